"""Benchmarks: step times, PyTorch beside them, scaling over ranks, checks on a GPU."""
