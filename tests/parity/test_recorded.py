"""refimpl against results of PyTorch that are kept in a file, so that no PyTorch is needed here.

tests/vectors/pytorch.safetensors is written by scripts/record_vectors.py, whose docstring says what the file holds. What is
compared with what:

  casts, loss scales, unscaled and clipped gradients, AdamW and SGD of refimpl.parity.fused_optimizers    every bit
  operations, forward and backward, in every recipe that runs them in a way of its own  what bounds.py says is possible
  a training step of a GPT and an MLP, from PyTorch's gradients on: unscale, clip,      every bit
    update
  six whole steps of both models in all recipes                                         scales and skips equal; the rest as
                                                                                        near as rounding allows: `allowed`

Each comparison is a function of the file's arrays. Where PyTorch is installed all are run once more, on arrays recorded
anew; and each is run on arrays with a mistake in them, or on a refimpl with a mistake, and must fail.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arrays import LOW, U, array, assert_same_bits, bits, rounded, wide
from bounds import (
    FUNCTION,
    Near,
    add_near,
    assert_agrees,
    attention_near,
    cross_entropy_near,
    embedding_near,
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
    possible,
    relu_near,
    rmsnorm_near,
    rope_near,
    silu_near,
    softmax_near,
    swiglu_near,
)
from paths import TESTS
from script_loader import load_script

from refimpl.backends.base import Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.models.model import Model, Parameter
from refimpl.nn.ops import OPS
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, dtype_of, format_of, widens_to
from refimpl.optim.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.optim.loss_scale import DynamicLossScale
from refimpl.optim.optimizer import Optimizer, Rule
from refimpl.optim.schedule import Schedule
from refimpl.optim.state import State
from refimpl.parity.fused_optimizers import ExactAdamW, ExactSGD, adamw_step, norm_like_torch
from refimpl.parity.pytorch import RECIPES
from refimpl.precision.context import OpPrecision, Run
from refimpl.precision.policy import Policy, Precision
from refimpl.precision.recipes import get_recipe
from refimpl.step import train_step
from refimpl.training.checkpoint import load, save

FILE = TESTS / "vectors" / "pytorch.safetensors"
Array = np.ndarray


recorder = load_script("record_vectors")  # it knows the cases and formats of what it wrote, and draws what it did not
CASES = {f"{case.op} {case.name}": case for case in recorder.cases()}


class Vectors:
    """The arrays by name, and what the file says of itself."""

    def __init__(self, arrays: Mapping[str, Array], header: Mapping[str, Any]) -> None:
        self.arrays, self.header = dict(arrays), header

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def changed(self, name: str, index: Any, to: Callable[[Any], Any]) -> Vectors:
        """A copy with a number, or all, changed from x to to(x)."""
        x = self[name].copy()
        x[index] = to(x[index])
        return Vectors({**self.arrays, name: x}, self.header)

    def one_place_off(self, name: str, index: int, places: int = 1) -> Vectors:
        """A copy with the last bit of one number turned over; 2 places: the last but one."""
        x = self[name].copy()
        bits(x).reshape(-1)[index] ^= places
        return Vectors({**self.arrays, name: x}, self.header)


KEPT = Vectors(*load(FILE))


@pytest.fixture(scope="module", params=["kept", "anew"])
def vectors(request: pytest.FixtureRequest) -> Iterator[Vectors]:
    """The file; and where torch 2.13.0 is installed, what it computes on this machine."""
    if request.param == "kept":
        yield KEPT
        return
    torch = pytest.importorskip("torch")
    if not torch.__version__.startswith("2.13.0"):
        pytest.skip("the file is torch 2.13.0's")
    threads = torch.get_num_threads()
    yield Vectors(*recorder.record())
    torch.set_num_threads(threads)


@pytest.fixture
def with_fma(vectors: Vectors) -> Vectors:
    """Vectors whose optimizers and norms are of the kernels whose bits parity.fused_optimizers has: those with FMA."""
    if vectors is not KEPT:
        import torch

        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            pytest.skip("PyTorch runs without FMA kernels here")
    return vectors


def red(check: Callable[..., None], *arguments: Any) -> None:
    """A comparison of something wrong must fail."""
    with pytest.raises(AssertionError):
        check(*arguments)


# ------------------------------------------------------------------------------------------------------------- the file


def test_the_file_is_small_and_is_what_the_script_would_write_now() -> None:
    assert FILE.stat().st_size < 450_000
    assert KEPT.header["torch"].startswith("2.13.0")
    # The inputs that are not in the file are among this, as a check sum: drawn otherwise, they would look like mistakes.
    for key, value in recorder.header("").items():
        if key not in ("torch", "numpy"):
            assert KEPT.header[key] == _as_json(value), f"{key!r} has changed: run scripts/record_vectors.py again"


def _as_json(x: Any) -> Any:
    """What comes back from JSON: tuples as lists."""
    if isinstance(x, dict):
        return {key: _as_json(value) for key, value in x.items()}
    return [_as_json(value) for value in x] if isinstance(x, list | tuple) else x


RUN = ("loss", "loss_scale", "skipped", "grad_norm", "weights", "scaled", "m.crc", "v.crc", "weights.crc")


def missing(arrays: Mapping[str, Array]) -> list[str]:
    """What the file should hold and does not: each operation in each recipe, and each run."""
    found = [f"{op} in {recipe}" for op in recorder.OPERATIONS for recipe in RECIPES if not _has_results(arrays, op, recipe)]
    runs = [f"run.{model}.{recipe}.{key}" for model in recorder.RUNS for recipe in RECIPES for key in RUN]
    return found + [name for name in runs if name not in arrays]


def _has_results(arrays: Mapping[str, Array], op: str, recipe: str) -> bool:
    """Whether there is a case for the recipe, and the output and all gradients of each."""
    if op == "cast" and not recipe.startswith("amp-"):
        return True  # only autocast casts parameters on their way into an operation
    of_recipe = [case for case in CASES.values() if case.op == op and recipe in case.recipes]
    names = ["y", *(f"d{name}" for name in recorder.OPERATIONS[op].operands if name not in recorder.DATA)]
    return bool(of_recipe) and all(f"op.{op}.{case.name}.{name}" in arrays for case in of_recipe for name in names)


def test_every_operation_and_every_recipe_is_in_the_file() -> None:
    assert set(recorder.OPERATIONS) == set(OPS)
    assert missing(KEPT.arrays) == []
    fewer = {name: x for name, x in KEPT.arrays.items() if name not in ("op.matmul.amp-bf16.db", "run.mlp.bf16.loss")}
    assert missing(fewer) == ["matmul in amp-bf16", "matmul in amp-bf16-cpu", "run.mlp.bf16.loss"]


def test_recording_again_gives_the_same_bytes_where_no_processor_matters(vectors: Vectors) -> None:
    """Casts and loss scales are defined to the bit, but for the payload of the one NaN."""
    assert vectors.arrays.keys() == KEPT.arrays.keys()
    exact = [name for name in KEPT.arrays if name.startswith(("cast.", "scaler.", "unscale."))]
    assert len(exact) > 10
    is_number = ~np.isnan(KEPT["cast.x"].view(np.float32))
    for name in exact:
        kept = is_number if name.startswith("cast.") else slice(None)
        assert_same_bits(vectors[name][kept], KEPT[name][kept], name)


def test_equal_arrays_make_equal_bytes(tmp_path: Path) -> None:
    save(tmp_path / "again.safetensors", KEPT.arrays, KEPT.header)
    assert (tmp_path / "again.safetensors").read_bytes() == FILE.read_bytes()


def test_without_torch_the_script_says_so_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"^PyTorch is not installed: pip install 'torch==2\.13\.0'$"):
        recorder.run(tmp_path / "vectors.safetensors")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------- casts


def check_cast(v: Vectors, fmt: str) -> None:
    """Every code; a NaN is a NaN."""
    x = v["cast.x"].view(np.float32)
    y = cast(x, fmt, overflow="saturate" if fmt == "e4m3" else "inf")  # E4M3 saturates in PyTorch 2.13; the others have Inf
    theirs = v[f"cast.{fmt}"].view(dtype_of(fmt))
    is_nan = np.isnan(x)
    assert is_nan.any() and np.isnan(wide(y)[is_nan]).all() and np.isnan(wide(theirs)[is_nan]).all()
    assert_same_bits(y[~is_nan], theirs[~is_nan])


@pytest.mark.parametrize("fmt", recorder.CASTS)
def test_casts(vectors: Vectors, fmt: str) -> None:
    check_cast(vectors, fmt)


@pytest.mark.parametrize("fmt", recorder.CASTS)
def test_control_a_code_one_place_off_is_noticed(fmt: str) -> None:
    for index in (0, 1000, 2000):
        red(check_cast, KEPT.one_place_off(f"cast.{fmt}", index), fmt)


@pytest.mark.parametrize("fmt", recorder.CASTS)
def test_control_the_values_tell_other_ways_to_round_apart(fmt: str) -> None:
    """Truncation, and ties away from zero, give other codes for dozens of the values."""
    x, theirs = wide(KEPT["cast.x"].view(np.float32)), wide(KEPT[f"cast.{fmt}"].view(dtype_of(fmt)))
    inside = np.abs(x) <= FORMATS[fmt].max
    x, theirs = np.abs(x[inside]), np.abs(theirs[inside])
    exponent = np.frexp(np.maximum(x, FORMATS[fmt].smallest_normal))[1] - 1
    place = np.ldexp(1.0, exponent - FORMATS[fmt].fraction_bits)
    assert np.array_equal(np.rint(x / place) * place, theirs)
    assert np.count_nonzero(np.trunc(x / place) * place != theirs) > 50
    assert np.count_nonzero(np.floor(x / place + 0.5) * place != theirs) > 30


# ----------------------------------------------------------------------------------------------------------- operations

FORMULAS: dict[str, Callable[..., list[Near]]] = {
    "linear": linear_near,
    "matmul": matmul_near,
    "add": add_near,
    "relu": relu_near,
    "silu": silu_near,
    "gelu_tanh": gelu_tanh_near,
    "gelu_new": gelu_new_near,
    "gelu_erf": gelu_erf_near,
    "layernorm": layernorm_near,
    "rmsnorm": rmsnorm_near,
    "softmax": softmax_near,
    "embedding": embedding_near,
    "cross_entropy": cross_entropy_near,
    "rope": rope_near,
    "llama_rmsnorm": llama_rmsnorm_near,
    "swiglu": swiglu_near,
}
"""Attention's is made of stages. Reshape, transpose, split and cast do no arithmetic, so they are identical."""


