"""The settings of a run, which are the flags of scripts/train.py, checked; and the objects made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from refimpl.backends.base import Backend, get_backend
from refimpl.distributed.collectives import Comm, Serial
from refimpl.distributed.zero import ShardedState
from refimpl.errors import UsageError, unknown
from refimpl.nn.loss import IGNORE_INDEX
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import LOSS_MEANS, Model
from refimpl.nn.ops import fused_attention
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.quantization.scaling_state import ScalingState
from refimpl.optim.adamw import AdamW
from refimpl.optim.loss_scale import LossScale
from refimpl.optim.loss_scalers import find_scaler, make_loss_scale
from refimpl.optim.optimizer import Optimizer, Rule
from refimpl.optim.schedule import SCHEDULES, Schedule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.policy import ATTENTION, with_attention
from refimpl.precision.recipes import MASTERS_FROM, Recipe, get_recipe
from refimpl.training.data import EXAMPLES
from refimpl.training.memory_limits import need, require_memory
from refimpl.training.setup import Training

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "lr": 2e-3, "steps": 800},
    "mlp": {"n_layer": 2, "n_head": 0, "n_embd": 64, "block_size": 16, "batch_size": 256, "lr": 2e-3, "steps": 1000},
}
"""The defaults of the settings that depend on the model."""

SCALER_SETTINGS = ("growth_factor", "backoff_factor", "scale_floor")
"""Settings of a loss scale that are None if they are the project's own."""


