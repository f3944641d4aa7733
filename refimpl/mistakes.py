"""Known mistakes: what people get wrong in mixed-precision training, each as a change that can be switched into a run.

    python scripts/train.py --mistake unscale-after-clip
    python scripts/trace.py diff OURS THEIRS          says which of them makes two traces agree

Each is a few lines that replace one of the run's parts and say what one then sees. They teach, they test the tests (every
one of them must be noticed), and they explain a run of somebody else's that departs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from refimpl.cast import cast, widen
from refimpl.errors import UsageError
from refimpl.formats import FORMATS, dtype_of, format_of
from refimpl.gradients import check_and_measure, clip_coefficient
from refimpl.loss_scale import DynamicLossScale
from refimpl.ops import Op, attention, embedding, linear
from refimpl.optim import AdamW
from refimpl.parts import Parts, UpdateArguments, WrappedOptimizer
from refimpl.policy import SAME, Bound, Precision
from refimpl.state import Sink, State

Array = Any


@dataclass(frozen=True)
class Mistake:
    """A mistake by name: what is done wrong, what one sees, and the point of a trace where it shows first."""

    name: str
    what: str
    seen: str
    departs: str
    make: Callable[[Parts], None]


def meddle(name: str, parts: Parts) -> None:
    """Make the named mistake in a run that has not begun. Errors: UsageError where the recipe leaves no room for it."""
    if name == "none":
        return
    try:
        MISTAKES[name].make(parts)
    except NoRoom as error:
        raise UsageError(f"--mistake {name} needs {error}") from None


def announcement(name: str) -> str:
    """Return what a run with a mistake in it says of it, wherever its numbers are shown."""
    return f"MISTAKE switched in: {name}: {MISTAKES[name].what}"


class NoRoom(Exception):
    """What a mistake needs and the run does not have."""


def _need(present: bool, what: str) -> None:
    if not present:
        raise NoRoom(what)


def _low(parts: Parts) -> str:
    """The 16-bit format that the run's products read."""
    row = parts.run.policy.row("linear.y")
    fmt = row.input("x")
    plain = fmt in FORMATS and FORMATS[fmt].bits == 16 and row.acc == "fp32"
    _need(plain, "a recipe whose products are in 16 bits with FP32 sums, such as fp16 or amp-bf16")
    return fmt


# -- 1. weights down ---------------------------------------------------------------------------------------------------


class RoundedMasters(State):
    """The 16-bit weights are all that there is: whatever of an update is below their spacing is lost at the next step."""

    def weights_down(self) -> None:
        super().weights_down()
        widen(self.weights, self.master_format, out=self.master)


class StaleWeights(State):
    """The weights go down once, when they are loaded, and never again: the masters learn, the model does not."""

    fresh = True

    def weights_down(self) -> None:
        if self.fresh:
            super().weights_down()

    def gradient_sink(self, first: bool) -> Sink:
        self.fresh = False
        return super().gradient_sink(first)


def _replace_state(parts: Parts, kind: type[State], **formats: str) -> None:
    state = parts.state
    parts.state = kind(parts.model, {**state.stored, **formats}, state.backend, state.seed)


def _no_masters(parts: Parts) -> None:
    _need("master" in parts.state.formats, "a recipe with separate masters, such as fp16 or bf16")
    _replace_state(parts, RoundedMasters)


def _stale_weights(parts: Parts) -> None:
    _need("master" in parts.state.formats, "a recipe with separate masters, such as fp16 or bf16")
    _replace_state(parts, StaleWeights)


# -- 2. through --------------------------------------------------------------------------------------------------------


class HalfScale(DynamicLossScale):
    """The loss scale, handled in FP16, whose largest number is 65504: 65536 is infinite there."""

    @property
    def scale(self) -> Array:
        """S as FP16 holds it."""
        return widen(cast(super().scale, "fp16"), "fp32")


def _change_scale(parts: Parts, change: type[DynamicLossScale]) -> None:
    """Put the methods of `change` before those of the run's loss scale, which stays what it is in all else."""
    scale = parts.loss_scale
    _need(scale.adapts, "a loss scale that adapts, such as dynamic")
    scale.__class__ = type(change.__name__, (change, type(scale)), {})


def _scale_in_16_bits(parts: Parts) -> None:
    _change_scale(parts, HalfScale)


def _override(parts: Parts, op: Op, **functions: Any) -> None:
    parts.run.overrides = {**parts.run.overrides, op.name: replace(op, **functions)}


def _cast_twice(parts: Parts) -> None:
    _low(parts)

    def forward(x: Array, w: Array, b: Array | None, p: Bound) -> tuple[Array, Any]:
        product, saved = linear.forward(x, w, None, p=p)  # rounded here, before the bias is in
        if b is not None:
            y = p["y"]
            product = y.out(y.wide(product) + y.wide(y.cast(b, "b")), "y.again", x, w)
        return product, saved

    _override(parts, linear, forward=forward)


