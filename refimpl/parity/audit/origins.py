"""Where Inf and NaN begin: the first operation with finite inputs and a result that is not, and whether a loss scale helps.

    origin = origin_of(step)            # None if the loss and the gradients of the step are finite
    print(origin.sentence, origin.remedy)

An Inf that is meant, as a mask of -inf is, reaches neither: so the search goes backwards, from the results of backward and
from the loss, along what is not finite, to operations whose inputs are. Of several the one that is named is first an overflow
(in FP64 the result is finite), then a row of softmax that is masked out entirely, then the earliest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.operation import Operation, TensorFacts
from refimpl.parity.audit.roles import name_of
from refimpl.parity.audit.step import Step
from refimpl.parity.audit.values import Values, is_float

OVERWRITTEN = {"aten.copy_": "self", "aten.fill_": "self", "aten.zero_": "self"}
"""Operations that do not read this argument, though it is there before they run; nor do others read their 'out'."""
ALLOCATIONS = ("aten.empty", "aten.new_empty", "aten.resize_")
SOFTMAX = ("aten._softmax.", "aten._log_softmax.", "aten._safe_softmax.")
PRODUCTS = {
    "aten.mm": ("self", "mat2"), "aten.bmm": ("self", "mat2"), "aten.addmm": ("mat1", "mat2"),
    "aten.baddbmm": ("batch1", "batch2"),
}  # fmt: skip
"""Matrix products, and the names of the two matrices."""
PASSES = {"backward": "backward pass", "unscale": "unscaling", "clip": "clipping", "step": "optimizer step"}
"""Phases behind the forward pass, in words."""
SEEDED = torch.Tag.nondeterministic_seeded


@dataclass(frozen=True, slots=True)
class Counts:
    """How many elements of a tensor are NaN, and how many infinite."""

    nan: int
    inf: int


@dataclass(frozen=True, slots=True)
class NonFinite:
    """What a probe keeps of an operation with a result that is not finite.

    results, arguments: by name, those that are not finite; of the arguments only those that the operation reads, Python's
    numbers among them. result, position, value: an element that is not finite, NaN rather than Inf if NaN is new here.
    dtype, limit: the result's format, and the largest number of it. The rest is measured where `born`:

    exact: what the operation gives at the position in FP64 on the same operands, None where it cannot be repeated. operands:
    what stands there in the arguments, by name. finite_exact: how many results are finite in FP64 only; if there are such,
    the position is that of the largest of them, and largest its magnitude. masked_rows: of a softmax, the rows of -inf alone.
    """

    results: Mapping[str, Counts]
    arguments: Mapping[str, Counts]
    result: str
    position: tuple[int, ...]
    value: float
    dtype: str
    limit: float
    exact: float | None = None
    largest: float | None = None
    finite_exact: int = 0
    operands: Mapping[str, str] | None = None
    masked_rows: int = 0

    @property
    def born(self) -> bool:
        """Whether what is not finite begins here: no input has any, or there is NaN and inputs have only Inf."""
        return not self.arguments or (self.nan and not any(counts.nan for counts in self.arguments.values()))

    @property
    def nan(self) -> bool:
        """Whether a result has NaN."""
        return any(counts.nan for counts in self.results.values())

    @property
    def overflow(self) -> bool:
        """Whether it begins here, from finite inputs, though in FP64 the result is finite: it is too large for its format."""
        return not self.arguments and self.largest is not None and self.largest > self.limit


@dataclass(frozen=True, slots=True)
class Origin:
    """Where what is not finite in the loss or the gradients of a step begins.

    operation: None if no operation made it: it was there before the step, in `tensor`. found: what was measured on it.
    scale: the loss scale of the step, 1 if there is none.
    """

    operation: Operation | None
    found: NonFinite | None
    scale: float
    tensor: str = ""

    @property
    def forward(self) -> bool:
        """Whether it is born before backward, where no loss scale reaches."""
        return self.operation is None or self.operation.phase not in PASSES

    @property
    def helpful_scale(self) -> int | None:
        """The largest k for which a loss scale of 2^k would have kept this operation finite; None if none would.

        Backward is linear in the loss scale S, so a result that is v in FP64 is v S' / S with another S'. It rounds to a finite
        number below limit (1 + 2^-12) in FP16, half a unit above the largest, 65504.
        """
        if self.forward or self.found is None or self.found.largest is None or not self.found.overflow:
            return None
        eps = torch.finfo(getattr(torch, self.found.dtype)).eps
        allowed = self.scale * self.found.limit * (1 + eps / 4) / self.found.largest
        return math.ceil(math.log2(allowed)) - 1

    @property
    def sentence(self) -> str:
        """What is not finite, where, from which operands, and what FP64 gives."""
        if self.operation is None or self.found is None:
            return f"{self.tensor} is not finite before the step begins"
        found, operation = self.found, self.operation
        what = "NaN" if math.isnan(found.value) else "Inf" if found.value > 0 else "-Inf"
        where = f" of {operation.module}" if operation.module else ""
        phase = "forward pass" if self.forward else PASSES[operation.phase]
        at = f" at {list(found.position)}" if found.position else ""
        operands = ", ".join(f"{name} = {text}" for name, text in (found.operands or {}).items())
        what = f"{what} first appears in the {phase}{where}"
        text = f"{what}: {operation.name.rpartition('.')[0]} ({found.dtype}){at} from {operands}"
        if found.exact is None:
            return text
        times = f", {abs(found.exact) / found.limit:.3g} times the largest {found.dtype}" if math.isfinite(found.exact) else ""
        return f"{text}; FP64 gives {found.exact:.6g}{times}"

    @property
    def remedy(self) -> str:
        """Which loss scale would, or would not, have helped."""
        if self.forward:
            return "no loss scale helps: it appears before backward, whatever S is"
        k = self.helpful_scale
        if k is not None:
            return f"S <= 2^{k} would do (S was {self.scale:.6g})"
        if self.found is None or self.found.exact is None:
            return "whether a loss scale helps is not known: the operation could not be repeated in FP64"
        return "no loss scale helps: FP64 is not finite there either"


# ------------------------------------------------------------------------------------------------- while an operation runs


def nonfinite(values: Values) -> NonFinite | None:
    """Measure what is not finite in an operation's results, and in its arguments if there is any."""
    operation = values.operation
    if operation.name.startswith(ALLOCATIONS) or is_view(operation.overload):
        return None
    results = {name: tensor for name, tensor in values.results() if is_float(tensor) and not all_finite(tensor)}
    if not results:
        return None
    counts = {name: _counts(tensor) for name, tensor in results.items()}
    arguments = dict(_bad_arguments(values))
    wants_nan = any(c.nan for c in counts.values()) and not any(c.nan for c in arguments.values())
    name = next((n for n, c in counts.items() if c.nan or not wants_nan), next(iter(counts)))
    tensor = _readable(results[name])
    bad = tensor.isnan() if wants_nan else ~tensor.isfinite()
    position = _index(int(bad.flatten().to(torch.uint8).argmax()), tensor)
    dtype = results[name].dtype
    found = NonFinite(counts, arguments, name, position, float(tensor[position]), name_of(dtype), torch.finfo(dtype).max)
    if not found.born:
        return found
    return _with_exact(values, found, tensor)


