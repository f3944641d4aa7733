"""refimpl against ONNX's own test vectors.

The package `onnx` holds, for each node type of the exchange format, test cases: inputs, attributes, and the outputs that a
backend must give. Here refimpl is that backend, for the node types that it has an operation for, and for both optimizers.
The cases are built in memory, by importing ONNX's own case modules; no data files are read.

Every case of these node types is run, unless `DIFFERENT` lists it with the reason. Where ONNX states a computation in
another way (another axis, epsilon or scale), the algebra that leads to refimpl's form stands at the function that runs it.

Casts, sums of two terms, lookups and shapes must be identical. Elsewhere both results, refimpl's and ONNX's own, must lie
within an error bound of the exact value: `Near` carries each FP32 rounding through the formula, and `stored` each rounding to
16 bits (both are explained in bounds.py).
"""

from __future__ import annotations

import copy
import fnmatch
import importlib
import math
import pkgutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import (
    Near,
    assert_agrees,
    gelu_erf_near,
    gelu_tanh_near,
    layernorm_near,
    linear_near,
    near,
    possible,
    rmsnorm_near,
    silu_near,
    softmax_of,
    stored,
)
from op_calls import OF_TRANSFORMERS

from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.elementwise import erf
from refimpl.nn.models.model import Model, Parameter
from refimpl.nn.ops import OPS, fan_in
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of, is_float, widens_to
from refimpl.optim.adamw import AdamW
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe

onnx = pytest.importorskip("onnx", reason="ONNX's test vectors need onnx: pip install -e '.[parity]'")

Array = np.ndarray

DIFFERENT: dict[str, str] = {
    # Cast, CastLike
    "test_cast*_*INT[248]": "refimpl has no integer formats",
    "test_cast*_*INT[248]_to_*": "refimpl has no integer formats",
    "test_cast*FNUZ*": "refimpl has no FNUZ formats (FP8 without infinities and without a negative zero)",
    "test_cast_e8m0_*_to_FLOAT8E8M0": "rounds scales up, so that nothing overflows; refimpl rounds to the nearest",
    # Add, Gemm, MatMul
    "test_add_*int*": "refimpl has no integer formats",
    "test_gemm_default_scalar_bias": "linear has one bias for each column, not one for all",
    "test_gemm_default_single_elem_vector_bias": "linear has one bias for each column, not one for all",
    "test_gemm_default_matrix_bias": "linear has one bias for each column, not one for each element",
    "test_matmul_bcast": "matmul has equal leading axes, no broadcasting",
    "test_matmul_*1d*": "matmul has matrices, no vectors",
    # Einsum
    "test_einsum_sum*": "a sum over an axis alone is no operation of refimpl",
    "test_einsum_batch_diagonal": "the diagonal is no operation of refimpl",
    "test_einsum_inner_prod": "matmul has matrices, no vectors",
    "test_einsum_scalar": "nothing is computed",
    # Gather
    "test_gather_negative_indices": "tokens count from 0; what -1 would mean is not defined",
    # SoftmaxCrossEntropyLoss
    "test_sce_*weights*": "cross_entropy has no weights of the classes",
    "test_sce_*mean_weight*": "cross_entropy has no weights of the classes",
    "test_sce_*sum_weight*": "cross_entropy has no weights of the classes",
    # Attention
    "test_attention_*mask*": "attention has the causal mask, no other",
    "test_attention_*qk_matmul_bias": "attention has the causal mask, no other",
    "test_attention_*qk_matmul_soft*": "attention has the causal mask, no other",
    "test_attention_*qk_matmul_output_mode3_softmax_precision": "attention has the causal mask, no other",
    "test_attention_*softcap*": "attention does not cap its scores",
    "test_attention_*diff_head*": "attention has heads of one size, so that q, k and v come from one linear layer",
    "test_attention_*past*": "training has no cache of keys and values",
    "test_attention_*nonpad*": "attention has no padding",
    "test_attention_*padded_kv*": "attention has no padding",
    "test_attention_*local_window": "attention has no window",
    "test_attention_bidirectional_window": "attention has no window",
    # Momentum
    "test_nesterov_momentum": "SGD has no Nesterov momentum",
}
"""Cases that are not run, by pattern of the name, and what refimpl does not have."""


# ------------------------------------------------------------------------------------------------------------ the cases


