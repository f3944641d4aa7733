"""Precision is data: a policy is a table that says, for every operation, which formats it works in.

    row = Precision(inputs, acc, out)
      inputs   the format that each operand is cast to before the operation reads it; in `linear` also how it is quantized
      acc      the format of all arithmetic inside, sums included: fp32 or fp64; a product may have an accumulator of fewer bits
      out      the format of the one rounding at the end

No operation knows which recipe runs: it casts its operands, computes in `acc` and rounds the result, and
`context.OpPrecision` looks the formats up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refimpl.numerics.quantization.registry import SCHEMES

SAME = "same"
"""As an input: leave the operand in the format it arrives in. As `out`: the widest format among the operands."""

EVERY_OTHER = "*"
"""The key of the row for all operations that a policy does not list."""

PRODUCTS = ("linear.y", "linear.dx", "linear.dw")
"""The rows that may quantize operands, or name an accumulator of fewer bits than FP32. `quantized_linear` computes them."""

WIDE_OPS = ("cross_entropy", "attention.wide_softmax")  # FP32 in every model: the loss, and the softmax of Llama
WIDE = ("fp32", "fp64")
"""The formats that arithmetic is done in."""


@dataclass(frozen=True)
class Precision:
    """One row of a policy. `inputs` is one format for all operands, or a table: operand -> format.

    >>> Precision("fp16", "fp32", "fp16").input("x")
    'fp16'
    """

    inputs: str | Mapping[str, str]
    acc: str
    out: str

    def input(self, operand: str) -> str:
        """Return the format that the named operand is cast to; SAME for an operand that the table does not list."""
        return self.inputs if isinstance(self.inputs, str) else self.inputs.get(operand, SAME)

    @property
    def quantizes(self) -> bool:
        """Return whether any operand is quantized."""
        return any(name in SCHEMES for name in ([self.inputs] if isinstance(self.inputs, str) else self.inputs.values()))

    @property
    def in_formats(self) -> bool:
        """Return whether no operand is quantized and sums are formed in FP32 or FP64."""
        return self.acc in WIDE and not self.quantizes


@dataclass(frozen=True)
class Policy:
    """A named table of rows. A key with a dot is more specific: `linear.dw` is used if listed, else `linear`, else `*`.

    A linear layer has three products, `linear.y`, `linear.dx` and `linear.dw`, and `linear.db` for the bias; attention has
    `attention.scores`, `attention.scale`, `attention.softmax` and `attention.values`, and for the softmax of grouped attention
    `attention.wide_softmax`. A place before a colon makes a row for one layer: `lm_head:linear`.

    fused_attention: whether attention runs as `nn/fused_attention.py` computes it, not operation by operation.
    Errors: ValueError for a table without `*`, an unknown operation, format, scheme or accumulator, and for a scheme or an
    accumulator of fewer bits in a row that is not one of PRODUCTS: `policy_checks.py`.
    """

    name: str
    rows: Mapping[str, Precision]
    fused_attention: bool = False

    def __post_init__(self) -> None:
        from refimpl.precision.policy_checks import check_rows  # here, since the checks need this module's names

        check_rows(self.name, self.rows)

    def row(self, key: str, place: str = "") -> Precision:
        """Return the most specific row for an operation or a part of one. Rows of its place come before those of all places."""
        return self.rows[self.row_key(key, place)]

    def row_key(self, key: str, place: str = "") -> str:
        """Return the key of that row.

        For `linear.y` at `lm_head` it is the first that the table has of lm_head:linear.y, lm_head:linear, linear.y, linear, *.
        """
        for prefix in (f"{place}:", ""):
            refined = key
            while refined:
                if prefix + refined in self.rows:
                    return prefix + refined
                refined = refined.rpartition(".")[0]
        return EVERY_OTHER

    def operation(self, name: str, place: str) -> str:
        """Return the name of the operation that computes `name` at a place: itself, or one of `nn.ops.SELECTED`."""
        if name == "linear" and not all(self.row(product, place).in_formats for product in PRODUCTS):
            return "quantized_linear"
        return f"fused_{name}" if self.fused_attention and name in ("attention", "grouped_attention") else name

    @property
    def in_formats(self) -> bool:
        """Return whether nothing is quantized and all sums are formed in FP32 or FP64."""
        return all(row.in_formats for row in self.rows.values())


def uniform(fmt: str, acc: str) -> Policy:
    """Return a policy with every tensor in one format and sums in `acc`; WIDE_OPS are computed and stored in `acc`."""
    return Policy(fmt, {EVERY_OTHER: Precision(fmt, acc, fmt), **dict.fromkeys(WIDE_OPS, Precision(acc, acc, acc))})


def autocast_cuda(low: str) -> Policy:
    """Return torch.autocast('cuda') as a policy: products in `low`; norms, softmax and losses in FP32; others unchanged.

    PyTorch: aten/src/ATen/autocast_mode.h.
    """
    product, high = Precision(low, "fp32", low), Precision("fp32", "fp32", "fp32")
    return Policy(
        f"autocast-cuda-{low}",
        {
            "linear": product,
            "matmul": product,
            "attention.scores": product,
            "attention.values": product,
            **dict.fromkeys(("attention.softmax", "attention.wide_softmax", "softmax"), high),
            **dict.fromkeys(("layernorm", "rmsnorm", "cross_entropy"), high),
            "gelu_new": Precision(SAME, "fp32", "fp32"),  # its x^3 is in the list for FP32, and FP32 spreads to the result
            EVERY_OTHER: Precision(SAME, "fp32", SAME),
        },
    )


def autocast_cpu(low: str) -> Policy:
    """Return torch.autocast('cpu') as a policy: as on CUDA, but softmax and norms are unchanged instead of FP32.

    PyTorch: aten/src/ATen/autocast_mode.h.
    """
    unchanged = ("attention.softmax", "softmax", "layernorm", "rmsnorm", "gelu_new")
    rows = {key: row for key, row in autocast_cuda(low).rows.items() if key not in unchanged}
    return Policy(f"autocast-cpu-{low}", rows)
