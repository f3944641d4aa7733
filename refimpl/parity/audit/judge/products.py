"""Matrix products: a product of K terms in FP32, in any order of summation.

Bound: gamma(K + 2) |A| |B|, gamma(n) = n u / (1 - n u), u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.5), one rounding for each of K products and K - 1 sums, and one to spare for a kernel that starts from 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from refimpl.parity.audit.values import Twin, Values

U = 2.0**-24


def gamma(n: float) -> float:
    """Return the largest relative error of n FP32 roundings in a row."""
    return n * U / (1 - n * U)


def mm(values: Values) -> Iterator[Twin]:
    """Judge `mm` and `bmm`."""
    a, b = values.inputs["self"].double(), values.inputs["mat2"].double()
    yield product(values.output, a, b)


def product(actual: Tensor, a: Tensor, b: Tensor) -> Twin:
    """Return the twin of a product of FP64 operands."""
    K = a.shape[-1]
    size = a.abs() @ b.abs()
    root = (a.square() @ b.square()).sqrt()
    typical, terms = U * root * math.sqrt(K), size / math.sqrt(max(K, 1))
    return Twin("out", actual, a @ b, gamma(K + 2) * size, typical, products=terms)


JUDGES = {"aten.mm": mm, "aten.bmm": mm}
