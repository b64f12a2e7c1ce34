"""What `pyhv run` makes, of either kind: containers and VMs under the same verbs (docs/run.md)."""
