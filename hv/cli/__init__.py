"""The command line: a fast path for `pyhv boot`, click for everything else."""