def _with_exact(values: Values, found: NonFinite, tensor: Tensor) -> NonFinite:
    """Return what was found, with the operation's result in FP64 and its operands there."""
    exact = in_fp64(values, found.result)
    position, value, largest, count = found.position, None, None, 0
    if exact is not None and exact.shape == tensor.shape:
        lost = (~tensor.isfinite() & exact.isfinite()) * exact.nan_to_num(0.0, 0.0, 0.0).abs()
        count = int(lost.count_nonzero())
        if count:
            position = _index(int(lost.argmax()), lost)
            largest = float(lost[position])
        value = float(exact[position])
    operands = dict(_operands(values, position, tensor))
    return replace(
        found, position=position, value=float(tensor[position]), exact=value, largest=largest, finite_exact=count,
        operands=operands, masked_rows=_masked_rows(values),
    )  # fmt: skip


def _index(flat: int, tensor: Tensor) -> tuple[int, ...]:
    """Return the index of an element from its place among all elements."""
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape)) if tensor.dim() else ()


def _bad_arguments(values: Values) -> Iterator[tuple[str, Counts]]:
    ignored = {OVERWRITTEN.get(values.operation.name.rpartition(".")[0], "out"), "out"}
    for name, value in named_tensors({n: v for n, v in values.inputs.items() if n not in ignored}):
        if isinstance(value, Tensor):
            if is_float(value) and not all_finite(value):
                yield name, _counts(value)
        elif isinstance(value, float) and not math.isfinite(value):
            yield name, Counts(int(math.isnan(value)), int(math.isinf(value)))


