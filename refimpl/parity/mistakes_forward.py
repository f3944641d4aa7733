"""Known mistakes in steps 1 and 2: weights down, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from refimpl.nn.models.llama import LlamaConfig, llama_model
from refimpl.nn.op import Op
from refimpl.nn.ops import add, attention, cross_entropy, embedding, grouped_attention, linear
from refimpl.nn.rope_scaling import RopeScaling, angles_at, cos_and_sin, inverse_frequencies
from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of
from refimpl.optim.gradients import inverse_of
from refimpl.optim.loss_scale import DynamicLossScale
from refimpl.optim.state import State
from refimpl.parity.hooks import UpdateArguments, WrappedOptimizer
from refimpl.parity.known_mistake import Mistake, low_format, need
from refimpl.precision.context import OpPrecision
from refimpl.precision.policy import SAME, Precision
from refimpl.training.setup import Training

S = TypeVar("S", bound=State)


# -- 1. weights down ---------------------------------------------------------------------------------------------------


class RoundedMasters(State):
    """Masters that are rounded to the 16-bit weights: updates smaller than the spacing of those are lost."""

    def weights_down(self) -> None:
        super().weights_down()
        widen(self.weights, self.master_format, out=self.master)


class StaleWeights(State):
    """Weights that are cast from the masters once and then never again: the masters learn, the model does not."""

    fresh = True

    def weights_down(self) -> None:
        if self.fresh:
            super().weights_down()

    def zero_grad(self) -> None:
        self.fresh = False
        super().zero_grad()


def _replace_state(training: Training, kind: type[S], **formats: str) -> S:
    state = training.state
    training.state = new = kind(training.model, {**state.stored, **formats}, state.backend, state.seed)
    return new


def _no_masters(training: Training) -> None:
    need("master" in training.state.formats, "a recipe with separate masters, such as fp16 or bf16")
    _replace_state(training, RoundedMasters)


def _stale_weights(training: Training) -> None:
    need("master" in training.state.formats, "a recipe with separate masters, such as fp16 or bf16")
    _replace_state(training, StaleWeights)


# -- 2. forward and backward ---------------------------------------------------------------------------------------------


class HalfScale(DynamicLossScale):
    """A loss scale in FP16, whose largest number is 65504, so that 65536 is infinite."""

    @property
    def scale(self) -> Array:
        """S rounded to FP16."""
        return widen(cast(super().scale, "fp16"), "fp32")


def change_scale(training: Training, change: type[DynamicLossScale]) -> None:
    """Override methods of the run's loss scale by those of `change`."""
    scale = training.loss_scale
    need(scale.adapts, "a loss scale that adapts, such as dynamic")
    scale.__class__ = type(change.__name__, (change, type(scale)), {})


def _scale_in_16_bits(training: Training) -> None:
    change_scale(training, HalfScale)


def _override(training: Training, op: Op, **functions: Any) -> None:
    training.run.overrides = {**training.run.overrides, op.name: replace(op, **functions)}


def _cast_twice(training: Training) -> None:
    low_format(training)
    linear_layers = {name.removesuffix(".weight") for name, spec in training.model.parameters.items() if len(spec.shape) == 2}
    need(any(f"{name}.bias" in training.model.parameters for name in linear_layers), "linear layers with a bias")

    def forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
        product, saved = linear.forward(x, w, None, p=p)  # rounded here, before the bias is in
        if b is not None:
            y = p["y"]
            product = y.round(y.widen(product) + y.widen(y.cast(b, "b")), "y.again", x, w)
        return product, saved

    _override(training, linear, forward=forward)


CHUNK = 8  # products between two roundings of the sum


def _sum_in_16_bits(training: Training) -> None:
    low = low_format(training)

    def forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
        y, saved = linear.forward(x, w, b, p=p)
        row = p["y"]
        xc, wc = row.cast(x.reshape(-1, x.shape[-1]), "x"), row.cast(w, "w")
        z = p.xp.zeros((len(xc), len(wc)), widen(xc[:1, :1], row.row.acc).dtype)
        for k in range(0, xc.shape[-1], CHUNK):
            z = row.widen(row.round_to(z + row.matmul(xc[:, k : k + CHUNK], wc[:, k : k + CHUNK].T), low, "sum"))
        if b is not None:
            z += row.widen(row.cast(b, "b"))
        return row.round_to(z, format_of(y), "y").reshape(y.shape), saved

    _override(training, linear, forward=forward)