CHUNK = 8  # products between two roundings of the sum


def _sum_in_16_bits(parts: Parts) -> None:
    low = _low(parts)

    def forward(x: Array, w: Array, b: Array | None, p: Bound) -> tuple[Array, Any]:
        y, saved = linear.forward(x, w, b, p=p)
        row = p["y"]
        xc, wc = row.cast(x.reshape(-1, x.shape[-1]), "x"), row.cast(w, "w")
        z = p.xp.zeros((len(xc), len(wc)), widen(xc[:1, :1], row.row.acc).dtype)
        for k in range(0, xc.shape[-1], CHUNK):
            z = row.wide(row.round(z + row.gemm(xc[:, k : k + CHUNK], wc[:, k : k + CHUNK].T), low, "sum"))
        if b is not None:
            z += row.wide(row.cast(b, "b"))
        return row.round(z, format_of(y), "y").reshape(y.shape), saved

    _override(parts, linear, forward=forward)


def _tied_gradient_dropped(parts: Parts) -> None:
    _need(bool(parts.model.tied), "a model with tied weights (gpt)")

    def backward(dy: Array, saved: Any, w: Array, p: Bound) -> tuple[None, Array | None]:
        tied = f"{p.place}.weight" in parts.model.tied.values()
        return (None, None) if tied else embedding.backward(dy, saved, w, p=p)  # type: ignore[return-value]

    _override(parts, embedding, backward=backward)


def _rows(parts: Parts, **rows: Precision) -> None:
    """Other rows of the policy; a name's '__' stands for its dot."""
    policy = parts.run.policy
    changed = {**policy.rows, **{name.replace("__", "."): row for name, row in rows.items()}}
    parts.run.policy = replace(policy, rows=changed)


def _need_written_out(parts: Parts) -> None:
    _need(parts.model.name == "gpt", "attention (gpt)")
    _need(parts.run.policy.row("attention.scores").out != "fp32", "--attention unfused")


def _missing_cast(parts: Parts) -> None:
    low = _low(parts)
    inputs = parts.run.policy.row("attention.softmax").input("S")
    _need_written_out(parts)
    _rows(parts, attention__softmax=Precision(inputs, "fp32", "fp32"),
          attention__values=Precision({"P": SAME, "v": low}, "fp32", low))  # fmt: skip


def _loss_in_16_bits(parts: Parts) -> None:
    low = _low(parts)
    _rows(parts, cross_entropy=Precision(low, "fp32", low))


def _softmax_in_16_bits(parts: Parts) -> None:
    low = _low(parts)
    _need_written_out(parts)
    _rows(parts, attention__softmax=Precision(low, "fp32", low))

    def narrow(p: Bound) -> Bound:
        p["softmax"].math = low  # exp, sum and quotient in NumPy's own 16-bit arithmetic, which no policy can ask for
        return p

    def forward(qkv: Array, p: Bound, n_head: int) -> tuple[Array, Any]:
        return attention.forward(qkv, p=narrow(p), n_head=n_head)

    def backward(dO: Array, saved: Any, p: Bound, n_head: int) -> tuple[Array | None, ...]:
        return attention.backward(dO, saved, p=narrow(p), n_head=n_head)

    _override(parts, attention, forward=forward, backward=backward)


def _norm_in_16_bits(parts: Parts) -> None:
    low = _low(parts)
    _need(parts.run.policy.row("layernorm").input("x") == "fp32", "a recipe that keeps it in FP32 (amp-fp16, amp-bf16)")
    _need(parts.model.name == "gpt", "layer norms (gpt)")
    _rows(parts, layernorm=Precision(low, "fp32", low))


class SixteenBitSums(State):
    """Gradients of micro-batches, added in the 16-bit buffer: small ones vanish beside the sum."""

    def gradient_sink(self, first: bool) -> Sink:
        store, fmt = super().gradient_sink(first), self.formats["grads"]

        def add(name: str, gradient: Array) -> None:
            view = self.grad_views[name]
            cast(widen(view, "fp32") + widen(gradient, "fp32"), fmt, out=view)

        return store if first else add


def _accumulate_in_16_bits(parts: Parts) -> None:
    formats = parts.state.formats
    _need(FORMATS[formats["weights"]].bits == 16 and formats["grads"] == "fp32", "fp16 or bf16 and --grad-accum above 1")
    _replace_state(parts, SixteenBitSums, grads=formats["weights"])


# -- 3. gradients up, and what step 4 makes of them -------------------------------------------------------------------


