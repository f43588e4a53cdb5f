"""Benchmarks of `gift_kernels` and `gift` against alternatives: `python -m benchmarks -h`."""