def _tied_gradient_dropped(training: Training) -> None:
    need(bool(training.model.tied), "a model with tied weights (gpt or llama)")

    def backward(dy: Array, saved: Any, w: Array, p: OpPrecision) -> tuple[None, Array | None]:
        tied = f"{p.place}.weight" in training.model.tied.values()
        return (None, None) if tied else embedding.backward(dy, saved, w, p=p)  # type: ignore[return-value]

    _override(training, embedding, backward=backward)


def _rows(training: Training, **rows: Precision) -> None:
    """Replace rows of the policy; '__' in a name stands for a dot."""
    policy = training.run.policy
    changed = {**policy.rows, **{name.replace("__", "."): row for name, row in rows.items()}}
    training.run.policy = replace(policy, rows=changed)


def _need_written_out(training: Training) -> None:
    need(training.model.name != "mlp", "attention (gpt or llama)")
    need(training.run.policy.row("attention.scores").out != "fp32", "--attention unfused")


def _missing_cast(training: Training) -> None:
    low = low_format(training)
    inputs = training.run.policy.row("attention.softmax").input("S")
    _need_written_out(training)
    _rows(training, attention__softmax=Precision(inputs, "fp32", "fp32"),
          attention__values=Precision({"P": SAME, "v": low}, "fp32", low))  # fmt: skip


def _loss_in_16_bits(training: Training) -> None:
    low = low_format(training)
    _rows(training, cross_entropy=Precision(low, "fp32", low))


def _softmax_in_16_bits(training: Training) -> None:
    low = low_format(training)
    _need_written_out(training)
    op, part = (attention, "softmax") if training.model.name == "gpt" else (grouped_attention, "wide_softmax")
    _rows(training, **{f"attention.{part}": Precision(low, "fp32", low)})

    def narrow(p: OpPrecision) -> OpPrecision:
        p[part].math = low  # exp, sum and quotient in NumPy's own 16-bit arithmetic, which no policy can ask for
        return p

    def forward(*qkv: Array, p: OpPrecision, **heads: int) -> tuple[Array, Any]:
        return op.forward(*qkv, p=narrow(p), **heads)

    def backward(dO: Array, saved: Any, p: OpPrecision, **heads: int) -> tuple[Array | None, ...]:
        return op.backward(dO, saved, p=narrow(p), **heads)

    _override(training, op, forward=forward, backward=backward)


def _norm_in_16_bits(training: Training) -> None:
    low = low_format(training)
    norm, kept = ("layernorm", "fp32") if training.model.name == "gpt" else ("llama_rmsnorm", SAME)
    need(training.model.name != "mlp", "norms (gpt or llama)")
    need(training.run.policy.row(norm).input("x") == kept, "a recipe that keeps it in FP32 (amp-fp16, amp-bf16)")
    _rows(training, **{norm: Precision(low, "fp32", low)})


def _rope_in_16_bits(training: Training, frequencies: str, angles: str) -> None:
    """Round the frequencies of rotary positions, or the angles, to 16 bits."""
    need(training.model.name == "llama", "rotary positions (llama)")

    def rotation(theta: float, D: int, scaling: RopeScaling, start: int, stop: int) -> tuple[Array, Array]:
        inverse = widen(cast(inverse_frequencies(theta, D, scaling, stop), frequencies), "fp32")
        rounded = widen(cast(angles_at(start, stop, inverse), angles), "fp32")
        return cos_and_sin(rounded, scaling.attention_factor)

    model = training.model
    training.model = llama_model(LlamaConfig(**model.config), model.ignore_index, model.loss_mean, rotation)


def _rope_frequencies_in_16_bits(training: Training) -> None:
    _rope_in_16_bits(training, frequencies=low_format(training), angles="fp32")


def _rope_angles_in_16_bits(training: Training) -> None:
    _rope_in_16_bits(training, frequencies="fp32", angles=low_format(training))


