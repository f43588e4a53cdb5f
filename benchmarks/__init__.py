"""Benchmarks of `gift_kernels` and `gift` against what users have: `python -m benchmarks -h`."""
