"""Loaders: recognise a kernel's format, write it and what it expects into guest memory, say where it starts."""
