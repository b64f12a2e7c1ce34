"""PCI: configuration spaces, the host bridge that leads to them, MSI-X (docs/pci.md)."""
