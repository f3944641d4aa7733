"""The operations of an audited step as rows of a policy: what formats they read, how they summed, and what format they gave.

A row says what `precision.policy.Precision` says, as it was observed. Casts are no rows of their own but belong to the
operation that reads them, as in refimpl's table: an operand has the format that it arrived in, and the narrowest one that it
was rounded to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch

from refimpl.numerics.formats import FORMATS, widens_to
from refimpl.parity.audit.judge.casts import MOVES
from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.report.operation_table import short
from refimpl.parity.audit.rules.flow import COPIES, Flow, is_any, results_of
from refimpl.parity.audit.step import Step
from refimpl.parity.audit.verdict import LEVELS, Verdict

PRODUCTS = {
    "aten.mm": ("self", "mat2"), "aten.bmm": ("self", "mat2"), "aten.addmm": ("mat1", "mat2"),
    "aten.baddbmm": ("batch1", "batch2"), "aten.mv": ("self", "vec"), "aten.addmv": ("mat", "vec"),
}  # fmt: skip
"""Matrix products, with the names of their factors."""
FUSED_ATTENTION = "aten._scaled_dot_product_"
DIRECT = {
    "aten.native_layer_norm": "layernorm", "aten._fused_rms_norm": "rmsnorm", "aten.embedding": "embedding",
    "aten.relu": "relu", "aten.silu": "silu", "aten._softmax": "softmax", "aten._safe_softmax": "softmax",
    "aten._log_softmax": "cross_entropy", "aten.nll_loss_forward": "cross_entropy", "aten.nll_loss2d_forward": "cross_entropy",
}  # fmt: skip
"""Operations that are one of refimpl's by themselves."""
LOSSES = ("aten.nll_loss_forward", "aten.nll_loss2d_forward")
LIKE = {
    "aten.convolution": "linear.y", "aten.convolution_backward": "linear.dw", "aten.mse_loss": "cross_entropy",
    "aten.smooth_l1_loss": "cross_entropy", "aten.huber_loss": "cross_entropy",
    "aten.binary_cross_entropy_with_logits": "cross_entropy", "aten.binary_cross_entropy": "cross_entropy",
}  # fmt: skip
"""Operations outside refimpl's table, and the row whose formats PyTorch's autocast gives them."""
CASTS = ("aten._to_copy",)
BETWEEN = (
    *COPIES, *CASTS, "aten.mul", "aten.div", "aten.add", "aten.sub", "aten.masked_fill", "aten.where", "aten.native_dropout",
)  # fmt: skip
"""What may stand between the products and the softmax of attention."""
FAR = 8
"""How many operations these may be."""
FEW, MANY = 0.75, 0.9
"""Shares of correctly rounded results: sums in FP32 leave more than MANY, sums in 16 bits, whole or in parts, less than FEW."""
SMALL = 50
"""So few results tell nothing of the sums."""
BITS = ((18.0, "fp32"), (9.6, "tf32"), (0.0, "bf16"))
"""(effective bits of FP32 products, the format that their factors were read in): 21 to 22, 11.1, 8.1."""
UNKNOWN, LOW = "unknown", "16 bits"


class Operand(NamedTuple):
    """The format in which an operand was made, the narrowest one that casts have rounded it to since, and its format now."""

    arrived: str
    rounded: str
    read: str


@dataclass(frozen=True, slots=True)
class LoopRow:
    """An operation as a row. key: of refimpl's table, or the name of an operation outside it, in parentheses.

    like: the key of the table's row that applies, '' if none does. place: the module. sums: 'fp32', 'tf32' or 'bf16' (FP32
    products whose factors are read so), '16 bits', or 'unknown'. output: the format of the result. rounds_to: the format to
    which all that read it cast it down first, '' if they do not: the result is as good as in that format.
    """

    key: str
    like: str
    place: str
    inputs: tuple[Operand, ...]
    sums: str
    output: str
    rounds_to: str = ""

    @property
    def formats(self) -> str:
        """Return the formats of the operands as text, each once."""
        return ", ".join(dict.fromkeys(operand.rounded for operand in self.inputs)) or "-"


def rows_of(step: Step) -> list[LoopRow]:
    """Return the rows of a step's forward and backward pass, in order."""
    return list(_Rows(step.operations).rows())