def operands_of(v: Vectors, case: Any) -> tuple[list[Array], Array]:
    """The inputs in the formats that the case names, and the output's gradient in the output's."""
    names = recorder.OPERATIONS[case.op].operands
    drawn = [(v[f"op.{case.op}.{name}"], fmt) for name, fmt in zip(names, case.operands, strict=True)]
    return [x if fmt == "data" else array(x, fmt) for x, fmt in drawn], array(v[f"op.{case.op}.dy"], case.results[0])


def results_of(v: Vectors, case: Any) -> dict[str, tuple[Array, str]]:
    """PyTorch's output and gradients by name, each with the format that it was rounded to."""
    names = ["y", *(f"d{name}" for name in recorder.OPERATIONS[case.op].operands)]
    return {n: (v[f"op.{case.op}.{case.name}.{n}"], fmt) for n, fmt in zip(names, case.results, strict=True) if fmt}


def exact_of(v: Vectors, case: Any) -> list[Near]:
    """The output and gradients without the last rounding, and how far a correct evaluation may be from them."""
    operands, dy = operands_of(v, case)
    fmt = case.results[0]
    if case.op == "attention":
        return attention_near(operands[0], dy, fmt, softmax="fp32" if case.how == "cuda" else None)
    if case.op == "grouped_attention":
        return grouped_attention_near(*(rounded(wide(x), fmt) for x in operands), dy, fmt)
    if case.op not in FORMULAS:
        return [Near(wide(x)) for x, _ in results_of(v, case).values()]
    products = case.op in ("linear", "matmul")  # what these see was rounded to the format of their result
    seen = [x if x.dtype == np.int64 else near(rounded(wide(x), fmt) if products else wide(x)) for x in operands]
    formats = {"fmt": fmt, "grad_fmt": case.results[1]}
    asked = formats.keys() & inspect.signature(FORMULAS[case.op]).parameters.keys()
    return FORMULAS[case.op](*seen, near(wide(dy)), **{name: formats[name] for name in asked})


