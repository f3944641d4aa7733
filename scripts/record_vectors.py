"""Record what PyTorch computes, so that refimpl can be held against it where PyTorch is not installed.

    pip install torch==2.13.0
    python scripts/record_vectors.py                     writes tests/vectors/pytorch.safetensors

Every result in the file is PyTorch's, on a CPU, with one thread: casts, operations with their gradients, optimizers, gradient
scaler, clipping, and short training runs in all recipes. refimpl gives names, settings and facts about formats, no arithmetic.
What an operation does under CUDA's lists of autocast is written out as casts; no GPU is needed to know them. On one machine
equal versions write equal bytes. tests/parity/test_recorded.py compares.

What the names in the file mean:

    cast.x, cast.FORMAT                     FP32 bits, and the codes that they are rounded to
    op.NAME.OPERAND, op.NAME.dy             inputs and the gradient of the output in FP32, to be rounded to a case's formats
    op.NAME.CASE.y, op.NAME.CASE.dOPERAND   results; the header lists the cases with their formats
    adamw.*, sgd.*                          state after the last of 100 updates; CRC-32 of the parameters after each
    scaler.*, unscale.*, clip.*             loss scales step by step; gradients unscaled; gradients clipped
    run.MODEL.RECIPE.*                      per step loss, loss_scale, skipped, grad_norm; every third of the weights at the
                                            end; of the first step that is not skipped the scaled gradients, and the CRC-32 of
                                            what follows from them: m, v, weights (one for each parameter)

Inputs that are not in the file are drawn by `Stream`.
"""

from __future__ import annotations

from refimpl.training.cli import main

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.numerics.formats import FORMATS, dtype_of
from refimpl.parity.pytorch import RECIPES, import_torch
from refimpl.training.arguments import Parser
from refimpl.training.checkpoint import save
from refimpl.training.config import Config

Array = np.ndarray
TARGET = Path(__file__).resolve().parents[1] / "tests" / "vectors" / "pytorch.safetensors"
SEED = 34
LOW = ("fp16", "bf16")


class Stream:
    """Reproducible numbers: bits of PCG64, which NumPy promises to keep, made FP32 by nothing but exact operations."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.PCG64(seed)

    def integers(self, shape: tuple[int, ...], bits: int) -> Array:
        """Uniform in 0 ... 2^bits - 1."""
        raw = np.asarray(self.generator.random_raw(math.prod(shape)), np.uint64)
        return (raw >> np.uint64(64 - bits)).astype(np.int64).reshape(shape)

    def uniform(self, shape: tuple[int, ...]) -> Array:
        """FP32, the multiples of 2^-23 in [-1, 1)."""
        return (self.integers(shape, 24) * 2.0**-23 - 1).astype(np.float32)


def crc(x: Array) -> int:
    """CRC-32 of an FP32 array's bits: one number that tells whether all bits are equal."""
    return zlib.crc32(np.ascontiguousarray(x, "<f4").tobytes())


def type_of(torch: Any, fmt: str) -> Any:
    """PyTorch's type of a format."""
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[fmt]


def to_torch(torch: Any, x: Array, fmt: str) -> Any:
    """A tensor of the values of an FP32 or integer array, rounded to `fmt` by PyTorch; 'int': as it is."""
    return torch.tensor(x) if fmt == "int" else torch.tensor(x).to(type_of(torch, fmt))


def to_numpy(torch: Any, x: Any) -> Array:
    """The same values in an array of the same format."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return np.asarray(x.contiguous().view(torch.int16).numpy()).view(dtype_of("bf16"))
    return np.array(x.numpy())


# ---------------------------------------------------------------------------------------------------------------- casts


CASTS = {"fp16": "float16", "bf16": "bfloat16", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
"""Our name of a format, and PyTorch's."""


