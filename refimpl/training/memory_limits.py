"""Check before anything is allocated that a run fits into memory, by formulas.

    bytes needed at least = model states + activations + 16-bit copies of weights + tables over the steps
                           + the batches of a step

This is a lower bound: gradients of activations, temporaries and Python are not counted. So a run that is refused could not
have run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.distributed.zero import per_rank
from refimpl.errors import UsageError
from refimpl.nn.models.registry import SIZES
from refimpl.training.activation_memory import largest, moments, nbytes, weight_copies

if TYPE_CHECKING:
    from refimpl.training.config import Config

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
TABLE_BYTES = 32
"""The least bytes per step of the tables of learning rates and of an optimizer's scalars."""
TARGET_BYTES = 16
"""Bytes per token of a batch and its target, both int64. Before a step every rank samples all of its micro-batches."""


@dataclass(frozen=True)
class Need:
    """The least bytes that a run needs on one machine.

    logits: included in the activations, 0 where these are largest after the logits have been freed. spared: what
    `--checkpointing full` would spare of the activations.
    """

    states: int
    activations: int
    logits: int
    copies: int = 0
    tables: int = 0
    spared: int = 0

    @property
    def total(self) -> int:
        """The sum of all but the logits, which are among the activations, and of what could be spared."""
        return self.states + self.activations + self.copies + self.tables


def n_params(config: Config) -> int:
    """Return the number of parameters of a run's model, computed from models of one and two layers: --n-layer may be 10^9."""
    one, two = (replace(config, n_layer=n).make_model().n_params for n in (1, 2))
    return one + (config.n_layer - 1) * (two - one)


def need(config: Config, ranks: int = 1, on_machine: int = 1) -> Need:
    """Return the needs of a run on a machine that `on_machine` of its ranks share."""
    recipe, rule, n = config.make_recipe(), config.make_rule(), n_params(config)
    states = sum(per_rank(n, recipe.bytes_by_buffer(rule.moments, config.grad_accum), config.zero or 0, ranks).values())
    if config.backend == "cupy":  # the host samples the first weights; the device reports its own lack of memory
        return Need(4 * n * on_machine, 0, 0)
    batch_size = max(1, config.batch_size // ranks)
    sizes = {**replace(config, n_layer=1).make_model().config, "n_layer": config.n_layer}
    model = SIZES[config.model](**sizes)
    sizes_of_batch = batch_size, config.block_size
    stored = largest(moments(model, recipe, *sizes_of_batch, config.checkpointing))
    activations, logits = nbytes(stored), nbytes([term for term in stored if term.name == "logits"])
    spared = activations - nbytes(largest(moments(model, recipe, *sizes_of_batch, "full")))
    copies = nbytes(weight_copies(model, recipe))
    batches = TARGET_BYTES * config.batch_size * config.block_size * config.grad_accum
    each = (states, activations, logits, copies, TABLE_BYTES * config.steps + batches, spared)
    return Need(*(size * on_machine for size in each))


def require_memory(needs: Sequence[Need], what: str = "this run") -> None:
    """Raise UsageError, with the bytes needed and available, unless the runs fit into memory.

    needs: those of runs whose states exist at the same time, but which compute one after another.
    """
    states = sum(one.states + one.tables for one in needs)
    most = max(needs, key=lambda one: one.total - one.states - one.tables)
    total = states + most.activations + most.copies
    for limit, where in limits():
        if total > limit:
            raise UsageError(
                f"{what} needs at least {total:,} bytes of memory: {_gib(states)} of model states, tables and batches, "
                f"{_gib(most.activations)} of activations, {_gib(most.logits)} of these logits; but {where} "
                f"{limit:,} ({_gib(limit)}): give {'--checkpointing full, or ' if total - most.spared <= limit else ''}"
                f"a smaller model, --batch-size, --block-size, --grad-accum or --steps"
            )


def _gib(n: int) -> str:
    return f"{n / GIB:,.1f} GiB" if n >= 10 * GIB else f"{n / GIB:.3g} GiB"


def limits() -> list[tuple[int, str]]:
    """Return (bytes, name) of each limit of this process's memory that can be read."""
    found = [(_physical(), "this machine has"), (_of_cgroup(), "the limit of this control group is"),
             (_address_space(), "the limit of this process (ulimit -v) leaves")]  # fmt: skip
    return [(n, where) for n, where in found if n is not None]


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _of_cgroup() -> int | None:
    """Return the smallest limit of the control groups of this process and their parents, in versions 1 and 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    files = [CGROUP / "memory.max", CGROUP / "memory" / "memory.limit_in_bytes"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        parts = [part for part in path.split("/") if part]
        for n in range(1, len(parts) + 1):
            if not controllers:
                files.append(CGROUP.joinpath(*parts[:n], "memory.max"))
            elif "memory" in controllers.split(","):
                files.append(CGROUP.joinpath("memory", *parts[:n], "memory.limit_in_bytes"))
    found = []
    for file in files:
        try:
            found.append(int(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such file, or 'max'
            continue
    return min(found, default=None)


def _address_space() -> int | None:
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft == resource.RLIM_INFINITY:
            return None
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        return max(0, soft - used)
    except ImportError:  # Windows
        return None
    except OSError:  # no /proc
        return soft