def ours_of(v: Vectors, case: Any, policy: Policy) -> list[Array]:
    """refimpl's output and gradients."""
    operands, dy = operands_of(v, case)
    static = recorder.OPERATIONS[case.op].static | ({"fmt": case.results[0]} if case.op == "cast" else {})
    y, gradients = ours(policy, case.op, operands, dy, **static)
    return [y, *(g for g in gradients if g is not None)]


def check_values(v: Vectors, case: Any, policy: Policy) -> None:
    """Every element of both sides is one that a correct evaluation can give, so most are identical."""
    results = results_of(v, case)
    for x, name, exact in zip(ours_of(v, case, policy), results, exact_of(v, case), strict=True):
        theirs, fmt = results[name]
        assert_agrees(x, theirs, exact, fmt, f"{name} of {case.op} {case.name}")


def check_operation(v: Vectors, case: Any, policy: Policy) -> None:
    """The formats that results are stored in, and the values."""
    for x, (name, (theirs, _)) in zip(ours_of(v, case, policy), results_of(v, case).items(), strict=True):
        assert x.dtype == theirs.dtype and x.shape == theirs.shape, name
    check_values(v, case, policy)


@pytest.mark.parametrize("name", CASES)
def test_operations(vectors: Vectors, name: str) -> None:
    for recipe in CASES[name].recipes:
        check_operation(vectors, CASES[name], get_recipe(recipe).policy)