def boundary_values() -> Array:
    """FP32 values at which rounding to one of the four formats may go wrong, with both signs in turn.

    Of FP8 every value and every tie between neighbours; of 16 bits those on both sides of every power of two; each tie also one
    FP32 place below and above; the overflow ties by the same rule; then zeros, infinities, NaN and FP32's own ends.
    """
    found = []
    for fmt in CASTS:
        f, bias = FORMATS[fmt].fraction_bits, FORMATS[fmt].bias

        def value(code: Array, f: int = f, bias: int = bias) -> Array:
            """What a code would stand for if the largest exponent were one like any other."""
            exponent, fraction = code >> f, (code & (2**f - 1)) / 2.0**f
            result: Array = np.ldexp(fraction + (exponent > 0), np.maximum(exponent, 1) - bias)
            return result

        top = 2 ** FORMATS[fmt].exponent_bits
        codes = np.arange(top << f) if FORMATS[fmt].bits == 8 else np.arange(1, top)[:, None] * 2**f + np.array([-1, 0])
        with np.errstate(over="ignore"):  # beyond BF16's largest there is only infinity
            ties = ((value(codes) + value(codes + 1)) / 2).ravel().astype(np.float32)
            found += [value(codes).ravel().astype(np.float32), ties]
        found += [np.nextafter(ties, np.float32(side)) for side in (0, np.inf)]
    x = np.unique(np.concatenate(found))
    x[::2] *= -1
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, FORMATS["fp32"].max, -FORMATS["fp32"].smallest_subnormal]
    return np.concatenate([x, np.array(special, np.float32)])


def record_casts(torch: Any) -> dict[str, Array]:
    """The boundary values and their codes."""
    x = boundary_values()
    result = {"cast.x": x.view(np.uint32)}
    for fmt, name in CASTS.items():
        y = torch.from_numpy(x).to(getattr(torch, name))
        if FORMATS[fmt].bits == 8:
            result[f"cast.{fmt}"] = np.array(y.view(torch.uint8).numpy())
        else:
            result[f"cast.{fmt}"] = np.array(y.view(torch.int16).numpy()).view(np.uint16)
    return result


# ----------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operation:
    """An operation's operands, by name: shapes of normal numbers, or whole arrays; and its arguments that are no arrays."""

    operands: Mapping[str, tuple[int, ...] | Array]
    static: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, rng: np.random.Generator) -> dict[str, Array]:
        """The operands in FP32 (tokens: integers)."""
        return {k: x if isinstance(x, np.ndarray) else rng.standard_normal(x, np.float32) for k, x in self.operands.items()}


def _logits(rows: int, width: int) -> Array:
    """Large, so that exp overflows unless the largest is subtracted first; a row of equal ones; one beside which all vanish."""
    z = Stream(SEED).uniform((rows, width)) * np.float32(80)
    z[0], z[1, 3] = 0, 60000
    return z


ELEMENTS = (15, 20)
TOKENS = Stream(SEED + 1).integers((60,), 4) % 12  # five times each, on average
OPERATIONS: dict[str, Operation] = {
    "linear": Operation({"x": (12, 20), "w": (15, 20), "b": (15,)}),
    "matmul": Operation({"a": (2, 2, 6, 10), "b": (2, 2, 10, 6)}),
    "attention": Operation({"qkv": (12, 4, 36)}, {"n_head": 2}),
    "add": Operation({"a": ELEMENTS, "b": (20,)}),
    "relu": Operation({"x": ELEMENTS}),
    "silu": Operation({"x": ELEMENTS}),
    "gelu_tanh": Operation({"x": ELEMENTS}),
    "gelu_erf": Operation({"x": ELEMENTS}),
    "layernorm": Operation({"x": (10, 24), "w": (24,), "b": (24,)}),
    "rmsnorm": Operation({"x": (10, 24), "w": (24,)}),
    "softmax": Operation({"x": (20, 15)}),
    "embedding": Operation({"tokens": TOKENS, "w": (12, 8)}),
    "cross_entropy": Operation({"logits": _logits(12, 20), "targets": Stream(SEED + 2).integers((12,), 4)}),
    "reshape": Operation({"x": (2, 3, 4)}, {"shape": (6, 4)}),
    "transpose": Operation({"x": (2, 3, 4)}, {"axes": (2, 0, 1)}),
    "split": Operation({"x": (2, 3, 12)}, {"start": 3, "stop": 8}),
    "cast": Operation({"w": Stream(SEED + 3).uniform(ELEMENTS) * np.float32(2**-12)}),  # a third is subnormal in FP16
}


