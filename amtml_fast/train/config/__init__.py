"""The configuration: its keys, how it is read from YAML, and what its values may be."""