def test_most_results_in_16_bits_are_decided() -> None:
    """Only one number is possible: otherwise the claim would be empty."""
    shares = {}
    for name, case in CASES.items():
        for (result, (_, fmt)), exact in zip(results_of(KEPT, case).items(), exact_of(KEPT, case), strict=True):
            if fmt in LOW:
                least, greatest = possible(exact, fmt)
                shares[f"{name} {result}"] = float((least == greatest).mean())
    assert min(shares.values()) > 0.5, sorted(shares.items(), key=lambda item: item[1])[:5]


UNROUNDED = ("relu", "reshape", "transpose", "split")
"""Their results are numbers that came in, or 0: nothing is left to be rounded."""


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.op not in UNROUNDED and set(case.results) & set(LOW)])
def test_control_without_its_roundings_an_operation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its values: the comparison of formats, which would notice too, is not made here."""
    case, rounding = CASES[name], OpPrecision.round_to

    def unrounded(self: OpPrecision, x: Array, fmt: str, site: str) -> Array:
        return rounding(self, x, fmt, site) if widens_to(format_of(x), fmt) else x

    policy = get_recipe(case.recipes[0]).policy
    check_values(KEPT, case, policy)
    monkeypatch.setattr(OpPrecision, "round_to", unrounded)
    red(check_values, KEPT, case, policy)


@pytest.mark.parametrize("name", ["linear amp-fp16", "matmul amp-fp16", "linear amp-bf16", "matmul amp-bf16"])
def test_control_without_autocasts_rounding_of_operands_a_product_is_noticed(name: str) -> None:
    case = CASES[name]
    fmt = case.results[0]
    red(check_values, KEPT, case, Policy("unrounded", {"*": Precision("same", "fp32", fmt)}))


@pytest.mark.parametrize("part", ["scores", "scale", "softmax"])
@pytest.mark.parametrize("fmt", LOW)
def test_control_without_one_of_its_roundings_attention_is_noticed(part: str, fmt: str) -> None:
    """Operands are taken as they come, or the row after it would make up for what is missing."""
    rows = {f"attention.{name}": Precision("same", "fp32", fmt) for name in ("scores", "scale", "softmax", "values")}
    base = Policy("as they come", {"*": Precision(fmt, "fp32", fmt), **rows})
    check_values(KEPT, CASES[f"attention {fmt}"], base)
    missed = {f"attention.{part}": Precision("same", "fp32", "fp32")}
    red(check_values, KEPT, CASES[f"attention {fmt}"], replace(base, rows=base.rows | missed))


def test_control_an_fp32_product_of_rounded_operands_is_noticed() -> None:
    red(check_values, KEPT, CASES["matmul fp32"], Policy("bf16 inputs", {"*": Precision("bf16", "fp32", "fp32")}))


@pytest.mark.parametrize("name", CASES)
def test_control_a_recorded_result_one_place_off_is_noticed(name: str) -> None:
    """In 16 bits at an element that is decided; in FP32 where there is no rounding error at all, or else by 2^-10 of it."""
    case = CASES[name]
    for (result, (theirs, fmt)), exact in zip(results_of(KEPT, case).items(), exact_of(KEPT, case), strict=True):
        least, greatest = possible(exact, fmt)
        decided = np.flatnonzero((least == greatest) & (least != 0))
        full = f"op.{case.op}.{case.name}.{result}"
        if decided.size and theirs.dtype.itemsize * 8 == FORMATS[fmt].bits:
            wrong = KEPT.one_place_off(full, int(decided[0]))
        else:
            largest = np.unravel_index(int(np.abs(wide(theirs)).argmax()), theirs.shape)
            wrong = KEPT.changed(full, largest, lambda x: x * type(x)(1 + 2**-10))
        red(check_values, wrong, case, get_recipe(case.recipes[0]).policy)


# --------------------------------------------------------------------------------------- optimizers, scaler, clipping


def toy(*shapes: tuple[int, ...]) -> Model:
    """A model that is only its table of parameters."""
    return Model("toy", {}, {f"p{i}": Parameter(shape, std=1.0) for i, shape in enumerate(shapes)}, {}, None, None)  # type: ignore[arg-type]


def check_optimizer(v: Vectors, name: str, rule: Rule, lr: float) -> None:
    """Every update as the training loop makes it, on one flat buffer; the first that differs in any bit is named."""
    start, *gradients = recorder.updates()
    state = State(toy((recorder.N, 1)), get_recipe("fp32").state_encodings(rule.moments), NUMPY)  # a matrix: it decays
    state.weights[...] = start
    optimizer = Optimizer(rule, Schedule(lr, lr, 0, len(gradients)))
    for t, g in enumerate(gradients):
        state.grads[...] = g
        optimizer.update(state, np.float32(1), 1.0, np.False_)
        assert recorder.crc(state.weights) == v[f"{name}.crc"][t], f"update {t + 1} is another one"
    assert_same_bits(state.weights, v[f"{name}.p"], "parameters")
    for kind in rule.moments:
        assert_same_bits(state.buffers[kind], v[f"{name}.{kind}"], kind)


def adamw_rule(**changed: Any) -> ExactAdamW:
    settings = {**recorder.ADAMW, **changed}
    return ExactAdamW(settings["betas"], settings["eps"], settings["weight_decay"])


def test_adamw(with_fma: Vectors) -> None:
    check_optimizer(with_fma, "adamw", adamw_rule(), recorder.ADAMW["lr"])


def test_sgd(with_fma: Vectors) -> None:
    check_optimizer(with_fma, "sgd", ExactSGD(recorder.SGD["momentum"]), recorder.SGD["lr"])


def test_control_an_optimizer_one_bit_or_one_setting_off_is_noticed() -> None:
    lr = recorder.ADAMW["lr"]
    for array_name in ("adamw.p", "adamw.m", "adamw.v", "adamw.crc"):
        red(check_optimizer, KEPT.one_place_off(array_name, 1000 % KEPT[array_name].size), "adamw", adamw_rule(), lr)
    check_optimizer(KEPT, "adamw", adamw_rule(), lr)
    for changed in ({"betas": (0.9, 0.95000001)}, {"eps": 1.001e-8}, {"weight_decay": 0.1001}):
        red(check_optimizer, KEPT, "adamw", adamw_rule(**changed), lr)
    red(check_optimizer, KEPT, "sgd", ExactSGD(0.9), recorder.SGD["lr"] * (1 + 1e-6))


def check_scaler(v: Vectors, i: int) -> None:
    """Scale and counter after each of 200 steps."""
    scale = DynamicLossScale(**recorder.SCALERS[i])
    for step, overflow in enumerate(v["scaler.overflow"]):
        scale.update(overflow)
        assert float(scale.scale) == v[f"scaler.{i}.scale"][step], f"step {step + 1}"
        assert int(scale.good_steps) == v[f"scaler.{i}.tracker"][step], f"step {step + 1}"


def check_unscaling(v: Vectors, i: int) -> None:
    """Finite gradients of all sizes, subnormals among them, times 1/S rounded to FP32."""
    inverse = inverse_of(np.float32(recorder.UNSCALED_BY[i]))
    with np.errstate(under="ignore"):
        assert_same_bits(v["unscale.scaled"] * inverse, v[f"unscale.{i}"])


@pytest.mark.parametrize("i", range(len(recorder.SCALERS)))
def test_loss_scales(vectors: Vectors, i: int) -> None:
    check_scaler(vectors, i)
    overflow = vectors["scaler.overflow"]
    assert overflow.size == 200 and 10 < overflow.sum() < 50
    for name in (f"scaler.{i}.scale", f"scaler.{i}.tracker"):
        red(check_scaler, vectors.one_place_off(name, 150), i)


@pytest.mark.parametrize("i", range(len(recorder.UNSCALED_BY)))
def test_unscaling(vectors: Vectors, i: int) -> None:
    check_unscaling(vectors, i)
    red(check_unscaling, vectors.one_place_off(f"unscale.{i}", 150), i)


def check_clipping(v: Vectors, i: int) -> None:
    """The norm of parity.fused_optimizers and the clipped gradients, to the bit; the norm of step 3 within its rounding errors.

    PyTorch's is a running sum in 8 lanes: with n numbers an error of (n/8 + 8) U of the sum, halved by the root. Ours has
    partial sums, and no more; each square and the root add U.
    """
    gradients = recorder.unclipped_gradients()
    norm, clipped = v[f"clip.{i}.norm"], v[f"clip.{i}.clipped"]
    assert_same_bits(norm_like_torch(np.array([norm_like_torch(g) for g in gradients])), norm, "norm")
    flat = np.concatenate([g.ravel() for g in gradients])
    assert_same_bits(flat * np.float32(clip_coefficient(norm, recorder.CLIP_NORMS[i])), clipped, "clipped gradients")
    state = State(toy(flat.shape), get_recipe("fp32").state_encodings(()), NUMPY)
    state.grads[...] = flat
    _, measured = check_and_measure(state, np.float32(1))
    assert abs(float(measured) - float(norm)) <= (flat.size / 8 + 16) * U * float(norm)


@pytest.mark.parametrize("i", range(len(recorder.CLIP_NORMS)))
def test_clipping(with_fma: Vectors, i: int) -> None:
    check_clipping(with_fma, i)
    for name in (f"clip.{i}.norm", f"clip.{i}.clipped"):
        red(check_clipping, with_fma.one_place_off(name, 0), i)


# ------------------------------------------------------------------------- a step, from PyTorch's gradients to its weights


def check_update(v: Vectors, model: str, recipe: str) -> None:
    """Steps 3 and 4 of the first step that is not skipped, tensor by tensor as PyTorch has them: every bit.

    What is recorded of the results is a check sum for each parameter. `tail`: the last elements of each tensor, see
    refimpl.parity.fused_optimizers.
    """
    config, key = recorder.run_config(model, recipe), f"run.{model}.{recipe}"
    weights, _ = recorder.run_inputs(model)
    first = int(np.flatnonzero(~v[f"{key}.skipped"])[0])
    inverse = inverse_of(np.float32(v[f"{key}.loss_scale"][first]))
    stops = np.cumsum([w.size for w in weights.values()])
    unscaled = [widen(g) * inverse for g in np.split(v[f"{key}.scaled"], stops[:-1])]

    norm = norm_like_torch(np.array([norm_like_torch(g) for g in unscaled]))
    assert norm == np.float32(v[f"{key}.grad_norm"][first]), "norm"
    coefficient = np.float32(clip_coefficient(norm, config.clip))
    assert (model == "gpt") or coefficient < 1  # the MLP's gradients are always clipped, the GPT's at times
    rule, schedule = config.make_rule(), config.make_optimizer(NUMPY).learning_rates
    for i, (name, w) in enumerate(weights.items()):
        p, m, v_ = w.ravel().copy(), *np.zeros((2, w.size), np.float32)
        clipped = unscaled[i] * coefficient
        settings = {"betas": rule.betas, "eps": rule.eps, "weight_decay": rule.weight_decay if w.ndim > 1 else 0.0}
        adamw_step(p, clipped, m, v_, lr=float(schedule[0]), t=1, tail=w.size % 8, **settings)
        for kind, x in (("m", m), ("v", v_), ("weights", p)):
            assert recorder.crc(x) == v[f"{key}.{kind}.crc"][i], f"{kind} of {name}"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", recorder.RUNS)
def test_from_pytorchs_gradients_follow_pytorchs_weights_bit_for_bit(with_fma: Vectors, model: str, recipe: str) -> None:
    check_update(with_fma, model, recipe)


def test_control_a_gradient_two_places_off_is_noticed_in_what_follows() -> None:
    """The product with 1/S may round neighbors to one number, but not those two places apart."""
    for model in recorder.RUNS:
        for recipe in RECIPES:
            check_update(KEPT, model, recipe)
            name = f"run.{model}.{recipe}.scaled"
            largest = int(np.abs(wide(KEPT[name])).argmax())
            red(check_update, KEPT.one_place_off(name, largest, places=2), model, recipe)


# ----------------------------------------------------------------------------------------------------------- whole runs


@dataclass(frozen=True)
class Rows:
    """What a run leaves behind: as in the file, but the gradients and weights in fp64."""

    loss: Array
    loss_scale: Array
    skipped: Array
    grad_norm: Array
    scaled: Array  # the gradients of the first step that is not skipped
    weights: Array  # every third one

    @classmethod
    def recorded(cls, v: Vectors, model: str, recipe: str) -> Rows:
        return cls(**{key: wide(v[f"run.{model}.{recipe}.{key}"]) for key in cls.__annotations__})


def run(model: str, recipe: str, policy: Policy | None = None, backend: Backend = NUMPY, **changed: Any) -> Rows:
    """The recorded run by refimpl. `changed`: settings of Config that are mistakes."""
    config, table = replace(recorder.run_config(model, recipe), **changed), get_recipe(recipe)
    weights, batches = recorder.run_inputs(model)
    network, rule = config.make_model(), config.make_rule()
    state = State(network, table.state_encodings(rule.moments), NUMPY)
    state.load_weights(weights)
    optimizer, loss_scale = config.make_optimizer(NUMPY), config.make_loss_scale(np)
    results, scaled = [], None
    for batch in batches:
        on = Run(policy or table.policy, backend)
        results.append(train_step(network, [batch], state, optimizer, loss_scale, on, config.clip))
        scaled = wide(state.grads) if scaled is None and not results[-1].skipped else scaled
    assert scaled is not None
    per_step = {key: wide([getattr(r, key) for r in results]) for key in ("loss", "loss_scale", "skipped", "grad_norm")}
    return Rows(**per_step, scaled=scaled, weights=wide(state.master)[:: recorder.STRIDE])


class WorstProducts(Backend):
    """Matrix products as far from the exact ones as correct ones may be, gamma_K |A||B|, with random signs."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__("worst products", np)
        object.__setattr__(self, "rng", rng)  # the dataclass is frozen

    def matmul(self, a: Array, b: Array, acc: str) -> Array:
        size = super().matmul(abs(a), abs(b), acc)
        return super().matmul(a, b, acc) + gamma(a.shape[-1]) * size * self.rng.choice([-1.0, 1.0], size.shape)


