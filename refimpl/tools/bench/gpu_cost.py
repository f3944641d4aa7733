"""The predicted cost of a training step of the GPT on a GPU, for `scripts/gpu_check.py --predict`.

Nothing here runs a model or needs a GPU. Each line of the ledger is a kind of call that the CuPy backend makes in a step: a
kernel with the arrays that it reads and writes, a matrix product with its sizes, or a copy. It follows backends/cupy/ops.py
and passes.py line by line; tests/tools/test_gpu_cost.py compares the names, numbers and sizes of all calls with those that
CuPy makes. The times are only a prediction:

    time of a call = max(FLOPs / peak, bytes / bandwidth) + gap between two calls
    time of a step = max(sum over its calls, number of calls x time of the host per call)

    L layers   B sequences   T positions   R = B T rows   C width   H heads   D = C / H   V vocabulary   N parameters
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from refimpl.backends.cupy.launch import COLUMNS, FORMATS, THREADS, WARPS, elementwise_grid
from refimpl.errors import UsageError, unknown
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.numerics.formats import dtype_of
from refimpl.optim.layout import GRAIN
from refimpl.precision.recipes import Recipe, get_recipe
from refimpl.tools.bench.steps import MODELS
from refimpl.training.activation_memory import gpt_activations, itemsize
from refimpl.training.columns import table

# ---------------------------------------------------------------------------------------------------- the device


@dataclass(frozen=True)
class Gpu:
    """A device: figures of its data sheet, and two assumed costs per call, which no data sheet has."""

    name: str
    bandwidth: float  # bytes per second, to and from its memory
    flops: Mapping[str, float]  # format of a product's operands -> multiplications and additions per second, sums in FP32
    memory: float  # bytes
    multiprocessors: int
    gap: float = 2e-6  # seconds between the end of a call and the start of the next on the device
    host: float = 10e-6  # seconds of Python, CuPy and the driver per call


_PEAK = {"fp32": 67e12, "fp16": 989e12, "bf16": 989e12}
GPUS = {
    "h100": Gpu("H100 SXM", 3.35e12, _PEAK, 80e9, 132),
    "h200": Gpu("H200 SXM", 4.8e12, _PEAK, 141e9, 132),
}
"""Source: NVIDIA's data sheets of the H100 and the H200 (SXM: 3.35 and 4.8 TB/s, 80 and 141 GB; both FP32 67 TFLOPS, BF16 and
FP16 tensor cores 1979 TFLOPS with sparsity, which is half of that without); its white paper on the architecture for the 132
multiprocessors. FP32 products do not use TF32: `cublas.product` requests CUBLAS_COMPUTE_32F, for which cuBLAS uses TF32 only
if an environment variable asks for it."""

_SIZES: dict[str, Any] = dict(MODELS["gpt2"])
BATCH = _SIZES.pop("batch_size")
GPT2 = GPTConfig(**_SIZES)
"""The transformer of the smallest GPT-2, on bytes like every model here. Source: Radford et al. 2019."""

# ---------------------------------------------------------------------------------------------------- the ledger


class Product(NamedTuple):
    """A batch of products (M, K) @ (K, N)."""

    M: int
    N: int
    K: int
    batch: int = 1


GEMM, COPY, CLEAR = "GEMM", "copy from device to device", "memset"


@dataclass(frozen=True)
class Line:
    """Calls of one kind. name: the kernel's name in kernels.cu or CuPy, or one of GEMM, COPY, CLEAR.

    nbytes: bytes that all these calls read and write, counting each array once. blocks: those of one launch, if we choose them.
    """

    part: str
    name: str
    times: int
    nbytes: int
    blocks: int | None = None
    product: Product | None = None
    result: str = ""  # the format of a product's result

    @property
    def launches(self) -> int:
        """Return the number of kernels, without those that cuBLAS launches."""
        return 0 if self.name in (GEMM, COPY, CLEAR) else self.times

    @property
    def flops(self) -> int:
        """Return 2 M N K per product; the FLOPs of other kernels are not counted."""
        return 0 if self.product is None else 2 * math.prod(self.product) * self.times

    def seconds(self, gpu: Gpu, fmt: str, fair: bool = False) -> float:
        """Return the time by the roofline model, and the gaps.

        fair: a multiprocessor gets only its share of the bandwidth, so that a launch of fewer blocks than multiprocessors
        cannot use all of it. The true bandwidth of such a launch is between the two.
        """
        share = min(1.0, self.blocks / gpu.multiprocessors) if fair and self.blocks else 1.0
        return max(self.flops / gpu.flops[fmt], self.nbytes / (gpu.bandwidth * share)) + self.times * gpu.gap


class Ledger:
    """Collects the lines of a step. Sizes are in elements: values in the storage format, fp32, int64.

    Single numbers, flags and the ranges of weight decay, a few bytes per launch, are left out.
    """

    def __init__(self, fmt: str) -> None:
        self.fmt, self.lines = fmt, list[Line]()

    def launch(
        self, part: str, name: str, times: int = 1, values: int = 0, fp32: int = 0, int64: int = 0,
        blocks: int | None = None,
    ) -> None:  # fmt: skip
        """Add a kernel: the elements of each format that one launch reads and writes."""
        nbytes = values * itemsize(self.fmt) + 4 * fp32 + 8 * int64
        self.lines.append(Line(part, name, times, times * nbytes, blocks))

    def product(self, part: str, times: int, product: Product, result: str | None = None) -> None:
        """Add a product whose operands are read once; its result is in the storage format, or in `result`."""
        (M, N, K, batch), result = product, result or self.fmt
        nbytes = batch * ((M * K + K * N) * itemsize(self.fmt) + M * N * itemsize(result))
        self.lines.append(Line(part, GEMM, times, times * nbytes, product=product, result=result))

    def convert(self, part: str, elements: int, source: str, target: str, times: int = 1) -> None:
        """Add CuPy's copy of an array into another format."""
        nbytes = elements * (itemsize(source) + itemsize(target))
        name = f"cupy_copy__{dtype_of(source).name}_{dtype_of(target).name}"
        self.lines.append(Line(part, name, times, times * nbytes))

    def elementwise(self, part: str, name: str, n: int, arrays: int, times: int = 1) -> None:
        """Add one of our kernels over `arrays` arrays of n elements."""
        self.launch(part, name, times, arrays * n, blocks=elementwise_grid(n)[0])


