"""Linux kernels and initramfs images for guests: built from source, fetched, cached. Runs programs of the host."""
