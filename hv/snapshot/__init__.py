"""Snapshots: a running machine to a folder of files, and back, as often as wanted."""
