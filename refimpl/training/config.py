"""The settings of a run, which are the flags of scripts/train.py, checked; and the objects made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypeAlias

from refimpl.backends.base import Backend
from refimpl.backends.choose import get_backend
from refimpl.distributed.collectives import Comm, Serial
from refimpl.distributed.zero import ShardedState
from refimpl.errors import UsageError, unknown
from refimpl.nn.checkpointing import CHECKPOINTING
from refimpl.nn.loss import IGNORE_INDEX
from refimpl.nn.models.model import LOSS_MEANS, Model
from refimpl.nn.models.registry import SIZES, make_model
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
from refimpl.precision.policy_variants import ATTENTION, with_attention
from refimpl.precision.recipes import MASTERS_FROM, Recipe, get_recipe
from refimpl.training.data import EXAMPLES, Corpus, load_corpus
from refimpl.training.kept_checkpoints import Keep
from refimpl.training.log_writers import chosen
from refimpl.training.memory_limits import need, require_memory
from refimpl.training.setup import Training
from refimpl.training.tokenizer import BYTES, load_tokenizer, refuse_smaller

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "lr": 2e-3, "steps": 800},
    "llama": {
        "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "lr": 2e-3, "steps": 800,
        "rope_theta": 10000.0, "rope_scaling": "default", "norm_eps": 1e-5, "qk_norm": False, "qkv_bias": False,
        "o_bias": False, "mlp_bias": False, "tied": True,
    },
    "mlp": {"n_layer": 2, "n_head": 0, "n_embd": 64, "block_size": 16, "batch_size": 256, "lr": 2e-3, "steps": 1000},
}  # fmt: skip
"""The defaults of the settings that depend on the model."""

LLAMA = (
    "n_kv_head", "head_dim", "ffn_dim", "rope_theta", "rope_scaling", "norm_eps", "qk_norm", "qkv_bias", "o_bias", "mlp_bias",
    "tied",
)  # fmt: skip
"""The sizes that only llama has."""

Flags: TypeAlias = Mapping[str, Any]
"""The settings that are given, by flags of scripts/train.py or by a file, under the names of Config's fields. A setting that is
absent or None is not given."""

STARTS = ("init_scale", "growth_interval")
"""Settings of a loss scale that adapts. They have defaults for every run, so that the same settings do for several recipes."""

SCALER_SETTINGS = ("growth_factor", "backoff_factor", "scale_floor")
"""Settings of a loss scale that are None if they are the project's own."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run, complete and checked, with nanoGPT's names. `Config.of` makes one from the flags that are given.

    A field without a default here has one that depends on others, as the comments say. None means: a size, the model has none;
    n_positions, as many as block_size; masters_from, as the recipe says; hysteresis, growth_factor, backoff_factor and
    scale_floor, as the project of the loss scale has it, or none; zero, a run by itself, not one of several ranks.
    """

    model: str = "gpt"
    recipe: str = "fp16"
    backend: str = "numpy"
    data: str = "pydoc"
    tokenizer: str = "bytes"
    examples: str = "blocks"
    steps: int  # this and the next five by the model: MODEL_DEFAULTS
    batch_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = 256  # the tokenizer's
    bias: bool = True
    activation: str = "gelu_tanh"
    n_kv_head: int | None = None  # this and the next ten are llama's: MODEL_DEFAULTS, and `resolved` for the first three
    head_dim: int | None = None
    ffn_dim: int | None = None
    rope_theta: float | None = None
    rope_scaling: str | None = None
    norm_eps: float | None = None
    qk_norm: bool | None = None
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    tied: bool | None = None
    n_positions: int | None = None
    optimizer: str = "adamw"
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    lr: float  # by the model
    min_lr: float  # lr / 10; lr if the schedule is constant
    schedule: str = "cosine"
    warmup: int = 50
    weight_decay: float = 0.1  # 0 for sgd
    clip: float = 1.0
    grad_accum: int = 1
    ignore_index: int = IGNORE_INDEX
    loss_mean: str = "tokens"
    masters_from: str | None = None
    attention: str = "unfused"
    checkpointing: str = "none"
    loss_scale: str  # the recipe's
    init_scale: float = 65536.0
    growth_interval: int = 2000
    hysteresis: int | None = None
    growth_factor: float | None = None
    backoff_factor: float | None = None
    scale_floor: float | None = None
    seed: int = 0
    mistake: str = "none"
    eval_every: int = 100
    eval_batches: int = 20
    log_every: int = 10
    sample_bytes: int = 300
    keep: str = "last"
    log: str = "none"
    zero: int | None = None

    @classmethod
    def of(cls, flags: Flags) -> Config:
        """Return the configuration with defaults for the settings that are not given, all of it checked.

        Errors: UsageError that names the flag and what it must be.
        """
        check_types(flags)
        config = cls(**resolved({name: value for name, value in flags.items() if value is not None}))
        config._check()
        return config

    def _check(self) -> None:
        least = {"steps": 1, "batch_size": 1, "block_size": 1, "n_layer": 1, "n_embd": 1, "grad_accum": 1, "eval_every": 1}
        least |= {"eval_batches": 1, "log_every": 1, "sample_bytes": 0, "warmup": 0, "seed": 0, "growth_interval": 1}
        if self.model != "mlp":
            least["n_head"] = 1
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UsageError(f"{flag(name)} is {getattr(self, name)}: it must be at least {minimum}")
        for name in ("lr", "init_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{flag(name)} is {getattr(self, name)}: it must be positive and finite")
        for name in ("min_lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{flag(name)} is {getattr(self, name)}: it must be 0 or more and finite")
        self._check_optimizer()
        if self.masters_from not in (None, *MASTERS_FROM):
            raise UsageError(f"--masters-from is {self.masters_from!r}: choose {' or '.join(MASTERS_FROM)}")
        if self.attention not in ATTENTION:
            raise UsageError(unknown("attention", self.attention, ATTENTION))
        if self.checkpointing not in CHECKPOINTING:
            raise UsageError(unknown("checkpointing", self.checkpointing, CHECKPOINTING))
        if self.checkpointing != "none" and self.model == "mlp":
            raise UsageError("--checkpointing is for models with blocks: the layers of the mlp store no more than their inputs")
        if self.examples not in EXAMPLES:
            raise UsageError(unknown("examples", self.examples, EXAMPLES))
        if self.examples == "lines" and self.tokenizer != BYTES.name:
            raise UsageError("--examples lines is for bytes, of which one ends a line: leave --tokenizer out")
        if self.examples == "lines" and self.model == "mlp":
            raise UsageError("--examples lines is for --model gpt or llama: the mlp has one target per block, its last byte")
        if self.loss_mean not in LOSS_MEANS:
            raise UsageError(unknown("loss mean", self.loss_mean, LOSS_MEANS))
        if self.zero not in (None, 0, 1, 2, 3):
            raise UsageError(f"--zero is {self.zero}: it must be a ZeRO stage, 0, 1, 2 or 3")
        if self.zero is not None and self.mistake != "none":
            raise UsageError("--mistake works on one rank only: leave --zero out")
        Keep.of(self.keep)
        chosen(self.log)
        self._check_sizes()
        replace(self, n_layer=1).make_model()  # checks the sizes; with one layer, since --n-layer may be 10^9
        scale = float(self.make_loss_scale().scale)
        if scale < FORMATS["fp32"].smallest_normal:
            raise UsageError(f"the loss scale starts at {scale:g}: its inverse must be finite in FP32")

    def _check_sizes(self) -> None:
        if self.model != "gpt" and not self.bias:
            what = "the mlp always has biases" if self.model == "mlp" else "llama has --qkv-bias, --o-bias and --mlp-bias"
            raise UsageError(f"--no-bias is for --model gpt: {what}")
        if self.model != "gpt" and self.activation != Config.activation:
            raise UsageError(f"--activation {self.activation} is for --model gpt: leave it out")
        for name in LLAMA if self.model != "llama" else ():
            if getattr(self, name) is not None:
                raise UsageError(f"{flag(name)} is for --model llama: leave it out")
        if self.n_positions is not None and (self.model == "mlp" or self.n_positions < self.block_size):
            more = "is for --model gpt or llama" if self.model == "mlp" else f"is less than --block-size {self.block_size}"
            raise UsageError(f"--n-positions {self.n_positions} {more}: leave it out")

    def _check_optimizer(self) -> None:
        if self.optimizer not in ("adamw", "sgd"):
            raise UsageError(unknown("optimizer", self.optimizer, ("adamw", "sgd")))
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{flag(name)} is {getattr(self, name)}: it must be 0 or more and below 1")
        smallest, largest = FORMATS["fp32"].smallest_normal, FORMATS["fp32"].max
        if not smallest <= self.eps <= largest:
            raise UsageError(
                f"--eps is {self.eps}: it must be a normal number of FP32, {smallest:.3g} to {largest:.3g}; with an eps of 0 "
                f"the update of a parameter whose gradients were all 0 would be 0/0"
            )
        for name in ("momentum",) if self.optimizer == "adamw" else ("beta1", "beta2", "eps"):
            if getattr(self, name) != getattr(Config, name):
                raise UsageError(f"{flag(name)} is {getattr(self, name)}: --optimizer {self.optimizer} has none")
        if self.schedule not in SCHEDULES:
            raise UsageError(unknown("schedule", self.schedule, SCHEDULES))
        if self.schedule == "constant" and self.min_lr != self.lr:
            raise UsageError(f"--min-lr is {self.min_lr}: leave it out, since --schedule constant stays at --lr, {self.lr}")
        if self.min_lr > self.lr:
            raise UsageError(f"--min-lr is {self.min_lr}: it must be at most --lr, {self.lr}")

    def make_model(self) -> Model:
        """Return the model of these sizes."""
        sizes = {f.name: getattr(self, f.name) for f in fields(SIZES[self.model])}
        sizes["block_size"] = self.n_positions or self.block_size
        return make_model(self.model, sizes, self.ignore_index, self.loss_mean)

    def make_corpus(self, quiet: bool = False) -> Corpus:
        """Return the text of --data as tokens. quiet: show no progress.

        Errors: UsageError, also for a vocabulary smaller than the tokenizer's.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        advice = "leave it out, or give a tokenizer.json with fewer ids by --tokenizer"
        refuse_smaller(tokenizer, self.vocab_size, "--vocab-size", advice)
        return load_corpus(self.data, self.block_size, tokenizer=tokenizer, quiet=quiet)

    @property
    def tokens_per_step(self) -> int:
        """The tokens of all micro-batches of a step."""
        return self.batch_size * self.block_size * self.grad_accum

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
        return Schedule(self.lr, self.min_lr, self.warmup, self.steps, self.schedule)

    def make_optimizer(self, backend: Backend) -> Optimizer:
        """Return the optimizer: the update rule with its schedule."""
        return Optimizer(self.make_rule(), self.make_schedule(), backend.xp)

    def make_loss_scale(self, xp: Any = None) -> LossScale:
        """Return the loss scale of --loss-scale, or the recipe's. A constant one uses none of STARTS."""
        more: dict[str, Any] = {} if xp is None else {"xp": xp}
        starts = () if find_scaler(self.loss_scale) is None else STARTS
        settings = {name: getattr(self, name) for name in (*starts, "hysteresis", *SCALER_SETTINGS)}
        return make_loss_scale(self.loss_scale, **settings, **more)

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
        if self.batch_size % comm.size:
            raise UsageError(f"--batch-size {self.batch_size} is not a multiple of {comm.size}, the number of ranks")
        optimizer, loss_scale = self.make_optimizer(backend), self.make_loss_scale(backend.xp)
        scales = ScalingState(self.seed, over_ranks=comm.on_host.largest)
        run = Run(recipe.policy, backend, scales=scales, checkpointing=self.checkpointing)
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


