"""Kernels written by hand to learn what a printer should write. Nothing in the package imports this."""