@dataclass(frozen=True)
class Case:
    """An operation in certain formats, and the recipes that run it like that when its operands arrive in these formats.

    operands: the format that each arrives in ('int': tokens). results: the format that the output, then the gradient of each
    operand, is rounded to ('': it has none). how: 'plain', or by the lists of autocast, 'cpu' or 'cuda'.
    """

    op: str
    name: str
    recipes: tuple[str, ...]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    how: str = "plain"


PRODUCTS = ("linear", "matmul", "attention")  # low under autocast, whatever comes in
HIGH_ON_CUDA = ("layernorm", "rmsnorm", "softmax", "attention")  # FP32 under CUDA's autocast, of attention the softmax


def cases() -> list[Case]:
    """All that is recorded of the operations: every way in which one of the recipes runs one of them."""
    result = []
    for op, operation in OPERATIONS.items():
        result += [_uniform_case(op, operation, fmt) for fmt in ("fp32", *LOW) if op != "cast"]
        for low in LOW:
            result += _autocast_cases(op, low, f"amp-{low}", f"amp-{low}-cpu")
    return result


def _uniform_case(op: str, operation: Operation, fmt: str) -> Case:
    """One format throughout, but that the loss is FP32. Autocast does the same to operations that take what comes."""
    if fmt == "fp32":
        same = () if op in PRODUCTS else tuple(recipe for recipe in RECIPES if recipe.startswith("amp-"))
    else:
        same = (f"amp-{fmt}-cpu",) if op in HIGH_ON_CUDA else (f"amp-{fmt}", f"amp-{fmt}-cpu")
    operands = tuple("int" if name in ("tokens", "targets") else fmt for name in operation.operands)
    gradients = tuple("" if operand == "int" else fmt for operand in operands)
    return Case(op, fmt, (fmt, *same), operands, ("fp32" if op == "cross_entropy" else fmt, *gradients))


def _autocast_cases(op: str, low: str, cuda: str, cpu: str) -> list[Case]:
    """What autocast makes of operands in other formats: FP32 into products, 16 bits (with FP32 parameters) into the rest."""
    high = "fp32"
    both = (cuda, cpu)
    table = {
        "linear": [Case(op, cuda, both, (high,) * 3, (low,) * 4, "cpu")],
        "matmul": [Case(op, cuda, both, (high,) * 2, (low,) * 3, "cpu")],
        "attention": [Case(op, cuda, (cuda,), (low,), (low, low), "cuda")],
        "add": [Case(op, cuda, both, (high, low), (high, high, low))],
        "softmax": [Case(op, cuda, (cuda,), (low,), (high, low), "cuda")],
        "layernorm": [
            Case(op, cuda, (cuda,), (low, high, high), (high, low, high, high), "cuda"),
            Case(op, cpu, (cpu,), (low, high, high), (low, low, high, high), "cpu"),
        ],
        "rmsnorm": [
            Case(op, cuda, (cuda,), (low, high), (high, low, high), "cuda"),
            Case(op, cpu, (cpu,), (low, high), (low, low, high), "cpu"),
        ],
        "cast": [Case(op, cuda, both, (high,), (low, low))],
    }
    return table.get(op, [])


