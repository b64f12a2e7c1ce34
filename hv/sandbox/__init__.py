"""An OCI bundle inside a virtual machine of its own (docs/vm-runtime.md)."""