def _has_loss_scale(parts: Parts) -> None:
    _need(parts.loss_scale.adapts or float(parts.loss_scale.scale) != 1, "a loss scale")


def _unscales_in_update(parts: Parts) -> None:
    _has_loss_scale(parts)
    _need("main_grads" not in parts.state.stored, "a recipe that unscales in the update, not into main_grads")


def _change_update(parts: Parts, change: Callable[[State, Array, Array | float, Array], UpdateArguments]) -> None:
    parts.optimizer = WrappedOptimizer(parts.optimizer, change)


def _scaled_clip(parts: Parts, state: State, inverse_scale: Array) -> Array | float:
    """The clip coefficient by the norm of gradients that are still scaled."""
    _, scaled_norm = check_and_measure(state, parts.state.backend.xp.ones_like(inverse_scale))
    return clip_coefficient(scaled_norm, parts.max_norm)


def _unscale_after_clip(parts: Parts) -> None:
    _unscales_in_update(parts)
    _need(math.isfinite(parts.max_norm), "--clip above 0")
    one = parts.state.backend.xp.ones((), dtype_of(parts.state.math_format))
    _change_update(parts, lambda state, inverse, clip, found: (inverse * _scaled_clip(parts, state, inverse), one, found))


def _no_unscale(parts: Parts) -> None:
    _unscales_in_update(parts)

    def change(state: State, inverse: Array, clip: Array | float, found: Array) -> UpdateArguments:
        return state.backend.xp.ones_like(inverse), _scaled_clip(parts, state, inverse), found

    _change_update(parts, change)


def _unscale_twice(parts: Parts) -> None:
    _unscales_in_update(parts)
    _change_update(parts, lambda state, inverse, clip, found: (inverse * inverse, clip, found))


def _ignore_inf(parts: Parts) -> None:
    _has_loss_scale(parts)
    _change_update(parts, lambda state, inverse, clip, found: (inverse, clip, state.backend.xp.zeros_like(found)))


def _t_advances_on_skip(parts: Parts) -> None:
    _has_loss_scale(parts)
    last = parts.optimizer.schedule.steps - 1

    def change(state: State, inverse: Array, clip: Array | float, found: Array) -> UpdateArguments:
        state.t = state.backend.xp.minimum(state.t + found, last)
        return inverse, clip, found

    _change_update(parts, change)


class DeafScale(DynamicLossScale):
    """A loss scale that never hears of an overflow: it only grows."""

    def update(self, found_inf: Array) -> None:
        """Every step counts as a good one."""
        super().update(found_inf & False)


def _scale_never_backs_off(parts: Parts) -> None:
    _change_scale(parts, DeafScale)


# -- 4. update ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpsInsideRoot(AdamW):
    """sqrt(v + eps) for sqrt(v) + eps: eps = 1e-8 then acts as 1e-4."""

    def update_block(self, w: Array, g: Array, moments: Sequence[Array], scalars: Array, xp: Any) -> None:
        (m, v), (beta1, beta2) = moments, self.betas
        m += (1 - beta1) * (g - m)
        v *= beta2
        v += (1 - beta2) * g * g
        w -= scalars[1] * m / xp.sqrt(v / (scalars[2] * scalars[2]) + self.eps)


@dataclass(frozen=True)
class CoupledDecay(AdamW):
    """Adam with L2 regularisation: the decay goes through the moments, and large gradients are decayed less."""

    def decay(self, w: Array, g: Array, scalars: Array) -> None:
        g += self.weight_decay * w


@dataclass(frozen=True)
class NoBiasCorrection(AdamW):
    """Moments that start at zero, taken as they are: the first updates are (1 - beta1) / sqrt(1 - beta2) times as large."""

    def scalars(self, lr: float, t: int) -> tuple[float, ...]:
        return super().scalars(lr, t)[0], lr, 1.0


def _rule(kind: type[AdamW]) -> Callable[[Parts], None]:
    def make(parts: Parts) -> None:
        rule = parts.optimizer.rule
        _need(isinstance(rule, AdamW), "--optimizer adamw")
        if kind is CoupledDecay:
            _need(getattr(rule, "weight_decay", 0) > 0, "--weight-decay above 0")
        parts.optimizer.use(kind(**{f.name: getattr(rule, f.name) for f in fields(rule)}))  # type: ignore[arg-type]

    return make


def _eps_in_16_bits(parts: Parts) -> None:
    rule = parts.optimizer.rule
    _need(isinstance(rule, AdamW), "--optimizer adamw")
    assert isinstance(rule, AdamW)
    eps = float(widen(cast(parts.state.backend.xp.asarray(rule.eps), "fp16"), "fp32"))  # 1e-8 is below FP16's 6e-8: zero
    parts.optimizer.use(replace(rule, eps=eps))