def function_of(torch: Any, case: Case) -> Callable[..., Any]:
    """The operation in PyTorch's words; under CUDA's autocast with its casts written out."""
    F, cuda = torch.nn.functional, case.how == "cuda"
    static = OPERATIONS[case.op].static
    table: dict[str, Callable[..., Any]] = {
        "linear": F.linear,
        "matmul": torch.matmul,
        "attention": lambda qkv: attention(torch, qkv, softmax_in_fp32=cuda, **static),
        "add": torch.add,
        "relu": torch.relu,
        "silu": F.silu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_erf": F.gelu,
        "layernorm": lambda x, w, b: F.layer_norm(x.float() if cuda else x, w.shape, w, b),
        "rmsnorm": lambda x, w: F.rms_norm(x.float() if cuda else x, w.shape, w, eps=1e-5),
        "softmax": lambda x: torch.softmax(x, -1, dtype=torch.float32 if cuda else None),
        "embedding": F.embedding,
        "cross_entropy": lambda z, targets: F.cross_entropy(z.float(), targets),
        "reshape": lambda x: x.reshape(static["shape"]),
        "transpose": lambda x: x.permute(static["axes"]),
        "split": lambda x: x.tensor_split([static["start"], static["stop"]], dim=-1)[1],
        "cast": lambda w: w.to(type_of(torch, case.results[0])),
    }
    return table[case.op]


