"""Measurements: each case beside its peers in the same run, interleaved, with medians and spread."""