@dataclass(frozen=True)
class Config:
    """The settings of one run: the flags of scripts/train.py, with nanoGPT's names. None means the model's default.

    `free` in a field's metadata marks settings that may change when a run is resumed. Other `steps` change the schedule of the
    learning rate. Another `backend` or number of ranks, or with micro-batches another `zero`, may change last bits. The other
    free settings do not affect training.
    """

    model: str = "gpt"
    recipe: str = "fp16"
    backend: str = field(default="numpy", metadata={"free": True})
    data: str = "pydoc"
    examples: str = "blocks"
    steps: int | None = field(default=None, metadata={"free": True})
    batch_size: int | None = None
    block_size: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    vocab_size: int = 256
    bias: bool = True
    optimizer: str = "adamw"
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    lr: float | None = None
    min_lr: float | None = None
    schedule: str = "cosine"
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    grad_accum: int = 1
    ignore_index: int = IGNORE_INDEX
    loss_mean: str = "tokens"
    masters_from: str | None = None
    attention: str = "unfused"
    loss_scale: str | None = None
    init_scale: float = 65536.0
    growth_interval: int = 2000
    hysteresis: int | None = None
    growth_factor: float | None = None
    backoff_factor: float | None = None
    scale_floor: float | None = None
    seed: int = 0
    mistake: str = "none"
    eval_every: int = field(default=100, metadata={"free": True})
    eval_batches: int = field(default=20, metadata={"free": True})
    log_every: int = field(default=10, metadata={"free": True})
    sample_bytes: int = field(default=300, metadata={"free": True})
    zero: int | None = field(default=None, metadata={"free": True})

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Config:
        """Return the configuration with defaults for the settings that are not given, all of it checked.

        Errors: UsageError that names the flag and what it must be.
        """
        check_types(given)
        config = cls(**given)
        if config.model not in MODEL_DEFAULTS:
            raise UsageError(unknown("model", config.model, MODEL_DEFAULTS))
        recipe = get_recipe(config.recipe)
        filled = {**MODEL_DEFAULTS[config.model], **{k: v for k, v in asdict(config).items() if v is not None}}
        filled.setdefault("min_lr", filled["lr"] / (1 if filled["schedule"] == "constant" else 10))
        filled.setdefault("masters_from", None)
        filled.setdefault("zero", None)
        filled |= {name: filled.get(name) for name in SCALER_SETTINGS}
        filled.setdefault("loss_scale", recipe.loss_scale)
        if filled["optimizer"] == "sgd" and "weight_decay" not in given:
            filled["weight_decay"] = 0.0
        cls._fill_loss_scale(filled, given)
        config = cls(**{f.name: filled[f.name] for f in fields(cls)})
        config._check()
        return config

    @staticmethod
    def _fill_loss_scale(filled: dict[str, Any], given: Mapping[str, Any]) -> None:
        """Fill in the defaults of a named loss scaler. Configurations call 'torch' 'dynamic'."""
        scaler = find_scaler(filled["loss_scale"])
        filled.setdefault("hysteresis", scaler.hysteresis if scaler is not None and scaler.hysteresis > 1 else None)
        if scaler is None:
            return
        if scaler.name == "torch":
            filled["loss_scale"] = "dynamic"
        filled |= {name: getattr(scaler, name) for name in ("init_scale", "growth_interval") if given.get(name) is None}
        own = {"growth_factor": 2.0, "backoff_factor": 0.5, "scale_floor": scaler.floor}
        filled |= {name: None for name, value in own.items() if filled[name] == value}

    def _check(self) -> None:
        least = {"steps": 1, "batch_size": 1, "block_size": 1, "n_layer": 1, "n_embd": 1, "grad_accum": 1, "eval_every": 1}
        least |= {"eval_batches": 1, "log_every": 1, "sample_bytes": 0, "warmup": 0, "seed": 0, "growth_interval": 1}
        if self.model == "gpt":
            least["n_head"] = 1
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UsageError(f"{_flag(name)} is {getattr(self, name)}: it must be at least {minimum}")
        for name in ("lr", "init_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{_flag(name)} is {getattr(self, name)}: it must be positive and finite")
        for name in ("min_lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{_flag(name)} is {getattr(self, name)}: it must be 0 or more and finite")
        self._check_optimizer()
        if self.masters_from not in (None, *MASTERS_FROM):
            raise UsageError(f"--masters-from is {self.masters_from!r}: choose {' or '.join(MASTERS_FROM)}")
        if self.attention not in ATTENTION:
            raise UsageError(unknown("attention", self.attention, ATTENTION))
        if self.examples not in EXAMPLES:
            raise UsageError(unknown("examples", self.examples, EXAMPLES))
        if self.examples == "lines" and self.model == "mlp":
            raise UsageError("--examples lines is for --model gpt: the mlp has one target per block, its last byte")
        if self.loss_mean not in LOSS_MEANS:
            raise UsageError(unknown("loss mean", self.loss_mean, LOSS_MEANS))
        if self.zero not in (None, 0, 1, 2, 3):
            raise UsageError(f"--zero is {self.zero}: it must be a ZeRO stage, 0, 1, 2 or 3")
        if self.zero is not None and self.mistake != "none":
            raise UsageError("--mistake works on one rank only: leave --zero out")
        if self.model == "mlp" and not self.bias:
            raise UsageError("--no-bias is for --model gpt: the mlp always has biases")
        replace(self, n_layer=1).make_model()  # checks the sizes; with one layer, since --n-layer may be 10^9
        scale = float(self.make_loss_scale().scale)
        if scale < FORMATS["fp32"].smallest_normal:
            raise UsageError(f"the loss scale starts at {scale:g}: its inverse must be finite in FP32")

    def _check_optimizer(self) -> None:
        if self.optimizer not in ("adamw", "sgd"):
            raise UsageError(unknown("optimizer", self.optimizer, ("adamw", "sgd")))
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{_flag(name)} is {getattr(self, name)}: it must be 0 or more and below 1")
        smallest, largest = FORMATS["fp32"].smallest_normal, FORMATS["fp32"].max
        if not smallest <= self.eps <= largest:
            raise UsageError(
                f"--eps is {self.eps}: it must be a normal number of FP32, {smallest:.3g} to {largest:.3g}; with an eps of 0 "
                f"the update of a parameter whose gradients were all 0 would be 0/0"
            )
        for name in ("momentum",) if self.optimizer == "adamw" else ("beta1", "beta2", "eps"):
            if getattr(self, name) != getattr(Config, name):
                raise UsageError(f"{_flag(name)} is {getattr(self, name)}: --optimizer {self.optimizer} has none")
        if self.schedule not in SCHEDULES:
            raise UsageError(unknown("schedule", self.schedule, SCHEDULES))
        if self.schedule == "constant" and self.min_lr != self.lr:
            raise UsageError(f"--min-lr is {self.min_lr}: leave it out, since --schedule constant stays at --lr, {self.lr}")

    def conflicts(self, saved: Mapping[str, Any]) -> list[str]:
        """Return, per flag, how this run differs from a saved one in the settings that a resumed run must not change.

        A setting missing from `saved` did not exist when the run was saved: it had today's default.
        """
        here = asdict(self)
        there = {f.name: saved.get(f.name, f.default) for f in fields(self) if not f.metadata.get("free")}
        return [f"{_flag(k)} {value} there, {here[k]} here" for k, value in there.items() if value != here[k]]

    def make_model(self) -> Model:
        """Return the model of these sizes."""
        names, how = ("n_layer", "n_embd", "block_size", "vocab_size"), (self.ignore_index, self.loss_mean)
        sizes: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.model == "mlp":
            return mlp_model(MLPConfig(**sizes), *how)
        return gpt_model(GPTConfig(n_head=self.n_head or 0, bias=self.bias, **sizes), *how)

    @property
    def no_target(self) -> int | None:
        """The value of padding in a batch's targets, or None if examples are not padded."""
        return self.ignore_index if self.examples == "lines" else None

    def make_rule(self) -> Rule:
        """Return the optimizer's update rule."""
        if self.optimizer == "sgd":
            return SGD(self.momentum, self.weight_decay)
        return AdamW((self.beta1, self.beta2), self.eps, self.weight_decay)

    def make_schedule(self) -> Schedule:
        """Return the schedule of the learning rate."""
        assert self.lr is not None and self.min_lr is not None and self.steps is not None
        return Schedule(self.lr, self.min_lr, self.warmup, self.steps, self.schedule)

    def make_optimizer(self, backend: Backend) -> Optimizer:
        """Return the optimizer: the update rule with its schedule."""
        return Optimizer(self.make_rule(), self.make_schedule(), backend.xp)

    def make_loss_scale(self, xp: Any = None) -> LossScale:
        """Return the loss scale of --loss-scale, or the recipe's."""
        assert self.loss_scale is not None
        more: dict[str, Any] = {} if xp is None else {"xp": xp}
        knobs = {name: getattr(self, name) for name in ("hysteresis", *SCALER_SETTINGS)}
        return make_loss_scale(self.loss_scale, self.init_scale, self.growth_interval, **knobs, **more)

    def make_training(self, backend: Backend, comm: Comm | None = None) -> Training:
        """Return the objects that a training step takes, those of one rank if there are several.

        The weights are still zero: see `training.state.load_weights`. Errors: UsageError for a batch that cannot be shared
        equally by the ranks, and for sizes that do not fit into memory.
        """
        comm = comm or Serial()
        require_memory([need(self, comm.size, comm.on_host.on_machine)])
        recipe, model, rule = self.make_recipe(), self.make_model(), self.make_rule()
        encodings = recipe.state_encodings(rule.moments, self.grad_accum)
        if self.zero is None:
            state = State(model, encodings, backend, self.seed)
        else:
            state = ShardedState(model, encodings, backend, self.seed, comm, self.zero)
        assert self.batch_size is not None
        if self.batch_size % comm.size:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be shared equally by {comm.size} ranks: start a number that divides it"
            )
        optimizer, loss_scale = self.make_optimizer(backend), self.make_loss_scale(backend.xp)
        overrides = {"attention": fused_attention} if recipe.policy.fused_attention else {}
        run = Run(recipe.policy, backend, overrides=overrides, scales=ScalingState(self.seed, over_ranks=comm.on_host.largest))
        return Training(model, state, optimizer, loss_scale, run, self.clip or math.inf, self.grad_accum)

    def make_backend(self) -> Backend:
        """Return the backend of --backend."""
        return get_backend(self.backend)

    @property
    def rounds_masters(self) -> bool:
        """Whether masters start from the rounded weights: --masters-from, or else the recipe's choice."""
        return (self.masters_from or self.make_recipe().masters_from) == "rounded"

    def make_recipe(self) -> Recipe:
        """Return the recipe of --recipe with the attention of --attention."""
        recipe = get_recipe(self.recipe)
        return replace(recipe, policy=with_attention(recipe.policy, self.attention))


_TYPES: dict[str, tuple[Any, str]] = {
    "str": (str, "a text"), "int": (Integral, "an integer"), "float": (Real, "a number"), "bool": (bool, "true or false"),
}  # fmt: skip
_LARGEST = 2**63 - 1


def check_types(given: Mapping[str, Any]) -> None:
    """Check the type of each setting, which may come from a file. Errors: UsageError for an unknown setting or a wrong type."""
    annotations = {f.name: str(f.type).partition(" | ") for f in fields(Config)}
    for name, value in given.items():
        if name not in annotations:
            raise UsageError(unknown("setting", name, annotations))
        kind, _, none = annotations[name]
        python_type, what = _TYPES[kind]
        if value is None and none:
            continue
        if not isinstance(value, python_type) or isinstance(value, bool) != (kind == "bool"):
            raise UsageError(f"{_flag(name)} is {value!r:.60}: it must be {what}")
        if kind == "int" and abs(int(value)) > _LARGEST:
            raise UsageError(f"{_flag(name)} is about 2^{int(value).bit_length()}: it must be below 2^63")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