def attention(torch: Any, qkv: Any, n_head: int, softmax_in_fp32: bool) -> Any:
    """Causal self-attention as four operations, one after the other: PyTorch's fused kernel rounds elsewhere."""
    B, T, C = qkv.shape
    q, k, v = (x.view(B, T, n_head, -1).transpose(1, 2) for x in qkv.split(C // 3, dim=2))
    S = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
    S = S.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    P = torch.softmax(S, -1, dtype=torch.float32 if softmax_in_fp32 else None)
    return (P.to(v.dtype) @ v).transpose(1, 2).reshape(B, T, C // 3)


SUMS_IN_16_BITS = ("layernorm", "rmsnorm", "embedding")
"""PyTorch's CPU kernels of these round 16-bit gradients after every row, and the statistics of a row before backward. CUDA's do
not, and that is not what is specified here: their gradients are recorded from FP32 kernels on the same values, rounded once."""


def record_operations(torch: Any) -> dict[str, Array]:
    """Inputs once, in FP32; results for every case."""
    result: dict[str, Array] = {}
    for i, (op, operation) in enumerate(OPERATIONS.items()):
        rng = np.random.default_rng([SEED, i])
        operands = operation.draw(rng)
        dy = np.array(1024, np.float32) if op == "cross_entropy" else None  # a loss scale
        # oneDNN's gelu has an erf of its own; without it PyTorch uses the published formula that refimpl uses too.
        with torch.backends.mkldnn.flags(enabled=op != "gelu_erf"):
            for case in (case for case in cases() if case.op == op):
                f = function_of(torch, case)
                leaves = [to_torch(torch, x, fmt) for x, fmt in zip(operands.values(), case.operands, strict=True)]
                y = _forward(torch, f, case, leaves)
                dy = rng.standard_normal(y.shape, np.float32) if dy is None else dy
                gradients = _backward(torch, f, case, leaves, y, torch.tensor(dy).to(y.dtype))
                found = zip(("y", *(f"d{name}" for name in operands)), (y, *gradients), strict=True)
                result |= {f"op.{op}.{case.name}.{name}": to_numpy(torch, x) for name, x in found if x is not None}
        assert dy is not None
        result |= {f"op.{op}.{name}": x for name, x in operands.items()} | {f"op.{op}.dy": dy}
    return result


def _forward(torch: Any, f: Callable[..., Any], case: Case, leaves: list[Any]) -> Any:
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    low = next((fmt for fmt in case.results if fmt in LOW), "bf16")
    with torch.autocast("cpu", type_of(torch, low), enabled=case.how == "cpu"):
        return f(*leaves)


def _backward(torch: Any, f: Callable[..., Any], case: Case, leaves: list[Any], y: Any, dy: Any) -> list[Any]:
    """The gradient of each operand, None for tokens."""
    if case.op not in SUMS_IN_16_BITS or case.how == "cuda":
        y.backward(dy)
        return [leaf.grad for leaf in leaves]
    wide = [leaf.detach().float() if leaf.is_floating_point() else leaf for leaf in leaves]
    for x in wide:
        x.requires_grad_(x.is_floating_point())
    f(*wide).backward(dy.float())
    return [None if x.grad is None else x.grad.to(leaf.dtype) for x, leaf in zip(wide, leaves, strict=True)]


# ----------------------------------------------------------------------------------------- optimizers, scaler, clipping


N, UPDATES = 1003, 100  # 1003 leaves a tail of 3 to kernels that take 8 at a time
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
SCALERS: list[dict[str, Any]] = [
    {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 5},
    {"init_scale": 1024.0, "growth_factor": 1.37, "backoff_factor": 0.7, "growth_interval": 3},
    {"init_scale": 1e38, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2},  # growth meets FP32's end
]
SCALER_STEPS = 200
UNSCALED_BY = (65536.0, 1572864.0, 1001.0)  # only the first has an inverse in FP32
CLIP_SHAPES = ((7, 9), (33,), (4, 3, 5), (1,), (16, 16))
CLIP_NORMS = (1.0, 0.3, 1e-3, 50.0)  # the last is above the norm: nothing is clipped


def updates() -> Iterable[Array]:
    """First the parameters, then the gradient of each update: sizes over seven decades, one for each element, some zeros."""
    stream = Stream(SEED + 4)
    yield stream.uniform((N,)) * np.float32(2**-5)
    size = np.ldexp(np.float32(1), -(stream.integers((N,), 5) % 24))
    for _ in range(UPDATES):
        yield stream.uniform((N,)) * size * (stream.integers((N,), 8) > 0)


def record_optimizers(torch: Any) -> dict[str, Array]:
    """AdamW (fused) and SGD with momentum on one flat parameter."""
    result: dict[str, Array] = {}
    for name, states in (("adamw", {"m": "exp_avg", "v": "exp_avg_sq"}), ("sgd", {"m": "momentum_buffer"})):
        start, *gradients = updates()
        p = torch.nn.Parameter(torch.from_numpy(start))
        made = torch.optim.AdamW([p], fused=True, **ADAMW) if name == "adamw" else torch.optim.SGD([p], foreach=False, **SGD)
        crcs = []
        for g in gradients:
            p.grad = torch.from_numpy(g)
            made.step()
            crcs.append(crc(to_numpy(torch, p)))
        result |= {f"{name}.p": to_numpy(torch, p), f"{name}.crc": np.array(crcs, np.uint32)}
        result |= {f"{name}.{kind}": to_numpy(torch, made.state[p][key]) for kind, key in states.items()}
    return result


def scaled_gradients() -> Array:
    """FP32 gradients of a scaled loss, from zeros and subnormals to the largest: what unscaling may meet."""
    stream = Stream(SEED + 5)
    x = stream.uniform((300,)) * np.ldexp(np.float32(1), stream.integers((300,), 8) - 130)
    ends = [0.0, -0.0, FORMATS["fp32"].smallest_subnormal, FORMATS["fp32"].smallest_normal, FORMATS["fp32"].max, 65504.0]
    return np.concatenate([x, np.array(ends, np.float32)])


def record_scaler(torch: Any) -> dict[str, Array]:
    """Scales and counters after every step, and gradients before and after unscaling."""
    overflow = Stream(SEED + 6).integers((SCALER_STEPS,), 3) == 0
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=0.0)
    result: dict[str, Array] = {"scaler.overflow": overflow, "unscale.scaled": scaled_gradients()}
    for i, settings in enumerate(SCALERS):
        scaler = torch.amp.GradScaler("cpu", **settings)
        scaler.scale(torch.zeros(()))  # the scale is made by its first use
        states = []
        for found in overflow:
            p.grad = torch.full((3,), math.inf if found else 0.0)
            scaler.step(optimizer)
            scaler.update()
            states.append(scaler.state_dict())
        result[f"scaler.{i}.scale"] = np.array([state["scale"] for state in states], np.float32)
        result[f"scaler.{i}.tracker"] = np.array([state["_growth_tracker"] for state in states], np.int32)
    for i, scale in enumerate(UNSCALED_BY):
        scaler = torch.amp.GradScaler("cpu", scale)
        scaler.scale(torch.zeros(()))
        p = torch.nn.Parameter(torch.zeros(result["unscale.scaled"].size))
        p.grad = torch.from_numpy(result["unscale.scaled"].copy())
        scaler.unscale_(torch.optim.SGD([p], lr=0.0))
        result[f"unscale.{i}"] = to_numpy(torch, p.grad)
    return result


def unclipped_gradients() -> list[Array]:
    """Gradients of five tensors, of unlike sizes."""
    stream = Stream(SEED + 7)
    return [stream.uniform(shape) * np.float32(2.0**-i) for i, shape in enumerate(CLIP_SHAPES)]


def record_clipping(torch: Any) -> dict[str, Array]:
    """The norm, and the gradients after clipping, end to end, for each largest norm."""
    result: dict[str, Array] = {}
    for i, most in enumerate(CLIP_NORMS):
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in CLIP_SHAPES]
        for p, g in zip(parameters, unclipped_gradients(), strict=True):
            p.grad = torch.from_numpy(g)
        result[f"clip.{i}.norm"] = to_numpy(torch, torch.nn.utils.clip_grad_norm_(parameters, most))
        result[f"clip.{i}.clipped"] = np.concatenate([to_numpy(torch, p.grad).ravel() for p in parameters])
    return result


# ----------------------------------------------------------------------------------------------------------- whole runs


STEPS, STRIDE = 6, 3
RUNS: dict[str, dict[str, Any]] = {
    "gpt": {"n_layer": 1, "n_head": 2, "n_embd": 4, "block_size": 6, "batch_size": 4, "clip": 0.43, "init_scale": 655360.0},
    "mlp": {"n_layer": 1, "n_embd": 1, "block_size": 3, "batch_size": 20, "clip": 0.28, "init_scale": 1835008.0},
}
COMMON: dict[str, Any] = {"steps": STEPS, "lr": 1e-2, "warmup": 2, "growth_interval": 2}
"""The loss scales begin where FP16 overflows by itself, and come back there by growing; their inverses are no FP32 numbers.
Roundings do not decide what overflows: the largest scaled gradient is beyond FP16's largest, or below it, by a fifth or more.
The GPT's gradient norms are on both sides of its `clip`, the MLP's all above."""


def run_config(model: str, recipe: str) -> Config:
    """The settings of a recorded run."""
    return Config.of({"model": model, "recipe": recipe, **RUNS[model], **COMMON})


def run_inputs(model: str) -> tuple[dict[str, Array], list[tuple[Array, Array]]]:
    """The weights at the start, biases among them not 0, and a batch of (tokens, targets) for each step."""
    config, stream = run_config(model, "fp32"), Stream(SEED + 8)
    assert config.batch_size and config.block_size
    weights = {}
    for name, spec in config.make_model().parameters.items():
        spread = np.float32(spec.std * math.sqrt(3) or 0.1)
        weights[name] = stream.uniform(spec.shape) * spread + np.float32(spec.fill)
    batches = []
    for _ in range(STEPS):
        text = stream.integers((config.batch_size, config.block_size + 1), 8)
        batches.append((np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])))
    return weights, batches