class SixteenBitSums(State):
    """Gradients of micro-batches that are added in a 16-bit buffer: small ones are lost beside the sum."""

    def accumulate_grad(self, name: str, gradient: Array) -> None:
        if name in self.without_grad:
            super().accumulate_grad(name, gradient)
        else:
            view = self.grad_views[name]
            cast(widen(view, "fp32") + widen(gradient, "fp32"), self.formats["grads"], out=view)


def _accumulate_in_16_bits(training: Training) -> None:
    formats = training.state.formats
    need(FORMATS[formats["weights"]].bits == 16 and formats["grads"] == "fp32", "fp16 or bf16 and --grad-accum above 1")
    _replace_state(training, SixteenBitSums, grads=formats["weights"])


def _residual_truncated(training: Training) -> None:
    low = low_format(training)
    need(training.model.name != "mlp" and training.run.policy.row("add").out == low, "residuals in 16 bits (fp16 or bf16)")

    def forward(a: Array, b: Array, p: OpPrecision) -> tuple[Array, Any]:
        y, saved = add.forward(a, b, p=p)
        if p.place.endswith(".0.residual_1"):  # in this place only
            y = _toward_zero(p.widen(a) + p.widen(b), y)
        return y, saved

    _override(training, add, forward=forward)


def _toward_zero(z: Array, y: Array) -> Array:
    """Return z rounded toward zero, given y, z rounded to nearest: the next smaller magnitude has a bit pattern one less."""
    bits = bits_of(y)
    bits -= abs(widen(y, format_of(z))) > abs(z)
    return from_bits(bits, format_of(y))


def _need_micro_batches(training: Training) -> None:
    need(training.grad_accum > 1, "--grad-accum above 1")


def _loss_not_averaged(training: Training) -> None:
    _need_micro_batches(training)

    def backward(dloss: Array, saved: Any, p: OpPrecision, **static: Any) -> tuple[Array | None, ...]:
        return cross_entropy.backward(cast(training.loss_scale.scale, format_of(dloss)), saved, p=p, **static)

    _override(training, cross_entropy, backward=backward)


def _mean_of_means(training: Training) -> None:
    _need_micro_batches(training)
    need(training.model.loss_mean == "tokens", "--loss-mean tokens")
    training.model = replace(training.model, loss_mean="micro-batches")


class UnscaledEachTime(State):
    """Gradients that are divided by S after each micro-batch but the last, and all of them again by the step."""

    inverse_scale: Callable[[], Array]

    def zero_grad(self) -> None:
        super().zero_grad()
        self.of_micro_batch: set[str] = set()

    def accumulate_grad(self, name: str, gradient: Array) -> None:
        if name in self.of_micro_batch:  # the next one begins
            self.of_micro_batch.clear()
            view = self.grads
            view *= self.inverse_scale()
        self.of_micro_batch.add(name)
        super().accumulate_grad(name, gradient)


def _unscale_each_micro_batch(training: Training) -> None:
    _need_micro_batches(training)
    need(training.loss_scale.adapts or float(training.loss_scale.scale) != 1, "a loss scale")
    state = _replace_state(training, UnscaledEachTime)
    state.inverse_scale = lambda: inverse_of(training.loss_scale.scale)


class KeptGradients(State):
    """Gradients that are not zeroed: a step adds to those of the last one, which were unscaled and clipped in place.

    factors: the factors of the last step. kept: the gradients at the start of this step, once it has begun.
    """

    factors: tuple[Array | float, ...] | None = None
    kept: Array | None = None

    def zero_grad(self) -> None:
        if self.factors is None:
            super().zero_grad()
            return
        if self.kept is None:
            self.kept = self.grads.copy()
            for factor in self.factors:
                self.kept *= factor
        self.grads[...] = self.kept
        self.without_grad = set()


def _gradients_not_zeroed(training: Training) -> None:
    formats = training.state.formats
    plain = FORMATS[formats["grads"]].bits == 32 and "master" not in formats
    need(plain, "FP32 weights, whose gradients are unscaled in place, such as those of amp-fp16")
    kept = _replace_state(training, KeptGradients)

    def keep(state: State, inverse: Array, clip: Array | float, found: Array) -> UpdateArguments:
        kept.factors, kept.kept = (inverse, clip), None
        return inverse, clip, found

    training.optimizer = WrappedOptimizer(training.optimizer, keep)


