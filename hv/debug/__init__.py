"""Seeing inside a guest: registers, disassembly, traces, profiles, symbols."""