def step_calls(config: GPTConfig, recipe: Recipe, batch_size: int) -> list[Line]:
    """Return all calls of `step.train_step` with one micro-batch on the device, AdamW and clipping.

    Errors: UsageError for a recipe in which not every operation has a kernel.
    """
    kept, fmt = recipe.state, recipe.state["weights"]
    updated = {kept["master"] or fmt, kept["m"], kept["v"]}  # other formats have no kernel
    if recipe.policy.name not in FORMATS or updated != {"fp32"} or (kept["grads"], kept["main_grads"]) != (fmt, ""):
        raise UsageError(f"recipe {recipe.name}: the cost is known for {', '.join(FORMATS)}")
    t, L, R, C, V = Ledger(fmt), config.n_layer, batch_size * config.block_size, config.n_embd, config.vocab_size
    _weights_down(t, config, recipe)
    _embedding(t, config, batch_size)
    _layernorm(t, 2 * L + 1, R, C)
    for n_in, n_out in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
        _linear(t, L, R, n_in, n_out)
    _attention(t, config, batch_size)
    t.elementwise("gelu", "gelu_tanh_forward", 4 * R * C, 2, L)
    t.elementwise("gelu", "gelu_tanh_backward", 4 * R * C, 3, L)
    t.elementwise("residuals, fan-in of gradients", "add_forward", R * C, 3, 4 * L)  # two sums per layer, forward and backward
    _lm_head_and_loss(t, R, C, V)
    _update(t, config, recipe)
    _zero_dimensional(t, recipe)
    return t.lines


def _weights_down(t: Ledger, config: GPTConfig, recipe: Recipe) -> None:
    """Add part 1 of the step, which does nothing without masters."""
    if recipe.state["master"]:
        t.convert("weights down", gpt_model(config).n_params, recipe.state["master"], t.fmt)


