"""Benchmarks of kvcompress: ``python -m benchmarks --help``."""
