"""Triton kernels, one operator a file, imported only when the triton backend is chosen."""
