"""Images: names, the store, archives, registries, unpacked layers (docs/images.md)."""
