"""An LSTM layer as one operation, oneDNN's on the CPU. The arithmetic is FP32, u = 2^-24.

    i, f, o = sigmoid(z), g = tanh(z), with z = W x + U h' + b of each of them, h' and c' the states of the step before
    c = f c' + i g,   h = o tanh(c)

The twin of each step starts from the h' that the layer has returned, which is what the next step has read: errors of h do not
add up, and one of c is multiplied by f < 1 at every step. What is not stored has its error carried along (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.3): of a sum, the sum of errors and u of the result; of a product a b,
|a| e_b + |b| e_a + e_a e_b and u of it; of z, gamma(K + 3) of its absolute terms; of a function, the slope times the error,
half of its largest curvature times the square, and 2 ulp of its own.

In backward dh of a step is what comes from the layers above and U^T dz of the next step, so that errors are multiplied by |U|
at every step: where they exceed the results, over long sequences, nothing is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import U, gamma
from refimpl.parity.audit.judge.roundings import FUNCTION
from refimpl.parity.audit.values import CannotJudge, Twin, Values

LSTM = 2
"""What `mode` is."""
CURVATURE = {"sigmoid": 0.05, "tanh": 0.39}
"""Half of the largest second derivative, 1 / (6 sqrt 3) and 4 / (3 sqrt 3), rounded up."""


class Carried(NamedTuple):
    """A number in FP64, and how far from it a kernel's may be."""

    value: Tensor
    error: Tensor

    def __add__(self, other: Carried) -> Carried:  # type: ignore[override]
        value = self.value + other.value
        return Carried(value, self.error + other.error + U * value.abs())

    def __mul__(self, other: Carried) -> Carried:  # type: ignore[override]
        value = self.value * other.value
        crossed = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return Carried(value, crossed + U * value.abs())

    def from_one(self) -> Carried:
        """Return 1 minus it."""
        value = 1 - self.value
        return Carried(value, self.error + U * value.abs())

    def moved(self, move: Callable[[Tensor], Tensor]) -> Carried:
        """Return elements of it, or in another order."""
        return Carried(move(self.value), move(self.error))

    def at(self, t: int) -> Carried:
        """Return that of one step."""
        return Carried(self.value[t], self.error[t])

    def twin(self, result: str, actual: Tensor) -> Twin:
        """Return the twin of a result."""
        return Twin(result, actual, self.value, self.error, by="refimpl")


def joined(parts: Sequence[Carried], join: Callable[[list[Tensor]], Tensor]) -> Carried:
    """Return parts joined as one."""
    return Carried(join([part.value for part in parts]), join([part.error for part in parts]))


class Layer(NamedTuple):
    """What an LSTM layer computes, steps first: its gates (T, N, H), c before and after each step, tanh(c)."""

    i: Carried
    f: Carried
    g: Carried
    o: Carried
    before: Carried
    after: Carried
    tanh: Carried


def forward(values: Values) -> Iterator[Twin]:
    """Judge `mkldnn_rnn_layer`: all h, the last h and the last c."""
    given = _checked(values)
    in_order = partial(_steps, given=given)
    output, hy, cy, _ = values.output
    layer = _layer(given["input"], given, [given[f"weight{i}"] for i in range(4)], output)
    h = layer.o * layer.tanh
    time = -1 if not given["reverse"] else 0
    yield h.moved(in_order).twin("out.0", output)
    yield Twin("out.1", hy, output[time].double(), 0.0, by="exact")
    yield layer.after.at(-1).twin("out.2", cy)


