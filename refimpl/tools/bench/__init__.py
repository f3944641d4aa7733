"""Benchmarks: step times of refimpl and PyTorch, scaling over ranks, and checks on a GPU."""
