"""Embeddings, which move rows of a table, and their gradients, which add up the rows of each token. u = 2^-24.

A row of the table that k tokens read receives k - 1 additions, in any order: (k - 1) u sum|dy|, whatever k is, and 0 for k = 1.
With scale_grad_by_freq each term is multiplied by 1 / k first: 2 u more. In 16 bits kernels round after each addition: u is
that of the format, and a note says so.
Source: Jeannerod and Rump 2013, 'Improved error bounds for inner products in floating-point arithmetic' (no k is too large).

Of a large table some columns are judged, each for all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import U, is_16_bit
from refimpl.parity.audit.judge.products import sampled
from refimpl.parity.audit.judge.roundings import FLUSHED, smallest, unit
from refimpl.parity.audit.values import Twin, Values

EACH = "the kernel adds in the tensor's format, and rounds each time"
MOST = 2**22
"""Elements of a table's gradient that are judged, about."""


def looked_up(values: Values) -> Iterator[Twin]:
    """Judge `embedding`: the rows themselves, to the bit."""
    given = values.inputs
    yield Twin("out", values.output, given["weight"][given["indices"]].double(), 0.0, by="exact")


def gradient(values: Values) -> Iterator[Twin]:
    """Judge `embedding_dense_backward`."""
    given, whole = values.inputs, values.output
    rows, C = whole.shape
    columns = sampled(C, values.operation.index, max(1, MOST // max(rows, 1)))
    tokens, scaled = given["indices"].reshape(-1), bool(given["scale_grad_by_freq"])
    counted = tokens != given["padding_idx"]
    tokens, dy = tokens[counted], given["grad_output"].reshape(-1, C)[:, columns][counted].double()

    def added(terms: Tensor) -> Tensor:
        return torch.zeros(rows, terms.shape[-1], dtype=terms.dtype, device=terms.device).index_add_(0, tokens, terms)

    times = added(torch.ones_like(dy[:, :1]))
    dy = dy / times[tokens] if scaled else dy
    rounds = is_16_bit(whole)
    u, least = (unit(whole.dtype), smallest(whole.dtype)) if rounds else (U, FLUSHED)
    bound = ((times - 1).clamp_(min=0) + 2 * scaled) * u * added(dy.abs()) + scaled * times * least
    yield Twin("out", whole[:, columns], added(dy), bound, note=EACH if rounds else "")


JUDGES = {"aten.embedding": looked_up, "aten.embedding_dense_backward": gradient}
