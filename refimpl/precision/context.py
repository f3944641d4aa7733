"""What an operation is handed during a run: `OpPrecision`, the formats of one operation at one place in the model.

`Run` holds what all operations of a run share: the policy, the backend, monitors, and what quantization remembers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import FORMATS, format_of, widens_to, widest
from refimpl.numerics.quantization.scaling_state import ScalingState
from refimpl.precision.policy import SAME, WIDE, Policy

Monitor = Callable[[str, Array, Array], None]
"""Callback at every rounding inside an operation: (site name, values before, values after)."""

Observer = Callable[[str, str, Array], Array]
"""Callback of the tape: ('activations' or 'activation_grads', place, array) -> the array that is used from there on."""


@dataclass
class Run:
    """What all operations of one run (one rank, one backend) share. There is no other global state.

    overrides: operations that replace those of the same name. scales: what quantization remembers between passes.
    checkpointing: one of those of `nn/checkpointing.py`. Errors: UsageError for a policy that the backend cannot compute.
    """

    policy: Policy
    backend: Any
    monitor: Monitor | None = None
    observer: Observer | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: str = "none"
    scales: ScalingState = field(default_factory=ScalingState)
    _precisions: dict[tuple[str, str], OpPrecision] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.policy.in_formats and not self.backend.on_host:
            raise UsageError(f"--backend {self.backend.name} cannot run policy {self.policy.name}: give --backend numpy")

    def frozen(self) -> Run:
        """Return a copy of the run for evaluation: its passes change nothing that the run remembers."""
        return replace(self, scales=self.scales.frozen(), _precisions={})

    def after_step(self) -> None:
        """End the passes of a step: delayed scaling makes its next scales. Does nothing if no tensor is quantized."""
        self.scales.after_pass()

    def version(self, definition: Any) -> Any:
        """Return what runs for an operation: the backend's fast version, or the definition where it has none.

        With a monitor the definition runs: its roundings are the ones to look at, and a fast version may not report them.
        """
        return definition if self.monitor is not None else self.backend.ops.get(definition.name, definition)

    def precision(self, op: str, place: str) -> OpPrecision:
        """Return the precision of operation `op` at `place`, e.g. ('linear', 'h.0.mlp.c_fc')."""
        key = (op, place)
        if key not in self._precisions:
            self._precisions[key] = OpPrecision(self, op, place)
        return self._precisions[key]


class OpPrecision:
    """The formats of one operation at one place in the model: the argument `p` of every operation.

        p.cast(x, 'x')              cast operand x to the format that the policy's row names for it
        p.widen(x)                  widen to the format of the arithmetic, `math`, exactly
        p.matmul(a, b)              multiply matrices: widen both, sum in `math`, do not round
        p.round(z, 'y', x)          round a result
        p.round_grad(dz, 'x', fmt)  round the gradient of operand x, and store it in fmt
        p['dw']                     the same for a part of the operation: the row `linear.dw`

    For a format that is not the row's there are round_to, store_grad and result_format, which the verbs above call.
    row: the row of the policy. inputs: operand -> the format that it names. place: the name in the model. xp: array library.
    math: the format of all arithmetic inside, the row's `acc`.
    """

    def __init__(self, run: Run, op: str, place: str) -> None:
        self.run, self.op, self.place = run, op, place
        self.row = run.policy.row(op, place)
        inputs = self.row.inputs
        self.inputs = defaultdict(lambda: inputs) if isinstance(inputs, str) else defaultdict(lambda: SAME, inputs)
        self.math = self.row.acc if self.row.acc in WIDE else "fp32"  # products with an accumulator hand over FP32
        self.xp = run.backend.xp
        self._parts: dict[str, OpPrecision] = {}

    def __getitem__(self, part: str) -> OpPrecision:
        """Return the precision of one part: `p['softmax']` inside attention has the row `attention.softmax`."""
        if part not in self._parts:
            self._parts[part] = OpPrecision(self.run, f"{self.op}.{part}", self.place)
        return self._parts[part]

    def cast(self, x: Array, operand: str) -> Array:
        """Cast an operand to the format that the row names for it; with SAME, leave it as it is."""
        fmt = self.inputs[operand]
        return x if fmt in (SAME, format_of(x)) else self.round_to(x, fmt, operand)

    def widen(self, x: Array) -> Array:
        """Widen an operand to the format of the arithmetic, exactly."""
        return self.run.backend.widen(x, self.math)

    def matmul(self, a: Array, b: Array) -> Array:
        """Multiply a (..., M, K) and b (..., K, N) -> (..., M, N) in the format of the arithmetic, not rounded."""
        return self.run.backend.matmul(a, b, self.math)

    def round(self, z: Array, site: str, *operands: Array) -> Array:
        """Round a result to the row's `out`; with SAME, to the widest format among `operands`, which are as they arrived."""
        return self.round_to(z, self.row.out if self.row.out != SAME else self.result_format(*map(format_of, operands)), site)

    def round_grad(self, dz: Array, operand: str, stored: str) -> Array:
        """Round the gradient of an operand to the format that the operand was cast to, then convert it to the operand's own.

        Thus a gradient has no more precision than the value that the operation read: where autocast casts an FP32 x to 16 bits,
        dx is rounded to 16 bits and then widened to FP32.
        stored: the format of the operand before its cast.
        """
        fmt = self.inputs[operand]
        return self.store_grad(self.round_to(dz, stored if fmt == SAME else fmt, f"d{operand}"), operand, stored)

    def store_grad(self, dz: Array, operand: str, stored: str) -> Array:
        """Convert a rounded gradient to the format of its operand: exactly, or rounded again where that holds fewer values."""
        if widens_to(format_of(dz), stored):
            return self.run.backend.widen(dz, stored)
        return self.round_to(dz, stored, f"d{operand}.stored")

    def round_to(self, x: Array, fmt: str, site: str) -> Array:
        """Round `x` to `fmt`, and report it to the monitor as `place:op.site`, e.g. 'h.0.mlp.c_fc:linear.dw.dw'."""
        y = self.run.backend.cast(x, fmt)
        if self.run.monitor is not None and not widens_to(format_of(x), fmt):
            self.run.monitor(f"{self.place}:{self.op}.{site}", x, y)
        return y

    def result_format(self, *operands: str) -> str:
        """Return the format of a result, given the formats in which the operands arrived."""
        return widest(*operands) if self.row.out == SAME else self.row.out

    def empty(self, shape: tuple[int, ...], fmt: str) -> Array:
        """Return an uninitialized array of the run's backend."""
        return self.xp.empty(shape, FORMATS[fmt].dtype)
