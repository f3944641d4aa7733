"""The CUDA kernels, compiled by g++ and run on the CPU, against their NumPy definitions; and sources with one thing wrong.

The checks are those of kernel_cases.py. Here exp, log and tanh are the C library's on both sides, so all comparisons with
one order of operations are of bits. That NumPy's own functions differ from those by no more than bounds.py allows is a test
of its own.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import kernel_cases
import kernel_host
import numpy as np
import pytest
from arrays import U, wide
from bounds import FUNCTION
from kernel_cases import CHECKS, REDUCING, CFunctions, Device
from kernel_host import HostKernels, c_function

from refimpl.backends.cupy.launch import FORMATS, declarations, source

pytestmark = [
    pytest.mark.usefixtures("ieee"),
    pytest.mark.skipif(bool(kernel_host.why_not()), reason=f"no host build: {kernel_host.why_not()}"),
]


def device(text: str | None = None, reverse: bool = False) -> Device:
    return Device(HostKernels(text, reverse).launch, CFunctions(c_function))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("check", CHECKS)
def test_kernel_computes_its_definition(check: str, fmt: str) -> None:
    CHECKS[check](device(), fmt)


@pytest.mark.parametrize("check", REDUCING)
def test_the_order_of_threads_changes_nothing(check: str) -> None:
    """Threads and blocks last to first: where a barrier were missing, some would read what was not written yet."""
    REDUCING[check](device(reverse=True), "fp16")


def test_every_kernel_is_checked() -> None:
    text = Path(kernel_cases.__file__).read_text(encoding="utf-8")
    assert [name for name in declarations(source()) if f'"{name}"' not in text] == []


# ---------------------------------------------------------------------------------------------- one thing wrong at a time

# name: (check that must fail, format, text, what it becomes)
MUTANTS: dict[str, tuple[str, str, str, str]] = {
    "product for sum": ("add_forward", "fp16", "each(add, y", "each(mul, y"),
    "last element missed": ("add_forward", "fp32", "i < n; i += stride()) y[i]", "i < n - 1; i += stride()) y[i]"),
    "words: the last value missed": ("add_forward", "bf16", "k < IN_WORD; k++", "k < IN_WORD - 1; k++"),
    "words: what follows them missed": ("add_forward", "fp32", "words * IN_WORD + first_element()", "n"),
    "fp16 truncated": ("add_forward", "fp16", "__float2half_rn(x)", "__float2half_rz(x)"),
    "bf16 truncated": ("add_forward", "bf16", "__float2bfloat16_rn(x)", "__float2bfloat16_rz(x)"),
    "gelu: another constant": ("gelu_tanh", "bf16", "KAPPA = 0.044715f", "KAPPA = 0.044716f"),
    "gelu: another half": ("gelu_tanh", "fp32", "mul(0.5f, z)", "mul(0.49999997f, z)"),
    "gelu: sign of the slope": ("gelu_tanh", "fp16", "sub(1.0f, mul(t, t))", "add(1.0f, mul(t, t))"),
    "silu: another sign": ("silu", "fp32", "add(expf(-z), 1.0f)", "add(expf(z), 1.0f)"),
    "silu: sign of the slope": ("silu", "bf16", "add(mul(sub(1.0f, s), z), 1.0f)", "sub(1.0f, mul(sub(1.0f, s), z))"),
    "swiglu: a rounding dropped": (
        "silu", "fp16", "mul(widen(round_to<T>(div(g, one_plus_exp(g)))), u)", "mul(div(g, one_plus_exp(g)), u)",
    ),
    "swiglu: silu not rounded again": ("silu", "fp16", "mul(widen(round_to<T>(div(g, e))), d)", "mul(div(g, e), d)"),
    "swiglu: a gradient not rounded": (
        "silu", "bf16", "float ds = widen(round_to<T>(mul(d, widen(up[i]))))", "float ds = mul(d, widen(up[i]))",
    ),
    "swiglu: the last element missed": (
        "silu", "fp32", "i < n; i += stride()) {\n        float d", "i < n - 1; i += stride()) {\n        float d",
    ),
    "rope: a product not rounded": ("rope", "fp16", "return widen(round_to<T>(mul(p, q)))", "return mul(p, q)"),
    "rope: angles not rounded": ("rope", "bf16", "c = widen(round_to<T>(cos[j]))", "c = cos[j]"),
    "rope: the other sign": ("rope", "fp32", "sub(product(a, c), product(b, s))", "add(product(a, c), product(b, s))"),
    "rope: backward turns forward": ("rope", "fp32", "mul(widen(round_to<T>(sin[j])), sign)", "widen(round_to<T>(sin[j]))"),
    "rope: neighbors for halves": ("rope", "fp32", "second = first + half", "second = first + 1"),
    "rope: one position for all": ("rope", "fp32", "cos += row % positions * half", "cos += 0"),
    "llama_rmsnorm: rounded once": (
        "llama_rmsnorm", "fp16",
        "T n = round_to<T>(mul(widen(x[i]), r));", "float n = mul(widen(x[i]), r);",
    ),
    "llama_rmsnorm: eps left out": (
        "llama_rmsnorm", "fp32", "div(warp_fold<add>(sum), (float)C), eps)", "div(warp_fold<add>(sum), (float)C), 0.0f)",
    ),
    "llama_rmsnorm: dn not rounded": (
        "llama_rmsnorm", "bf16",
        "return widen(round_to<T>(mul(widen(dy[i]), widen(w[i]))))", "return mul(widen(dy[i]), widen(w[i]))",
    ),
    "llama_rmsnorm: dy n not rounded": (
        "llama_rmsnorm", "bf16", "widen(round_to<T>(mul(widen(dy[i]), widen(n))))", "mul(widen(dy[i]), widen(n))",
    ),
    "wide softmax: P rounded": (
        "wide_causal_softmax", "fp16",
        "round_to<U>(div(expf(sub(scaled(i), largest)), sum))",
        "round_to<U>(widen(round_to<T>(div(expf(sub(scaled(i), largest)), sum))))",
    ),
    "layernorm: eps outside the root": (
        "layernorm", "fp16",
        "root(add(div(warp_fold<add>(squares), (float)C), eps))", "add(root(div(warp_fold<add>(squares), (float)C)), eps)",
    ),
    "layernorm: unbiased variance": ("layernorm", "bf16", "(squares), (float)C", "(squares), (float)(C - 1)"),
    "layernorm: rounded before the bias": ("layernorm", "fp16", "add(z, widen(b[i]))", "add(widen(round_to<T>(z)), b[i])"),
    "bias: rounded before it is added": (
        "bias_forward", "bf16", "add(products[row * C + i], ", "add(widen(round_to<T>(products[row * C + i])), ",
    ),
    "heads: positions and heads exchanged": (
        "heads", "fp16", "* H + h) * positions + position)", "* positions + position) * H + h)",
    ),
    "heads: the first element of a row stays": ("heads", "fp32", "THREADS) x[i] = y[", "THREADS) if (i) x[i] = y["),
    "heads: words longer than heads": ("heads", "fp16", "return D % IN_WORD == 0", "return D % 4 == 0"),
    "columns: last row missed": ("bias_backward", "fp32", "row < rows; row += LANES) sum", "row < rows - 1; row += LANES) sum"),
    "columns: summed in 16 bits": (
        "bias_backward", "bf16",
        "add(sum, widen(dy[(long long)row * C + column]))", "widen(round_to<T>(add(sum, dy[(long long)row * C + column])))",
    ),
    "softmax: a rounding dropped": ("causal_softmax", "fp16", "T unscaled = round_to<T>(", "float unscaled = ("),
    "softmax: sees one key more": (
        "causal_softmax", "fp32", "i < keys; i += WARP) sum = add(sum, expf", "i <= keys; i += WARP) sum = add(sum, expf",
    ),
    "softmax: not shifted": ("causal_softmax", "fp32", "sub(scaled(i), largest)));\n    sum", "scaled(i)));\n    sum"),
    "loss: NaN passed over": ("cross_entropy_forward", "fp32", "(a > b) | isnan(a) ? a : b", "a > b ? a : b"),
    "loss: the shift moved": (
        "cross_entropy_backward", "fp32",
        "sub(sub(widen(logits[i]), most), log)", "sub(widen(logits[i]), add(most, log))",
    ),
    "loss: no target": ("cross_entropy_backward", "bf16", "if (i == target[row]) d = sub(d, each);", ""),
    "loss: ignored rows counted": ("cross_entropy_mean", "fp32", "target[i] == ignore_index ? 0.0f : 1.0f", "1.0f"),
    "loss: ignored rows summed": ("cross_entropy_forward", "fp32", "i == ignore_index ? 0.0f : sub(l,", "sub(l,"),
    "loss: ignored rows not left out": ("cross_entropy_backward", "fp32", "if (target[row] == ignore_index) each = 0.0f;", ""),
    "loss: a target below 0 read": ("cross_entropy_forward", "fp32", "return 0 <= target && target < V", "return target < V"),
    "loss: a target beyond V read": ("cross_entropy_forward", "bf16", "return 0 <= target && target < V", "return 0 <= target"),
    "embedding: a token overlooked": ("embedding_backward", "fp32", "__ffs(left) - 1;", "31 - __builtin_clz(left); left = 8;"),
    "embedding: a word overlooked": ("embedding_backward", "fp32", "t % 32 < WORDS &&", "t % 32 < WORDS - 1 &&"),
    "rows: one too many": (
        "rows_beyond_the_last", "fp32", "if (row >= rows) return;\n    dy += row", "if (row > rows) return;\n    dy += row",
    ),
    "fold: the first lane keeps it": ("layernorm", "fp32", "__shfl_sync(ALL_LANES, mine, 0)", "mine"),
    "fold: a lane overlooked": (
        "cross_entropy_mean", "fp32", "for (int half = WARP / 2; half > 0;", "for (int half = WARP / 2; half > 1;",
    ),
    "norm: of half-scaled squares": ("gradient_norm", "fp16", "mul(g, g)", "mul(g, scaled)"),
    "norm: infinities pass": ("gradient_norm", "fp16", "!isfinite(scaled)", "isnan(scaled)"),
    "norm: 1/S is not looked at": ("gradient_norm", "fp16", "bad = !isfinite(*inverse_scale)", "bad = false"),
    "norm: looks at its own blocks only": ("gradient_norm", "bf16", "bad = bad || partial_bad[i]", "bad = partial_bad[i]"),
    "adamw: eps inside": (
        "adamw", "fp16", "add(div(root(second), root_correction), eps)", "div(add(root(second), eps), root_correction)",
    ),
    "adamw: another order": ("adamw", "fp32", "mul(mul(g, one_minus_beta2), g)", "mul(mul(g, g), one_minus_beta2)"),
    "adamw: no clipping": ("adamw", "bf16", "*inverse_scale), *clip)", "*inverse_scale), 1.0f)"),
    "adamw: all decay": ("adamw", "fp32", "if (in_ranges(i, decayed_start, decayed_stop, ranges)) master", "master"),
    "adamw: ranges end one late": ("adamw", "fp32", "stop[middle] <= i", "stop[middle] < i"),
    "adamw: not skipped": ("adamw", "fp16", "if (*found_inf) return;", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_fails(name: str) -> None:
    check, fmt, text, wrong = MUTANTS[name]
    assert source().count(text) == 1, "the mutant's text is not in the source, or more than once"
    with pytest.raises(AssertionError):
        CHECKS[check](device(source().replace(text, wrong)), fmt)


MEAN = "    sum = block_fold<add>(sum);\n    n = block_fold"
TWO_FOLDS = MEAN.replace("block_fold<add>(sum)", "block_fold<add>(div(block_fold<add>(sum), (float)THREADS))")
"""The same mean by two folds, one after the other: in the second each thread has a part of the sum."""

BARRIERS = {  # where: (check, what follows the barrier, or its comment)
    "in the fold of a block": ("cross_entropy_mean", "\n        if (t < half)"),
    "after the fold of a block": ("cross_entropy_mean", "  // all have read before the next reduction writes"),
    "in the fold of lanes": ("bias_backward", "\n        if (lane < half)"),
}


@pytest.mark.parametrize("where", BARRIERS)
def test_a_missing_barrier_fails_in_one_order_or_the_other(where: str) -> None:
    check, after = BARRIERS[where]
    whole = source().replace(MEAN, TWO_FOLDS)
    assert whole != source() and whole.count("__syncthreads();" + after) == 1
    CHECKS[check](device(whole), "fp32")
    text = whole.replace("__syncthreads();" + after, after)

    def passes(reverse: bool) -> bool:
        try:
            CHECKS[check](device(text, reverse), "fp32")
        except AssertionError:
            return False
        return True

    assert not (passes(False) and passes(True))


def test_a_barrier_that_some_threads_miss_is_seen() -> None:
    assert source().count(MEAN) == 1
    with pytest.raises(AssertionError, match="a barrier was missed"):
        CHECKS["cross_entropy_mean"](device(source().replace(MEAN, "    if (threadIdx.x == 0) return;\n" + MEAN)), "fp32")


# ------------------------------------------------------------------------------------------------------------- functions

SPAN = {"expf": (np.exp, -87.0, 88.0), "logf": (np.log, 1e-37, 3e38), "tanhf": (np.tanh, -10.0, 10.0)}


@pytest.mark.parametrize("name", SPAN)
def test_numpy_and_the_c_library_lie_within_the_bound_of_a_function(name: str, record_property: object) -> None:
    """Both err by at most FUNCTION, relative to the exact value: what bounds.py takes exp, log and tanh to do."""
    f, low, high = SPAN[name]
    rng = np.random.default_rng(15)
    x = rng.uniform(low, high, 1_000_000) if low < 0 else np.exp(rng.uniform(np.log(low), np.log(high), 1_000_000))
    x = x.astype(np.float32)
    exact, mine, theirs = f(wide(x)), f(x), c_function(name, x)
    for side, got in (("numpy", mine), ("C", theirs)):
        worst = float((np.abs(wide(got) - exact) / np.abs(exact)).max())
        record_property(f"{name}, {side}: largest relative error in units of 2^-24", worst / U)
        assert worst <= FUNCTION
    apart = np.abs(mine.view(np.int32).astype(np.int64) - theirs.view(np.int32))
    record_property(f"{name}: NumPy and C apart, ulp", int(apart.max()))
    assert apart.max() <= 2 * FUNCTION / U


def test_the_functions_are_those_of_the_c_library() -> None:
    x = np.array([0.5, 1.0, 3.0], np.float32)
    libm = ctypes.CDLL(None)
    libm.expf.restype, libm.expf.argtypes = ctypes.c_float, [ctypes.c_float]
    assert c_function("expf", x).tolist() == [libm.expf(value) for value in x.tolist()]
