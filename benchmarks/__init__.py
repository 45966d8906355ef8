"""Benchmarks of quantkernels against memory speed and its peers; run with ``python -m benchmarks``."""
