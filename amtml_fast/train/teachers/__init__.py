"""The frozen teachers, and the cache of their outputs on the disk."""
