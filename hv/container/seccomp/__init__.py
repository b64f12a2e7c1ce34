"""linux.seccomp of config.json: from profile to filter, and its listener."""