MISTAKES: dict[str, Mistake] = {
    mistake.name: mistake
    for mistake in (
        Mistake("no-masters", "the 16-bit weights are updated; no FP32 masters keep what rounding loses",
                "small updates vanish, learning slows down and stops early", "4.master", _no_masters),
        Mistake("stale-weights", "the masters are not copied down after an update",
                "the loss stays where it began", "1.weights", _stale_weights),
        Mistake("scale-in-16-bits", "the loss is multiplied by the scale in FP16, where 65536 is infinite",
                "every step is skipped until the scale is 32768, and again each time that it grows", "2.loss_scale",
                _scale_in_16_bits),
        Mistake("cast-twice", "a product is rounded before the bias is added, and again after",
                "nothing in the loss; one element in some is an ulp off", "2.activations", _cast_twice),
        Mistake("sum-in-16-bits", "matrix products are summed in 16 bits",
                "activations lose bits with every layer; little in the loss of a small model", "2.activations",
                _sum_in_16_bits),
        Mistake("missing-cast", "attention's probabilities stay in FP32 where they should be rounded to 16 bits",
                "nothing in the loss: results are more exact, but not those of the recipe", "2.activations", _missing_cast),
        Mistake("softmax-in-16-bits", "attention's softmax is computed in 16 bits: its exp, its sum and its quotient",
                "probabilities that do not add up to 1; little in the loss of a small model", "2.activations",
                _softmax_in_16_bits),
        Mistake("norm-in-16-bits", "layer norm reads and writes 16 bits where autocast keeps FP32",
                "little in the loss; the stream that is summed in FP32 is read in 16 bits", "2.activations",
                _norm_in_16_bits),
        Mistake("loss-in-16-bits", "the loss is computed into 16 bits",
                "the loss moves in steps of 1/512 (FP16) or 1/64 (BF16)", "2.loss", _loss_in_16_bits),
        Mistake("tied-gradient-dropped", "of the two uses of the tied embedding only the last layer's gives a gradient",
                "learning goes on, a little worse", "2.grads", _tied_gradient_dropped),
        Mistake("accumulate-in-16-bits", "gradients of micro-batches are added in 16 bits",
                "small gradients vanish beside the sum, more with every micro-batch", "2.grads", _accumulate_in_16_bits),
        Mistake("no-unscale", "the gradients are never divided by the loss scale",
                "hidden by Adam and clipping, which forgive any factor; with SGD and no clipping the run explodes",
                "3.unscaled", _no_unscale),
        Mistake("unscale-twice", "the gradients are divided by the loss scale two times",
                "with SGD learning stops; Adam forgives it but where gradients sink below eps", "3.unscaled", _unscale_twice),
        Mistake("ignore-inf", "an Inf or a NaN in the gradients does not skip the step",
                "the first overflow makes weights NaN, and the loss for ever", "3.found_inf", _ignore_inf),
        Mistake("unscale-after-clip", "gradients are clipped while they are still scaled, and divided afterwards",
                "each step is clipped, by S too much: with SGD no learning; Adam hides it until updates reach eps",
                "3.unscaled",
                _unscale_after_clip),
        Mistake("scale-never-backs-off", "the loss scale is not lowered after an overflow",
                "from the first overflow on every step is skipped", "4.scale", _scale_never_backs_off),
        Mistake("t-advances-on-skip", "a skipped step counts as an update",
                "bias corrections and learning rate run ahead by a step", "4.lr", _t_advances_on_skip),
        Mistake("eps-inside-root", "Adam divides by sqrt(v + eps), not by sqrt(v) + eps",
                "parameters with gradients below 1e-4 hardly move", "4.master", _rule(EpsInsideRoot)),
        Mistake("eps-in-16-bits", "Adam's eps is kept in FP16, where 1e-8 is zero",
                "0/0 where a parameter has had no gradient yet: NaN", "4.master", _eps_in_16_bits),
        Mistake("coupled-decay", "weight decay is added to the gradient (Adam with L2), not to the weight (AdamW)",
                "weights with large gradients are decayed less than the others", "4.m", _rule(CoupledDecay)),
        Mistake("no-bias-correction", "Adam's moments are not corrected for their start at zero",
                "the first updates are too small or too large", "4.master", _rule(NoBiasCorrection)),
    )
}  # fmt: skip


def listing() -> str:
    """All mistakes, one paragraph each, as `scripts/mistakes.py` prints them."""
    indent = " " * 24
    return "\n".join(
        f"{m.name:<24}{m.what}\n{indent}-> {m.seen}\n{indent}   a trace departs at {m.departs}" for m in MISTAKES.values()
    )
