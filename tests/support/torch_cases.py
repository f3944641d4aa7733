"""Operations against PyTorch on the CPU: forward and backward, on identical inputs, in every recipe.

Both must give what a correct evaluation can give; bounds.py derives what that is, and in 16 bits it is mostly one number.
test_mutants.py takes out every rounding that there is, and every time one of these comparisons must fail.

A `Case` is one operation in one recipe with operands in given formats. The op lists of CPU autocast are torch.autocast's
own; those of CUDA autocast, which need no GPU to be known, are spelled out here as casts. `check` is the test of a case; it
records the share of bit-identical elements, the share that was decided, and the largest distance in ulps at the scale of the
row, which each test prints (with -s, and into --junit-xml).
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from arrays import AMP, DTYPE, FORMATS, LOW, Array, array, rounded, wide
from autocast_lists import FP32_INSIDE_ON_CUDA, FP32_ON_CUDA, LOW_PRECISION
from bounds import (
    D,
    H,
    Near,
    T,
    add_near,
    agreement,
    attention_near,
    backend,
    cross_entropy_near,
    embedding_near,
    fast_versions,
    gamma,
    gelu_erf_near,
    gelu_new_near,
    gelu_tanh_near,
    grouped_attention_near,
    layernorm_near,
    linear_near,
    llama_rmsnorm_near,
    matmul_near,
    near,
    ours,
    relu_near,
    rmsnorm_near,
    rope_near,
    silu_near,
    softmax_near,
    stored,
    swiglu_near,
)

from refimpl.nn.autograd import Tape, Value
from refimpl.nn.ops import OPS, add, embedding, fan_in, linear
from refimpl.nn.rope_scaling import RopeScaling, rotation
from refimpl.precision.context import Run
from refimpl.precision.policy import EVERY_OTHER, Policy, Precision
from refimpl.precision.recipes import get_recipe

try:
    import torch
except ImportError:  # cases can be listed without it; the fixture `torch` skips their tests
    torch = None
F = torch and torch.nn.functional
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16} if torch else {}

RECIPES = [*FORMATS, *AMP]

ELEMENTWISE = ["add", "relu", "silu", "swiglu", "rope", "gelu_tanh", "gelu_new", "gelu_erf"]

REPORT: list[tuple[str, str]] = []
"""What the comparisons of the running test found: (name of the result, text)."""


def assert_agrees(ours: Array, theirs: Array, exact: Near, fmt: str, name: str = "result") -> None:
    """Every element of both is a possible result. Where only one is, they are therefore identical."""
    got = agreement(ours, theirs, exact, fmt)
    REPORT.append((name, str(got)))
    assert got.ours_outside == 0 and got.theirs_outside == 0, f"{name}: {got}"


def assert_format(x: Array, fmt: str, name: str) -> None:
    """The type that a result is stored in. Apart from `assert_agrees`, so that one can ask whether values alone tell."""
    assert x.dtype == DTYPE[fmt], f"{name} is {x.dtype}, not {fmt}"


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """With oneDNN, gelu in fp32 and bf16 uses another approximation of erf than the published one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the context manager itself reads a deprecated setting
        flags = torch.backends.mkldnn.flags(enabled=enabled)
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags.__exit__(None, None, None)


def tensor(x: Array, fmt: str | None = None) -> Any:
    """The same values in PyTorch: by way of fp32, which holds all of them."""
    if x.dtype == np.int64:
        return torch.tensor(x)
    name = fmt or next(name for name, dtype in DTYPE.items() if dtype == x.dtype)
    return torch.tensor(x.astype(np.float32)).to(TORCH[name])


def theirs(f: Callable[..., Any], operands: list[Array], dy: Array, fmt: str | None = None) -> tuple[Any, list[Any]]:
    """f on PyTorch tensors, and the gradients of the operands; fmt: on operands widened to it."""
    leaves = [tensor(x, fmt).requires_grad_(not is_data(x)) for x in operands]
    y = f(*leaves)
    y.backward(tensor(np.asarray(dy), fmt))
    return y, [leaf.grad for leaf in leaves]


