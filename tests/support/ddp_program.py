"""What each process of test_ddp.py runs: the PyTorch model under DistributedDataParallel, with its rows of each batch.

    python tests/support/ddp_program.py CONFIG.json RANK RANKS MEETING-PLACE OUT.npz
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from refimpl.distributed.collectives import shares_of
from refimpl.parity.pytorch_model import PyTorchTraining
from refimpl.parity.trace import batches_of
from refimpl.training.config import Config
from refimpl.training.setup import INIT, generator


class Parallel(DistributedDataParallel):
    """Under the names of the model that it wraps."""

    def named_parameters(self, *words: Any, **more: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name.removeprefix("module."), p) for name, p in super().named_parameters(*words, **more))


def main(config: Config, rank: int, ranks: int, place: str, out: Path) -> None:
    """Train, and write losses and weights."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=ranks)
    training = PyTorchTraining(config, config.make_model().initial_weights(generator(config.seed, INIT)))
    training.model = Parallel(training.model)
    rows = shares_of(config.batch_size, ranks)[rank]
    results = [training.step(x[rows], y[rows]) for ((x, y),) in batches_of(config, None)]
    figures = {key: np.array([result[key] for result in results]) for key in ("loss", "skipped", "loss_scale")}
    np.savez(out, **figures, **{f"weights.{name}": w for name, w in training.weights().items()})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    config, rank, ranks, place, out = sys.argv[1:]
    main(Config.of(json.loads(Path(config).read_text(encoding="utf-8"))), int(rank), int(ranks), place, Path(out))
