"""Precision is data: a policy is a table that says, for every operation, which formats it works in.

    row = Precision(inputs, acc, out)
      inputs   the format that each operand is cast to before the operation reads it; in `linear` also how it is quantized
      acc      the format of all arithmetic inside, sums included: fp32 or fp64; a product may have an accumulator of fewer bits
      out      the format of the one rounding at the end

No operation knows what recipe it runs in: it casts in, computes in `acc`, rounds out, and `Bound` looks the formats up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from refimpl.errors import UsageError
from refimpl.numerics.accumulators import matmul
from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of, widens_to, widest
from refimpl.numerics.quantization.products import product
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor, spread
from refimpl.numerics.quantization.registry import SCHEMES, ScalingState

SAME = "same"
"""As an input: the operand stays in the format it arrives in. As `out`: the widest format among the operands."""

EVERY_OTHER = "*"
"""The row of all operations that a policy does not list."""

PRODUCTS = ("linear.y", "linear.dx", "linear.dw", "matmul")
"""The rows that may name an accumulator of fewer bits than FP32: what they sum, `accumulate.matmul` sums."""


WIDE = ("fp32", "fp64")
"""The formats of arithmetic."""


@dataclass(frozen=True)
class Precision:
    """One row of a policy. `inputs` is one format for all operands, or a table operand -> format.

    >>> Precision("fp16", "fp32", "fp16").input("x")
    'fp16'
    """

    inputs: str | Mapping[str, str]
    acc: str
    out: str

    def input(self, operand: str) -> str:
        """The format that the named operand is cast to; operands that a table leaves out stay as they are."""
        return self.inputs if isinstance(self.inputs, str) else self.inputs.get(operand, SAME)

    @property
    def quantizes(self) -> bool:
        """Whether an operand is quantized."""
        return any(name in SCHEMES for name in ([self.inputs] if isinstance(self.inputs, str) else self.inputs.values()))


@dataclass(frozen=True)
class Policy:
    """A named table of rows. A key with a dot refines the key before it: `linear.dw` if listed, else `linear`, else `*`.

    A matrix product has three rows, since forward and the two gradients may differ: `linear.y`, `linear.dx`,
    `linear.dw`, and `linear.db` for the bias; attention has `attention.scores`, `attention.scale`, `attention.softmax`,
    `attention.values`. A place before a colon makes a row of one layer: `lm_head:linear`.

    fused_attention: whether attention runs as `ops.fused_attention` computes it, not operation by operation.
    """

    name: str
    rows: Mapping[str, Precision]
    fused_attention: bool = False

    def __post_init__(self) -> None:
        """Errors: ValueError for an accumulator that no code would heed: other sums than those of products are fp32 or fp64."""
        for key, row in self.rows.items():
            if row.acc not in WIDE and key.rpartition(":")[2] not in PRODUCTS:
                products = ", ".join(PRODUCTS)
                raise ValueError(f"policy {self.name}: row {key!r} sums in {row.acc}, which only products can: {products}")

    def row(self, key: str, place: str = "") -> Precision:
        """The most specific row for an operation or a part of one; any row of its place comes before those of all places."""
        for prefix in (f"{place}:", ""):
            refined = key
            while refined:
                if prefix + refined in self.rows:
                    return self.rows[prefix + refined]
                refined = refined.rpartition(".")[0]
        return self.rows[EVERY_OTHER]

    @property
    def in_formats(self) -> bool:
        """Whether all operands are cast to formats and all sums are formed in one: nothing is quantized."""
        return not any(row.quantizes or row.acc not in WIDE for row in self.rows.values())


MAP_BLOCK = 1 << 18
"""Elements of a block in `Bound.map` and `Bound.by_example`.

