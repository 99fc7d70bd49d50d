"""Training methods: one file each, and one line of METHODS in registry.py."""
