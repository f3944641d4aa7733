"""refimpl.nn.ops against PyTorch on the CPU: every operation, forward and backward, on identical inputs, in every recipe.

Both must give what a correct evaluation can give; bounds.py derives what that is, and in 16 bits it is mostly one number.
test_mutants.py takes out every rounding that there is, and every time one of these comparisons must fail.

A `Case` is one operation in one recipe with operands in given formats. The op lists of CPU autocast are torch.autocast's
own; those of CUDA autocast, which need no GPU to be known, are spelled out here as casts. Each test records (record_property,
and on the screen with -s) the share of bit-identical elements, the share that was decided, and the largest distance in ulps
at the scale of the row. Negative controls at the end: the claims must fail where they should.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from arrays import DTYPE, FORMATS, LOW, Array, array, rounded, wide
from bounds import (
    SMALLEST_EXPONENT,
    Agreement,
    D,
    H,
    Near,
    T,
    add_near,
    agreement,
    attention_near,
    cross_entropy_near,
    embedding_near,
    gamma,
    gelu_erf_near,
    gelu_tanh_near,
    layernorm_near,
    linear_near,
    matmul_near,
    near,
    ours,
    possible,
    relu_near,
    rmsnorm_near,
    silu_near,
    softmax_near,
    stored,
)

from refimpl.backends.base import NUMPY
from refimpl.nn.autograd import Tape, Value
from refimpl.nn.ops import OPS, add, embedding, fan_in, linear
from refimpl.precision.context import Monitor, Run
from refimpl.precision.policy import EVERY_OTHER, Policy, Precision
from refimpl.precision.recipes import RECIPES as ALL_RECIPES
from refimpl.precision.recipes import get_recipe

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("torch")  # on one thread
F = torch.nn.functional

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

AMP = ["amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu"]
RECIPES = [*FORMATS, *AMP]


REPORT: list[tuple[str, str]] = []
"""What the comparisons of the running test found: (name of the result, text)."""


@pytest.fixture(autouse=True)
def report(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Iterator[None]:
    """Puts it into the report of the test run (--junit-xml) and on the screen (-s)."""
    REPORT.clear()
    yield
    for name, text in REPORT:
        record_property(name, text)
        print(f"{request.node.name}  {name}: {text}")


# ------------------------------------------------------------------------------------------------------------ agreement


def assert_agrees(ours: Array, theirs: Array, exact: Near, fmt: str, name: str = "result") -> None:
    """Every element of both is a possible result. Where only one is, they are therefore identical."""
    got = agreement(ours, theirs, exact, fmt)
    REPORT.append((name, str(got)))
    assert got.ours_outside == 0 and got.theirs_outside == 0, f"{name}: {got}"


def assert_format(x: Array, fmt: str, name: str) -> None:
    """The type that a result is stored in. Apart from `assert_agrees`, so that one can ask whether values alone tell."""
    assert x.dtype == DTYPE[fmt], f"{name} is {x.dtype}, not {fmt}"


# ------------------------------------------------------------------------------------------------- arrays, here and there


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
    leaves = [tensor(x, fmt).requires_grad_(x.dtype != np.int64) for x in operands]
    y = f(*leaves)
    y.backward(tensor(np.asarray(dy), fmt))
    return y, [leaf.grad for leaf in leaves]


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Twin:
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
TWINS = {
    "linear": Twin(((64, 32), (80, 32), (80,)), F.linear, linear_near),
    "matmul": Twin(((2, 3, 32, 48), (2, 3, 48, 40)), torch.matmul, matmul_near),
    "add": Twin(((50, 60), (60,)), torch.add, add_near),
    "relu": Twin(((50, 60),), torch.relu, relu_near),
    "silu": Twin(((50, 60),), F.silu, silu_near),
    "gelu_tanh": Twin(((50, 60),), lambda x: F.gelu(x, approximate="tanh"), gelu_tanh_near),
    "gelu_erf": Twin(((50, 60),), F.gelu, gelu_erf_near),
    "layernorm": Twin(
        ((50, 100), (100,), (100,)), lambda x, w, b: F.layer_norm(x, (100,), w, b), layernorm_near, gradients_in_fp32=True
    ),
    "rmsnorm": Twin(((50, 100), (100,)), lambda x, w: F.rms_norm(x, (100,), w, eps=1e-5), rmsnorm_near, gradients_in_fp32=True),
    "softmax": Twin(((50, 60),), lambda x: torch.softmax(x, -1), softmax_near),
    "embedding": Twin((TOKENS, (20, 16)), F.embedding, embedding_near, gradients_in_fp32=True),
    "cross_entropy": Twin(((60, 50), TARGETS), lambda z, t: F.cross_entropy(z.float(), t), cross_entropy_near),
    "reshape": Twin(((4, 6, 8),), lambda x: x.reshape(24, 8), None, {"shape": (24, 8)}),
    "transpose": Twin(((4, 6, 8),), lambda x: x.permute(2, 0, 1), None, {"axes": (2, 0, 1)}),
    "split": Twin(((4, 6, 12),), lambda x: torch.split(x, [4, 5, 3], dim=-1)[1], None, {"start": 4, "stop": 9}),
}
"""Attention, the recorded cast, fan-in and weights that are used twice are cases of their own below."""


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


def format_name(x: Any) -> str:
    """Of an array or a tensor."""
    return next(name for name in FORMATS if x.dtype in (DTYPE[name], TORCH[name]))


# The op lists of CUDA autocast (aten/src/ATen/autocast_mode.h), as far as there are operations here. The rest runs in
# the format of its input. CPU autocast has the same products and losses, but not the norms and softmax.
PRODUCTS = {"linear", "matmul"}
FP32_ON_CUDA = {"layernorm", "rmsnorm", "softmax", "cross_entropy"}


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
        return f
    if recipe.endswith("-cpu"):
        return autocast(f, low_of(recipe))
    if op in PRODUCTS:
        return with_casts(f, TORCH[low_of(recipe)])
    return with_casts(f, torch.float32) if op in FP32_ON_CUDA else f


def operand_names(op: str) -> list[str]:
    return list(inspect.signature(OPS[op].forward).parameters)


def draw(case: Case) -> list[Array]:
    """Normal values; the same ones in every format, but for their rounding."""
    rng, formats = np.random.default_rng(11), iter(case.formats)
    operands = [x if isinstance(x, np.ndarray) else rng.standard_normal(x) for x in TWINS[case.op].operands]
    scaled = range(len(operands)) if case.op == "add" else [0]
    return [
        x if x.dtype == np.int64 else array(x * case.scale if i in scaled else x, next(formats)) for i, x in enumerate(operands)
    ]


def gradient_of_output(op: str, shape: tuple[int, ...], fmt: str, scale: float = 1.0) -> Array:
    """Random, in the output's format; the loss scale for the loss."""
    if op == "cross_entropy":
        return np.float32(1024)
    return array(np.random.default_rng(13).standard_normal(shape) * scale, fmt)


