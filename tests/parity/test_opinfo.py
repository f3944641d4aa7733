"""refimpl against PyTorch's own test inputs.

PyTorch describes each of its operations by an `OpInfo`, with the inputs that its own tests use: `op_db` in
torch.testing._internal. Here each sample's own tensors go through PyTorch's operation and through refimpl's, forward and
backward, in FP32, FP16 and BF16 (recipes `fp32`, `fp16`, `bf16`). torch_cases.py compares the same operations on inputs of
our choice; these were chosen by others: no elements, no axes, one feature, rows of two, numbers up to 9.

A sample with an option that refimpl does not have is left out by one of the `RULES`. How many samples run, and how many each
rule leaves out, is written down in `OPINFOS` for the version of PyTorch that the project names, and must be so exactly.

Bounds are those of torch_cases.py: the FP32 rounding errors of each formula are carried through it (`Near`), and both
results must be possible roundings of what lies within them. Where only one is possible, they are identical.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from arrays import DTYPE, FORMATS, LOW, Array, wide
from bounds import (
    Near,
    assert_agrees,
    attention_near,
    cross_entropy_near,
    embedding_near,
    gelu_erf_near,
    gelu_tanh_near,
    layernorm_near,
    linear_near,
    matmul_near,
    near,
    ours,
    relu_near,
    rmsnorm_near,
    silu_near,
    softmax_near,
)
from op_calls import OF_TRANSFORMERS
from torch_cases import POLICIES, TORCH, assert_format, format_name, gradient_of_output, onednn, operand_names, tensor, theirs

from refimpl.backends.base import Backend
from refimpl.nn.ops import OPS
from refimpl.nn.ops import embedding as embedding_op
from refimpl.nn.ops import gelu_erf as gelu_erf_op
from refimpl.nn.ops import gelu_tanh as gelu_tanh_op
from refimpl.nn.ops import layernorm as layernorm_op
from refimpl.nn.ops import linear as linear_op
from refimpl.numerics.casts import cast
from refimpl.precision.recipes import get_recipe

torch = pytest.importorskip("torch", reason="PyTorch's test inputs need torch==2.13.0: pip install -e '.[parity]'")
pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest: pip install -e '.[parity]'")

F = torch.nn.functional

RULES = {
    "factor": "add has no factor `alpha`",
    "broadcasting": "shapes differ: in add, b may lack leading axes of a and nothing else; matmul and attention repeat nothing",
    "vector": "matmul has matrices",
    "another axis": "softmax and split work along the last axis",
    "empty axis": "softmax of rows without elements",
    "no weight": "norms have a weight",
    "probabilities": "targets are classes, not probabilities of classes",
    "reduction": "the loss is the mean, not the sum or all of the terms",
    "class weights": "classes have no weights",
    "ignored targets": "no target is ignored",
    "dropout": "refimpl has no dropout",
    "not causal": "attention is causal",
    "16 bits already": "the recorded cast is that of an FP32 parameter",
}
"""Why a sample is left out: what refimpl does not have."""

pytestmark = pytest.mark.usefixtures("torch")  # on one thread


class LeftOut(Exception):
    """By the rule of this name."""


def unless(condition: bool, rule: str) -> None:
    if not condition:
        raise LeftOut(rule)


# -------------------------------------------------------------------------------------------------- one sample, arranged


@dataclass(frozen=True)
class Call:
    """A sample as operands of refimpl's operation, and the call in PyTorch with the same operands (but for those that are
    None). Both get the operands arranged in the same way, e.g. the axes of a norm as one; that moves values only."""

    op: str
    operands: list[Array | None]
    torch: Callable[..., Any]
    formula: Callable[..., list[Near]] | None  # None: no arithmetic, so identical
    static: dict[str, Any] = field(default_factory=dict)
    gradients_in_fp32: bool = False  # as torch_cases.Counterpart has it, and why
    policy: str = ""  # if another than the recipe's


def values(x: Any) -> Array:
    """The values of a tensor; by way of fp32, which holds all of them."""
    return x.detach().float().numpy().astype(DTYPE[format_name(x)]) if x.is_floating_point() else x.numpy()


def known(sample: Any, *names: str) -> dict[str, Any]:
    """The keyword arguments, which must be among these: none is dropped that a function here does not know of."""
    assert set(sample.kwargs) <= set(names), sample.kwargs
    return sample.kwargs


def rows(x: Near) -> Near:
    """(..., C) -> (n, C)."""
    shape = (math.prod(x.value.shape[:-1]), x.value.shape[-1])
    return Near(x.value.reshape(shape), np.broadcast_to(x.err, x.value.shape).reshape(shape))


def linear(sample: Any) -> Call:
    known(sample)
    w, b = (*sample.args, None)[:2]

    def formula(x: Near, w: Near, *rest: Near) -> list[Near]:
        *bias, dy = rest
        y, dx, dw, db = linear_near(rows(x), w, bias[0] if bias else near(0.0), rows(dy))
        return [y, dx, dw, db] if bias else [y, dx, dw]

    return Call("linear", [values(sample.input), values(w), None if b is None else values(b)], F.linear, formula)


def matmul(sample: Any) -> Call:
    known(sample)
    a, b = sample.input, *sample.args
    unless(a.ndim > 1 and b.ndim > 1, "vector")
    unless(a.shape[:-2] == b.shape[:-2], "broadcasting")
    return Call("matmul", [values(a), values(b)], torch.matmul, matmul_near)


def add(sample: Any) -> Call:
    unless("alpha" not in known(sample, "alpha"), "factor")
    a, b = sample.input, *sample.args
    repeated = a.ndim - b.ndim
    unless(repeated >= 0 and a.shape[repeated:] == b.shape, "broadcasting")

    def formula(a: Near, b: Near, dy: Near) -> list[Near]:
        return [Near(a.value + b.value), dy, dy.sum(tuple(range(repeated))) if repeated else dy]

    return Call("add", [values(a), values(b)], torch.add, formula)


def relu(sample: Any) -> Call:
    known(sample)
    return Call("relu", [values(sample.input)], F.relu, relu_near)


def silu(sample: Any) -> Call:
    known(sample)
    return Call("silu", [values(sample.input)], F.silu, silu_near)


def gelu(sample: Any) -> Call:
    approximate = known(sample, "approximate")["approximate"]
    op, formula = {"tanh": ("gelu_tanh", gelu_tanh_near), "none": ("gelu_erf", gelu_erf_near)}[approximate]
    return Call(op, [values(sample.input)], lambda x: F.gelu(x, approximate=approximate), formula)


def softmax(sample: Any) -> Call:
    known(sample)
    x, (axis,) = sample.input, sample.args
    unless(axis in (-1, max(x.ndim - 1, 0)), "another axis")  # PyTorch gives a single number an axis
    unless(x.numel() > 0, "empty axis")
    fmt = format_name(x)
    return Call("softmax", [values(x)], lambda x: torch.softmax(x, -1), lambda x, dy: softmax_near(x, dy, fmt))


def layernorm(sample: Any) -> Call:
    """With refimpl's epsilon in the place of the sample's; several axes that are normalized together are one."""
    known(sample, "eps")
    shape, *params = sample.args
    unless(len(params) == 2, "no weight")
    C = math.prod(shape)
    x, w, b = values(sample.input).reshape(-1, C), *(values(v).reshape(C) for v in params)
    formula = layernorm_near if C > 1 else layernorm_of_one_feature
    return Call("layernorm", [x, w, b], lambda x, w, b: F.layer_norm(x, (C,), w, b), formula, gradients_in_fp32=True)


def layernorm_of_one_feature(x: Near, w: Near, b: Near, dy: Near) -> list[Near]:
    """As layernorm_near, whose bound divides by the variance: here it is 0, and the result is b. PyTorch subtracts before or
    after it multiplies by rstd, the root of 1e5; what does not cancel is the error."""
    rstd = (near(0.0) + 1e-5).rsqrt()
    h = x * rstd - rstd * x
    dh = dy * w
    B = (dh * x - dh * x) * rstd * rstd * rstd
    C = -B * x - dh * rstd
    dx = (rstd * (dh - dh - h * (dh * h))).worse_of(B * x + rstd * dy * w + C)
    return [h * w + b, dx, (dy * h).sum(0), dy.sum(0)]


def rmsnorm(sample: Any) -> Call:
    """As layernorm."""
    known(sample, "eps")
    shape, *params = sample.args
    unless(len(params) == 1, "no weight")
    C = math.prod(shape)
    x, w = values(sample.input).reshape(-1, C), values(params[0]).reshape(C)
    return Call("rmsnorm", [x, w], lambda x, w: F.rms_norm(x, (C,), w, eps=1e-5), rmsnorm_near, gradients_in_fp32=True)


def embedding(sample: Any) -> Call:
    known(sample)
    (tokens,) = sample.args

    def formula(tokens: Array, w: Near, dy: Near) -> list[Near]:
        return embedding_near(tokens.reshape(-1), w, rows(dy))

    return Call("embedding", [values(tokens), values(sample.input)], F.embedding, formula, gradients_in_fp32=True)


def cross_entropy(sample: Any) -> Call:
    """PyTorch's classes are the second axis, refimpl's the last. As the recipes do, from logits that are widened to FP32."""
    options = known(sample, "reduction", "weight", "ignore_index")
    (targets,) = sample.args
    unless(not targets.is_floating_point(), "probabilities")
    unless("weight" not in options, "class weights")
    unless(options.get("reduction", "mean") == "mean", "reduction")
    unless("ignore_index" not in options, "ignored targets")

    def formula(z: Near, targets: Array, S: Near) -> list[Near]:
        return cross_entropy_near(rows(z), targets.reshape(-1), S)

    operands = [np.moveaxis(values(sample.input), 1, -1), values(targets)]
    return Call("cross_entropy", operands, lambda z, t: F.cross_entropy(z.float().movedim(-1, 1), t), formula)


def attention(sample: Any) -> Call:
    """PyTorch's own attention in its written-out form, SDPBackend.MATH: all in FP32 and one rounding at the end, which here
    is four other rows of the policy. Keys beyond the last query are seen by none: PyTorch gets them, refimpl does not."""
    options = known(sample, "is_causal", "dropout_p", "attn_mask")
    unless(options["dropout_p"] == 0, "dropout")
    unless(options["is_causal"], "not causal")
    q, k, v = sample.input, *sample.args
    unless(q.shape[:-2] == k.shape[:-2], "broadcasting")
    fmt, batch, T, D = format_name(q), q.shape[:-2], *q.shape[-2:]
    H = batch[1] if len(batch) == 2 else 1
    beyond = [x[..., T:, :].detach() for x in (k, v)]
    qkv = np.stack([values(x[..., :T, :]).reshape(batch[0], H, T, D).transpose(0, 2, 1, 3) for x in (q, k, v)], axis=2)

    def in_pytorch(qkv: Any) -> Any:
        q, k, v = qkv.view(batch[0], T, 3, H, D).permute(2, 0, 3, 1, 4).reshape(3, *batch, T, D)
        k, v = (torch.cat([x, more], -2) for x, more in zip((k, v), beyond, strict=True))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.reshape(batch[0], H, T, D).transpose(1, 2).reshape(batch[0], T, H * D)

    def formula(qkv: Near, dy: Near) -> list[Near]:
        # That formula is written for one shape, by constants of its module.
        with mock.patch.multiple(attention_near.__module__, H=H, D=D, CAUSAL=np.tril(np.ones((T, T), bool))):
            return attention_near(qkv.value, dy.value, fmt, unfused=True)

    operand = qkv.reshape(batch[0], T, 3 * H * D)
    return Call("attention", [operand], in_pytorch, formula, {"n_head": H}, policy="" if fmt == "fp32" else f"math-{fmt}")


def reshape(sample: Any) -> Call:
    known(sample)
    (shape,) = sample.args
    return Call("reshape", [values(sample.input)], lambda x: x.reshape(shape), None, {"shape": shape})


def permute(sample: Any) -> Call:
    """Axes that are counted from the end are counted from the front."""
    known(sample)
    (axes,) = sample.args
    axes = tuple(i % sample.input.ndim for i in axes)
    return Call("transpose", [values(sample.input)], lambda x: x.permute(axes), None, {"axes": axes})


def narrow(sample: Any) -> Call:
    known(sample)
    x, (axis, start, length) = sample.input, sample.args
    unless(axis % x.ndim == x.ndim - 1, "another axis")
    start = int(start)
    return Call("split", [values(x)], lambda x: x.narrow(-1, start, length), None, {"start": start, "stop": start + length})


def cast_to(fmt: str) -> Callable[[Any], Call]:
    def cast(sample: Any) -> Call:
        known(sample, "memory_format")
        unless(format_name(sample.input) == "fp32", "16 bits already")
        return Call("cast", [values(sample.input)], lambda x: x.to(TORCH[fmt]), None, {"fmt": fmt})

    return cast


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Samples:
    """How the samples of one OpInfo are arranged, how many run, and how many each rule leaves out."""

    arrange: Callable[[Any], Call]
    ops: tuple[str, ...]
    run: int
    left_out: dict[str, int] = field(default_factory=dict)


OPINFOS = {
    "nn.functional.linear": Samples(linear, ("linear",), 18),
    "matmul": Samples(matmul, ("matmul",), 3, {"vector": 7, "broadcasting": 5}),
    "mm": Samples(matmul, ("matmul",), 3),
    "bmm": Samples(matmul, ("matmul",), 1),
    "add": Samples(add, ("add",), 5, {"factor": 2, "broadcasting": 4}),
    "nn.functional.relu": Samples(relu, ("relu",), 4),
    "nn.functional.silu": Samples(silu, ("silu",), 3),
    "nn.functional.gelu": Samples(gelu, ("gelu_tanh", "gelu_erf"), 8),
    "softmax": Samples(softmax, ("softmax",), 5, {"another axis": 1, "empty axis": 1}),
    "nn.functional.layer_norm": Samples(layernorm, ("layernorm",), 5, {"no weight": 1}),
    "nn.functional.rms_norm": Samples(rmsnorm, ("rmsnorm",), 5, {"no weight": 1}),
    "nn.functional.embedding": Samples(embedding, ("embedding",), 3),
    "nn.functional.cross_entropy": Samples(
        cross_entropy, ("cross_entropy",), 5, {"probabilities": 10, "class weights": 3, "reduction": 2, "ignored targets": 1}
    ),
    "nn.functional.scaled_dot_product_attention": Samples(
        attention, ("attention",), 4, {"dropout": 12, "not causal": 7, "broadcasting": 2}
    ),
    "reshape": Samples(reshape, ("reshape",), 7),
    "permute": Samples(permute, ("transpose",), 4),
    "narrow": Samples(narrow, ("split",), 6, {"another axis": 4}),
    "half": Samples(cast_to("fp16"), ("cast",), 5),
    "bfloat16": Samples(cast_to("bf16"), ("cast",), 5),
}


@pytest.fixture(scope="module")
def op_db() -> dict[str, Any]:
    """Imported here and not above: common_utils, which it needs, freezes torch.backends' settings for the whole process, and
    sets an environment variable."""
    with warnings.catch_warnings(), mock.patch.dict(os.environ):
        warnings.filterwarnings("ignore", message="Fail to import hypothesis")  # these tests draw nothing by it
        module = importlib.import_module("torch.testing._internal.common_methods_invocations")
    return {op.name: op for op in module.op_db if not op.variant_test_name}


def arranged(opinfo: Any, name: str, fmt: str) -> tuple[list[Call], Counter[str]]:
    """The samples that run, and how many each rule leaves out.

    `opinfo.sample_inputs` calls this function too, but seeds the global generators of Python and NumPy and searches the stack
    for a unittest.TestCase, which takes longer than all the rest.
    """
    calls, left_out = [], Counter[str]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for sample in opinfo.sample_inputs_func(opinfo, "cpu", TORCH[fmt], requires_grad=True):
            try:
                calls.append(OPINFOS[name].arrange(sample))
            except LeftOut as rule:
                left_out[str(rule)] += 1
    return calls, left_out


def compare(call: Call, fmt: str) -> None:
    """Forward and backward, here and there."""
    present = [x for x in call.operands if x is not None]
    with onednn(call.op != "gelu_erf"):
        y = call.torch(*(tensor(x) for x in present))
        dy = gradient_of_output(call.op, tuple(y.shape), format_name(y))
        y, gradients = theirs(call.torch, present, dy)
        if call.gradients_in_fp32 and fmt in LOW:
            _, in_fp32 = theirs(call.torch, present, dy, "fp32")
            gradients = [None if g is None else g.to(TORCH[fmt]) for g in in_fp32]
    policy = POLICIES[call.policy] if call.policy else get_recipe(fmt).policy
    y_ours, gradients_ours = ours(policy, call.op, call.operands, dy, **call.static)

    pairs = [("y", y_ours, y)]
    mine = [g for x, g in zip(call.operands, gradients_ours, strict=True) if x is not None]
    names = operand_names(call.op)
    pairs += [(f"d{name}", a, b) for name, a, b in zip(names, mine, gradients, strict=False) if b is not None]
    if call.formula:
        exact = call.formula(*(x if x.dtype == np.int64 else near(wide(x)) for x in present), near(wide(dy)))
    else:
        exact = [Near(wide(b)) for _, _, b in pairs]
    for (name, a, b), value in zip(pairs, exact, strict=True):
        assert_format(a, format_name(b), name)
        assert np.shape(a) == tuple(b.shape), name
        if np.size(a):
            shape = value.value.shape
            assert_agrees(wide(a).reshape(shape), wide(b).reshape(shape), value, format_name(b), name)


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", OPINFOS)
def test_samples(name: str, fmt: str, op_db: dict[str, Any], record_property: Callable[[str, object], None]) -> None:
    expected = OPINFOS[name]
    calls, left_out = arranged(op_db[name], name, fmt)
    record_property("samples", f"{len(calls)} run, left out: {dict(left_out)}")
    if expected.ops == ("cast",) and fmt in LOW:
        assert not calls and left_out == {"16 bits already": expected.run}
        return
    assert len(calls) == expected.run and left_out == expected.left_out
    for call in calls:
        assert call.op in expected.ops
        compare(call, fmt)


def test_every_operation_has_samples_and_every_rule_leaves_something_out() -> None:
    assert {op for row in OPINFOS.values() for op in row.ops} == set(OPS) - OF_TRANSFORMERS
    assert {rule for row in OPINFOS.values() for rule in row.left_out} | {"16 bits already"} == set(RULES)
    assert all(row.run > 0 for row in OPINFOS.values())


# ----------------------------------------------------------------------------------------------------- negative controls


def noticed(calls: list[Call], fmt: str) -> int:
    """In how many samples a result is outside of what is possible."""
    count = 0
    for call in calls:
        try:
            compare(call, fmt)
        except AssertionError as error:
            assert re.search(r"outside: ours [1-9]\d*, PyTorch's 0\b", str(error)), error
            count += 1
    return count


def truncating(x: Array, fmt: str) -> Array:
    """Towards zero in the place of to the nearest."""
    y = cast(x, fmt)
    if y.dtype == x.dtype or y.dtype.itemsize != 2:
        return y
    code = y.view(np.uint16) if np.ndim(y) else np.asarray(y).view(np.uint16)
    return (code - (np.abs(y.astype(x.dtype)) > np.abs(x))).astype(np.uint16).view(y.dtype)


ROUNDS = [name for name in OPINFOS if name not in ("reshape", "permute", "narrow", "nn.functional.relu")]
"""Those that round at all: an embedding rounds its gradient, which is a sum."""


@pytest.mark.parametrize("fmt", LOW)
@pytest.mark.parametrize("name", ROUNDS)
def test_control_rounding_towards_zero_is_noticed(name: str, fmt: str, op_db: dict[str, Any]) -> None:
    fmt = "fp32" if OPINFOS[name].ops == ("cast",) else fmt  # that casts to 16 bits
    calls, _ = arranged(op_db[name], name, fmt)
    with mock.patch.object(Backend, "cast", staticmethod(truncating)):
        assert noticed(calls, fmt) > 0


def rounds_before_the_bias(x: Array, w: Array, b: Array | None, p: Any) -> Any:
    y, saved = linear_op.forward(x, w, None, p=p)
    return (y if b is None else p.round(p.widen(y) + p.widen(b), "y", y)), saved


def keeps_the_last(dy: Array, saved: Any, w: Array, p: Any) -> Any:
    dw = np.zeros_like(w)
    dw[saved.reshape(-1)] = dy.reshape(-1, w.shape[-1])
    return None, dw


def forgets_the_mean(dy: Array, saved: Any, w: Array, b: Array, p: Any) -> Any:
    _, _, rstd, x_format = saved
    return p.round_grad(p.widen(dy) * p.widen(w) * rstd, "x", x_format), *layernorm_op.backward(dy, saved, w, b, p=p)[1:]


WRONG = {
    "the other gelu": ("nn.functional.gelu", replace(gelu_tanh_op, forward=gelu_erf_op.forward)),
    "linear rounds before the bias": ("nn.functional.linear", replace(linear_op, forward=rounds_before_the_bias)),
    "embedding keeps the last gradient of a row": ("nn.functional.embedding", replace(embedding_op, backward=keeps_the_last)),
    "layernorm's statistics have no gradient": ("nn.functional.layer_norm", replace(layernorm_op, backward=forgets_the_mean)),
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("what", WRONG)
def test_control_a_wrong_operation_is_noticed(what: str, fmt: str, op_db: dict[str, Any]) -> None:
    name, op = WRONG[what]
    calls, _ = arranged(op_db[name], name, fmt)
    with mock.patch.dict(OPS, {op.name: op}):
        # In FP32 there is no rounding before the bias that is not a part of every sum.
        assert (noticed(calls, fmt) > 0) == (what != "linear rounds before the bias" or fmt in LOW)


@pytest.mark.parametrize("fmt", LOW)
def test_control_attention_with_roundings_that_pytorchs_form_does_not_have_is_noticed(fmt: str, op_db: dict[str, Any]) -> None:
    name = "nn.functional.scaled_dot_product_attention"
    calls, _ = arranged(op_db[name], name, fmt)
    assert noticed([replace(call, policy="") for call in calls], fmt) > 0


def test_control_an_option_that_no_rule_knows_fails(op_db: dict[str, Any]) -> None:
    opinfo = op_db["nn.functional.relu"]
    sample = next(iter(opinfo.sample_inputs_func(opinfo, "cpu", torch.float32, requires_grad=True)))
    sample.kwargs["new"] = 1
    with pytest.raises(AssertionError):
        relu(sample)