@dataclass
class Case:
    """One vector. `attribute` keeps a list of what was asked for: an attribute that nobody asks for fails the case."""

    name: str
    node_type: str
    attributes: dict[str, Any]
    inputs: list[Array | None]
    outputs: list[Array]
    asked: set[str] = field(default_factory=set)

    def attribute(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return self.attributes.get(name, default)

    def decimal(self, name: str, default: float) -> float:
        """ONNX stores the attribute 0.95 as the nearest FP32 number, but computes its vectors with 0.95 itself: the shortest
        decimal that gives this FP32 number."""
        return float(str(np.float32(self.attribute(name, default))))

    def arrays(self, count: int) -> list[Array]:
        """All inputs, which must be this many: an input that a runner does not know must not be dropped."""
        present = [x for x in self.inputs if x is not None]
        if not len(present) == len(self.inputs) == count:
            raise AssertionError(f"{len(present)} of {len(self.inputs)} inputs, not {count}")
        return present


def collect(node_types: Iterable[str]) -> list[Case]:
    """ONNX's cases of these node types. Of its case modules, those that name one of them; each fills one list on import.

    A case whose name has 'expanded' is left out: the vectors of another, for backends that have only simpler node types.
    """
    node_types = set(node_types)
    package = importlib.import_module("onnx.backend.test.case.node")
    with warnings.catch_warnings():
        # Making the vectors of casts, NumPy says that 1e6 overflows in FP16; onnx does not silence it.
        warnings.filterwarnings("ignore", "overflow encountered in cast", RuntimeWarning, r"onnx\.backend\.test\.case\.node")
        for module in pkgutil.iter_modules(package.__path__):
            source = Path(package.__path__[0], f"{module.name}.py")
            if source.is_file() and any(f'"{name}"' in source.read_text(encoding="utf-8") for name in node_types):
                importlib.import_module(f"{package.__name__}.{module.name}")
    cases = []
    for case in package._NodeTestCases:
        (node, *others) = case.model.graph.node
        if others or node.op_type not in node_types or "_expanded" in case.name:
            continue
        ((inputs, outputs),) = case.data_sets
        given = iter(inputs)
        cases.append(
            Case(
                case.name,
                node.op_type,
                {a.name: text(onnx.helper.get_attribute_value(a)) for a in node.attribute},
                [array(next(given)) if name else None for name in node.input],
                [array(x) for x in outputs],
            )
        )
    return cases


def text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def array(x: Any) -> Array:
    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else np.asarray(x)


def difference(name: str) -> str | None:
    """The first pattern that the name matches."""
    return next((pattern for pattern in DIFFERENT if fnmatch.fnmatchcase(name, pattern)), None)


# ----------------------------------------------------------------------------------------------------------- comparisons


def identical(ours: Array, expected: Array) -> None:
    """Format, shape and every bit, but for the payload of NaNs."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    if is_float(expected):
        ours, expected = canonical(ours), canonical(expected)
    assert ours.tobytes() == expected.tobytes(), (ours, expected)


def canonical(x: Array) -> Array:
    return np.where(np.isnan(x), np.asarray(math.nan, np.float32).astype(x.dtype), x)


def agree(ours: Array, expected: Array, exact: Near) -> None:
    """Both within the bound of the exact value."""
    assert ours.dtype == expected.dtype == np.float32
    assert_agrees(ours, expected, exact, "fp32")


def run_op(name: str, recipe: str, /, *operands: Any, **static: Any) -> tuple[Array, Any]:
    """Forward in the recipe of that name: all in this format, sums in FP32."""
    return OPS[name].forward(*operands, p=Run(get_recipe(recipe).policy, NUMPY).precision(name, "here"), **static)


def wide(x: Array) -> Near:
    return near(np.asarray(x).astype(np.float64))


def constant(x: float) -> Near:
    """A constant that is rounded to FP32 before it is used."""
    return Near(np.float64(x)) * 1


# --------------------------------------------------------------------------------------------------------------- casts


def run_cast(case: Case) -> None:
    """Cast and CastLike. FP8 saturates if not told otherwise, and narrower formats have no other way; 16 bits overflow."""
    if case.node_type == "CastLike":
        x, like = case.arrays(2)
        fmt = format_of(like)
    else:
        (x,) = case.arrays(1)
        fmt = format_of(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(case.attribute("to"))))
    saturate = case.attribute("saturate", 1)
    if widens_to(format_of(x), fmt):
        identical(widen(x, fmt), case.outputs[0])
        return
    overflow = None if FORMATS[fmt].bits > 8 else "saturate" if saturate else "inf"
    ours = cast(x, fmt, overflow=overflow)
    identical(ours, case.outputs[0])
    if overflow is None:  # the operation that the tape records is the same cast
        identical(run_op("cast", "fp32", x, fmt=fmt)[0], case.outputs[0])


# ------------------------------------------------------------------------------------------------- elementwise and shapes


def run_relu(case: Case) -> None:
    identical(run_op("relu", "fp32", *case.arrays(1))[0], case.outputs[0])


def run_add(case: Case) -> None:
    """One correctly rounded addition: identical."""
    identical(run_op("add", "fp32", *case.arrays(2))[0], case.outputs[0])


def run_sum(case: Case) -> None:
    """Sum of any number of tensors: what fan_in does with the gradients of a tensor that is used several times."""
    total, *others = case.arrays(len(case.inputs))
    exact = wide(total)
    for x in others:
        p = Run(get_recipe("fp32").policy, NUMPY).precision("fan_in", "here")
        total, exact = fan_in.forward(total, x, p)[0], exact + wide(x)
    agree(total, case.outputs[0], exact)


def run_gelu(case: Case) -> None:
    (x,) = case.arrays(1)
    op, formula = {"tanh": ("gelu_tanh", gelu_tanh_near), "none": ("gelu_erf", gelu_erf_near)}[
        case.attribute("approximate", "none")
    ]
    agree(run_op(op, "fp32", x)[0], case.outputs[0], formula(wide(x), near(0.0))[0])


def run_swish(case: Case) -> None:
    assert case.attribute("alpha", 1.0) == 1.0
    (x,) = case.arrays(1)
    agree(run_op("silu", "fp32", x)[0], case.outputs[0], silu_near(wide(x), near(0.0))[0])


def run_erf(case: Case) -> None:
    """The polynomial inside gelu_erf; ONNX's vector is the C library's erf."""
    (x,) = case.arrays(1)
    agree(erf(x, Run(get_recipe("fp32").policy, NUMPY).precision("gelu_erf", "here")), case.outputs[0], wide(x).erf())


def run_reshape(case: Case) -> None:
    """ONNX's rules for 0 and -1 in a shape are not refimpl's business: it is told the shape that they lead to."""
    case.attribute("allowzero")
    x, _ = case.arrays(2)
    identical(run_op("reshape", "fp32", x, shape=case.outputs[0].shape)[0], case.outputs[0])


def run_transpose(case: Case) -> None:
    (x,) = case.arrays(1)
    axes = tuple(case.attribute("perm", reversed(range(x.ndim))))
    identical(run_op("transpose", "fp32", x, axes=axes)[0], case.outputs[0])


def run_split(case: Case) -> None:
    """One part after another. The sizes are stated, or the axis is divided into parts of one size and a smaller rest."""
    x = case.inputs[0]
    assert x is not None and case.attribute("axis", 0) % x.ndim == x.ndim - 1
    parts = case.attribute("num_outputs", len(case.outputs))
    each = -(-x.shape[-1] // parts)
    sizes = case.arrays(2)[1].tolist() if len(case.inputs) > 1 else [each] * (parts - 1) + [x.shape[-1] - each * (parts - 1)]
    stops = np.cumsum(sizes).tolist()
    for start, stop, expected in zip([0, *stops], stops, case.outputs, strict=False):
        identical(run_op("split", "fp32", x, start=start, stop=stop)[0], expected)


def run_gather(case: Case) -> None:
    """Rows of a table by number: the axis comes first and all others become the row, which moves values only."""
    data, indices = case.arrays(2)
    assert (indices >= 0).all()
    axis = case.attribute("axis", 0)
    table = np.moveaxis(data, axis, 0)
    rows, _ = run_op("embedding", "fp32", indices, table.reshape(len(table), -1))
    rows = rows.reshape(*indices.shape, *table.shape[1:])
    identical(np.moveaxis(rows, range(indices.ndim), range(axis, axis + indices.ndim)), case.outputs[0])


# -------------------------------------------------------------------------------------------------------------- products


def run_matmul(case: Case) -> None:
    a, b = case.arrays(2)
    assert a.ndim == b.ndim >= 2 and a.shape[:-2] == b.shape[:-2]
    agree(run_op("matmul", "fp32", a, b)[0], case.outputs[0], wide(a) @ wide(b))


def run_gemm(case: Case) -> None:
    """alpha A B + beta C = linear(alpha A, B^T, beta C), the second being one rounding of each factor earlier."""
    A, B, C = (*case.arrays(len(case.inputs)), None)[:3]
    A = A.T if case.attribute("transA", 0) else A
    B = B.T if case.attribute("transB", 0) else B
    alpha, beta = case.decimal("alpha", 1.0), case.decimal("beta", 1.0)
    bias = None if C is None else C.reshape(B.shape[1]) * np.float32(beta)
    y, _ = run_op("linear", "fp32", A * np.float32(alpha), B.T, bias)
    x, w, b = wide(A), wide(B.T), wide(np.zeros(1) if C is None else C)
    before = linear_near(x * constant(alpha), w, b * constant(beta), near(np.zeros(case.outputs[0].shape)))[0]
    agree(y, case.outputs[0], before.worse_of((x @ w.T) * constant(alpha) + b * constant(beta)))


def run_einsum(case: Case) -> None:
    """The equation of a batch of products is matmul, that of a transposed matrix transpose; in FP64 and BF16."""
    equation, inputs = case.attribute("equation").replace(" ", ""), case.arrays(len(case.inputs))
    fmt = format_of(inputs[0])
    if equation == "ij->ji":
        identical(run_op("transpose", fmt, *inputs, axes=(1, 0))[0], case.outputs[0])
        return
    assert equation == "bij,bjk->bik"
    a, b = inputs
    y, _ = run_op("matmul", fmt, a, b)
    if fmt == "bf16":
        identical(y, case.outputs[0])  # the operands are 0 and 1, so that nothing is rounded
        return
    # K products and K - 1 sums in FP64, on both sides.
    assert fmt == "fp64" and (np.abs(y - case.outputs[0]) <= 2 * gamma(a.shape[-1], fmt) * (np.abs(a) @ np.abs(b))).all()


def gamma(n: int, fmt: str) -> float:
    """The relative error of n roundings to a format."""
    u = FORMATS[fmt].eps / 2
    return n * u / (1 - n * u)


# ----------------------------------------------------------------------------------------------------- norms and softmax


def run_softmax(case: Case) -> None:
    """Over another axis than the last: the axis is moved there and back."""
    (x,) = case.arrays(1)
    axis = case.attribute("axis", -1)
    x, expected = (np.moveaxis(v, axis, -1) for v in (x, case.outputs[0]))
    agree(run_op("softmax", "fp32", x)[0], expected, softmax_of(wide(x)))


def rows_with_refimpls_epsilon(case: Case, x: Array) -> tuple[Array, Near, float]:
    """x as rows of all axes that are normalized together, times s, and s.

    refimpl's epsilon is 1e-5. With another, y = (x - mean) / sqrt(var + eps) stays the same if x is multiplied by
    s = sqrt(1e-5 / eps): mean, standard deviation and the root of epsilon all get the factor s.
    """
    rows = x.reshape(math.prod(x.shape[: case.attribute("axis", -1) % x.ndim]), -1)
    epsilon = case.decimal("epsilon", 1e-5)
    if epsilon == 1e-5:
        return rows, wide(rows), 1.0
    s = math.sqrt(1e-5 / epsilon)
    return rows * np.float32(s), wide(rows) * constant(s), s


def run_layernorm(case: Case) -> None:
    """The result, and the two statistics that refimpl keeps for backward."""
    x, w, b = case.arrays(3)
    rows, exact, s = rows_with_refimpls_epsilon(case, x)
    y, (_, mean, rstd, _) = run_op("layernorm", "fp32", rows, w.reshape(-1), b.reshape(-1))
    expected, expected_mean, expected_rstd = case.outputs
    W, B, dy = wide(w.reshape(-1)), wide(b.reshape(-1)), near(np.zeros(rows.shape))
    agree(y, expected.reshape(rows.shape), layernorm_near(exact, W, B, dy)[0])
    agree(mean / np.float32(s), expected_mean.reshape(-1, 1), exact.mean() / constant(s))
    centered = exact - exact.mean()
    exact_rstd = ((centered * centered).mean() + constant(1e-5)).rsqrt() * constant(s)
    agree(rstd * np.float32(s), expected_rstd.reshape(-1, 1), exact_rstd)


def run_rmsnorm(case: Case) -> None:
    x, w = case.arrays(2)
    rows, exact, _ = rows_with_refimpls_epsilon(case, x)
    y, _ = run_op("rmsnorm", "fp32", rows, w.reshape(-1))
    agree(y, case.outputs[0].reshape(rows.shape), rmsnorm_near(exact, wide(w.reshape(-1)), near(np.zeros(rows.shape)))[0])


def run_cross_entropy(case: Case) -> None:
    """The classes are ONNX's second axis, refimpl's last. refimpl has the mean: a sum is the mean times the number of rows,
    and no reduction at all is the mean of each row. ONNX's second output, the log probabilities, is what backward makes of
    the two values a row that refimpl keeps.
    """
    x, targets = case.arrays(2)
    ignore_index = case.attribute("ignore_index", -100)
    reduction, expected = case.attribute("reduction", "mean"), case.outputs[0]
    logits, targets = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]), targets.reshape(-1)
    counts = targets != ignore_index
    rows, target = int(counts.sum()), targets * counts
    mean, (_, largest, log_sum, *_) = run_op("cross_entropy", "fp32", logits, targets, ignore_index=ignore_index)

    z = wide(logits)
    shifted = z - z.value.max(-1, keepdims=True)
    # ONNX writes log(softmax(z)).
    log_p = (shifted - shifted.exp().sum(-1, keepdims=True).log()).worse_of(softmax_of(z).log())
    at = np.arange(len(target)), target
    each = -Near(log_p.value[at] * counts, log_p.err[at] * counts)
    if reduction == "mean":
        agree(mean, expected, each.sum(0) / rows)
    elif reduction == "sum":
        agree(mean * np.float32(rows), expected, each.sum(0) / rows * rows)
    else:
        assert reduction == "none"
        # The mean of an ignored row alone is NaN, where ONNX has 0.
        alone = [run_op("cross_entropy", "fp32", logits[i : i + 1], target[i : i + 1])[0] for i in range(len(target))]
        agree(np.stack(alone) * counts.astype(np.float32), expected.reshape(-1), each)
    if len(case.outputs) > 1:
        agree(logits - largest - log_sum, np.moveaxis(case.outputs[1], 1, -1).reshape(logits.shape), log_p)


# ------------------------------------------------------------------------------------------------------------- attention


def run_attention(case: Case) -> None:
    """refimpl's attention is causal, with as many keys as queries and heads of one number. Other forms are led to it:

    - causal, more keys than queries: those beyond the last query are seen by none, and left out;
    - not causal: every query is the last position of a causal attention over all keys, on its own;
    - fewer heads of keys and values than of queries: each is repeated, as ONNX defines it;
    - another scale than 1/sqrt(D): the queries are multiplied by scale sqrt(D) beforehand.

    Compared is the result. The scores, which ONNX makes a further output of, refimpl does not hand out.
    """
    Q, K, V = case.arrays(3)
    assert case.attribute("left_window_size", -1) == case.attribute("right_window_size", -1) == -1
    expected = case.outputs[0]
    if Q.ndim == 3:
        heads, kv_heads = case.attribute("q_num_heads"), case.attribute("kv_num_heads")
        Q, K, V, expected = (by_heads(x, n) for x, n in ((Q, heads), (K, kv_heads), (V, kv_heads), (expected, heads)))
    K, V = (np.repeat(x, Q.shape[1] // x.shape[1], axis=1) for x in (K, V))
    (T, D), fmt = Q.shape[-2:], format_of(Q)
    scale = case.decimal("scale", 0.0) or 1 / math.sqrt(D)
    assert fmt == "fp32" or "scale" not in case.attributes
    stretch = scale * math.sqrt(D)
    q, exact_q = Q * Q.dtype.type(stretch), wide(Q) * constant(stretch)  # exact where there is no scale: 1

    if case.attribute("is_causal", 0):
        K, V, mask = K[:, :, :T], V[:, :, :T], np.tril(np.ones((T, T), bool))
        ours = causal_attention(q, K, V)
    else:
        mask = np.ones((T, K.shape[2]), bool)
        ours = np.concatenate([attention_of_one_query(q[:, :, i], K, V) for i in range(T)], axis=2)

    assert ours.dtype == expected.dtype
    k, v = wide(K), wide(V)
    for x, exact in (
        (ours, refimpls_attention(exact_q, k, v, mask, fmt)),
        (expected, onnxs_attention(wide(Q), k, v, mask, fmt, scale)),
    ):
        least, greatest = possible(exact, fmt)
        assert ((least <= wide(x).value) & (wide(x).value <= greatest)).all(), "outside of what is possible"


def by_heads(x: Array, heads: int) -> Array:
    B, T, C = x.shape
    return x.reshape(B, T, heads, C // heads).transpose(0, 2, 1, 3)


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """refimpl's attention on (B, H, T, D), which it has from one linear layer as (B, T, 3 H D)."""
    B, H, T, D = q.shape
    qkv = np.stack([x.transpose(0, 2, 1, 3) for x in (q, k, v)], axis=2).reshape(B, T, 3 * H * D)
    y, _ = run_op("attention", format_of(q), np.ascontiguousarray(qkv), n_head=H)
    return by_heads(y, H)


def attention_of_one_query(q: Array, k: Array, v: Array) -> Array:
    """q (B, H, D), as the last position of a causal attention over all keys."""
    queries = np.zeros_like(k)
    queries[:, :, -1] = q
    return causal_attention(queries, k, v)[:, :, -1:]


def masked_softmax(S: Near, mask: Array, each: Callable[[Near], Near], sum_: Callable[[Near], Near]) -> Near:
    """`each` rounds after every operation, `sum_` at every step of the sum; or they do nothing."""
    err = S.err + np.zeros_like(S.value)
    largest = Near(np.where(mask, S.value, -np.inf).max(-1, keepdims=True), np.where(mask, err, 0).max(-1, keepdims=True))
    e = each(each(S.where(mask, 0.0) - largest).exp()).where(mask, 0.0)
    return e / sum_(e.sum(-1, keepdims=True))


def refimpls_attention(q: Near, k: Near, v: Near, mask: Array, fmt: str) -> Near:
    """Scores, scaled scores and softmax are rounded to 16 bits (`stored`), and then the result."""
    S = stored(stored(q @ k.T, fmt) * constant(1 / math.sqrt(q.value.shape[-1])), fmt)
    return stored(masked_softmax(S, mask, lambda x: x, lambda x: x), fmt) @ v


def onnxs_attention(q: Near, k: Near, v: Near, mask: Array, fmt: str, scale: float) -> Near:
    """A rounding after every operation: queries and keys are multiplied by the root of the scale each, and the softmax has
    four operations. Its sum may be rounded at each step; products of 16-bit matrices NumPy sums in FP32."""

    def each(x: Near) -> Near:
        return stored(x, fmt)

    def sum_(x: Near) -> Near:
        return x if fmt == "fp32" else Near(x.value, x.err + gamma(mask.shape[-1], fmt) * (x.value + x.err))

    root = each(constant(math.sqrt(scale)))
    S = each(each(q * root) @ each(k * root).T)
    return each(masked_softmax(S, mask, each, sum_)) @ v


# ------------------------------------------------------------------------------------------------------------ optimizers


def update(rule: AdamW | SGD, lr: float, t: int, x: list[Array], gradients: list[Array], *moments: list[Array]) -> list[Array]:
    """One update by refimpl's Optimizer, which has made t - 1 before: the new weights and moments, each as one buffer.

    The parameters have two axes each, so that weight decay acts on them.
    """
    parameters = {f"x{i}": Parameter((w.size, 1), std=1.0) for i, w in enumerate(x)}
    kinds = ("weights", "grads", *rule.moments)
    state = State(Model("vectors", {}, parameters, {}, None, None), dict.fromkeys(kinds, "fp32"), NUMPY)
    for kind, values in zip(kinds, (x, gradients, *moments), strict=True):
        state.buffers[kind][...] = np.concatenate(values)
    state.t = np.asarray(t - 1)
    Optimizer(rule, Schedule(lr, lr, 0, t)).update(state, np.float32(1), 1.0, np.False_)
    return [state.buffers[kind] for kind in ("weights", *rule.moments)]


def groups(case: Case, kinds: int) -> list[list[Array]]:
    """ONNX's optimizers take any number of parameters: all X, then all G, and so on."""
    arrays = case.arrays(len(case.inputs))[2:]
    n = len(arrays) // kinds
    return [arrays[i * n : (i + 1) * n] for i in range(kinds)]


def regularised(x: Array, g: Array, coefficient: float) -> tuple[Array, Near]:
    """ONNX couples the decay: it adds norm_coefficient X to the gradient, before the moments see it. refimpl's decay is
    decoupled and does not enter here; it is given the gradient after that addition."""
    return np.float32(coefficient) * x + g, wide(x) * constant(coefficient) + wide(g)


MANY = 2000
"""Updates after which the bias corrections of refimpl's Adam are exactly 1: 0.95^2000 is less than 2^-53."""


@dataclass(frozen=True)
class AdamAlgebra:
    """ONNX's Adam, as refimpl's AdamW with other numbers.

        ONNX      x = (1 - post) (x - r c2/c1 m / (sqrt(v) + eps)),   c1 = 1 - alpha^T,  c2 = sqrt(1 - beta^T)
        refimpl   x = (1 - lr wd) x - (lr/c1) m / (sqrt(v)/c2 + eps')

    They are one with eps' = eps / c2, lr = r (1 - post), lr wd = post. T = 0 means no bias correction in ONNX: c1 = c2 = 1,
    as after many updates. norm_coefficient changes the gradient alone: `regularised`.
    """

    r: float
    T: int
    alpha: float
    beta: float
    eps: float
    post: float

    def compare(self, inputs: list[list[Array]], norm: float, expected: list[Array]) -> None:
        """inputs: X, G, V and H (here x, g, m and v), each a list of parameters; expected: x, m and v end to end."""
        x, g, m, v = inputs
        c1, c2 = (1 - self.alpha**self.T, math.sqrt(1 - self.beta**self.T)) if self.T else (1.0, 1.0)
        lr = self.r * (1 - self.post)
        rule = AdamW((self.alpha, self.beta), self.eps / c2, self.post / lr)
        gradients, exact = regularised(np.concatenate(x), np.concatenate(g), norm)
        ours = update(rule, lr, self.T or MANY, x, [gradients], m, v)

        X, M, V = (wide(np.concatenate(values)) for values in (x, m, v))
        a, b, one_less_a, one_less_b = (constant(c) for c in (self.alpha, self.beta, 1 - self.alpha, 1 - self.beta))
        M = (M + (exact - M) * one_less_a).worse_of(M * a + exact * one_less_a)
        V = V * b + exact * exact * one_less_b
        root = 1 / V.rsqrt()
        left = X * constant(1 - self.post) - M * constant(lr / c1) / (root / constant(c2) + constant(self.eps / c2))
        right = (X - constant(self.r * c2 / c1) * (M / (root + constant(self.eps)))) * constant(1 - self.post)
        for i, value in enumerate((left.worse_of(right), M, V)):
            agree(ours[i], expected[i], value)


def run_adam(case: Case) -> None:
    (r, T), inputs = case.arrays(len(case.inputs))[:2], groups(case, 4)
    names = ("alpha", 0.9), ("beta", 0.999), ("epsilon", 1e-6), ("norm_coefficient_post", 0.0)
    adam = AdamAlgebra(float(str(r)), int(T), *(case.decimal(*name) for name in names))
    n = len(inputs[0])
    expected = [np.concatenate(case.outputs[i * n : (i + 1) * n]) for i in range(3)]
    adam.compare(inputs, case.decimal("norm_coefficient", 0.0), expected)


def run_momentum(case: Case) -> None:
    """ONNX: v = alpha v + beta (g + norm_coefficient x), with 1 in the place of beta at T = 0;  x = x - r v. That is SGD with
    the momentum alpha, on the gradient after that addition."""
    (r, T), (x, g, m) = case.arrays(len(case.inputs))[:2], groups(case, 3)
    case.attribute("beta")
    assert case.attribute("mode") == "standard" and T == 0
    alpha, r = case.decimal("alpha", 0.0), float(str(r))
    gradients, exact = regularised(np.concatenate(x), np.concatenate(g), case.decimal("norm_coefficient", 0.0))
    ours = update(SGD(alpha), r, 1, x, [gradients], m)
    n = len(x)
    M = wide(np.concatenate(m)) * constant(alpha) + exact
    X = wide(np.concatenate(x)) - M * constant(r)
    for i, value in enumerate((X, M)):
        agree(ours[i], np.concatenate(case.outputs[i * n : (i + 1) * n]), value)


# ---------------------------------------------------------------------------------------------------------------- tests


@dataclass(frozen=True)
class Runner:
    """Runs the cases of one node type; which operations of refimpl that is about; and at least how many cases there are."""

    run: Callable[[Case], None]
    ops: tuple[str, ...]
    at_least: int


RUNNERS = {
    "Cast": Runner(run_cast, ("cast",), 26),
    "CastLike": Runner(run_cast, ("cast",), 24),
    "Add": Runner(run_add, ("add",), 2),
    "Sum": Runner(run_sum, (), 3),
    "Relu": Runner(run_relu, ("relu",), 1),
    "Gelu": Runner(run_gelu, ("gelu_tanh", "gelu_erf"), 4),
    "Erf": Runner(run_erf, (), 1),
    "Swish": Runner(run_swish, ("silu",), 1),
    "Reshape": Runner(run_reshape, ("reshape",), 10),
    "Transpose": Runner(run_transpose, ("transpose",), 7),
    "Split": Runner(run_split, ("split",), 16),
    "Gather": Runner(run_gather, ("embedding",), 3),
    "MatMul": Runner(run_matmul, ("matmul",), 3),
    "Gemm": Runner(run_gemm, ("linear",), 8),
    "Einsum": Runner(run_einsum, ("matmul", "transpose"), 4),
    "Softmax": Runner(run_softmax, ("softmax",), 7),
    "LayerNormalization": Runner(run_layernorm, ("layernorm",), 19),
    "RMSNormalization": Runner(run_rmsnorm, ("rmsnorm",), 19),
    "SoftmaxCrossEntropyLoss": Runner(run_cross_entropy, ("cross_entropy",), 10),
    "Attention": Runner(run_attention, ("attention",), 19),
    "Adam": Runner(run_adam, (), 2),
    "Momentum": Runner(run_momentum, (), 2),
}

CASES = {case.name: case for case in collect(RUNNERS)}
TO_RUN = [name for name in CASES if difference(name) is None]


def run_case(case: Case) -> None:
    """Errors: AssertionError for an attribute that the runner did not ask for."""
    RUNNERS[case.node_type].run(case)
    assert set(case.attributes) <= case.asked, case.attributes


@pytest.mark.parametrize("name", TO_RUN)
def test_vector(name: str) -> None:
    # A case of a form that its runner does not know fails here: it is to be led to refimpl's form, or listed in DIFFERENT.
    run_case(CASES[name])


@pytest.mark.parametrize("name", sorted(CASES.keys() - TO_RUN))
def test_what_is_listed_as_different_cannot_be_run(name: str) -> None:
    with pytest.raises((AssertionError, TypeError, ValueError)):
        run_case(CASES[name])


def test_every_pattern_of_the_differences_is_needed() -> None:
    assert {difference(name) for name in CASES} - {None} == set(DIFFERENT)


def test_as_many_cases_run_as_when_this_was_written() -> None:
    counts = Counter(CASES[name].node_type for name in TO_RUN)
    assert {name: counts[name] for name in RUNNERS if counts[name] < RUNNERS[name].at_least} == {}


def test_every_operation_has_a_node_type() -> None:
    assert {op for runner in RUNNERS.values() for op in runner.ops} == set(OPS) - OF_TRANSFORMERS


@pytest.mark.parametrize("T", [0, 1, 2, 100])
@pytest.mark.parametrize(("norm", "post"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.125), (0.5, 0.25)])
def test_adams_algebra_holds_for_bias_corrections_and_both_decays(T: int, norm: float, post: float) -> None:
    # ONNX's vectors have T = 0 and no decay afterwards; its reference evaluator computes the others.
    inputs, expected = onnxs_adam(T, norm, post)
    AdamAlgebra(**ADAM, T=T, post=post).compare(inputs, norm, expected)


