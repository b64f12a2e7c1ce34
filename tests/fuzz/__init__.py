"""Fuzzing: a target for each parser of what guests and other programs send. `make fuzz`, or python -m fuzz --help."""