def in_fp64(recipe: str) -> Policy:
    """The roundings of the recipe, and no others: sums and functions are in FP64."""
    return Policy("exact", {key: replace(row, acc="fp64") for key, row in get_recipe(recipe).policy.rows.items()})


def noisy_run(model: str, recipe: str, seed: int) -> Rows:
    """A run in FP64, with errors before each rounding as large as those of FP32 arithmetic may be, and random signs.

    They are gamma_K |A||B| in a matrix product and 4 ulp elsewhere, which is what bounds.py allows an exp or a tanh.
    """
    rng, rounding = np.random.default_rng(seed), OpPrecision.round_to

    def with_errors(self: OpPrecision, x: Array, fmt: str, site: str) -> Array:
        if x.dtype == np.float64:
            x = x * (1 + FUNCTION * rng.choice([-1.0, 1.0], np.shape(x)))
        return rounding(self, x, fmt, site)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpPrecision, "round_to", with_errors)
        return run(model, recipe, in_fp64(recipe), WorstProducts(rng))


def by_tensor(model: str, x: Array) -> list[Array]:
    """A flat array that holds a sample of all parameters, in one piece for each.

    Without the keys' part of attention's bias: its gradient is 0, since the softmax does not see it, and what Adam makes of the
    rounding errors of a 0 is not to be compared.
    """
    start, _ = recorder.run_inputs(model)
    owner = np.concatenate([np.full(w.size, i) for i, w in enumerate(start.values())])
    for i, (name, w) in enumerate(start.items()):
        if name.endswith("c_attn.bias"):
            third = w.size // 3
            owner[np.flatnonzero(owner == i)[third : 2 * third]] = -1
    owner = owner[:: 1 if x.size == owner.size else recorder.STRIDE]
    return [x[owner == i] for i in range(len(start))]