def named_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield arguments by name; those in lists as 'name.0', 'name.1'."""
    for name, value in arguments.items():
        if isinstance(value, list | tuple):
            yield from named_tensors({f"{name}.{i}": part for i, part in enumerate(value)})
        else:
            yield name, value


def all_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite."""
    if not tensor.numel():
        return True
    low, high = _readable(tensor).aminmax()  # in a tenth of the time of all elements' own isfinite
    return math.isfinite(low) and math.isfinite(high)


def _readable(tensor: Tensor) -> Tensor:
    """Return a tensor that has arithmetic: FP8 has none."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _counts(tensor: Tensor) -> Counts:
    tensor = _readable(tensor)
    return Counts(int(tensor.isnan().sum()), int(tensor.isinf().sum()))


@cache
def is_view(overload: Any) -> bool:
    """Return whether an operation's result is its argument's memory, looked at in another way."""
    schema = getattr(overload, "_schema", None)
    return schema is not None and any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)


def _masked_rows(values: Values) -> int:
    """Return the rows of a softmax's input that are -inf alone."""
    if not values.operation.name.startswith(SOFTMAX):
        return 0
    inputs = values.inputs
    return int((inputs["self"] == -math.inf).all(dim=inputs["dim"]).sum())


def _operands(values: Values, position: tuple[int, ...], result: Tensor) -> Iterator[tuple[str, str]]:
    """Yield what stands in the arguments at a position of the result; the range of those of another shape.

    Of a matrix product these are a row of the one matrix and a column of the other.
    """
    lines = _row_and_column(values, position)
    for name, value in named_tensors(values.inputs):
        if name in lines:
            low, high = torch.aminmax(lines[name])
            yield name, f"({lines[name].numel()}) in {float(low):.4g} ... {float(high):.4g}"
        elif isinstance(value, Tensor):
            yield name, _operand(value, position, result)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, f"{value:.6g}"