@dataclass(frozen=True)
class Counterpart:
    """One operation here and there. operands: shapes, or tokens. `formula` has the errors of forward, then backward."""

    operands: tuple[Any, ...]
    torch: Callable[..., Any]
    formula: Callable[..., list[Near]] | None  # None: no arithmetic at all, so identical
    static: dict[str, Any] = field(default_factory=dict)

    # The gradients of PyTorch's 16-bit kernels that are less than one rounding of an FP32 sum: its layernorm rounds the mean
    # and rstd that it saves to 16 bits, and dgamma, dbeta (also those of FP32 weights) and the embedding's gradient after
    # every row. That is not what is specified here (on CUDA neither happens), so where an operand has 16 bits these are
    # compared with PyTorch in FP32 on the same values, rounded once.
    gradients_in_fp32: bool = False


rng = np.random.default_rng(12)

TOKENS, TARGETS = rng.integers(0, 20, 300), rng.integers(0, 50, 60)

ANGLES = rotation(100.0, 12, RopeScaling("default", {}), 0, 50)


def rotated(x: Any, cos: Any, sin: Any) -> Any:
    """RoPE as transformers' Llama computes it: cos and sin in the format of the hidden states, FP32 under autocast."""
    c, s = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
    heads = x.unflatten(-1, (-1, 2 * cos.shape[-1]))
    a, b = heads.chunk(2, -1)
    return (heads * c + torch.cat((-b, a), -1) * s).flatten(-2)


def llama_rmsnorm(x: Any, w: Any) -> Any:
    """RMSNorm as transformers' Llama computes it."""
    z = x.float()
    return w * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def gelu_new(x: Any, wide: bool = False) -> Any:
    """GELU as transformers' GPT-2 computes it, in its order, in which gradients are added. wide: autocast's cast before pow."""
    inner = math.sqrt(2.0 / math.pi)
    return 0.5 * x * (1.0 + torch.tanh(inner * (x + 0.044715 * torch.pow(x.float() if wide else x, 3.0))))


COUNTERPARTS = {
    "linear": Counterpart(((64, 32), (80, 32), (80,)), lambda x, w, b: F.linear(x, w, b), linear_near),
    "matmul": Counterpart(((2, 3, 32, 48), (2, 3, 48, 40)), lambda a, b: torch.matmul(a, b), matmul_near),
    "add": Counterpart(((50, 60), (60,)), lambda a, b: torch.add(a, b), add_near),
    "relu": Counterpart(((50, 60),), lambda x: torch.relu(x), relu_near),
    "silu": Counterpart(((50, 60),), lambda x: F.silu(x), silu_near),
    "swiglu": Counterpart(((50, 60), (50, 60)), lambda g, u: F.silu(g) * u, swiglu_near),
    "rope": Counterpart(((6, 50, 24), *ANGLES), lambda x, cos, sin: rotated(x, cos, sin), rope_near),
    "gelu_tanh": Counterpart(((50, 60),), lambda x: F.gelu(x, approximate="tanh"), gelu_tanh_near),
    "gelu_new": Counterpart(((50, 60),), lambda x: gelu_new(x), gelu_new_near),
    "gelu_erf": Counterpart(((50, 60),), lambda x: F.gelu(x), gelu_erf_near),
    "layernorm": Counterpart(
        ((50, 100), (100,), (100,)), lambda x, w, b: F.layer_norm(x, (100,), w, b), layernorm_near, gradients_in_fp32=True
    ),
    "rmsnorm": Counterpart(
        ((50, 100), (100,)), lambda x, w: F.rms_norm(x, (100,), w, eps=1e-5), rmsnorm_near, gradients_in_fp32=True
    ),
    "llama_rmsnorm": Counterpart(((8, 600), (600,)), lambda x, w: llama_rmsnorm(x, w), llama_rmsnorm_near),
    "softmax": Counterpart(((50, 60),), lambda x: torch.softmax(x, -1), softmax_near),
    "embedding": Counterpart((TOKENS, (20, 16)), lambda t, w: F.embedding(t, w), embedding_near, gradients_in_fp32=True),
    "cross_entropy": Counterpart(((60, 50), TARGETS), lambda z, t: F.cross_entropy(z.float(), t), cross_entropy_near),
    "reshape": Counterpart(((4, 6, 8),), lambda x: x.reshape(24, 8), None, {"shape": (24, 8)}),
    "transpose": Counterpart(((4, 6, 8),), lambda x: x.permute(2, 0, 1), None, {"axes": (2, 0, 1)}),
    "split": Counterpart(((4, 6, 12),), lambda x: torch.split(x, [4, 5, 3], dim=-1)[1], None, {"start": 4, "stop": 9}),
}
"""Both kinds of attention, the recorded cast, fan-in and weights that are used twice are cases of their own below."""