def backward(values: Values) -> Iterator[Twin]:
    """Judge `mkldnn_rnn_layer_backward`: the gradients of x, W, U, b, b, and of the first h and c."""
    given = _checked(values)
    weights = [given[f"weight{i}"] for i in range(1, 5)]
    layer = _layer(given["input"], given, weights, given["output"])
    w, u = weights[0].double(), weights[1].double()
    x, h = _steps(given["input"], given), _earlier(given["output"], given)
    none = torch.zeros_like(layer.after.value[0])
    dy = given["grad_output"]
    dy = _steps(dy, given) if dy is not None else torch.zeros_like(layer.after.value)
    dh, dc = (Carried(none if given[key] is None else given[key].double(), none) for key in ("grad_hy", "grad_cy"))
    dz: list[Carried] = []
    for t in reversed(range(len(x))):
        i, f, g, o, c, tanh = (part.at(t) for part in (layer.i, layer.f, layer.g, layer.o, layer.before, layer.tanh))
        dh = dh + Carried(dy[t], none)
        dc = dc + dh * o * (tanh * tanh).from_one()
        of_i, of_f, of_o = dc * g * i * i.from_one(), dc * c * f * f.from_one(), dh * tanh * o * o.from_one()
        dz.append(joined((of_i, of_f, dc * i * (g * g).from_one(), of_o), partial(torch.cat, dim=-1)))
        dh, dc = _times(dz[-1], u), dc * f
    step = joined(dz[::-1], torch.stack)
    rows = step.moved(lambda d: d.flatten(0, 1).T)
    bias = _times(rows, torch.ones_like(rows.value[0])[:, None]).moved(lambda d: d[:, 0])
    found = (
        _times(step, w).moved(partial(_steps, given=given)), _times(rows, x.flatten(0, 1)), _times(rows, h.flatten(0, 1)),
        bias, bias, dh, dc,
    )  # fmt: skip
    if any(float(c.error.mean()) > float(c.value.abs().mean()) for c in found if bool(c.value.any())):
        raise CannotJudge("an LSTM's gradients over so many steps: the errors that its steps may carry exceed them")
    for at, (actual, carried) in enumerate(zip(values.output, found, strict=True)):
        yield carried.twin(f"out.{at}", actual)


def _checked(values: Values) -> dict[str, Any]:
    given = values.inputs
    if given["mode"] != LSTM:
        raise CannotJudge("a recurrent layer other than an LSTM")
    if given["input"].dtype != torch.float32:
        raise CannotJudge("an LSTM whose intermediate states are in 16 bits")
    return given


def _layer(x: Tensor, given: dict[str, Any], weights: list[Tensor], output: Tensor) -> Layer:
    """Return what a layer computes from its inputs, and from the h of each step before that it has returned."""
    w, u, *biases = (weight.double() for weight in weights)
    x, h = _steps(x, given), _earlier(output, given)
    z, size = x @ w.T + h @ u.T, x.abs() @ w.abs().T + h.abs() @ u.abs().T
    if given["has_biases"]:
        z, size = z + biases[0] + biases[1], size + biases[0].abs() + biases[1].abs()
    whole = Carried(z, gamma(w.shape[1] + u.shape[1] + 3) * size)
    parts = zip(whole.value.chunk(4, -1), whole.error.chunk(4, -1), strict=True)
    i, f, g, o = (_function("tanh" if gate == 2 else "sigmoid", Carried(*part)) for gate, part in enumerate(parts))
    added, c = i * g, given["cx_" if "cx_" in given else "cx_tmp"].double()
    states = [Carried(c, torch.zeros_like(c))]
    for t in range(len(x)):
        states.append(f.at(t) * states[-1] + added.at(t))
    before, after = joined(states[:-1], torch.stack), joined(states[1:], torch.stack)
    return Layer(i, f, g, o, before, after, _function("tanh", after))


def _function(name: str, x: Carried) -> Carried:
    """Return a sigmoid or tanh."""
    y = getattr(torch, name)(x.value)
    slope = y * (1 - y) if name == "sigmoid" else 1 - y.square()
    return Carried(y, slope * x.error + CURVATURE[name] * x.error.square() + FUNCTION * y.abs())


def _times(a: Carried, b: Tensor) -> Carried:
    """Return the product with an exact matrix."""
    size = b.abs()
    return Carried(a.value @ b, a.error @ size + gamma(len(b) + 2) * (a.value.abs() @ size))


def _steps(x: Tensor, given: dict[str, Any]) -> Tensor:
    """Return a sequence in FP64 in the order of its steps, or steps in the order of the sequence."""
    return x.double().flip(0) if given["reverse"] else x.double()


def _earlier(output: Tensor, given: dict[str, Any]) -> Tensor:
    """Return the h that each step has read."""
    return torch.cat([given["hx_"].double()[None], _steps(output, given)[:-1]])


JUDGES = {"aten.mkldnn_rnn_layer": forward, "aten.mkldnn_rnn_layer_backward": backward}
