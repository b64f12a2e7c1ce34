"""The host's system calls. The only package that loads libc; raises KernelError, knows nothing of guests."""
