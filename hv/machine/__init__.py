"""One virtual machine from configuration to exit: builder (the boot path), vCPU threads, I/O loop, console."""