ADAM = {"r": 0.125, "alpha": 0.875, "beta": 0.96875, "eps": 0.5}
"""FP32 numbers all of them, and an epsilon as large as the root beside it, so that its place counts."""


def onnxs_adam(T: int, norm: float, post: float) -> tuple[list[list[Array]], list[Array]]:
    """Inputs, and what ONNX's reference evaluator makes of them."""
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(0)
    x, g, m, v = (rng.standard_normal(1000).astype(np.float32) for _ in range(4))
    v = np.abs(v)
    names = ["R", "T", "X", "G", "V", "H"]
    node = onnx.helper.make_node(
        "Adam", names, ["X_new", "V_new", "H_new"], domain="ai.onnx.preview.training", alpha=ADAM["alpha"], beta=ADAM["beta"],
        epsilon=ADAM["eps"], norm_coefficient=norm, norm_coefficient_post=post,
    )  # fmt: skip
    values = (np.float32(ADAM["r"]), np.int64(T), x, g, m, v)
    outputs = ReferenceEvaluator(node).run(None, {name: np.asarray(value) for name, value in zip(names, values, strict=True)})
    return [[x], [g], [m], [v]], [y.astype(np.float32) for y in outputs]


# ----------------------------------------------------------------------------------------------------- negative controls


def changed(name: str, inputs: list[Array] | None = None, **attributes: Any) -> Case:
    case = copy.deepcopy(CASES[name])
    case.attributes |= attributes
    case.inputs = case.inputs if inputs is None else list(inputs)
    return case