def _embedding(t: Ledger, config: GPTConfig, B: int) -> None:
    """Add the lookup in both tables, the sum by the definition of `add` (the shapes differ), and both gradients."""
    part, T, C, V = "embedding", config.block_size, config.n_embd, config.vocab_size
    R = B * T
    t.launch(part, "cupy_arange__int_int_int64", int64=T)
    for rows in (R, T):
        t.launch(part, "cupy_take", values=2 * rows * C, int64=rows)
    wide = t.fmt == "fp32"
    for rows in () if wide else (R, T):
        t.convert(part, rows * C, t.fmt, "fp32")
    t.launch(part, "cupy_add__float32_float32_float32", fp32=2 * R * C + T * C)
    if not wide:
        t.convert(part, R * C, "fp32", t.fmt)
        t.convert(part, R * C, t.fmt, "fp32")  # backward: the gradient of the sum ...
    t.launch(part, "cupy_sum", fp32=R * C + T * C)  # ... summed over the batch, for the positions
    if not wide:
        t.convert(part, T * C, "fp32", t.fmt)
    for rows, places in ((V, R), (T, T)):
        blocks = rows * math.ceil(C / THREADS)
        t.launch(part, "embedding_backward", values=places * C + rows * C, int64=places, blocks=blocks)


def _layernorm(t: Ledger, times: int, R: int, C: int) -> None:
    """Add layer norm: one kernel forward; backward, one by rows and one by columns."""
    t.launch("layer norm, forward", "layernorm_forward", times, 2 * R * C + 2 * C, 2 * R, blocks=math.ceil(R / WARPS))
    part, columns = "layer norm, backward", math.ceil(C / COLUMNS)
    t.launch(part, "layernorm_backward", times, 3 * R * C + C, 2 * R, blocks=math.ceil(R / WARPS))
    t.launch(part, "layernorm_weights_backward", times, 2 * R * C + 2 * C, 2 * R, blocks=columns)


def _linear(t: Ledger, times: int, R: int, n_in: int, n_out: int) -> None:
    """Add a linear layer: its sums stay in FP32 until a kernel has added the bias; db is another kernel."""
    t.product("linear: x w^T", times, Product(R, n_out, n_in), "fp32")
    t.launch("bias", "bias_forward", times, R * n_out + n_out, R * n_out, blocks=R)
    t.product("linear: dx = dy w", times, Product(R, n_in, n_out))
    t.product("linear: dw = dy^T x", times, Product(n_out, n_in, R))
    t.launch("bias, gradient", "bias_backward", times, R * n_out + n_out, blocks=math.ceil(n_out / COLUMNS))


def _attention(t: Ledger, config: GPTConfig, B: int) -> None:
    """Add attention: six batched products, one softmax kernel in each direction, and kernels that split and merge heads."""
    L, T, C, H = config.n_layer, config.block_size, config.n_embd, config.n_head
    D, scores = C // H, B * H * T
    for name in ("split_heads", "merge_heads"):  # forward q, k, v and O; backward dO and dq, dk, dv
        for width in (C, 3 * C):
            t.launch("attention, split and merge heads", name, L, 2 * B * T * width, blocks=B * T)
    inner, outer = Product(T, T, D, B * H), Product(T, D, T, B * H)
    for part, product in (
        ("attention: q k^T, P v", inner), ("attention: q k^T, P v", outer),
        ("attention: dv, dP, dq, dk", outer), ("attention: dv, dP, dq, dk", inner),
        ("attention: dv, dP, dq, dk", outer), ("attention: dv, dP, dq, dk", outer),
    ):  # fmt: skip
        t.product(part, L, product)
    seen, blocks = scores * (T + 1) // 2, B * H * math.ceil(T / WARPS)  # later keys are written but not read
    t.launch("attention softmax, forward", "causal_softmax_forward", L, seen + scores * T, blocks=blocks)
    t.launch("attention softmax, backward", "causal_softmax_backward", L, 2 * seen + scores * T, blocks=blocks)


def _lm_head_and_loss(t: Ledger, R: int, C: int, V: int) -> None:
    """Add the product with the token embedding, whose gradient is a sum of two, and the loss.

    Forward reads the logits twice, and both times count, since caches do not hold all rows that are processed at a time.
    """
    t.product("lm_head: y, dx, dw", 1, Product(R, V, C))
    t.product("lm_head: y, dx, dw", 1, Product(R, C, V))
    t.product("lm_head: y, dx, dw", 1, Product(V, C, R))
    t.elementwise("residuals, fan-in of gradients", "add_forward", V * C, 3)
    part = "cross-entropy"
    t.launch(part, "cross_entropy_forward", values=2 * R * V, fp32=3 * R, int64=R, blocks=R)
    t.launch(part, "cross_entropy_mean", fp32=R, int64=R, blocks=1)
    t.launch(part, "cross_entropy_backward", 1, 2 * R * V, 2 * R, R, R)