Few enough for a cache; but many, since two threads take turns at Python's lock between any two NumPy calls, and the wait for
it costs some 10 us.
"""

Monitor = Callable[[str, Array, Array], None]
"""Called at every rounding inside an operation, when a run has one: (site name, values before, values after)."""

Observer = Callable[[str, str, Array], Array]
"""Called by the tape, when a run has one: ('activations' or 'activation_grads', place, array) -> the array to go on with."""


@dataclass
class Run:
    """What one run (one rank, one backend) shares among all its operations. There is no global state beside it.

    overrides: operations that run in the place of those of the same name. scales: what quantization remembers.
    """

    policy: Policy
    backend: Any
    monitor: Monitor | None = None
    observer: Observer | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    scales: ScalingState = field(default_factory=ScalingState)
    _bound: dict[tuple[str, str], Bound] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.policy.in_formats and not self.backend.on_host:
            raise UsageError(f"--backend {self.backend.name} knows formats and FP32 sums; policy {self.policy.name} has others")

    def frozen(self) -> Run:
        """The run as it is now, for passes that are no training: they change nothing that the run remembers."""
        return replace(self, scales=self.scales.frozen(), _bound={})

    def op(self, definition: Any) -> Any:
        """What runs where a model says that operation: this run's override, else the backend's fast twin, else itself.

        Who watches roundings watches those of the definition.
        """
        twins = self.backend.ops if self.monitor is None else {}
        return self.overrides.get(definition.name) or twins.get(definition.name, definition)

    def bind(self, op: str, place: str) -> Bound:
        """The precision that operation `op` is handed when it runs at `place`, e.g. ('linear', 'h.0.mlp.c_fc')."""
        key = (op, place)
        if key not in self._bound:
            self._bound[key] = Bound(self, op, place)
        return self._bound[key]


class Bound:
    """A policy row bound to a run and to a place in the model: the `p` of every operation.

    `p.cast(x, 'x')` casts an operand in; `p.wide(x)` takes it to the format of the arithmetic (that of `acc`, and FP32 where a
    product has an accumulator of its own, whose sums are handed over in FP32); `p.out(z, 'y', x)` rounds a result; `p.grad(dz,
    'x', fmt)` rounds the gradient of operand x and stores it in fmt. `p['dw']` is the row of a part.
    """

    def __init__(self, run: Run, op: str, place: str) -> None:
        self.run, self.op, self.place = run, op, place
        self.row = run.policy.row(op, place)
        self.math = self.row.acc if self.row.acc in WIDE else "fp32"
        self.sums_plainly = self.math == self.row.acc
        self.xp = run.backend.xp
        self._parts: dict[str, Bound] = {}

    def __getitem__(self, part: str) -> Bound:
        """The row of one part: `p['softmax']` inside attention is the row `attention.softmax`."""
        if part not in self._parts:
            self._parts[part] = Bound(self.run, f"{self.op}.{part}", self.place)
        return self._parts[part]

    def round(self, x: Array, fmt: str, site: str) -> Array:
        """Round `x` to `fmt` at a named site; the name is `place:op.site`, e.g. 'h.0.mlp.c_fc:linear.dw.dw'."""
        y = self.run.backend.convert(cast, x, fmt)
        if self.run.monitor is not None and not widens_to(format_of(x), fmt):
            self.run.monitor(f"{self.place}:{self.op}.{site}", x, y)
        return y

    def cast(self, x: Array, operand: str, axis: int | None = None) -> Any:
        """Cast an operand to the format that the row names for it; quantize it, if that is a scheme.

        axis: the one that the product sums over, for an operand that can be quantized.
        """
        fmt = self.row.input(operand)
        if fmt in SCHEMES:
            return self.quantize(x, fmt, operand, axis)
        return x if fmt == SAME else self.round(x, fmt, operand)

    def quantize(self, x: Array, scheme: str, operand: str, axis: int | None) -> QuantizedTensor:
        """Quantize an operand. A monitor is told of its elements before and after: scaled, and rounded to their format."""
        if axis is None:
            raise TypeError(f"{self.op}.{operand}: only the factors of linear's products can be quantized, not to {scheme}")
        q = self.run.scales.quantize(scheme, x, axis, f"{self.place}.{operand}")
        if self.run.monitor is not None:
            source = self.run.scales.source(scheme, x, axis)
            self.run.monitor(f"{self.place}:{self.op}.{operand}", *self._rounding(source, q))
        return q

    def _rounding(self, x: Array, q: QuantizedTensor) -> tuple[Array, Array]:
        """What the elements of x were rounded from and to, both divided by their scales.

        A block too small for its scale has the scale zero, and is zero: it is not divided.
        """
        with self.xp.errstate(over="ignore", under="ignore", invalid="ignore"):
            scale = spread(q.scale_values(), q.block, q.shape) * (1 if q.tensor_scale is None else q.tensor_scale)
            before = widen(x, "fp32") / self.xp.where(scale == 0, 1, scale)
        return before, from_bits(q.codes * (scale != 0), q.fmt)

    def wide(self, x: Any) -> Any:
        """The operand in the format of the arithmetic. Exact. What is quantized stays so: `gemm` multiplies codes."""
        return x if isinstance(x, QuantizedTensor) else self.run.backend.convert(widen, x, self.math)

    def gemm(self, a: Any, b: Any) -> Array:
        """Matrix product of the last two axes, a (..., M, K) @ b (..., K, N) -> (..., M, N), accumulated in `acc`."""
        if isinstance(a, QuantizedTensor) != isinstance(b, QuantizedTensor):
            raise TypeError(f"{self.op}: a policy quantizes both factors of a product, or none")
        multiply = partial(self.run.backend.gemm, acc=self.math)
        if isinstance(a, QuantizedTensor):
            return product(a, b, self.row.acc, multiply)
        return multiply(a, b) if self.sums_plainly else matmul(a, b, self.row.acc, multiply)

    def gemm_then(self, finish: Callable[[Array], Array], fmt: str, a: Any, b: Any) -> Array:
        """`finish(gemm(a, b))`, for a `finish` that treats each row of a product by itself and rounds it to `fmt`.

        So that a row can be rounded as soon as it is there, by the thread that computed it, and no product is stored wide.
        """
        quantized = isinstance(a, QuantizedTensor) or isinstance(b, QuantizedTensor)
        if self.run.monitor is not None or quantized or not self.sums_plainly:
            return finish(self.gemm(a, b))
        return self.run.backend.gemm_then(a, b, self.row.acc, finish, fmt)

    def row_sum(self, x: Array) -> Array:
        """The sum of each row, x (..., N) -> (..., 1), in the format of `x`: the accumulation format."""
        return self.run.backend.row_sum(x)

    def row_dot(self, x: Array, y: Array) -> Array:
        """The scalar product of each row of x and y (..., N) -> (..., 1), in the accumulation format."""
        return self.run.backend.row_dot(x, y)

    def sum_by_index(self, rows: Array, index: Array, count: int) -> Array:
        """rows (n, C), index (n,) -> (count, C): place r has the sum of the rows whose index is r, all in `acc`."""
        return self.run.backend.sum_by_index(rows, index, count)

    def out(self, z: Array, site: str, *operands: Array) -> Array:
        """Round a result once, to the row's `out`; with SAME, to the widest format of the operands as they came in."""
        return self.round(z, self.out_format(*(format_of(x) for x in operands)), site)

    def out_format(self, *operands: str) -> str:
        """The format of a result, from those of the operands as they came in."""
        return widest(*operands) if self.row.out == SAME else self.row.out

    def grad(self, dz: Array, operand: str, stored: str, rounded: str | None = None) -> Array:
        """Round the gradient of an operand to the format that the operand was cast to, then store it in its own.

        So a gradient has no more precision than the value that the operation saw: under autocast a weight gradient is
        fp32(R16(dy^T x)). `stored` is the format of the tensor before the cast; `rounded` overrides the row's format.
        """
        seen = rounded or self.row.input(operand)
        dz = self.round(dz, stored if seen == SAME else seen, f"d{operand}")
        return widen(dz, stored) if widens_to(format_of(dz), stored) else self.round(dz, stored, f"d{operand}.stored")

    def map(self, formula: Callable[..., Array], finish: Callable[[Array], Array], *arrays: Array) -> Array:
        """`finish(formula(wide(a), wide(b), ...))` for an elementwise formula and arrays of one shape.

        `finish` is the rounding: `lambda z: p.out(z, 'y', x)`. On the host the work goes block by block, so that what a
        formula leaves between its operations stays in the cache; elementwise results do not depend on that.
        """
        size = arrays[0].size
        in_one_piece = self.run.monitor is not None or size <= MAP_BLOCK or not self.run.backend.on_host
        if in_one_piece or not all(x.flags.c_contiguous for x in arrays):
            return finish(formula(*(self.wide(x) for x in arrays)))
        flat = [x.reshape(-1) for x in arrays]
        (result,) = self._joined(lambda *part: (finish(formula(*(self.wide(x) for x in part))),), flat, MAP_BLOCK, size)
        return result.reshape(arrays[0].shape)

    def by_example(self, formula: Callable[..., tuple[Array, ...]], size: int, *arrays: Array) -> tuple[Array, ...]:
        """`formula(*arrays)`, for arrays (B, ...) whose B examples do not depend on one another, nor do those of its results.

        size: elements of the largest array that the formula makes. On the host so many examples as fill a block go at a
        time, and several threads take them.
        """
        B = len(arrays[0]) if arrays[0].ndim > 1 else 1  # a vector is one example, such as a single row of a norm
        if self.run.monitor is not None or size <= MAP_BLOCK or B < 2 or not self.run.backend.on_host:
            return formula(*arrays)
        return tuple(self._joined(formula, arrays, max(1, MAP_BLOCK * B // size), size))

    def _joined(self, formula: Callable[..., tuple[Array, ...]], arrays: Sequence[Array], step: int, size: int) -> list[Array]:
        """The results of a formula on every `step` rows of the arrays, end to end."""
        n, results, making = len(arrays[0]), list[Array](), threading.Lock()

        def compute(start: int) -> None:
            rows = slice(start, start + step)
            parts = formula(*(x[rows] for x in arrays))
            with making:  # whoever comes first knows what the results look like
                if not results:
                    results.extend(self.xp.empty((n, *part.shape[1:]), part.dtype) for part in parts)
            for result, part in zip(results, parts, strict=True):
                result[rows] = part

        self.run.backend.each(compute, range(0, n, step), size)
        return results

    def leaf_format(self, operand: str, x: Array) -> str | None:
        """The 16-bit format that a parameter is cast to once a step and shared among its uses, or None.

        This is autocast's cast of FP32 weights. 8-bit formats are not shared: each GEMM quantizes its own way.
        """
        fmt = self["y"].row.input(operand)  # `linear.y` for linear; without parts, the operation's own row
        if fmt not in FORMATS or fmt == format_of(x) or FORMATS[fmt].bits != 16:
            return None
        return fmt

    def empty(self, shape: tuple[int, ...], fmt: str) -> Array:
        """Uninitialized memory of the run's backend."""
        return self.xp.empty(shape, FORMATS[fmt].dtype)