def start_of(model: str) -> Array:
    """The sample of the weights before the first step, in fp64."""
    return wide(np.concatenate([w.ravel() for w in recorder.run_inputs(model)[0].values()]))[:: recorder.STRIDE]


def relative(model: str, difference: Array, size: Array) -> float:
    """|difference| / |size| of each tensor, and of these the root of the sum of squares: small tensors count as large ones."""
    differences, sizes = ([float(np.linalg.norm(part)) for part in by_tensor(model, x)] for x in (difference, size))
    shares = [a / b if b else np.inf for a, b in zip(differences, sizes, strict=True) if a]
    return float(np.linalg.norm(shares))


def distances(a: Rows, b: Rows, model: str) -> dict[str, float]:
    """Of losses and norms over the steps; of the gradients relative to them; of the weights relative to the way they went."""
    assert np.array_equal(a.loss_scale, b.loss_scale) and np.array_equal(a.skipped, b.skipped), "scales and skipped steps"
    made = b.skipped == 0
    return {
        "loss": float(np.linalg.norm(a.loss - b.loss)),
        "grad_norm": float(np.linalg.norm(a.grad_norm[made] - b.grad_norm[made])),
        "scaled": relative(model, a.scaled - b.scaled, b.scaled),
        "weights": relative(model, a.weights - b.weights, b.weights - start_of(model)),
    }