@dataclass(frozen=True)
class Case:
    """One operation in one recipe; `formats` are those of its floating-point operands, in order."""

    op: str
    recipe: str
    formats: tuple[str, ...] = ()
    scale: float = 1.0  # of the data: subnormals, or values where softmax saturates

    def __str__(self) -> str:
        return " ".join([self.recipe, self.op, *self.formats, *([f"x{self.scale:.0e}"] if self.scale != 1 else [])])


@dataclass(frozen=True)
class Expected:
    """One result of a case: what PyTorch gives, what is exact, the format that it was rounded to and is stored in."""

    name: str
    theirs: Array  # in fp64
    exact: Near
    rounded: str
    stored: str


@dataclass(frozen=True)
class Reference:
    """All of a case that is not refimpl's. Made once: the mutants of test_mutants.py are held against the same."""

    operands: list[Array]
    dy: Array
    expected: list[Expected]


def low_of(recipe: str) -> str:
    """The 16-bit format of a recipe."""
    return "bf16" if "bf16" in recipe else "fp16"


def is_data(x: Array) -> bool:
    """Whether an operand has no gradient: tokens, and the angles of RoPE."""
    return x.dtype == np.int64 or any(x is table for table in ANGLES)


def format_name(x: Any) -> str:
    """Of an array or a tensor."""
    return next(name for name in FORMATS if x.dtype in (DTYPE[name], TORCH[name]))


def autocast(f: Callable[..., Any], low: str) -> Callable[..., Any]:
    def run(*operands: Any) -> Any:
        with torch.autocast("cpu", dtype=TORCH[low]):
            return f(*operands)

    return run