def _row_and_column(values: Values, position: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the row and the column that a product's result at a position is made of, by argument; empty for others."""
    names = PRODUCTS.get(values.operation.name.rpartition(".")[0])
    if names is None or len(position) < 2 or values.inputs[names[0]].numel() == 0:
        return {}
    *batch, i, j = position
    a, b = (values.inputs[name][tuple(batch)] for name in names)
    return {names[0]: a[i], names[1]: b[:, j]}


def _operand(value: Tensor, position: tuple[int, ...], result: Tensor) -> str:
    try:
        return f"{float(value.expand(result.shape)[position]):.6g}"
    except RuntimeError:
        shape = "x".join(map(str, value.shape))
        if not value.numel():
            return f"({shape})"
        low, high = torch.aminmax(value)
        return f"({shape}) in {float(low):.4g} ... {float(high):.4g}"


# ------------------------------------------------------------------------------------------------- the same in FP64


def in_fp64(values: Values, result: str) -> Tensor | None:
    """Return a result of an operation in FP64, from the same inputs; None where it cannot be computed.

    Operations with random numbers are not repeated, nor those that refuse FP64.
    """
    if result in values.twins:
        return values.twins[result].exact
    operation, inputs = values.operation, values.inputs
    if operation.name.startswith(("aten._to_copy", "aten.clone")):
        return inputs["self"].double()
    seeded = SEEDED in getattr(operation.overload, "tags", ()) and inputs.get("dropout_p") != 0.0
    if seeded or operation.completes_later or getattr(operation.overload, "namespace", "") != "aten":
        return None
    args = [wide(value) for value in values.args]
    kwargs = {name: wide(value) for name, value in values.kwargs.items()}
    try:
        output = operation.overload(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    written = dict(zip(values.names, args, strict=False)) | kwargs
    again = Values(operation, values.names, tuple(args), kwargs, output, {n: written[n] for n in operation.written})
    return dict(again.results()).get(result)


def wide(value: Any) -> Any:
    """Return an argument in FP64: tensors of floating-point numbers as copies, and their formats."""
    if is_float(value):
        return value.to(torch.float64, copy=True)
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, list | tuple):
        return type(value)(wide(part) for part in value)
    return value


# ------------------------------------------------------------------------------------------------- at the end of a step


@lru_cache(maxsize=1)
def origin_of(step: Step) -> Origin | None:
    """Return where Inf or NaN in the step's loss, gradients or update begins; None if these are finite.

    The answer for the last step is kept for the next rule.
    """
    bad = [o for o in step.operations if found(o) is not None]
    reached = _ancestors(bad, _harmed(bad))
    scale = step.before.scale or 1.0
    born = [o for o in reached if (f := found(o)) is not None and f.born]
    if born:
        first = min(born, key=lambda o: (_rank(o), o.index))
        return Origin(first, found(first), scale)
    tensor = _from_before(bad, reached)
    return Origin(None, None, scale, tensor) if tensor else None


def found(operation: Operation) -> NonFinite | None:
    """Return what `nonfinite` measured on an operation."""
    return operation.probed.get("nonfinite")


def _harmed(bad: list[Operation]) -> list[Operation]:
    """Return the operations that show that training is harmed: those of backward and after, and the loss, a single number."""
    late = [o for o in bad if o.phase in ("backward", "unscale", "clip", "step")]
    losses = [o for o in bad if o.phase == "forward" and o.sequence is not None and _single(o.outputs)]
    return [*late, *losses]


def _single(outputs: Any) -> bool:
    return isinstance(outputs, TensorFacts) and math.prod(outputs.shape) == 1


def _rank(operation: Operation) -> int:
    f = found(operation)
    assert f is not None
    return 0 if f.overflow else 1 if f.masked_rows else 2


def _ancestors(bad: list[Operation], harmed: list[Operation]) -> list[Operation]:
    """Return the operations that results which are not finite come from, the given ones included.

    Where NaN is among the results and the inputs, only the inputs with NaN are followed.
    """
    writers: dict[int, list[Operation]] = {}
    for o in bad:
        for storage in _written(o):
            writers.setdefault(storage, []).append(o)
    seen: dict[int, Operation] = {}
    waiting = list(harmed)
    while waiting:
        o = waiting.pop()
        if o.index in seen:
            continue
        seen[o.index] = o
        for storage in _sources(o):
            earlier = [w for w in writers.get(storage, ()) if w.index < o.index]
            if earlier:
                waiting.append(earlier[-1])
    return list(seen.values())


def _written(operation: Operation) -> set[int]:
    """Return the storages of an operation's results that are not finite."""
    f = found(operation)
    assert f is not None
    facts = dict(result_facts(operation))
    return {facts[name].storage for name in f.results if name in facts and facts[name].storage is not None}  # type: ignore[misc]


def result_facts(operation: Operation) -> Iterator[tuple[str, TensorFacts]]:
    """Yield an operation's results by the names that `Values.results` gives them."""
    written = {name: operation.arguments[name] for name in operation.written}
    for name, value in named_tensors({"out": operation.outputs, **written}):
        if isinstance(value, TensorFacts):
            yield name, value


def _sources(operation: Operation) -> list[int]:
    """Return the storages of the inputs that explain what is not finite in the results."""
    f = found(operation)
    assert f is not None
    facts = {n: v for n, v in named_tensors(operation.arguments) if isinstance(v, TensorFacts)}
    followed = [n for n, c in f.arguments.items() if c.nan] if f.nan else []
    followed = followed or list(f.arguments)
    return [storage for n in followed if n in facts and (storage := facts[n].storage) is not None]


def _from_before(bad: list[Operation], reached: list[Operation]) -> str:
    """Return the name of a tensor, made by no operation of the step, that brings in what is not finite."""
    made: dict[int, int] = {}
    for o in reversed(bad):
        made.update(dict.fromkeys(_written(o), o.index))
    for o in sorted(reached, key=lambda o: o.index):
        f = found(o)
        assert f is not None
        facts = dict(named_tensors(o.arguments))
        for name in f.arguments:
            tensor = facts.get(name)
            if isinstance(tensor, TensorFacts) and (tensor.storage is None or made.get(tensor.storage, o.index) >= o.index):
                role = tensor.role
                return f"the {role.kind} {role.name}".strip() if role is not None else f"{name} of {o.name}, an input,"
    return ""
