"""The fixed devices of a PC that kernels expect: serial port, clock, keyboard controller, ACPI power management."""