def _update(t: Ledger, config: GPTConfig, recipe: Recipe) -> None:
    """Add the copies of gradients to the flat buffer, and parts 3 and 4. AdamW reads w, m, v, g and writes w, m, v."""
    parameters, N = gpt_model(config).parameters, gpt_model(config).n_params
    part, size = "gradients to the flat buffer", N * itemsize(t.fmt)
    t.lines.append(Line(part, CLEAR, 1, size))
    t.lines.append(Line(part, COPY, len(parameters), 2 * size))
    parts = math.ceil(N / GRAIN)
    t.launch("check and norm", "gradient_norm", values=N, fp32=parts, blocks=parts)
    t.launch("check and norm", "gradient_norm_fold", fp32=parts, blocks=1)
    t.launch("AdamW", "adamw", values=N, fp32=6 * N, blocks=elementwise_grid(N)[0])


ZERO_DIMENSIONAL = {
    "S / n, and the mean of the loss": {"true_divide__float32_float_float32": 2, "add__float_float32_float32": 1},
    "1 / S": {"copy__float32_float64": 1, "true_divide__float_float64_float64": 1, "copy__float64_float32": 1},
    "the learning rate; the scalars of the update": {"take": 2, "copy__float64_float32": 1},
    "the clip coefficient": {
        "add__float32_float_float32": 1, "true_divide__float_float32_float32": 1, "multiply__float32_float_float32": 1,
        "clip__float32_float_float_float32": 1,
    },
    "t": {"add__int64_int_int64": 1, "where__bool_int64_int64_int64": 1},
}  # fmt: skip
"""Kernels of CuPy that a step launches for single numbers, by their names without 'cupy_'."""

ADAPTING = {
    "S smaller, and larger": {
        "copy__float32_float64": 1, "multiply__float64_float_float64": 2, "copy__float64_float32": 2,
    },
    "good steps": {"add__int32_int_int32": 1, "equal__int32_int_bool": 1, "isfinite__float32_bool": 1},
    "which of them": {
        "bitwise_and__bool_bool_bool": 1, "where__bool_float32_float32_float32": 2, "bitwise_or__bool_bool_bool": 1,
        "where__bool_int_int32_int32": 1,
    },
}  # fmt: skip
"""Further ones for a dynamic loss scale."""


def _zero_dimensional(t: Ledger, recipe: Recipe) -> None:
    """Add the launches for single numbers, of a few bytes each."""
    adapts = recipe.loss_scale == "dynamic"
    for kernels in (*ZERO_DIMENSIONAL.values(), *(ADAPTING.values() if adapts else ())):
        for name, times in kernels.items():
            t.launch("0-d arithmetic", f"cupy_{name}", times)


