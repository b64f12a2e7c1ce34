"""Device models. They know offsets, not addresses: the bus places them. They never import hv.kvm."""
