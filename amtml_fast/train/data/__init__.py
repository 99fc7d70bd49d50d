"""Data sets: readers of their files, and batches of images on the device."""