@functools.cache
def allowed(model: str, recipe: str) -> dict[str, float]:
    """How far two correct runs may be apart: each as far from the run in FP64 as a noisy one, so twice that; the most of 3.

    Beside it what the noise leaves out. A loss is a mean in FP32, a few U on each side. The norm errs as `check_clipping` says,
    and with it a clipped update. An update rounds a weight at the decay and at the last sum, U each, and errs by a few U of
    itself (PyTorch fuses products with sums): 4 U of the weight on each side, in each step.
    """
    exact = run(model, recipe, in_fp64(recipe))
    tries = [distances(noisy_run(model, recipe, seed), exact, model) for seed in range(3)]
    limits = {key: 2 * max(each[key] for each in tries) for key in tries[0]}
    of_norm = (sum(w.size for w in recorder.run_inputs(model)[0].values()) / 8 + 16) * U
    way = exact.weights - start_of(model)
    limits["loss"] += 4 * U * float(np.linalg.norm(exact.loss))
    limits["grad_norm"] += of_norm * float(np.linalg.norm(exact.grad_norm[exact.skipped == 0]))
    limits["weights"] += relative(model, of_norm * np.abs(way) + 8 * U * recorder.STEPS * np.abs(exact.weights), way)
    assert np.isfinite([*limits.values()]).all()
    return limits