ELEMENTWISE = ["add", "relu", "silu", "gelu_tanh", "gelu_erf"]


@functools.cache
def reference(case: Case) -> Reference:
    if case.op in SPECIAL:
        return SPECIAL[case.op][0](case)
    twin, operands, low = TWINS[case.op], draw(case), low_of(case.recipe)
    f = in_recipe(twin.torch, case.op, case.recipe)
    with onednn(case.op != "gelu_erf"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # rms_norm is slower then, it says
        y = f(*(tensor(x) for x in operands))
        dy = gradient_of_output(case.op, y.shape, format_name(y), case.scale if case.op in ELEMENTWISE else 1.0)
        y, gradients = theirs(f, operands, dy)
        stored_in = [format_name(g) for g in (y, *gradients) if g is not None]
        if twin.gradients_in_fp32 and low in case.formats:
            _, in_fp32 = theirs(twin.torch, operands, dy, "fp32")
            pairs = zip(gradients, in_fp32, strict=True)
            gradients = [None if g is None else rounded(wide(h), format_name(g)) for g, h in pairs]
    # Autocast's products see rounded operands, and what autocast stores in FP32 was rounded to 16 bits before.
    cast_in = case.op in PRODUCTS and case.recipe in AMP
    seen = [x if x.dtype == np.int64 else near(rounded(wide(x), low) if cast_in else wide(x)) for x in operands]
    results = [wide(y), *(wide(g) for g in gradients if g is not None)]
    if twin.formula is None:
        exact = [Near(x) for x in results]
    else:
        exact = twin.formula(*seen, near(wide(dy)), **({"fmt": stored_in[0]} if case.op == "softmax" else {}))
    names = ["y", *(f"d{name}" for name, g in zip(operand_names(case.op), gradients, strict=False) if g is not None)]
    return Reference(
        operands,
        dy,
        [Expected(n, r, e, low if cast_in else s, s) for n, r, e, s in zip(names, results, exact, stored_in, strict=True)],
    )


def policy_of(recipe: str) -> Policy:
    return POLICIES[recipe] if recipe in POLICIES else get_recipe(recipe).policy


def results(case: Case, monitor: Monitor | None = None) -> list[Array]:
    """Ours: the output and the gradients."""
    if case.op in SPECIAL:
        return SPECIAL[case.op][1](case, monitor)
    wanted = reference(case)
    y, gradients = ours(policy_of(case.recipe), case.op, wanted.operands, wanted.dy, monitor, **TWINS[case.op].static)
    return [y, *(g for g in gradients if g is not None)]


def check(case: Case) -> None:
    """The test of a case."""
    for x, wanted in zip(results(case), reference(case).expected, strict=True):
        assert_format(x, wanted.stored, wanted.name)
        assert_agrees(x, wanted.theirs, wanted.exact, wanted.rounded, wanted.name)


def cases_of(op: str) -> Iterator[Case]:
    """Uniform recipes have one format. Under autocast activations come in FP32 or in 16 bits, and parameters are FP32, or,
    for products, the 16-bit copies that are shared within a step."""
    params = len(OPS[op].params)
    inputs = sum(not isinstance(x, np.ndarray) for x in TWINS[op].operands) - params
    for recipe in FORMATS:
        yield Case(op, recipe, (recipe,) * (inputs + params))
    for recipe in AMP if TWINS[op].formula else []:
        low = low_of(recipe)
        formats = [("fp32",) * (inputs + params)]
        if inputs:
            formats.append((low,) * inputs + ("fp32",) * params)
        if op == "linear":
            formats.append((low,) * (inputs + params))
        if op in ("add", "matmul"):
            formats += [("fp32", low), (low, "fp32")]
        yield from (Case(op, recipe, each) for each in formats)


def test_every_operation_has_a_twin() -> None:
    assert {*TWINS, "attention", "cast"} == set(OPS)


def test_every_recipe_is_covered() -> None:
    # pure-fp16 differs from fp16 in what the optimizer keeps, not in its operations; fp64 is for test_ops_formula.py, and
    # what is quantized or summed otherwise for test_quantized_linear.py.
    covered = [get_recipe(name).policy for name in RECIPES]
    assert all(recipe.policy in covered for name, recipe in ALL_RECIPES.items() if name != "fp64" and recipe.policy.in_formats)


@pytest.mark.parametrize("case", [case for op in TWINS for case in cases_of(op)], ids=str)
def test_twin(case: Case) -> None:
    check(case)


def test_most_results_are_decided() -> None:
    """Otherwise the claims would be empty. It depends on the data and the formulas alone, not on what computes them. The least
    share, some 50 %, is that of the layer norm's dw in FP16: a hundred sums of fifty products that cancel in part."""
    shares = {}
    for case in CASES:
        for wanted in reference(case).expected:
            least, greatest = possible(wanted.exact, wanted.rounded)
            if wanted.rounded in LOW:
                shares[f"{case}: {wanted.name}"] = float((least == greatest).mean())
    average = float(np.mean([*shares.values()]))
    REPORT.append(("decided, on average", f"{100 * average:.1f} %"))
    assert average > 0.9
    assert min(shares.values()) > 1 / 3, {name: share for name, share in shares.items() if share <= 1 / 3}


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_without_bias_and_in_three_dimensions(fmt: str) -> None:
    rng = np.random.default_rng(14)
    x, w, dy = (array(rng.standard_normal(shape), fmt) for shape in ((4, 16, 96), (80, 96), (4, 16, 80)))
    p = Run(get_recipe(fmt).policy, NUMPY).bind("linear", "here")
    y, saved = OPS["linear"].forward(x, w, None, p=p)
    dx, dw, db = OPS["linear"].backward(dy, saved, w, None, p=p)
    y_torch, (dx_torch, dw_torch) = theirs(F.linear, [x, w], dy)
    assert db is None
    X, W, G = near(wide(x).reshape(64, 96)), near(wide(w)), near(wide(dy).reshape(64, 80))
    assert_agrees(y.reshape(64, 80), wide(y_torch).reshape(64, 80), X @ W.T, fmt, "y")
    assert_agrees(dx.reshape(64, 96), wide(dx_torch).reshape(64, 96), G @ W, fmt, "dx")
    assert_agrees(dw, dw_torch, G.T @ X, fmt, "dw")


# ----------------------------------------------------------------------------------- one tensor, one weight, used twice


def fan_in_reference(case: Case) -> Reference:
    """Three gradients of one tensor, added one after the other: the sums are exact but for their rounding."""
    (fmt,), rng = case.formats, np.random.default_rng(15)
    each = [array(rng.standard_normal(4000) * case.scale, fmt) for _ in range(3)]
    leaf = torch.zeros(4000, dtype=TORCH[fmt], requires_grad=True)
    for g in each:
        leaf.backward(tensor(g))
    a, b, c = (wide(g) for g in each)
    return Reference(each, each[0], [Expected("sum", wide(leaf.grad), Near(rounded(a + b, fmt) + c), fmt, fmt)])


def fan_in_results(case: Case, monitor: Monitor | None) -> list[Array]:
    a, b, c = reference(case).operands
    p = Run(policy_of(case.recipe), NUMPY, monitor).bind("fan_in", "here")
    return [fan_in.forward(fan_in.forward(a, b, p)[0], c, p)[0]]


def cast_reference(case: Case) -> Reference:
    """The copy of a parameter that autocast makes once a step."""
    low, rng = low_of(case.recipe), np.random.default_rng(16)
    w, dy = array(rng.standard_normal((40, 30)) * 1e-3, "fp32"), array(rng.standard_normal((40, 30)), low)
    y, (dw,) = theirs(lambda w: w.to(TORCH[low]), [w], dy)
    wanted = [
        Expected("y", wide(y), Near(wide(w)), low, format_name(y)),
        Expected("dw", wide(dw), Near(wide(dy)), low, format_name(dw)),
    ]
    return Reference([w], dy, wanted)


def cast_results(case: Case, monitor: Monitor | None) -> list[Array]:
    wanted = reference(case)
    y, gradients = ours(policy_of(case.recipe), "cast", wanted.operands, wanted.dy, monitor, fmt=low_of(case.recipe))
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


def on_tape(case: Case, monitor: Monitor | None, build: Callable[[Tape, list[Array]], Value], tied: str) -> list[Array]:
    """Forward and backward of a model with one weight, `a.weight`, that `tied` stands for too: the output and dw."""
    wanted, kept = reference(case), {}
    t = Tape(Run(policy_of(case.recipe), NUMPY, monitor), {"a.weight": wanted.operands[0]}, {tied: "a.weight"})
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


def shared_weight_results(case: Case, monitor: Monitor | None) -> list[Array]:
    return on_tape(case, monitor, lambda t, x: t(add, "sum", t(linear, "a", x[0]), t(linear, "b", x[1])), "b.weight")


def tied_reference(case: Case) -> Reference:
    """An embedding whose table is the output layer too. Under autocast one gradient passes the 16-bit copy and one does not:
    they meet in FP32. In a 16-bit model both are rounded, and so is their sum."""
    recipe, rng = case.recipe, np.random.default_rng(20)
    kept, fmt = weights_format(recipe), product_format(recipe)
    w, tokens = array(rng.standard_normal((50, 30)), kept), rng.integers(0, 50, 40)
    dy = array(rng.standard_normal((40, 50)), fmt)
    leaf = tensor(w).requires_grad_(True)
    # The embedding in FP32, as in `Twin.gradients_in_fp32`.
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


def tied_results(case: Case, monitor: Monitor | None) -> list[Array]:
    return on_tape(case, monitor, lambda t, x: t(linear, "head", t(embedding, "a", x[0])), "head.weight")


@pytest.mark.parametrize("recipe", RECIPES)
def test_fan_in_is_pytorchs_accumulation_bit_for_bit(recipe: str) -> None:
    for fmt in [recipe] if recipe in FORMATS else ["fp32", low_of(recipe)]:
        case = Case("fan_in", recipe, (fmt,))
        check(case)
        assert agreement(results(case)[0], reference(case).expected[0].theirs, reference(case).expected[0].exact, fmt) == (
            Agreement(1.0, 1.0, 0.0, 0, 0)
        )


@pytest.mark.parametrize("recipe", AMP)
def test_the_recorded_cast_of_a_parameter_is_autocasts(recipe: str) -> None:
    check(Case("cast", recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_used_twice_under_autocast_sums_its_gradients_in_16_bits(recipe: str) -> None:
    case = Case("shared_weight", recipe)
    check(case)
    if recipe in AMP:  # summing in FP32 is something else
        unrounded = reference(case).expected[1]
        assert (rounded(unrounded.exact.value, unrounded.rounded) != unrounded.exact.value).mean() > 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tied_weight_gets_the_sum_of_both_its_gradients(recipe: str) -> None:
    check(Case("tied", recipe))


# ------------------------------------------------------------------------------------------------------------ attention

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


def attention_results(case: Case, monitor: Monitor | None) -> list[Array]:
    wanted = reference(case)
    y, gradients = ours(policy_of(case.recipe), "attention", wanted.operands, wanted.dy, monitor, n_head=H)
    return [y, *gradients]


SPECIAL: dict[str, tuple[Callable[[Case], Reference], Callable[[Case, Monitor | None], list[Array]]]] = {
    "attention": (attention_reference, attention_results),
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
        yield from (Case(op, recipe) for op in ("shared_weight", "tied"))
    yield from (Case("cast", recipe) for recipe in AMP)


CASES = [*(case for op in TWINS for case in cases_of(op)), *special_cases()]
"""Everything that is held against PyTorch with a derived bound."""


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "attention"], ids=str)
def test_attention_written_out(case: Case) -> None:
    check(case)


def queries_at_a_time(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setitem(OPS["attention"].forward.__globals__, "QUERIES", n)


@pytest.mark.parametrize("queries", [1, 2, 3])  # of T = 4
@pytest.mark.parametrize("case", [case for case in CASES if case.op == "attention"], ids=str)
def test_attention_by_blocks_of_queries(case: Case, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries_at_a_time(monkeypatch, queries)
    check(case)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_block_of_queries_does_not_touch_what_it_does_not_see(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = product_format(recipe)
    qkv, dO = draw_qkv(fmt, fmt)
    queries_at_a_time(monkeypatch, 2)
    y, _ = ours(policy_of(recipe), "attention", [qkv], dO, n_head=H)
    _, (_, P) = OPS["attention"].forward(qkv, p=Run(policy_of(recipe), NUMPY).bind("attention", "h"), n_head=H)
    assert np.array_equal(wide(P) == 0, np.broadcast_to(np.triu(np.ones((T, T), bool), 1), P.shape))
    qkv[:, 2:] = math.nan
    z, _ = ours(policy_of(recipe), "attention", [qkv], dO, n_head=H)
    assert z[:, :2].tobytes() == y[:, :2].tobytes() and np.isnan(wide(z)[:, 2:]).all()


@pytest.mark.parametrize("low", LOW)
def test_attention_with_one_rounding_is_the_math_backend(low: str) -> None:
    case = Case("attention", f"math-{low}", (low,))
    check(case)
    # Of O 95 % and of dqkv 79 % are decided, and so identical. The others may fall either way, with a probability of the
    # errors that really occur over an ulp; those are a tenth or less of what they are bounded by, so 99 % is identical.
    for wanted, x in zip(reference(case).expected, results(case), strict=True):
        assert agreement(x, wanted.theirs, wanted.exact, low).share_identical > 0.99


@pytest.mark.parametrize("recipe", RECIPES)
def test_attention_where_one_score_outweighs_all_others(recipe: str) -> None:
    # q and k 6 times as large: scores in the hundreds, a softmax of ones, zeros and subnormals.
    check(Case("attention", recipe, (product_format(recipe),), 6.0))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_mask_hides_stays_hidden_as_in_pytorch(recipe: str, bad: float) -> None:
    # The last position's q, k or v is not finite. Earlier positions do not see its scores; 0 times its v is NaN in both.
    fmt = product_format(recipe)
    for part in range(3):
        qkv, dO = draw_qkv(fmt, fmt)
        qkv[:, -1, part * H * D] = bad
        with np.errstate(invalid="ignore"):
            y, (g,) = ours(policy_of(recipe), "attention", [qkv], dO, n_head=H)
        y_torch, (g_torch,) = theirs(attention_in(recipe), [qkv], dO)
        same_kind(y, y_torch, f"O, {'qkv'[part]} not finite")
        same_kind(g, g_torch, f"dqkv, {'qkv'[part]} not finite")
        assert part == 2 or np.isfinite(wide(y)[:, :-1]).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_infinite_gradient_reaches_no_key_that_is_hidden_from_it(recipe: str) -> None:
    # P is 0 where a key is hidden, but 0 times an infinite dP is NaN.
    qkv, dO = draw_qkv(product_format(recipe), product_format(recipe))
    dO[:, 0, 0] = math.inf
    with np.errstate(invalid="ignore"):
        _, (g,) = ours(policy_of(recipe), "attention", [qkv], dO, n_head=H)
    _, (g_torch,) = theirs(attention_in(recipe), [qkv], dO)
    same_kind(g, g_torch, "dqkv, dO not finite")
    assert np.isfinite(wide(g)[:, 1:, : 2 * H * D]).all()


# ------------------------------------------------------------------------------------------------------------ the edges


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


SPECIAL_VALUES = [math.inf, -math.inf, math.nan, 0, -0.0, 1, -1, 3e38, -3e38, 65504, -65504, 1e-8, -1e-8, 1e-40]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", ["relu", "silu", "gelu_tanh", "gelu_erf", "softmax", "add"])
def test_special_values_are_finite_infinite_or_nan_where_pytorchs_are(op: str, fmt: str) -> None:
    with np.errstate(all="ignore"):
        x = array(SPECIAL_VALUES, fmt)
        # Pairs of values for those that look at more than one.
        pairs = np.array(np.meshgrid(x, x)).reshape(2, -1)
        operands = {"softmax": [pairs.T], "add": [pairs[0], pairs[1]]}.get(op, [x])
        operands = [np.ascontiguousarray(v).astype(DTYPE[fmt]) for v in operands]
        dy = array(np.ones(operands[0].shape), fmt)
        y, gradients = ours(get_recipe(fmt).policy, op, operands, dy)
    with onednn(op != "gelu_erf"):
        y_torch, gradients_torch = theirs(TWINS[op].torch, operands, dy)
    same_kind(y, y_torch, "y", identical=op in ("relu", "add"))
    for a, b in zip(gradients, gradients_torch, strict=True):
        same_kind(a, b, "gradient", identical=op in ("relu", "add"))


@pytest.mark.parametrize("fmt", FORMATS)
def test_cross_entropy_of_large_logits(fmt: str) -> None:
    # Standard deviation 3000: most rows are certain, the loss is in the thousands, and exp(z - largest) is 0 or near it.
    check(Case("cross_entropy", fmt, (fmt,), 3000.0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_cross_entropy_of_logits_that_are_not_finite(recipe: str) -> None:
    rng, fmt = np.random.default_rng(21), product_format(recipe)
    for bad in ([math.inf], [-math.inf], [math.nan], [math.inf, -math.inf], [math.inf, math.inf], [-math.inf] * 5):
        for target in (0, 4):  # at a bad logit, and at a good one
            row = rng.standard_normal((1, 5))
            row[0, : len(bad)] = bad
            z, targets = array(row, fmt), np.array([target])
            with np.errstate(all="ignore"):
                y, (dz, _) = ours(get_recipe(recipe).policy, "cross_entropy", [z, targets], np.float32(1024))
            y_torch, (dz_torch, _) = theirs(
                in_recipe(TWINS["cross_entropy"].torch, "cross_entropy", recipe), [z, targets], np.float32(1024)
            )
            same_kind(y, y_torch, f"loss with {bad}, target {target}")
            same_kind(dz, dz_torch, f"dlogits with {bad}, target {target}")


@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
@pytest.mark.parametrize("fmt", FORMATS)
def test_cross_entropy_with_ignored_targets(fmt: str, ignore_index: int) -> None:
    rng, op = np.random.default_rng(22), OPS["cross_entropy"]
    z, targets = array(rng.standard_normal((60, 50)), fmt), rng.integers(0, 50, 60)
    targets[rng.permutation(60)[:25]] = ignore_index
    p = Run(policy_of(fmt), NUMPY).bind("cross_entropy", "loss")
    y, saved = op.forward(z, targets, p, ignore_index=ignore_index)
    dz, _ = op.backward(np.float32(1024), saved, p, ignore_index=ignore_index)
    y_torch, (dz_torch, _) = theirs(
        lambda z, t: F.cross_entropy(z.float(), t, ignore_index=ignore_index), [z, targets], np.float32(1024)
    )
    exact = cross_entropy_near(near(wide(z)), targets, near(1024.0), ignore_index)
    assert_agrees(y, wide(y_torch), exact[0], "fp32", "loss")
    assert_agrees(dz, wide(dz_torch), exact[1], fmt, "dlogits")
    assert not wide(dz)[targets == ignore_index].any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_cross_entropy_ignores_as_pytorch_does_where_values_are_not_finite(fmt: str) -> None:
    """All ignored: a loss of NaN and gradients of 0. A bad row that is ignored leaves the loss finite, not its own gradient."""
    rows = array(np.random.default_rng(23).standard_normal((3, 5)), fmt)
    for bad, targets in ((0.0, [-100] * 3), (math.nan, [-100, 1, 2]), (math.inf, [-100, 1, 2]), (-math.inf, [1, -100, 2])):
        z = rows.copy()
        z[0, 2] = z[0, 2] if bad == 0 else bad
        with np.errstate(all="ignore"):
            y, (dz, _) = ours(policy_of(fmt), "cross_entropy", [z, np.array(targets)], np.float32(1024))
        y_torch, (dz_torch, _) = theirs(TWINS["cross_entropy"].torch, [z, np.array(targets)], np.float32(1024))
        same_kind(y, y_torch, f"loss with {bad}")
        same_kind(dz, dz_torch, f"dlogits with {bad}")
        assert bad != 0 or (np.isnan(y) and not wide(dz).any())


SUBNORMAL = {"fp16": 2.0**-20, "bf16": 2.0**-130, "fp32": 2.0**-130}
"""Times normal values: some bits are left, and some values become zero."""


@pytest.mark.parametrize("op", [*ELEMENTWISE, "matmul", "embedding", "fan_in", "softmax", "cross_entropy"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_subnormal_operands(op: str, fmt: str) -> None:
    case = next(case for case in CASES if case.op == op and case.recipe == fmt)
    check(replace(case, scale=SUBNORMAL[fmt]))


@pytest.mark.parametrize("fmt", LOW)
def test_subnormal_results(fmt: str) -> None:
    # Values so far apart that many probabilities are subnormal, and their gradients too.
    case = Case("softmax", fmt, (fmt,), {"fp16": 6.0, "bf16": 45.0}[fmt])
    check(case)
    y = wide(results(case)[0])
    assert np.count_nonzero((y > 0) & (y < 2.0 ** SMALLEST_EXPONENT[fmt])) > 100


@pytest.mark.parametrize("fmt", LOW)
def test_embedding_gradient_of_a_row_that_is_used_thousands_of_times(fmt: str) -> None:
    # Row 3 stands in 5000 places with gradients near 1: the sum is rounded once. PyTorch's CPU kernel rounds after each
    # addition and stops where half an ulp is more than 1; its sum in FP32 is the reference.
    rng = np.random.default_rng(22)
    tokens = np.where(rng.random(6000) < 5 / 6, 3, rng.integers(0, 20, 6000))
    w, dy = array(rng.standard_normal((20, 16)), fmt), array(1 + 0.1 * rng.standard_normal((6000, 16)), fmt)
    _, (_, dw) = ours(get_recipe(fmt).policy, "embedding", [tokens, w], dy)
    _, (_, in_fp32) = theirs(F.embedding, [tokens, w], dy, "fp32")
    _, (_, in_16_bits) = theirs(F.embedding, [tokens, w], dy)
    exact = embedding_near(tokens, near(wide(w)), near(wide(dy)))[1]
    assert_agrees(dw, rounded(wide(in_fp32), fmt), exact, fmt, "dw")
    assert agreement(dw, wide(in_16_bits), exact, fmt).theirs_outside > 16
    assert wide(in_16_bits)[3].max() < 0.9 * wide(dw)[3].min()


# ----------------------------------------------------------------------------------------------------- negative controls


def outside(policy: Policy, case: Case) -> list[int]:
    """How many elements of each of our results, computed by another policy, are no possible results of the case."""
    wanted = reference(case)
    static = {"n_head": H} if case.op == "attention" else {}
    y, gradients = ours(policy, case.op, wanted.operands, wanted.dy, **static)
    pairs = zip([y, *gradients], wanted.expected, strict=True)
    return [agreement(x, e.theirs, e.exact, e.rounded).ours_outside for x, e in pairs]


@pytest.mark.parametrize("fmt", LOW)
def test_control_rounding_before_the_bias_is_noticed(fmt: str) -> None:
    case = Case("linear", fmt, (fmt,) * 3)
    x, w, b = reference(case).operands
    run, wanted = Run(get_recipe(fmt).policy, NUMPY), reference(case).expected[0]
    y, _ = OPS["linear"].forward(x, w, None, p=run.bind("linear", "here"))
    twice, _ = OPS["add"].forward(y, b, p=run.bind("add", "here"))
    assert agreement(twice, wanted.theirs, wanted.exact, fmt).ours_outside > 0.1 * twice.size


@pytest.mark.parametrize("fmt", LOW)
def test_control_a_missing_rounding_of_the_output_is_noticed(fmt: str) -> None:
    unrounded = Policy("unrounded", {EVERY_OTHER: Precision(fmt, "fp32", "fp32")})
    assert outside(unrounded, Case("linear", fmt, (fmt,) * 3))[0] > 0.9 * 64 * 80


@pytest.mark.parametrize(("fmt", "n"), [("fp16", 4096), ("bf16", 512)])
def test_control_accumulating_in_16_bits_is_beyond_the_bound(fmt: str, n: int) -> None:
    dy = np.abs(array(np.random.default_rng(19).standard_normal((n, 8)), fmt))
    running = np.zeros(8)
    for row in wide(dy):
        running = rounded(running + row, fmt)
    exact = near(wide(dy)).sum(0)
    summed = tensor(dy).sum(0)
    assert agreement(running, summed, exact, fmt).ours_outside == 8
    assert agreement(rounded(exact.value, fmt), summed, exact, fmt).ours_outside == 0


def test_control_an_fp32_product_of_rounded_operands_is_beyond_the_bound() -> None:
    tf32_like = Policy("bf16 inputs", {EVERY_OTHER: Precision("bf16", "fp32", "fp32")})
    assert min(outside(tf32_like, Case("matmul", "fp32", ("fp32", "fp32")))) > 1000


@pytest.mark.parametrize("fmt", LOW)
@pytest.mark.parametrize("part", ["scores", "scale", "softmax", "everything"])
def test_control_attention_without_one_of_its_roundings_is_noticed(part: str, fmt: str) -> None:
    # 'everything' is what SDPBackend.MATH does: all in FP32, one rounding at the end. Operands are taken as they come, or
    # the next row would make up for it.
    missing = ["scores", "scale", "softmax"] if part == "everything" else [part]
    parts = {name: Precision("same", "fp32", "fp32" if name in missing else fmt) for name in ("scores", "scale", "softmax")}
    rows = {f"attention.{name}": row for name, row in {**parts, "values": Precision("same", "fp32", fmt)}.items()}
    missed = outside(Policy("unrounded", {EVERY_OTHER: Precision(fmt, "fp32", fmt), **rows}), Case("attention", fmt, (fmt,)))
    assert min(missed) > 0.01 * B * T * H * D, missed
