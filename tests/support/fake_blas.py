"""A BLAS whose number of threads is only a number."""

from __future__ import annotations


class FakeBlas:
    """What threadpoolctl hands out."""

    def __init__(self, threads: int) -> None:
        self.num_threads = threads

    def set_num_threads(self, n: int) -> None:
        self.num_threads = n