def check_run(v: Vectors, model: str, recipe: str, ours: Rows) -> None:
    """Scales and skipped steps are equal; everything else is as near as rounding errors allow."""
    limits = allowed(model, recipe)
    for key, distance in distances(ours, Rows.recorded(v, model, recipe), model).items():
        assert distance <= limits[key], f"{key} of {model}, {recipe}: {distance:.2g} apart, {limits[key]:.2g} allowed"


ours_run = functools.cache(run)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", recorder.RUNS)
def test_whole_runs(vectors: Vectors, model: str, recipe: str) -> None:
    check_run(vectors, model, recipe, ours_run(model, recipe))
    skipped = int(vectors[f"run.{model}.{recipe}.skipped"].sum())
    assert (0 < skipped < recorder.STEPS - 2) if get_recipe(recipe).loss_scale == "dynamic" else skipped == 0


MISTAKES: dict[str, dict[str, Any]] = {
    "no clipping": {"clip": 1e9},
    "thirty times the weight decay": {"weight_decay": 3.0},
    "a learning rate 5 % too large": {"lr": 1.05e-2},
    "a shorter warm-up": {"warmup": 1},
    "SGD": {"optimizer": "sgd", "weight_decay": 0.0},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("model", recorder.RUNS)
def test_control_a_run_with_a_mistake_is_noticed(model: str, mistake: str) -> None:
    for recipe in RECIPES:
        red(check_run, KEPT, model, recipe, run(model, recipe, **MISTAKES[mistake]))


def test_control_a_loss_scale_that_grows_later_is_noticed() -> None:
    for model in recorder.RUNS:
        red(check_run, KEPT, model, "fp16", run(model, "fp16", growth_interval=3))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", recorder.RUNS)
def test_control_a_recorded_run_that_is_a_little_off_is_noticed(model: str, recipe: str) -> None:
    ours, key = ours_run(model, recipe), f"run.{model}.{recipe}"
    check_run(KEPT, model, recipe, ours)
    last = recorder.STEPS - 1
    red(check_run, KEPT.one_place_off(f"{key}.loss_scale", last), model, recipe, ours)
    red(check_run, KEPT.changed(f"{key}.skipped", last, lambda x: not x), model, recipe, ours)
    red(check_run, KEPT.changed(f"{key}.loss", last, lambda x: x * (1 + 1e-4)), model, recipe, ours)
    red(check_run, KEPT.changed(f"{key}.grad_norm", last, lambda x: x * (1 + 1e-2)), model, recipe, ours)
    red(check_run, KEPT.changed(f"{key}.weights", slice(None), lambda x: x * np.float32(1.01)), model, recipe, ours)
    red(check_run, KEPT.changed(f"{key}.scaled", slice(None), lambda x: x * np.float32(1.05)), model, recipe, ours)
