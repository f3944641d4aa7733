"""The tape: reverse-mode differentiation that does no arithmetic.

It records every operation that runs (the operation, its inputs, its output, what it saved) and replays the list backwards.
Formats and rounding are the operations' business; the operation `fan_in` adds gradients of one tensor.

A model calls one operation per line:

    x = t(linear, "mlp.c_fc", x)           # operation, name in the model, inputs

The name finds the parameters (`mlp.c_fc.weight`, `mlp.c_fc.bias`) and appears in sites, traces and messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from refimpl.nn.checkpointing import Block, block_scope, saved_by
from refimpl.nn.op import Op
from refimpl.nn.ops import OPS, SELECTED, cast_parameter, fan_in
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import FORMATS, format_of
from refimpl.precision.context import OpPrecision, Run

Sink = Callable[[str, Array], None]


@dataclass(eq=False)
class Node:
    """A tensor on the tape: its name, how many gradients are still missing, and the sum of those that are there."""

    name: str
    uses: int = 0
    grad: Array | None = None


@dataclass(eq=False)
class Value:
    """What a model computes with: an array and its node. The tape keeps only the node, so that the array can be freed.

    The array of a parameter is None: it is looked up in `weights` whenever it is needed.
    """

    array: Array
    node: Node


@dataclass
class Entry:
    """One recorded operation. It keeps no input arrays: what backward needs is in `saved`, or in a block, which computes it."""

    op: Op
    p: OpPrecision
    inputs: tuple[Node | None, ...]
    params: tuple[Value | None, ...]
    output: Node
    saved: Any
    static: dict[str, Any]


class Parameters:
    """The parameters of a model for the time of one tape: which name a tied one has, and which copies autocast has made.

    weights: name -> array. tied: name -> the name of the parameter that it shares.
    """

    def __init__(self, weights: Mapping[str, Array], tied: Mapping[str, str]):
        self.weights, self.tied = weights, tied
        self.leaves: dict[str, Value] = {}
        self.copies: dict[tuple[str, str], Value] = {}

    def leaf(self, name: str) -> Value | None:
        """Return the parameter of that name, or None if the model has none (a bias)."""
        name = self.tied.get(name, name)
        if name not in self.weights:
            return None
        return self.leaves.setdefault(name, Value(None, Node(name)))

    def array(self, w: Value | None) -> Array | None:
        """Return the array of a parameter: looked up in `weights`, or the shared copy, which lives as long as the tape."""
        if w is None:
            return None
        return self.weights[w.node.name] if w.array is None else w.array

    def copy_format(self, leaf: Value, operand: str, p: OpPrecision) -> str | None:
        """Return the 16-bit format of the copy that an operation reads in place of the parameter, or None if it reads that.

        This is autocast's cast of FP32 weights, once per micro-batch for all uses of a parameter. Quantized weights have none:
        each product quantizes its own operands.
        """
        fmt = p["y"].inputs[operand]  # `linear.y` for linear; without parts, the operation's own row
        if fmt not in FORMATS or fmt == format_of(self.array(leaf)) or FORMATS[fmt].bits != 16:
            return None
        return fmt


class Tape:
    """Records operations on the parameters of one model, in one run.

    weights, tied: as in `Parameters`. record=False: forward only.
    """

    def __init__(self, run: Run, weights: Mapping[str, Array], tied: Mapping[str, str] | None = None, record: bool = True):
        self.run, self.parameters, self.record = run, Parameters(weights, tied or {}), record
        self.entries: list[Entry] = []
        self._prefix = ""
        self.in_block: Block | None = None

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put a prefix before all names inside: `with t.scope('transformer.h.0')`."""
        outer, self._prefix = self._prefix, f"{self._prefix}{name}."
        try:
            yield
        finally:
            self._prefix = outer

    block = block_scope  # `with t.block('transformer.h.0')`: a scope that `run.checkpointing` may compute again in backward

    def __call__(self, op: Op, name: str, *inputs: Any, **static: Any) -> Value:
        """Run one operation and record it. Inputs are Values, or plain arrays without a gradient (tokens)."""
        place = self._prefix + name
        op = selected(op, self.run, place)
        p = self.run.precision(op.key, place)
        params = tuple(self._parameter(f"{place}.{param}", operand, p) for param, operand in op.params)
        result = self._apply(op, p, inputs, params, **static)
        made = result.array
        if self.run.observer is not None:
            result.array = self.run.observer("activations", place, made)
        if self.in_block is not None:
            self.in_block.add(self.entries[-1], inputs, made, result.array)
        return result

    def _apply(self, op: Op, p: OpPrecision, inputs: tuple[Any, ...], params: tuple[Value | None, ...], **static: Any) -> Value:
        """Call an operation's forward function, and append what its backward function will need."""
        arrays = [x.array if isinstance(x, Value) else x for x in inputs]
        y, saved = op.forward(*arrays, *map(self.parameters.array, params), p=p, **static)
        output = Node(p.place)
        if self.record:
            nodes = tuple(x.node if isinstance(x, Value) else None for x in inputs)
            for node in (*nodes, *(w.node for w in params if w)):
                if node is not None:
                    node.uses += 1
            self.entries.append(Entry(op, p, nodes, params, output, saved, static))
        return Value(y, output)

    def _parameter(self, name: str, operand: str, p: OpPrecision) -> Value | None:
        """Return a parameter, or its 16-bit copy where the policy casts it; None if the model has none of that name.

        The cast is a recorded operation, whose backward widens the sum of all gradients of the copy.
        """
        leaf = self.parameters.leaf(name)
        fmt = None if leaf is None else self.parameters.copy_format(leaf, operand, p)
        if leaf is None or fmt is None:
            return leaf
        copies, key = self.parameters.copies, (leaf.node.name, fmt)
        if key not in copies:
            cast_p = self.run.precision(cast_parameter.name, f"{leaf.node.name}.{fmt}")
            copies[key] = self._apply(cast_parameter, cast_p, (), (leaf,), fmt=fmt)
        return copies[key]

    def backward(self, loss: Value, grad_output: Array, sink: Sink) -> None:
        """Replay the tape in reverse from d(loss) = grad_output, and call `sink` with each parameter's gradient once complete.

        What an entry saved is freed as soon as it is used. Errors: RuntimeError for a tape that has recorded nothing, or whose
        backward has run.
        """
        if not self.entries:
            raise RuntimeError("nothing is recorded: backward has run already, or the tape was made with record=False")
        loss.node.grad = grad_output
        while self.entries:
            entry = self.entries.pop()
            dy, entry.output.grad = entry.output.grad, None
            if self.run.observer is not None and dy is not None and entry.op is not cast_parameter:
                dy = self.run.observer("activation_grads", entry.output.name, dy)
            operands = (*entry.inputs, *(w.node if w else None for w in entry.params))
            grads: tuple[Array | None, ...] = (None,) * len(operands)
            if dy is not None:
                params = map(self.parameters.array, entry.params)
                grads = entry.op.backward(dy, saved_by(entry), *params, p=entry.p, **entry.static)
            for node, gradient in zip(operands, grads, strict=True):
                if node is not None:
                    self._receive(node, gradient, sink)

    def _receive(self, node: Node, gradient: Array | None, sink: Sink) -> None:
        """Add the gradient of one use to that of the tensor. After its last use a parameter's gradient goes to `sink`."""
        if gradient is not None and node.grad is not None:
            place = f"{node.name}.grad"
            p = self.run.precision(fan_in.key, place)
            gradient, _ = selected(fan_in, self.run, place).forward(node.grad, gradient, p=p)
        node.grad = node.grad if gradient is None else gradient
        node.uses -= 1
        if node.uses == 0 and node.name in self.parameters.leaves and node.grad is not None:
            sink(node.name, node.grad)
            node.grad = None


def selected(op: Op, run: Run, place: str) -> Op:
    """Return what runs where a model calls `op`: the run's override, else the operation that the policy selects.

    Of the latter the backend may have a fast version. An operation that is not one of ours runs as it is, whatever its name.
    """
    if op.name in run.overrides:
        op = run.overrides[op.name]
    elif op is fan_in or OPS.get(op.name) is op:  # else a user's own operation, which may bear a name of ours
        op = run.version(SELECTED.get(run.policy.operation(op.name, place), op))
    return op