def record_run(torch: Any, model: str, recipe: str) -> dict[str, Array]:
    """A few steps by `refimpl.parity.pytorch_model`, which is PyTorch throughout."""
    from refimpl.parity.pytorch_model import PyTorchTraining

    weights, batches = run_inputs(model)
    theirs: Any = PyTorchTraining(run_config(model, recipe), weights)
    gradients: dict[str, Array] = {}  # of the scaled loss, as backward leaves them; they are unscaled and clipped in place
    for name, p in theirs.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: to_numpy(torch, p.grad)}))
    rows: list[dict[str, Any]] = []
    first: dict[str, Array] = {}
    for tokens, targets in batches:
        rows.append(theirs.step(tokens, targets))
        if not first and not rows[-1]["skipped"]:
            first["scaled"] = np.concatenate([gradients[name].ravel() for name in weights])
            after = {**theirs.moments(), "weights": theirs.weights()}
            first |= {f"{kind}.crc": np.array([crc(x[name]) for name in weights], np.uint32) for kind, x in after.items()}
    found = {key: np.array([row[key] for row in rows], np.float32) for key in ("loss", "loss_scale", "grad_norm")}
    found["skipped"] = np.array([row["skipped"] for row in rows])
    found |= first | {"weights": np.concatenate([theirs.weights()[name].ravel() for name in weights])[::STRIDE]}
    return {f"run.{model}.{recipe}.{key}": x for key, x in found.items()}


