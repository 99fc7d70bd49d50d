"""Benchmarks of the operators, run by pytest-benchmark."""
