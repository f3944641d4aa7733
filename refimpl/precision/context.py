"""What an operation is handed during a run: `OpPrecision`, one row of the policy for one place in the model.

`Run` holds what all operations of a run share: the policy, the backend, monitors, and what quantization remembers.
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
from refimpl.numerics.quantization.registry import SCHEMES, quantize_operand, rotated_operand
from refimpl.numerics.quantization.scaling_state import ScalingState
from refimpl.precision.policy import SAME, WIDE, Policy

MAP_BLOCK = 1 << 18
"""Elements of a block in `OpPrecision.map` and `OpPrecision.by_example`.

Few enough to fit a cache, and many enough to be worth a thread: between two NumPy calls threads wait for Python's lock, some
10 us each time.
"""

Monitor = Callable[[str, Array, Array], None]
"""Callback at every rounding inside an operation: (site name, values before, values after)."""


Observer = Callable[[str, str, Array], Array]
"""Callback of the tape: ('activations' or 'activation_grads', place, array) -> the array that is used from there on."""


@dataclass
class Run:
    """What all operations of one run (one rank, one backend) share. There is no global state beside it.

    overrides: operations that replace those of the same name. scales: what quantization remembers between passes.
    Errors: UsageError for a policy that the backend cannot compute.
    """

    policy: Policy
    backend: Any
    monitor: Monitor | None = None
    observer: Observer | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    scales: ScalingState = field(default_factory=ScalingState)
    _precisions: dict[tuple[str, str], OpPrecision] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.policy.in_formats and not self.backend.on_host:
            raise UsageError(f"--backend {self.backend.name} knows formats and FP32 sums; policy {self.policy.name} has others")

    def frozen(self) -> Run:
        """Return a copy of the run for evaluation: its passes change nothing that the run remembers."""
        return replace(self, scales=self.scales.frozen(), _precisions={})

    def op(self, definition: Any) -> Any:
        """Return what runs for an operation: this run's override, else the backend's fast version, else the definition.

        With a monitor the definition runs: its roundings are the ones to look at, and a fast version may not report them.
        """
        fast = self.backend.ops if self.monitor is None else {}
        return self.overrides.get(definition.name) or fast.get(definition.name, definition)

    def precision(self, op: str, place: str) -> OpPrecision:
        """Return the precision for operation `op` at `place`, e.g. ('linear', 'h.0.mlp.c_fc')."""
        key = (op, place)
        if key not in self._precisions:
            self._precisions[key] = OpPrecision(self, op, place)
        return self._precisions[key]


class OpPrecision:
    """A row of the policy, bound to a run and to a place in the model: the argument `p` of every operation.

        p.cast(x, 'x')         cast operand x to the format that the row names for it
        p.widen(x)              widen to the format of the arithmetic: `acc`, or FP32 where `acc` has fewer bits
        p.matmul(a, b)           multiply matrices, with sums in `acc`
        p.round(z, 'y', x)       round a result
        p.round_grad(dz, 'x', fmt)   round the gradient of operand x, and store it in fmt
        p['dw']                the same for a part of the operation: the row `linear.dw`
    """

    def __init__(self, run: Run, op: str, place: str) -> None:
        self.run, self.op, self.place = run, op, place
        self.row = run.policy.row(op, place)
        self.math = self.row.acc if self.row.acc in WIDE else "fp32"
        self.sums_plainly = self.math == self.row.acc
        self.xp = run.backend.xp
        self._parts: dict[str, OpPrecision] = {}

    def __getitem__(self, part: str) -> OpPrecision:
        """Return the precision of one part: `p['softmax']` inside attention has the row `attention.softmax`."""
        if part not in self._parts:
            self._parts[part] = OpPrecision(self.run, f"{self.op}.{part}", self.place)
        return self._parts[part]

    def round_to(self, x: Array, fmt: str, site: str) -> Array:
        """Round `x` to `fmt`, and report it to the monitor as `place:op.site`, e.g. 'h.0.mlp.c_fc:linear.dw.dw'."""
        y = self.run.backend.convert(cast, x, fmt)
        if self.run.monitor is not None and not widens_to(format_of(x), fmt):
            self.run.monitor(f"{self.place}:{self.op}.{site}", x, y)
        return y

    def cast(self, x: Array, operand: str, axis: int | None = None) -> Any:
        """Cast an operand to the format that the row names for it; where that is a quantization scheme, quantize it.

        axis: the axis that the product sums over, for an operand that can be quantized.
        """
        fmt = self.row.input(operand)
        if fmt in SCHEMES:
            return self.quantize(x, fmt, operand, axis)
        return x if fmt == SAME else self.round_to(x, fmt, operand)

    def quantize(self, x: Array, scheme: str, operand: str, axis: int | None) -> QuantizedTensor:
        """Quantize an operand, and report its elements to the monitor: divided by their scales, before and after rounding."""
        if axis is None:
            raise TypeError(f"{self.op}.{operand}: only the factors of linear's products can be quantized, not to {scheme}")
        q = quantize_operand(self.run.scales, scheme, x, axis, f"{self.place}.{operand}")
        if self.run.monitor is not None:
            source = rotated_operand(self.run.scales, scheme, x, axis)
            self.run.monitor(f"{self.place}:{self.op}.{operand}", *self._rounding(source, q))
        return q

    def _rounding(self, x: Array, q: QuantizedTensor) -> tuple[Array, Array]:
        """Return the elements of x before and after rounding, both divided by their scales."""
        with self.xp.errstate(over="ignore", under="ignore", invalid="ignore"):
            scale = spread(q.scale_values(), q.block, q.shape) * (1 if q.tensor_scale is None else q.tensor_scale)
            before = widen(x, "fp32") / self.xp.where(scale == 0, 1, scale)  # a block too small for its scale: 0, kept as zeros
        return before, from_bits(q.codes * (scale != 0), q.fmt)

    def widen(self, x: Any) -> Any:
        """Widen an operand to the format of the arithmetic, exactly. A quantized one is returned unchanged, for `matmul`."""
        return x if isinstance(x, QuantizedTensor) else self.run.backend.convert(widen, x, self.math)

    def matmul(self, a: Any, b: Any) -> Array:
        """Multiply a (..., M, K) and b (..., K, N) -> (..., M, N), accumulated in `acc` and not rounded.

        Errors: TypeError where only one of them is quantized.
        """
        if isinstance(a, QuantizedTensor) != isinstance(b, QuantizedTensor):
            raise TypeError(f"{self.op}: a policy quantizes both factors of a product, or none")
        multiply = partial(self.run.backend.matmul, acc=self.math)
        if isinstance(a, QuantizedTensor):
            return product(a, b, self.row.acc, multiply)
        return multiply(a, b) if self.sums_plainly else matmul(a, b, self.row.acc, multiply)

    def matmul_then(self, finish: Callable[[Array], Array], fmt: str, a: Any, b: Any) -> Array:
        """Return `finish(matmul(a, b))`, for a `finish` that treats each row of the product by itself and rounds it to `fmt`.

        The thread that computes rows can then round them at once, and the product is never stored in FP32.
        """
        quantized = isinstance(a, QuantizedTensor) or isinstance(b, QuantizedTensor)
        if self.run.monitor is not None or quantized or not self.sums_plainly:
            return finish(self.matmul(a, b))
        return self.run.backend.matmul_then(a, b, self.row.acc, finish, fmt)

    def row_sum(self, x: Array) -> Array:
        """Sum each row, x (..., N) -> (..., 1), in the format of `x`, which is that of the arithmetic."""
        return self.run.backend.row_sum(x)

    def row_dot(self, x: Array, y: Array) -> Array:
        """Return the scalar product of each row, x and y (..., N) -> (..., 1), in their format, that of the arithmetic."""
        return self.run.backend.row_dot(x, y)

    def sum_by_index(self, rows: Array, index: Array, count: int) -> Array:
        """Sum the rows that have the same index: rows (n, C), index (n,) -> (count, C), in the format of `rows`."""
        return self.run.backend.sum_by_index(rows, index, count)

    def round(self, z: Array, site: str, *operands: Array) -> Array:
        """Round a result to the row's `out`; with SAME, to the widest format among `operands`, which are as they arrived."""
        return self.round_to(z, self.result_format(*(format_of(x) for x in operands)), site)

    def result_format(self, *operands: str) -> str:
        """Return the format of a result, given the formats in which the operands arrived."""
        return widest(*operands) if self.row.out == SAME else self.row.out

    def round_grad(self, dz: Array, operand: str, stored: str, rounded: str | None = None) -> Array:
        """Round the gradient of an operand to the format that the operand was cast to, then convert it to the operand's own.

        Thus a gradient has no more precision than the value that the operation read: under autocast a weight gradient is
        R16(dy^T x), widened to FP32.
        stored: the format of the operand before its cast. rounded: the format to round to, if not the row's.
        """
        seen = rounded or self.row.input(operand)
        dz = self.round_to(dz, stored if seen == SAME else seen, f"d{operand}")
        return widen(dz, stored) if widens_to(format_of(dz), stored) else self.round_to(dz, stored, f"d{operand}.stored")

    def map(self, formula: Callable[..., Array], finish: Callable[[Array], Array], *arrays: Array) -> Array:
        """Return `finish(formula(wide(a), wide(b), ...))` for an elementwise formula and arrays of one shape.

        `finish` rounds: `lambda z: p.round(z, 'y', x)`. On the host large arrays are processed in blocks that fit a cache, on
        several threads. Elementwise results do not depend on the blocks.
        """
        size = arrays[0].size
        in_one_piece = self.run.monitor is not None or size <= MAP_BLOCK or not self.run.backend.on_host
        if in_one_piece or not all(x.flags.c_contiguous for x in arrays):
            return finish(formula(*(self.widen(x) for x in arrays)))
        flat = [x.reshape(-1) for x in arrays]
        (result,) = self._joined(lambda *part: (finish(formula(*(self.widen(x) for x in part))),), flat, MAP_BLOCK, size)
        return result.reshape(arrays[0].shape)

    def by_example(self, formula: Callable[..., tuple[Array, ...]], size: int, *arrays: Array) -> tuple[Array, ...]:
        """Return `formula(*arrays)`, for arrays (B, ...) of B independent examples.

        size: elements of the largest array that the formula makes. On the host several threads each compute the examples of
        one block.
        """
        B = len(arrays[0]) if arrays[0].ndim > 1 else 1  # a vector is one example, such as a single row of a norm
        if self.run.monitor is not None or size <= MAP_BLOCK or B < 2 or not self.run.backend.on_host:
            return formula(*arrays)
        return tuple(self._joined(formula, arrays, max(1, MAP_BLOCK * B // size), size))

    def _joined(self, formula: Callable[..., tuple[Array, ...]], arrays: Sequence[Array], step: int, size: int) -> list[Array]:
        """Apply a formula to every `step` rows of the arrays, and join the results."""
        n, results, making = len(arrays[0]), list[Array](), threading.Lock()

        def compute(start: int) -> None:
            rows = slice(start, start + step)
            parts = formula(*(x[rows] for x in arrays))
            with making:  # the first part to finish shows the shapes and types of the results
                if not results:
                    results.extend(self.xp.empty((n, *part.shape[1:]), part.dtype) for part in parts)
            for result, part in zip(results, parts, strict=True):
                result[rows] = part

        self.run.backend.each(compute, range(0, n, step), size)
        return results

    def leaf_format(self, operand: str, x: Array) -> str | None:
        """Return the 16-bit format that a parameter is cast to once per step, for all its uses, or None for no such cast.

        This is autocast's cast of FP32 weights. Quantized weights are not shared: each product quantizes its own operands.
        """
        fmt = self["y"].row.input(operand)  # `linear.y` for linear; without parts, the operation's own row
        if fmt not in FORMATS or fmt == format_of(x) or FORMATS[fmt].bits != 16:
            return None
        return fmt

    def empty(self, shape: tuple[int, ...], fmt: str) -> Array:
        """Return an uninitialized array of the run's backend."""
        return self.xp.empty(shape, FORMATS[fmt].dtype)