# ---------------------------------------------------------------------------------------------------- the prediction


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a step of one recipe on one device."""

    config: GPTConfig
    recipe: Recipe
    batch_size: int
    gpu: Gpu
    lines: Sequence[Line]

    @property
    def calls(self) -> int:
        """Return the number of calls that the host makes."""
        return sum(line.times for line in self.lines)

    @property
    def tokens(self) -> int:
        """Return the number of tokens per step."""
        return self.batch_size * self.config.block_size

    @property
    def flops(self) -> int:
        """Return the FLOPs of all products, each computed once, and attention without its causal mask."""
        return sum(line.flops for line in self.lines)

    def device_seconds(self, fair: bool = False) -> float:
        """Return the time of all calls on the device; `fair` as in `Line.seconds`."""
        return sum(line.seconds(self.gpu, self.recipe.state["weights"], fair) for line in self.lines)

    @property
    def host_seconds(self) -> float:
        """Return the time that the host needs for its calls."""
        return self.calls * self.gpu.host

    def seconds(self, fair: bool = False) -> float:
        """Return the time of a step, the larger of these two."""
        return max(self.device_seconds(fair), self.host_seconds)

    def utilization(self, fair: bool = False) -> float:
        """Return the FLOPs of the products divided by those that the device could compute in the time of a step."""
        return self.flops / (self.seconds(fair) * self.gpu.flops[self.recipe.state["weights"]])


def predict(config: GPTConfig, recipe: Recipe, batch_size: int, gpu: Gpu = GPUS["h100"]) -> Prediction:
    """Predict the cost of a step. Errors: as `step_calls`."""
    return Prediction(config, recipe, batch_size, gpu, step_calls(config, recipe, batch_size))


def text(p: Prediction) -> str:
    """Return a prediction as it is printed."""
    c, gpu, fmt = p.config, p.gpu, p.recipe.state["weights"]
    parts: dict[str, list[Line]] = {}
    for line in p.lines:
        parts.setdefault(line.part, []).append(line)
    rows = [_row(part, lines, gpu, fmt) for part, lines in [*parts.items(), ("total", list(p.lines))]]
    header = ["part of the step", "launches", "GEMMs", "copies", "GFLOP", "MB", "ms", "ms, fair shares"]
    N, states = gpt_model(c).n_params, p.recipe.bytes_per_parameter()
    activations = sum(term.nbytes for term in gpt_activations(c, p.recipe, p.batch_size, c.block_size))
    logits = p.tokens * c.vocab_size * itemsize(fmt)
    both = [f"{1e3 * p.seconds(fair):.1f} ms, {p.tokens / p.seconds(fair):,.0f} tokens/s, "
            f"{100 * p.utilization(fair):.0f} % of the peak" for fair in (False, True)]  # fmt: skip
    return "\n".join([
        f"recipe {p.recipe.name} on an {gpu.name}: GPT of {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, block "
        f"{c.block_size}, vocabulary {c.vocab_size}, batch {p.batch_size}: {N:,} parameters, {p.tokens:,} tokens per step",
        f"{gpu.bandwidth / 1e12:g} TB/s, {gpu.flops[fmt] / 1e12:g} TFLOP/s on {fmt} operands, {gpu.multiprocessors} "
        f"multiprocessors; {1e6 * gpu.gap:g} us between two calls on the device, {1e6 * gpu.host:g} us of the host per call",
        "",
        table(header, rows),
        "",
        f"device  {both[0]}",
        f"        {both[1]}, with fair shares",
        f"host    {p.calls} calls: {1e3 * p.host_seconds:.1f} ms, in parallel with the device",
        f"memory  {(states * N + activations) / 1e9:.2f} GB: model states {states} x {N:,}, "
        f"activations {activations / 1e9:.2f} GB; temporarily {logits / 1e9:.2f} GB more for the gradient of the logits",
    ])  # fmt: skip


def _row(part: str, lines: Sequence[Line], gpu: Gpu, fmt: str) -> list[str]:
    """Return a row of the table."""
    gemms, others = (sum(x.times for x in lines if x.name in names) for names in ((GEMM,), (COPY, CLEAR)))
    counts = [sum(x.launches for x in lines), gemms, others]
    flops, nbytes = sum(x.flops for x in lines) / 1e9, sum(x.nbytes for x in lines) / 1e6
    times = [1e3 * sum(x.seconds(gpu, fmt, fair) for x in lines) for fair in (False, True)]
    cells = [f"{flops:,.0f}" if flops else "", f"{nbytes:,.0f}", *(f"{t:.2f}" for t in times)]
    return [part, *(str(n or "") for n in counts), *cells]


EXPLANATION = """\
A PREDICTION: nothing was run. Names, numbers and sizes of the calls are tested, times are not. Assumptions:
 - A call takes the larger of FLOPs / peak and bytes / full bandwidth. No call reaches either.
 - Each array that a call reads or writes crosses the memory bus once; the logits twice if a kernel reads them twice.
 - Arithmetic outside products is free. With exp, tanh or a division it may take as long as the bytes.
 - 'Fair shares': a launch of fewer blocks than multiprocessors gets only their share of the bandwidth. The true value is
   between the two. Latency of memory is free, even for a launch of few threads.
 - The device waits for the host only if the host's calls take longer in total."""


def show(recipes: Sequence[str], gpu: str) -> int:
    """Print predictions, for `scripts/gpu_check.py --predict`. Errors: UsageError for an unknown recipe or GPU."""
    if gpu not in GPUS:
        raise UsageError(unknown("GPU", gpu, GPUS))
    predictions = [predict(GPT2, get_recipe(name), BATCH, GPUS[gpu]) for name in recipes]
    print("\n\n".join([EXPLANATION, *(text(p) for p in predictions)]))
    return 0