FORWARD = (
    Mistake("no-masters", "the 16-bit weights are updated, without FP32 masters that would keep what rounding loses",
            "small updates vanish, learning slows down and stops early", "4.master", _no_masters),
    Mistake("stale-weights", "the masters are not copied to the 16-bit weights after an update",
            "the loss stays at its first value", "1.weights", _stale_weights),
    Mistake("scale-in-16-bits", "the loss is multiplied by the scale in FP16, where 65536 is infinite",
            "every step is skipped until the scale is 32768, and again each time that it grows", "2.loss_scale",
            _scale_in_16_bits),
    Mistake("cast-twice", "a product is rounded before the bias is added, and again after",
            "nothing in the loss; some elements are off by one ulp", "2.activations", _cast_twice),
    Mistake("sum-in-16-bits", "matrix products are summed in 16 bits",
            "activations lose bits with every layer; little effect on the loss of a small model", "2.activations",
            _sum_in_16_bits),
    Mistake("missing-cast", "attention's probabilities stay in FP32 where they should be rounded to 16 bits",
            "nothing in the loss: results are more exact, but not those of the recipe", "2.activations", _missing_cast),
    Mistake("softmax-in-16-bits", "attention's softmax is computed in 16 bits: its exp, its sum and its quotient",
            "probabilities do not add up to 1; little effect on the loss of a small model", "2.activations",
            _softmax_in_16_bits),
    Mistake("norm-in-16-bits", "a norm reads and writes 16 bits where autocast keeps FP32",
            "little effect on the loss; the residual stream, which is summed in FP32, is read in 16 bits", "2.activations",
            _norm_in_16_bits),
    Mistake("rope-frequencies-in-16-bits", "the frequencies of rotary positions are cast to 16 bits with the model",
            "nothing in the loss of short texts; at position 1,000 some angles are a radian off (BF16)",
            "2.activations", _rope_frequencies_in_16_bits),
    Mistake("rope-angles-in-16-bits", "the angles of rotary positions, position times frequency, are rounded to 16 bits",
            "nothing in the loss of short texts; neighbors get equal angles, from position 256 on (BF16)",
            "2.activations", _rope_angles_in_16_bits),
    Mistake("residual-truncated", "one residual addition is rounded toward zero instead of to nearest",
            "nothing in the loss; half of the elements of one residual are smaller by one ulp", "2.activations",
            _residual_truncated),
    Mistake("loss-in-16-bits", "the loss is rounded to 16 bits",
            "the loss moves in steps of 1/512 (FP16) or 1/64 (BF16)", "2.loss", _loss_in_16_bits),
    Mistake("tied-gradient-dropped", "the tied embedding gets a gradient from the last layer only, not from the input",
            "learning continues, slightly worse", "2.grads", _tied_gradient_dropped),
    Mistake("loss-not-averaged", "the losses of micro-batches are not divided by their number",
            "gradients are n times too large, which clipping and Adam hide; with fp16 they overflow sooner",
            "2.activation_grads", _loss_not_averaged),
    Mistake("mean-of-means", "the loss is the mean of the micro-batches' means, although they have unequal numbers of targets",
            "targets in short micro-batches weigh more; no effect if all are full (with --examples lines they are not)",
            "2.loss", _mean_of_means),
    Mistake("unscale-each-micro-batch", "gradients are unscaled after each micro-batch, the earlier ones several times",
            "only the last micro-batch counts: the others are 65536 times smaller", "2.grads", _unscale_each_micro_batch),
    Mistake("gradients-not-zeroed", "gradients are not set to zero between steps",
            "without a loss scale, gradients add up over all steps; with one, old unscaled ones vanish beside new ones",
            "2.grads", _gradients_not_zeroed),
    Mistake("accumulate-in-16-bits", "gradients of micro-batches are added in 16 bits",
            "small gradients vanish beside the sum, more with every micro-batch", "2.grads", _accumulate_in_16_bits),
)  # fmt: skip
"""The mistakes in the order of the step's lines that they change."""