@pytest.mark.parametrize(("name", "other"), [("test_gelu_tanh_2", "none"), ("test_gelu_default_2", "tanh")])
def test_control_the_other_gelu_is_beyond_the_bound(name: str, other: str) -> None:
    with pytest.raises(AssertionError, match="outside"):
        run_case(changed(name, approximate=other))


@pytest.mark.parametrize("name", ["test_cast_FLOAT_to_FLOAT8E4M3FN", "test_cast_no_saturate_FLOAT_to_FLOAT8E5M2"])
def test_control_the_other_overflow_is_noticed(name: str) -> None:
    with pytest.raises(AssertionError):
        run_case(changed(name, saturate=int("no_saturate" in name)))


def test_control_truncation_in_the_place_of_rounding_is_noticed() -> None:
    (x,) = CASES["test_cast_FLOAT_to_BFLOAT16"].arrays(1)
    truncated = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    with pytest.raises(AssertionError):
        run_case(changed("test_cast_FLOAT_to_BFLOAT16", [truncated]))


@pytest.mark.parametrize("fmt", ["", "_fp16", "_bf16"])
def test_control_attention_that_is_not_causal_or_not_scaled_is_noticed(fmt: str) -> None:
    name = f"test_attention_4d_causal{fmt}"
    Q, K, V = CASES[name].arrays(3)
    with pytest.raises(AssertionError, match="outside"):
        run_case(changed(name, is_causal=0))
    with pytest.raises(AssertionError, match="outside"):
        run_case(changed(name, [Q * Q.dtype.type(4), K, V]))


def test_control_another_epsilon_is_noticed() -> None:
    with pytest.raises(AssertionError, match="outside"):
        run_case(changed("test_layer_normalization_3d_axis2_epsilon", epsilon=0.09))


def test_control_adam_with_one_number_wrong_is_noticed() -> None:
    inputs, expected = onnxs_adam(2, 0.25, 0.125)
    right: dict[str, Any] = {**ADAM, "T": 2, "post": 0.125}
    AdamAlgebra(**right).compare(inputs, 0.25, expected)
    # The second is an epsilon in refimpl's place; the last leaves the coupled decay out.
    wrong = [({"T": 1}, 0.25), ({"eps": 0.5 * math.sqrt(1 - 0.96875**2)}, 0.25), ({"post": 0.0}, 0.25), ({}, 0.0)]
    for change, norm in wrong:
        with pytest.raises(AssertionError, match="outside"):
            AdamAlgebra(**right | change).compare(inputs, norm, expected)


def test_control_an_attribute_or_an_input_that_no_runner_knows_fails() -> None:
    with pytest.raises(AssertionError):
        run_case(changed("test_relu", new=1))
    with pytest.raises(AssertionError):
        run_case(changed("test_relu", CASES["test_relu"].arrays(1) * 2))
