"""Guest memory: the address map, the host mappings behind it, and checked access. Knows nothing of KVM."""