def resolved(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are given, with those defaults that depend on others."""
    model = given.get("model", Config.model)
    if model not in MODEL_DEFAULTS:
        raise UsageError(unknown("model", model, MODEL_DEFAULTS))
    settings = {**MODEL_DEFAULTS[model], **given}
    if "vocab_size" not in settings:
        settings["vocab_size"] = load_tokenizer(settings.get("tokenizer", Config.tokenizer)).vocab_size
    if model == "llama":
        n_head, n_embd = settings["n_head"], settings["n_embd"]
        settings.setdefault("n_kv_head", n_head if n_head % 2 else n_head // 2)
        if n_head > 0 and n_embd % n_head and "head_dim" not in settings:
            raise UsageError(f"n_embd {n_embd} is not a multiple of n_head {n_head}: give --head-dim, the width of a head")
        settings.setdefault("head_dim", n_embd // max(1, n_head))
        settings.setdefault("ffn_dim", -(-n_embd * 8 // 24) * 8)  # 8/3 of the width, as Llama's, in whole multiples of 8
    constant = settings.get("schedule", Config.schedule) == "constant"
    settings.setdefault("min_lr", settings["lr"] / (1 if constant else 10))
    settings.setdefault("loss_scale", get_recipe(settings.get("recipe", Config.recipe)).loss_scale)
    if settings.get("optimizer") == "sgd":
        settings.setdefault("weight_decay", 0.0)
    return _resolve_loss_scale(settings)


def _resolve_loss_scale(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the defaults of a named loss scaler; where they are its own, None. 'torch' becomes 'dynamic'."""
    scaler = find_scaler(settings["loss_scale"])
    if scaler is None:
        return settings
    rule = "dynamic" if scaler.name == "torch" else settings["loss_scale"]
    starts = {"init_scale": scaler.init_scale, "growth_interval": scaler.growth_interval}
    hysteresis = {"hysteresis": scaler.hysteresis} if scaler.hysteresis > 1 else {}
    own = {"growth_factor": 2.0, "backoff_factor": 0.5, "scale_floor": scaler.floor}
    others = {name: value for name, value in settings.items() if name not in own or value != own[name]}
    return {**starts, **hysteresis, **others, "loss_scale": rule}


KINDS = {f.name: str(f.type).partition(" | ")[0] for f in fields(Config)}
"""The type of each setting: 'str', 'int', 'float' or 'bool'."""

_TYPES: dict[str, tuple[Any, str]] = {
    "str": (str, "a text"), "int": (Integral, "an integer"), "float": (Real, "a number"), "bool": (bool, "true or false"),
}  # fmt: skip
_LARGEST = 2**63 - 1


def check_types(flags: Flags) -> None:
    """Check the type of each setting, which may come from a file. Errors: UsageError for an unknown setting or a wrong type."""
    optional = {f.name for f in fields(Config) if f.default in (None, MISSING)}
    for name, value in flags.items():
        if name not in KINDS:
            raise UsageError(unknown("setting", name, KINDS))
        python_type, what = _TYPES[KINDS[name]]
        if value is None and name in optional:
            continue
        if not isinstance(value, python_type) or isinstance(value, bool) != (KINDS[name] == "bool"):
            raise UsageError(f"{flag(name)} is {value!r:.60}: it must be {what}")
        if KINDS[name] == "int" and abs(int(value)) > _LARGEST:
            raise UsageError(f"{flag(name)} is about 2^{int(value).bit_length()}: it must be below 2^63")


def flag(name: str) -> str:
    """Return the flag of a setting: 'n_layer' -> '--n-layer'."""
    return "--" + name.replace("_", "-")