# -------------------------------------------------------------------------------------------------------------- the file


def drawn() -> int:
    """CRC-32 of the inputs that are not in the file: a reader who draws others must not blame the results."""
    arrays = [*updates(), *unclipped_gradients()]
    for model in RUNS:
        weights, batches = run_inputs(model)
        arrays += [*weights.values(), *(x.astype(np.float32) for batch in batches for x in batch)]
    return crc(np.concatenate([x.ravel() for x in arrays]))


def header(torch_version: str) -> dict[str, Any]:
    """What the file says of itself, and every setting that a reader needs beside the arrays."""
    return {
        "what": "results of PyTorch on a CPU, one thread, to hold refimpl against; see scripts/record_vectors.py",
        "torch": torch_version,
        "numpy": np.__version__,
        "seed": SEED,
        "CRC-32 of what is drawn": drawn(),
        "static": {op: dict(operation.static) for op, operation in OPERATIONS.items() if operation.static},
        "cases": [asdict(case) for case in cases()],
        "adamw": ADAMW,
        "sgd": SGD,
        "scalers": SCALERS,
        "unscaled by": UNSCALED_BY,
        "clip shapes": CLIP_SHAPES,
        "clip norms": CLIP_NORMS,
        "recipes": RECIPES,
        "runs": {model: {**COMMON, **settings} for model, settings in RUNS.items()},
    }


def record() -> tuple[dict[str, Array], dict[str, Any]]:
    """All arrays, and the header. Errors: UsageError without PyTorch."""
    torch = import_torch()
    torch.set_num_threads(1)  # its sums depend on their number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mixed formats take a slower kernel; oneDNN's flags read a deprecated setting
        arrays = record_casts(torch) | record_operations(torch) | record_optimizers(torch) | record_scaler(torch)
        arrays |= record_clipping(torch)
        for model in RUNS:
            for recipe in RECIPES:
                arrays |= record_run(torch, model, recipe)
    return arrays, header(torch.__version__)


def run(out: Path) -> None:
    """Record, and write the file."""
    arrays, about = record()
    out.parent.mkdir(parents=True, exist_ok=True)
    save(out, arrays, about)
    print(f"{out}: {len(arrays)} arrays, {out.stat().st_size:,} bytes, PyTorch {about['torch']}")


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("--out", type=Path, default=TARGET, help="file to write (tests/vectors/pytorch.safetensors)")
    return result


if __name__ == "__main__":
    main(lambda: run(parser().parse_args().out), goes_on=True)