def folded(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Return names with repeated layers as '*': 'layers.*.norm' for all of layers.0.norm to layers.5.norm.

    among: all names that there are. Where only some of those that differ in a number are meant, these are listed:
    'layers.{0,3}.norm'.
    """
    chosen, everywhere = list(dict.fromkeys(names)), list(dict.fromkeys(among))
    groups: dict[str, list[str]] = {}
    for name in chosen:
        groups.setdefault(_pattern(name), []).append(name)
    result = []
    for pattern, members in groups.items():
        all_of = [name for name in everywhere if _pattern(name) == pattern]
        if len(members) == 1:
            result.append(members[0])
        elif len(members) >= len(all_of):
            result.append(_starred(members))
        else:
            result.append(_starred(members, listed=True))
    return result


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _starred(names: Sequence[str], listed: bool = False) -> str:
    """Return names of one pattern as one: numbers that differ become '*', or are listed."""
    parts = []
    for column in zip(*(name.split(".") for name in names), strict=True):
        values = list(dict.fromkeys(column))
        parts.append(values[0] if len(values) == 1 else "{" + ",".join(values) + "}" if listed else "*")
    return ".".join(parts)


class _Rows:
    """Reads the rows off a step's operations."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = [o for o in operations if o.phase in ("forward", "other", "backward")]
        self.flow = Flow(self.operations)
        self.casts: dict[int, Operand] = {}  # by storage
        self.weights: set[int] = set()  # storages of parameters in another format
        self._find_weights()
        self.linear: set[int] = set()  # sequence numbers of forward products with weights
        self.inside: set[int] = set()  # operations that are a part of another row
        self.norms: dict[int, tuple[Operation, Operation, list[Operation]]] = {}
        self.parts = self._attention() | self._norms()

    def rows(self) -> Iterator[LoopRow]:
        for operation in self.operations:
            row = None if operation.recomputed else self._row(operation)
            if row is not None:
                yield row
            self._follow(operation)

    # ------------------------------------------------------------------------------------------------- operands

    def _find_weights(self) -> None:
        for operation in self.operations:
            if is_any(operation, CASTS) and any(map(self._is_weight, tensors_in(operation.arguments))):
                self.weights |= {t.storage for t in tensors_in(operation.outputs) if t.storage is not None}

    def _follow(self, operation: Operation) -> None:
        """Note what casts and copies have made of which tensor."""
        for name in operation.written:
            for tensor in tensors_in(operation.arguments[name]):
                self.casts.pop(tensor.storage or -1, None)
        if not is_any(operation, (*CASTS, *COPIES)) or operation.written:
            return
        source = next(tensors_in(operation.arguments), None)
        if source is None or not _is_float(source):
            return
        for made in tensors_in(operation.outputs):
            if made.storage is None or made.storage == source.storage or not _is_float(made):
                continue
            before, target = self._operand(source), short(made.dtype)
            self.casts[made.storage] = Operand(before.arrived, _narrower(before.rounded, target), target)

    def _operand(self, tensor: TensorFacts) -> Operand:
        known = self.casts.get(tensor.storage) if tensor.storage is not None else None
        return known or _as_read(tensor)

    def _operands(self, operation: Operation, names: Iterable[str] = ()) -> tuple[Operand, ...]:
        chosen = [operation.arguments.get(name) for name in names] if names else list(operation.arguments.values())
        return tuple(self._operand(t) for t in tensors_in(tuple(chosen)) if _is_float(t) and (t.shape or names))

    def _is_weight(self, tensor: TensorFacts) -> bool:
        return tensor.storage in self.weights or (tensor.role is not None and tensor.role.kind == "parameter")

    # ------------------------------------------------------------------------------------------------- rows

    def _row(self, operation: Operation) -> LoopRow | None:
        base = _base(operation)
        if not any(_is_float(t) for t in results_of(operation)):
            return None
        if operation.phase == "backward":
            return self._backward_row(operation, base)
        if operation.index in self.parts:
            return self._part(operation, self.parts[operation.index])
        if operation.index in self.inside or (base == "aten.add" and self._adds_bias(operation)):
            return None
        if base in PRODUCTS:
            key = "linear.y" if self._reads_weight(operation, base) else "matmul"
            if key == "linear.y" and operation.sequence is not None:
                self.linear.add(operation.sequence)
            return self._made(operation, key, key, PRODUCTS[base])
        if base.startswith(FUSED_ATTENTION):
            return self._made(operation, "attention", "attention.values", ("query", "key", "value"))
        if base in LOSSES and is_any(self.flow.source(operation, "self") or operation, ("aten._log_softmax",)):
            return None  # the rest of what _log_softmax began
        if base in DIRECT:
            return self._made(operation, DIRECT[base], DIRECT[base])
        if base == "aten.gelu":
            key = "gelu_tanh" if operation.arguments.get("approximate") == "tanh" else "gelu_erf"
            return self._made(operation, key, key)
        if base == "aten.add" and len(self._operands(operation)) == 2:
            return self._made(operation, "add", "add")
        if base in CASTS:
            return self._cast(operation)
        outside = _computes(operation, base) and bool(self._operands(operation))
        return self._made(operation, f"({base.removeprefix('aten.')})", LIKE.get(base, "")) if outside else None

    def _backward_row(self, operation: Operation, base: str) -> LoopRow | None:
        if base in PRODUCTS and operation.sequence in self.linear:
            key = "linear.dx" if self._reads_weight(operation, base) else "linear.dw"
            return self._made(operation, key, key, PRODUCTS[base])
        if base == "aten.sum" and operation.sequence in self.linear:
            return self._made(operation, "linear.db", "linear.db")
        if base == "aten.add" and operation.accumulates is None and len(self._operands(operation)) == 2:
            # Gradients are rounded as the values were: their own formats are what is added.
            inputs = tuple(_as_read(t) for t in tensors_in(operation.arguments))
            # In a norm of several operations it is x of these that has two uses, in the format of their arithmetic.
            like = "" if operation.module in self.norm_modules else "fan_in"
            return replace(self._made(operation, "fan_in", like), inputs=inputs)
        if base in LIKE:
            return self._made(operation, f"({base.removeprefix('aten.')})", LIKE[base])
        return None

    def _part(self, operation: Operation, key: str) -> LoopRow:
        """Return the row of a part of attention, or of a norm that is several operations."""
        if key != "rmsnorm":
            return self._made(operation, key, key, PRODUCTS.get(_base(operation), ()))
        first, mean, between = self.norms[operation.index]
        inner = [short(t.dtype) for o in between for t in results_of(o)]
        narrow = any(FORMATS[fmt].bits <= 16 for fmt in inner if fmt in FORMATS)
        row = self._made(operation, key, key)
        inputs = self._operands(first)[:1]
        return replace(row, inputs=inputs, sums=LOW if narrow else _sums(mean))

    def _made(self, operation: Operation, key: str, like: str, names: Iterable[str] = ()) -> LoopRow:
        output = next(short(t.dtype) for t in results_of(operation) if _is_float(t))
        inputs = self._operands(operation, names)
        return LoopRow(key, like, operation.module or "", inputs, _sums(operation), output, self._rounds_to(operation, output))

    def _cast(self, operation: Operation) -> LoopRow | None:
        """Return the row of a parameter's copy in fewer bits."""
        source, made = next(tensors_in(operation.arguments)), next(tensors_in(operation.outputs))
        before, after = short(source.dtype), short(made.dtype)
        if not self._is_weight(source) or before not in FORMATS or after not in FORMATS or widens_to(before, after):
            return None
        return LoopRow("cast", "", operation.module or "", (Operand(before, before, before),), "-", after)

    def _reads_weight(self, operation: Operation, base: str) -> bool:
        return any(self._is_weight(t) for name in PRODUCTS[base] for t in tensors_in((operation.arguments.get(name),)))

    def _adds_bias(self, operation: Operation) -> bool:
        """Return whether an addition is that of a linear layer's bias to its product."""
        bias = any(len(t.shape) == 1 and self._is_weight(t) for t in tensors_in(operation.arguments))
        made = (self.flow.source(operation, name) for name in ("self", "other"))
        return bias and any(maker is not None and _base(maker) in PRODUCTS for maker in made)

    def _rounds_to(self, operation: Operation, output: str) -> str:
        """Return the narrower format to which all readers in the forward pass cast a result, '' if any reads it as it is."""
        targets = set()
        for reader in self.flow.readers(operation):
            if reader.phase == "backward" or reader.is_view or is_any(reader, COPIES):
                continue
            made = next(tensors_in(reader.outputs), None)
            targets.add(short(made.dtype) if is_any(reader, CASTS) and made is not None else "")
        target = targets.pop() if len(targets) == 1 else ""
        return target if target in FORMATS and output in FORMATS and not widens_to(output, target) else ""

    # ------------------------------------------------------------------------------------------------- patterns

    def _attention(self) -> dict[int, str]:
        """Return which operations are parts of attention that is computed operation by operation."""
        found: dict[int, str] = {}
        for softmax in self.operations:
            if not is_any(softmax, ("aten._softmax", "aten._safe_softmax")) or softmax.phase == "backward":
                continue
            path = self._back_to_product(softmax, FAR)
            values = self._on_to_product(softmax, FAR)
            if path is None or values is None:
                continue
            self.inside |= {o.index for o in path}
            found |= {o.index: "attention.scale" for o in path if _base(o) in ("aten.mul", "aten.div") and _by_a_number(o)}
            found |= {path[-1].index: "attention.scores", softmax.index: "attention.softmax", values.index: "attention.values"}
        return found

    def _back_to_product(self, operation: Operation, depth: int) -> list[Operation] | None:
        """Return the operations from one back to the product that its numbers come from, the product last."""
        if depth == 0:
            return None
        for tensor in tensors_in(operation.arguments):
            maker = self.flow.maker(tensor, operation.index) if _is_float(tensor) and tensor.shape else None
            if maker is None:
                continue
            if _base(maker) in PRODUCTS:
                return [maker]
            rest = self._back_to_product(maker, depth - 1) if is_any(maker, BETWEEN) else None
            if rest is not None:
                return [maker, *rest]
        return None

    def _on_to_product(self, operation: Operation, depth: int) -> Operation | None:
        """Return the product that an operation's result goes into."""
        for reader in self.flow.readers(operation) if depth else ():
            if reader.phase == "backward":
                continue
            if _base(reader) in PRODUCTS:
                return reader
            product = self._on_to_product(reader, depth - 1) if is_any(reader, BETWEEN) else None
            if product is not None:
                return product
        return None

    def _norms(self) -> dict[int, str]:
        """Return the last operations of RMS norms that are computed operation by operation: x rsqrt(mean(x^2) + eps) w."""
        for rsqrt in self.operations:
            if not is_any(rsqrt, ("aten.rsqrt",)) or rsqrt.phase == "backward" or rsqrt.recomputed:
                continue
            add = self._maker(rsqrt, ("aten.add",))
            mean = self._maker(add, ("aten.mean",))
            square = self._maker(mean, ("aten.pow", "aten.square", "aten.mul"))
            product = next((r for r in self.flow.readers(rsqrt) if is_any(r, ("aten.mul",)) and r.phase != "backward"), None)
            if square is None or mean is None or add is None or product is None:
                continue
            scaled = self._scaled_by_weight(product)
            between = [square, mean, add, rsqrt, product]
            self.norms[scaled.index] = square, mean, between if scaled is not product else between[:-1]
            self.inside |= {o.index for o in between}
        self.norm_modules = {square.module for square, _, _ in self.norms.values()}
        return dict.fromkeys(self.norms, "rmsnorm")

    def _maker(self, operation: Operation | None, names: tuple[str, ...]) -> Operation | None:
        source = self.flow.source(operation, "self", (*COPIES, *CASTS)) if operation is not None else None
        return source if source is not None and is_any(source, names) else None

    def _scaled_by_weight(self, product: Operation) -> Operation:
        """Return the multiplication with the weight that follows, or the operation itself."""
        waiting = [product]
        for operation in waiting:
            for reader in self.flow.readers(operation):
                if is_any(reader, ("aten.mul",)) and any(self._is_weight(t) for t in tensors_in(reader.arguments)):
                    return reader
                if is_any(reader, CASTS) and reader.phase != "backward":
                    waiting.append(reader)
        return product


def _sums(operation: Operation) -> str:
    """Return how an operation added up, as far as the verdicts tell."""
    if not operation.verdicts:
        return UNKNOWN
    verdict: Verdict = operation.verdicts[0]
    if verdict.dtype == "float32" and verdict.bits is not None:
        return next(name for least, name in BITS if verdict.bits > least)
    if verdict.dtype == "float32":
        return "fp32" if LEVELS.index(verdict.level) >= LEVELS.index("biased") else UNKNOWN
    if verdict.judged < SMALL:
        return UNKNOWN
    if verdict.expected is None:
        return "fp32" if verdict.equal > MANY else UNKNOWN
    return "fp32" if verdict.equal > MANY * verdict.expected else LOW if verdict.equal < FEW * verdict.expected else UNKNOWN


def _base(operation: Operation) -> str:
    """Return an operation's name without overload; of one in place that of the other, where rows are made of that."""
    base = operation.name.rpartition(".")[0]
    plain = base.removesuffix("_")
    return plain if plain in (*PRODUCTS, *DIRECT, "aten.add", "aten.mul", "aten.div") else base


def _is_float(tensor: TensorFacts) -> bool:
    return short(tensor.dtype) in FORMATS


def _as_read(tensor: TensorFacts) -> Operand:
    fmt = short(tensor.dtype)
    return Operand(fmt, fmt, fmt)


def _narrower(a: str, b: str) -> str:
    return a if a in FORMATS and b in FORMATS and widens_to(a, b) else b


def _by_a_number(operation: Operation) -> bool:
    """Return whether the second operand is a number, or a tensor of one."""
    other = operation.arguments.get("other")
    return not isinstance(other, TensorFacts) or prod(other.shape) == 1


def _computes(operation: Operation, base: str) -> bool:
    """Return whether an operation does arithmetic: casts, copies, moves, views and random numbers do none."""
    name = base.removeprefix("aten.")
    tags = getattr(operation.overload, "tags", ())
    if name in _MOVED or is_any(operation, (*CASTS, *COPIES)) or not base.startswith("aten."):
        return False
    return not operation.is_view and torch.Tag.nondeterministic_seeded not in tags and not name.startswith(_MADE)


_MOVED = frozenset(MOVES.split())
_MADE = ("empty", "new_", "arange", "detach", "linspace", "bernoulli", "scalar_tensor", "_unsafe_view", "unsafe_split")