def with_casts(f: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """What autocast does, spelled out: every floating-point operand is cast first, and its gradient comes back through it."""
    return lambda *operands: f(*(x.to(dtype) if x.is_floating_point() else x for x in operands))


def in_recipe(f: Callable[..., Any], op: str, recipe: str) -> Callable[..., Any]:
    """PyTorch's function by the op lists of the recipe."""
    if recipe in FORMATS:
        return with_casts(f, TORCH[recipe]) if op == "rope" else f  # cos and sin have the format of the model
    if recipe.endswith("-cpu"):
        return autocast(f, low_of(recipe))
    if op in LOW_PRECISION:
        return with_casts(f, TORCH[low_of(recipe)])
    if op in FP32_INSIDE_ON_CUDA:
        return lambda x: gelu_new(x, wide=True)
    return with_casts(f, torch.float32) if op in FP32_ON_CUDA else f


def operand_names(op: str) -> list[str]:
    return list(inspect.signature(OPS[op].forward).parameters)


def draw(case: Case) -> list[Array]:
    """Normal values; the same ones in every format, but for their rounding."""
    rng, formats = np.random.default_rng(11), iter(case.formats)
    operands = [x if isinstance(x, np.ndarray) else rng.standard_normal(x) for x in COUNTERPARTS[case.op].operands]
    scaled = range(len(operands)) if case.op == "add" else [0]
    return [x if is_data(x) else array(x * case.scale if i in scaled else x, next(formats)) for i, x in enumerate(operands)]


def gradient_of_output(op: str, shape: tuple[int, ...], fmt: str, scale: float = 1.0) -> Array:
    """Random, in the output's format; the loss scale for the loss."""
    if op == "cross_entropy":
        return np.float32(1024)
    return array(np.random.default_rng(13).standard_normal(shape) * scale, fmt)


@functools.cache
def reference(case: Case) -> Reference:
    if case.op in SPECIAL:
        return SPECIAL[case.op][0](case)
    counterpart, operands, low = COUNTERPARTS[case.op], draw(case), low_of(case.recipe)
    f = in_recipe(counterpart.torch, case.op, case.recipe)
    with onednn(case.op != "gelu_erf"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # rms_norm is slower then, it says
        y = f(*(tensor(x) for x in operands))
        dy = gradient_of_output(case.op, y.shape, format_name(y), case.scale if case.op in ELEMENTWISE else 1.0)
        y, gradients = theirs(f, operands, dy)
        stored_in = [format_name(g) for g in (y, *gradients) if g is not None]
        if counterpart.gradients_in_fp32 and low in case.formats:
            _, in_fp32 = theirs(counterpart.torch, operands, dy, "fp32")
            pairs = zip(gradients, in_fp32, strict=True)
            gradients = [None if g is None else rounded(wide(h), format_name(g)) for g, h in pairs]
    # Autocast's products see rounded operands, and what autocast stores in FP32 was rounded to 16 bits before.
    cast_in = case.op in LOW_PRECISION and case.recipe in AMP
    seen = [x if x.dtype == np.int64 else near(rounded(wide(x), low) if cast_in else wide(x)) for x in operands]
    results = [wide(y), *(wide(g) for g in gradients if g is not None)]
    if counterpart.formula is None:
        exact = [Near(x) for x in results]
    else:
        formats = {"fmt": stored_in[0], "grad_fmt": stored_in[1]}
        asked = formats.keys() & inspect.signature(counterpart.formula).parameters.keys()
        exact = counterpart.formula(*seen, near(wide(dy)), **{name: formats[name] for name in asked})
    names = ["y", *(f"d{name}" for name, g in zip(operand_names(case.op), gradients, strict=False) if g is not None)]
    return Reference(
        operands,
        dy,
        [Expected(n, r, e, low if cast_in else s, s) for n, r, e, s in zip(names, results, exact, stored_in, strict=True)],
    )


def policy_of(recipe: str) -> Policy:
    return POLICIES[recipe] if recipe in POLICIES else get_recipe(recipe).policy


def results(case: Case) -> list[Array]:
    """Ours: the output and the gradients."""
    if case.op in SPECIAL:
        return SPECIAL[case.op][1](case)
    wanted = reference(case)
    y, gradients = ours(policy_of(case.recipe), case.op, wanted.operands, wanted.dy, **COUNTERPARTS[case.op].static)
    return [y, *(g for g in gradients if g is not None)]


def check(case: Case) -> None:
    """The test of a case: of the definitions, and of what the NumPy backend runs in their place."""
    check_results(case, results(case))
    with fast_versions():
        check_results(case, results(case))


def check_results(case: Case, results: list[Array]) -> None:
    """Formats are PyTorch's, and values are possible."""
    for x, wanted in zip(results, reference(case).expected, strict=True):
        assert_format(x, wanted.stored, wanted.name)
        assert_agrees(x, wanted.theirs, wanted.exact, wanted.rounded, wanted.name)


def cases_of(*ops: str) -> Iterator[Case]:
    """Uniform recipes have one format. Under autocast activations come in FP32 or in 16 bits, and parameters are FP32, or,
    for products, the 16-bit copies that are shared within a step."""
    for op in ops:
        params = len(OPS[op].params)
        inputs = sum(not isinstance(x, np.ndarray) for x in COUNTERPARTS[op].operands) - params
        for recipe in FORMATS:
            yield Case(op, recipe, (recipe,) * (inputs + params))
        for recipe in AMP if COUNTERPARTS[op].formula else []:
            low = low_of(recipe)
            formats = [("fp32",) * (inputs + params)]
            if inputs:
                formats.append((low,) * inputs + ("fp32",) * params)
            if op == "linear":
                formats.append((low,) * (inputs + params))
            if op in ("add", "matmul"):
                formats += [("fp32", low), (low, "fp32")]
            yield from (Case(op, recipe, each) for each in formats)


def fan_in_reference(case: Case) -> Reference:
    """Three gradients of one tensor, added one after the other: the sums are exact but for their rounding."""
    (fmt,), rng = case.formats, np.random.default_rng(15)
    each = [array(rng.standard_normal(4000) * case.scale, fmt) for _ in range(3)]
    leaf = torch.zeros(4000, dtype=TORCH[fmt], requires_grad=True)
    for g in each:
        leaf.backward(tensor(g))
    a, b, c = (wide(g) for g in each)
    return Reference(each, each[0], [Expected("sum", wide(leaf.grad), Near(rounded(a + b, fmt) + c), fmt, fmt)])


def fan_in_results(case: Case) -> list[Array]:
    (a, b, c), run = reference(case).operands, Run(policy_of(case.recipe), backend())
    add_up, p = run.version(fan_in).forward, run.precision("fan_in", "here")
    return [add_up(add_up(a, b, p=p)[0], c, p=p)[0]]


def cast_reference(case: Case) -> Reference:
    """The copy of a parameter that autocast makes once per step."""
    low, rng = low_of(case.recipe), np.random.default_rng(16)
    w, dy = array(rng.standard_normal((40, 30)) * 1e-3, "fp32"), array(rng.standard_normal((40, 30)), low)
    y, (dw,) = theirs(lambda w: w.to(TORCH[low]), [w], dy)
    wanted = [
        Expected("y", wide(y), Near(wide(w)), low, format_name(y)),
        Expected("dw", wide(dw), Near(wide(dy)), low, format_name(dw)),
    ]
    return Reference([w], dy, wanted)


def cast_results(case: Case) -> list[Array]:
    wanted = reference(case)
    y, gradients = ours(policy_of(case.recipe), "cast", wanted.operands, wanted.dy, fmt=low_of(case.recipe))
    return [y, *gradients]


def weights_format(recipe: str) -> str:
    return recipe if recipe in FORMATS else "fp32"


def product_format(recipe: str) -> str:
    return recipe if recipe in FORMATS else low_of(recipe)


def linear_by_hand(x: Any, w: Any, recipe: str, copy: Any) -> Any:
    """F.linear by the lists of the recipe; `copy` is the 16-bit weight that all products of a step share on CUDA."""
    if recipe.startswith("amp") and not recipe.endswith("-cpu"):
        return F.linear(x.to(TORCH[low_of(recipe)]), copy)
    return in_recipe(F.linear, "linear", recipe)(x, w)


def on_tape(case: Case, build: Callable[[Tape, list[Array]], Value], tied: str) -> list[Array]:
    """Forward and backward of a model with one weight, `a.weight`, that `tied` stands for too: the output and dw."""
    wanted, kept = reference(case), {}
    t = Tape(Run(policy_of(case.recipe), backend()), {"a.weight": wanted.operands[0]}, {tied: "a.weight"})
    y = build(t, wanted.operands[1:])
    t.backward(y, wanted.dy, lambda name, g: kept.update({name: g}))
    return [y.array, kept["a.weight"]]


def shared_weight_reference(case: Case) -> Reference:
    """y = x1 w^T + x2 w^T. PyTorch caches autocast's cast, so both gradients meet at the 16-bit copy: f32(R(R(d1) + R(d2)))."""
    recipe, rng = case.recipe, np.random.default_rng(17)
    kept, fmt = weights_format(recipe), product_format(recipe)
    w, x1, x2 = (array(rng.standard_normal(s), kept) for s in ((40, 30), (5, 30), (5, 30)))
    dy = array(rng.standard_normal((5, 40)), fmt)
    leaf = tensor(w).requires_grad_(True)
    with torch.autocast("cpu", dtype=TORCH["bf16" if fmt == "fp32" else fmt], enabled=recipe.endswith("-cpu")):
        copy = leaf.to(TORCH[fmt])
        y = linear_by_hand(tensor(x1), leaf, recipe, copy) + linear_by_hand(tensor(x2), leaf, recipe, copy)
    y.backward(tensor(dy))

    seen = [near(rounded(wide(v), fmt)) for v in (w, x1, x2)]
    d = [stored(near(wide(dy)).T @ x, fmt) for x in seen[1:]]
    value = stored(seen[1] @ seen[0].T, fmt) + stored(seen[2] @ seen[0].T, fmt)
    wanted = [
        Expected("y", wide(y), value, fmt, format_name(y)),
        Expected("dw", wide(leaf.grad), d[0] + d[1], fmt, format_name(leaf.grad)),
    ]
    return Reference([w, x1, x2], dy, wanted)


def shared_weight_results(case: Case) -> list[Array]:
    return on_tape(case, lambda t, x: t(add, "sum", t(linear, "a", x[0]), t(linear, "b", x[1])), "b.weight")


def tied_reference(case: Case) -> Reference:
    """An embedding whose table is the output layer too. Under autocast one gradient passes the 16-bit copy and one does not:
    they meet in FP32. In a 16-bit model both are rounded, and so is their sum."""
    recipe, rng = case.recipe, np.random.default_rng(20)
    kept, fmt = weights_format(recipe), product_format(recipe)
    w, tokens = array(rng.standard_normal((50, 30)), kept), rng.integers(0, 50, 40)
    dy = array(rng.standard_normal((40, 50)), fmt)
    leaf = tensor(w).requires_grad_(True)
    # The embedding in FP32, as in `Counterpart.gradients_in_fp32`.
    x = F.embedding(tensor(tokens), leaf.float()).to(leaf.dtype)
    y = linear_by_hand(x, leaf, recipe, leaf.to(TORCH[fmt]))
    y.backward(tensor(dy))

    table, G = near(rounded(wide(w), fmt)), near(wide(dy))
    X = near(table.value[tokens])
    dx, dw = stored(G @ table, fmt), stored(G.T @ X, fmt)
    total, size = np.zeros(w.shape), np.zeros(w.shape)
    np.add.at(total, tokens, dx.value)
    np.add.at(size, tokens, np.abs(dx.value) + dx.err)
    err = np.zeros(w.shape)
    np.add.at(err, tokens, dx.err)
    from_rows = Near(total, err + gamma(int(np.bincount(tokens).max()) - 1) * size)
    wanted = [
        Expected("y", wide(y), X @ table.T, fmt, format_name(y)),
        Expected("dw", wide(leaf.grad), stored(from_rows, kept) + dw, kept, format_name(leaf.grad)),
    ]
    return Reference([w, tokens], dy, wanted)


def tied_results(case: Case) -> list[Array]:
    return on_tape(case, lambda t, x: t(linear, "head", t(embedding, "a", x[0])), "head.weight")


B = 400
"""Short rows: one undecided P makes its row of O undecided, and backward the whole head. D is no power of 4, so that the
scale rounds; many samples, so that every rounding changes many elements."""


def math_policy(low: str) -> Policy:
    """What PyTorch's SDPBackend.MATH does: all of attention in FP32, one rounding at the end."""
    inside, last = Precision("same", "fp32", "fp32"), Precision("same", "fp32", low)
    rows = {f"attention.{part}": inside for part in ("scores", "scale", "softmax")}
    return Policy(f"math-{low}", {**rows, "attention.values": last, EVERY_OTHER: Precision(low, "fp32", low)})


POLICIES = {f"math-{low}": math_policy(low) for low in LOW}
"""Beside those of the recipes."""


def torch_heads(qkv: Any) -> list[Any]:
    batch, length, _ = qkv.shape
    return [x.view(batch, length, H, D).transpose(1, 2) for x in qkv.split(H * D, dim=2)]


def torch_attention(qkv: Any, product: Any = None, softmax: Any = None) -> Any:
    """Written out: PyTorch's own fused kernel rounds elsewhere. product, softmax: types that CUDA autocast casts to."""
    q, k, v = torch_heads(qkv)
    batch, length, _ = qkv.shape
    S = (q.to(product) @ k.to(product).transpose(-2, -1)) * (1 / math.sqrt(D))
    S = S.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    P = torch.softmax(S, -1, dtype=softmax)
    return (P.to(product) @ v.to(product)).transpose(1, 2).reshape(batch, length, H * D)


def torch_math_attention(qkv: Any) -> Any:
    q, k, v = torch_heads(qkv)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        O = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E741
    return O.transpose(1, 2).reshape(qkv.shape[0], qkv.shape[1], H * D)


def attention_in(recipe: str) -> Callable[..., Any]:
    if recipe in POLICIES:
        return torch_math_attention
    if recipe in FORMATS:
        return torch_attention
    if recipe.endswith("-cpu"):
        return autocast(torch_attention, low_of(recipe))
    return functools.partial(torch_attention, product=TORCH[low_of(recipe)], softmax=torch.float32)


def draw_qkv(fmt: str, out: str, scale: float = 1.0) -> tuple[Array, Array]:
    rng = np.random.default_rng(18)
    return array(rng.standard_normal((B, T, 3 * H * D)) * scale, fmt), array(rng.standard_normal((B, T, H * D)), out)


def attention_reference(case: Case) -> Reference:
    recipe, unfused = case.recipe, case.recipe in POLICIES
    fmt = product_format(recipe) if recipe in RECIPES else low_of(recipe)
    qkv, dO = draw_qkv(case.formats[0], fmt, case.scale)
    y, (g,) = theirs(attention_in(recipe), [qkv], dO)
    softmax = "fp32" if recipe in AMP and not recipe.endswith("-cpu") else None
    exact = attention_near(rounded(wide(qkv), fmt), dO, fmt, softmax, unfused)
    pairs = zip(("O", "dqkv"), (y, g), exact, strict=True)
    return Reference([qkv], dO, [Expected(name, wide(x), value, fmt, format_name(x)) for name, x, value in pairs])


def attention_results(case: Case) -> list[Array]:
    wanted = reference(case)
    y, gradients = ours(policy_of(case.recipe), "attention", wanted.operands, wanted.dy, n_head=H)
    return [y, *gradients]


GROUPS = {"n_head": 6, "n_kv_head": 2}
"""Three heads in each: a sum that is rounded after two of them is another one."""


def torch_grouped_attention(q: Any, k: Any, v: Any, product: Any = None) -> Any:
    """Transformers' `eager_attention_forward`, but that it adds the least number where this puts -Inf. product: the type that
    CUDA autocast casts to."""
    batch, length, _ = q.shape
    q, k, v = (x.view(batch, length, -1, D).transpose(1, 2) for x in (q, k, v))
    k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // k.shape[1], -1, -1).reshape(q.shape) for x in (k, v))  # repeat_kv
    S = torch.matmul(q.to(product), k.to(product).transpose(2, 3)) * D**-0.5
    S = S.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    P = torch.softmax(S, -1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(P.to(product), v.to(product)).transpose(1, 2).reshape(batch, length, -1)


def grouped_attention_in(recipe: str) -> Callable[..., Any]:
    if recipe in FORMATS:
        return torch_grouped_attention
    if recipe.endswith("-cpu"):
        return autocast(torch_grouped_attention, low_of(recipe))
    return functools.partial(torch_grouped_attention, product=TORCH[low_of(recipe)])


def draw_groups(formats: Sequence[str], out: str, scale: float = 1.0) -> tuple[list[Array], Array]:
    rng = np.random.default_rng(19)
    H, K = GROUPS.values()
    drawn = [rng.standard_normal((B // 4, T, heads * D)) for heads in (H, K, K, H)]
    q, k, v = (array(x * scale, fmt) for x, fmt in zip(drawn[:3], formats, strict=True))
    return [q, k, v], array(drawn[3], out)


def grouped_attention_reference(case: Case) -> Reference:
    """Under autocast the rounded dk of each head is widened before the sum over the group where k has FP32, as after RoPE."""
    fmt = product_format(case.recipe)
    operands, dO = draw_groups(case.formats, fmt, case.scale)
    y, gradients = theirs(grouped_attention_in(case.recipe), operands, dO)
    exact = grouped_attention_near(*(rounded(wide(x), fmt) for x in operands), dO, fmt)
    formats = [fmt, fmt, *("fp32" if kept == "fp32" else fmt for kept in case.formats[1:])]
    pairs = zip(("O", "dq", "dk", "dv"), (y, *gradients), exact, formats, strict=True)
    return Reference(operands, dO, [Expected(name, wide(x), value, last, format_name(x)) for name, x, value, last in pairs])


def grouped_attention_results(case: Case) -> list[Array]:
    wanted = reference(case)
    y, gradients = ours(policy_of(case.recipe), "grouped_attention", wanted.operands, wanted.dy, **GROUPS)
    return [y, *gradients]


SPECIAL: dict[str, tuple[Callable[[Case], Reference], Callable[[Case], list[Array]]]] = {
    "attention": (attention_reference, attention_results),
    "grouped_attention": (grouped_attention_reference, grouped_attention_results),
    "fan_in": (fan_in_reference, fan_in_results),
    "cast": (cast_reference, cast_results),
    "shared_weight": (shared_weight_reference, shared_weight_results),
    "tied": (tied_reference, tied_results),
}
"""Cases that are more than an operation and its formula: how to make the reference, and our results."""


def special_cases() -> Iterator[Case]:
    for recipe in RECIPES:
        formats = [recipe] if recipe in FORMATS else ["fp32", low_of(recipe)]
        yield from (Case(op, recipe, (fmt,)) for op in ("attention", "fan_in") for fmt in formats)
        low = low_of(recipe)
        grouped = [(recipe,) * 3] if recipe in FORMATS else [("fp32", "fp32", low), (low,) * 3]
        yield from (Case("grouped_attention", recipe, each) for each in grouped)
        yield from (Case(op, recipe) for op in ("shared_weight", "tied"))
    yield from (Case("cast", recipe) for recipe in AMP)


CASES = [*cases_of(*COUNTERPARTS), *special_cases()]
"""Everything that is held against PyTorch with a derived bound."""


def same_kind(a: Array, b: Any, name: str, identical: bool = False) -> None:
    """NaN where PyTorch has NaN, the same infinities; finite values are for the cases, unless they must be identical."""
    a, b = wide(a), wide(b)
    finite = np.isfinite(a) & np.isfinite(b)
    same = np.count_nonzero((a == b)[finite]) / max(1, np.count_nonzero(finite))
    REPORT.append((name, f"finite {100 * finite.mean():.1f} %, of these identical {100 * same:.3f} %"))
    assert np.array_equal(np.isnan(a), np.isnan(b)), name
    assert np.array_equal(a[~finite], b[~finite], equal_nan=True), name
    if identical:
        assert np.array_equal(a, b, equal_nan=True), name


def outside(policy: Policy, case: Case) -> list[int]:
    """How many elements of each of our results, computed by another policy, are no possible results of the case."""
    wanted = reference(case)
    static = {"attention": {"n_head": H}, "grouped_attention": GROUPS}.get(case.op, {})
    y, gradients = ours(policy, case.op, wanted.operands, wanted.dy, **static)
    pairs = zip([y, *gradients], wanted.expected, strict=True)
    return [agreement(x, e.theirs, e.exact, e.rounded).ours_outside for x, e in pairs]


SPECIAL_VALUES = [math.inf, -math.inf, math.nan, 0, -0.0, 1, -1, 3e38, -3e38, 65504, -65504, 1e-8, -1e-8, 1e-40]


def check_special_values(op: str, fmt: str) -> None:
    """Results are finite, infinite or NaN where PyTorch's are."""
    with np.errstate(all="ignore"):
        x = array(SPECIAL_VALUES, fmt)
        # Pairs of values for those that look at more than one.
        pairs = np.array(np.meshgrid(x, x)).reshape(2, -1)
        operands = {"softmax": [pairs.T], "add": [*pairs], "swiglu": [*pairs]}.get(op, [x])
        operands = [np.ascontiguousarray(v).astype(DTYPE[fmt]) for v in operands]
        dy = array(np.ones(operands[0].shape), fmt)
        y, gradients = ours(get_recipe(fmt).policy, op, operands, dy)
    with onednn(op != "gelu_erf"):
        y_torch, gradients_torch = theirs(COUNTERPARTS[op].torch, operands, dy)
    same_kind(y, y_torch, "y", identical=op in ("relu", "add"))
    for a, b in zip(gradients, gradients_torch, strict=True):
        same_kind(a, b, "gradient", identical=op in ("relu", "add"))


SUBNORMAL = {"fp16": 2.0**-20, "bf16": 2.0**-130, "fp32": 2.0**-130}
"""Times normal values: some bits are left, and some values become zero."""


def subnormal(op: str, fmt: str) -> Case:
    """Return the case of an operation in one format, with operands of which many are subnormal."""
    return replace(next(case for case in CASES if case.op == op and case.recipe == fmt), scale=SUBNORMAL[fmt])
