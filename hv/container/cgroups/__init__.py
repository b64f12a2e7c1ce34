"""Control groups of a container: v1, v2 and both at once behind one face (hv/container/cgroups/manager.py)."""
