"""The layers of a precision report: outliers, narrow formats and FP16's room, on tensors whose figures are known."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import LLAMA, tensors_of, write
from script_loader import load_script

from refimpl.errors import UsageError
from refimpl.numerics.casts import cast
from refimpl.precision.recipes import get_recipe
from refimpl.tools.precision_report.collect import fresh
from refimpl.tools.precision_report.layer_figures import draw_layers, layer_pictures
from refimpl.tools.precision_report.layer_tables import effect_rows, layer_parts, outlier_rows, room_rows, room_sentence
from refimpl.tools.precision_report.layers import (
    NARROW,
    Effect,
    LargestBySite,
    Layer,
    Operand,
    Room,
    effect_of,
    inspect_layers,
    peak_over_rms,
    top_share,
)
from refimpl.training.config import Config
from refimpl.training.init_from import First, settings_from
from refimpl.training.setup import start

# -- one tensor --------------------------------------------------------------------------------------------------------


def with_outlier(outlier: float, rest: float = 1.0, rows: int = 3, channels: int = 1000) -> np.ndarray:
    """Values `rest` in all channels, but `outlier` in channel 7."""
    x = np.full((rows, channels), rest, np.float32)
    x[:, 7] = outlier
    return x


def test_the_share_of_the_top_channels() -> None:
    assert top_share(with_outlier(1.0)) == pytest.approx(1 / 1000)
    assert top_share(with_outlier(-100.0)) == pytest.approx(1e4 / (1e4 + 999))
    two = with_outlier(10.0, channels=1001)  # more than 1000 channels: the top 0.1 % are two of them
    two[:, 8] = 10.0
    assert top_share(two) == pytest.approx(200 / (200 + 999))
    assert top_share(with_outlier(10.0, channels=64)) == pytest.approx(100 / 163)  # fewer than 1000: one
    one_row = np.ones((100, 50), np.float32)
    one_row[0, 3] = 100.0  # one large value of a channel counts with its channel
    assert top_share(one_row) == pytest.approx((1e4 + 99) / (1e4 + 4999))
    assert top_share(np.zeros((2, 8), np.float32)) == 0 and math.isnan(top_share(with_outlier(math.inf)))


def test_the_largest_value_over_the_root_of_the_mean_square() -> None:
    assert peak_over_rms(np.full((4, 8), -3.0, np.float32)) == 1
    only = np.zeros((4, 16), np.float32)
    only[1, 2] = -5.0
    assert peak_over_rms(only) == pytest.approx(8)  # the root of 64 values
    assert peak_over_rms(with_outlier(100.0)) == pytest.approx(100 / math.sqrt((1e4 + 999) / 1000))
    assert peak_over_rms(np.zeros((2, 8), np.float32)) == 0


LOW = 2.0**-11
"""Less than half of e4m3's smallest value times the scale of a tensor whose largest value is 448."""


@pytest.mark.parametrize(
    ("recipe", "zeros"),
    [
        ("fp8", 63),  # one scale for the tensor
        ("fp8-rows", 63),  # one for the row, which has the outlier
        ("mxfp8", 31),  # one for 32 values
        ("mxfp6", 31),
        ("mxfp4", 31),
        ("nvfp4", 63),  # the FP8 scale of a block without outlier is below e4m3's smallest, times the tensor's
    ],
)
def test_an_outlier_flushes_those_that_share_its_scale(recipe: str, zeros: int) -> None:
    x = with_outlier(448.0, LOW, rows=2, channels=64)
    effect = effect_of(x, get_recipe(recipe).policy.row("linear.y").input("x"))
    assert effect.flushed == zeros / 64
    own = 64.0 if recipe == "mxfp4" else 0.0  # the OCP text's scale is 64, and 448 / 64 = 7 is more than e2m1's largest, 6
    assert effect.error == pytest.approx(math.sqrt((own**2 + zeros * LOW**2) / (448**2 + 63 * LOW**2)), rel=1e-6)


def test_where_scales_are_per_row_a_row_without_outlier_is_whole() -> None:
    x = with_outlier(448.0, LOW, rows=2, channels=64)
    x[1] = LOW
    assert effect_of(x, "e4m3-rows").flushed == 63 / 128 and effect_of(x, "e4m3-tensor").flushed == 127 / 128


def test_an_effect_without_an_error_and_of_values_that_are_not_finite() -> None:
    exact = effect_of(with_outlier(4.0, 1.0, channels=64), "mx-e4m3-rceil")
    assert (exact.error, exact.flushed, exact.snr) == (0.0, 0.0, math.inf)
    assert Effect(0.1, 0).snr == pytest.approx(20)
    broken = effect_of(with_outlier(math.nan), "e4m3-tensor")
    assert math.isnan(broken.error) and math.isnan(broken.flushed) and math.isnan(broken.snr)
    assert effect_of(np.zeros((2, 64), np.float32), "nvfp4") == Effect(0.0, 0.0)


def test_long_tensors_are_measured_in_pieces() -> None:
    """More values than are looked at together: the figures are those of one piece."""
    x = np.random.default_rng(0).standard_normal((3000, 192)).astype(np.float32)
    x[:, 5] *= 30
    wide = cast(x, "fp64")
    squares = np.sort((wide**2).sum(0))
    assert top_share(x) == pytest.approx(squares[-1] / squares.sum(), rel=1e-12)
    assert peak_over_rms(x) == pytest.approx(np.abs(wide).max() / np.sqrt((wide**2).mean()), rel=1e-12)
    whole, parts = effect_of(x, "mx-e2m1-floor"), [effect_of(part, "mx-e2m1-floor") for part in (x[:1000], x[1000:])]
    assert whole.flushed == pytest.approx((parts[0].flushed + 2 * parts[1].flushed) / 3, abs=1e-9)
    assert min(part.error for part in parts) < whole.error < max(part.error for part in parts)


# -- all layers --------------------------------------------------------------------------------------------------------

GIVEN = {"tokenizer": "bytes", "block_size": 8, "batch_size": 2, "steps": 1, "eval_batches": 1}


def from_folder(folder: Path, tensors: Mapping[str, np.ndarray], **more: Any) -> tuple[Config, First]:
    write(folder, {**LLAMA, "vocab_size": 256}, tensors)
    settings, first = settings_from(folder, {**GIVEN, **more})
    return Config.of(settings), first


def small_llama() -> dict[str, np.ndarray]:
    return {name: 0.2 * array for name, array in tensors_of({**LLAMA, "vocab_size": 256}).items()}


def layers_of(config: Config, first: First) -> list[Layer]:
    source = fresh(config, first)
    return inspect_layers(source.training, next(iter(source.batches)))


def test_a_planted_channel_is_found_in_the_layer_that_reads_it(tmp_path: Path) -> None:
    """A norm's weight makes one channel of its output large, as in real models: only the two layers that read it show it."""
    tensors = small_llama()
    tensors["model.layers.1.post_attention_layernorm.weight"] = np.full(32, 0.2, np.float32)
    before = layers_of(*from_folder(tmp_path / "a", tensors, recipe="fp32"))
    tensors["model.layers.1.post_attention_layernorm.weight"][20] = 200.0
    after = layers_of(*from_folder(tmp_path / "b", tensors, recipe="fp32"))
    assert [layer.name for layer in after] == ["block 0", "block 1", "head"]
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert [operand.name for operand in after[1].inputs] == names  # k, v and up read what q and gate read
    weights = [operand.name for operand in after[1].weights]
    assert weights[:3] == [f"self_attn.{x}_proj" for x in "qkv"] and len(weights) == 7
    assert before[0] == after[0] and before[1].inputs[:2] == after[1].inputs[:2] and before[1].weights == after[1].weights
    found, usual = after[1].worst, before[1].inputs[2]
    assert found is not None and found.name == "mlp.gate_proj" and found.top > 0.999 > 0.3 > usual.top
    assert found.peak > 5 > usual.peak > 1 and found.effects["fp8"].flushed > usual.effects["fp8"].flushed
    assert all(layer.forward is None and layer.backward is None for layer in after)  # FP32 rounds nothing


def test_the_operands_are_those_of_the_products(tmp_path: Path) -> None:
    tensors = small_llama()
    config, first = from_folder(tmp_path / "hf", tensors, recipe="bf16")
    head = layers_of(config, first)[-1]
    w = cast(cast(first[1].weights["lm_head.weight"], "bf16"), "fp32")
    (weight,) = head.weights
    assert weight == Operand("lm_head", top_share(w), peak_over_rms(w), {
        name: effect_of(w, get_recipe(name).policy.row("linear.y").input("w")) for name in NARROW
    })  # fmt: skip


def test_a_layer_with_little_room_is_named(tmp_path: Path) -> None:
    tensors = small_llama()
    config, first = from_folder(tmp_path / "a", tensors, recipe="fp16", loss_scale="1")
    assert not [layer for layer in layers_of(config, first) if layer.little_room()]
    training, site = start(config, first=first), "model.layers.1.mlp.down_proj:linear.y.y"
    training.set_monitor(usual := LargestBySite())
    training.step(next(iter(fresh(config, first).batches)))
    for name in ("up_proj", "down_proj"):  # of which the output is a product, so that neither's weights are large themselves
        tensors[f"model.layers.1.mlp.{name}.weight"] *= math.sqrt(4e4 / usual.sites[site][0])
    layers = layers_of(*from_folder(tmp_path / "b", tensors, recipe="fp16", loss_scale="1"))
    forward = {layer.name: layer.forward for layer in layers if layer.forward and layer.forward.is_little}
    assert list(forward) == ["block 1"], forward
    room = forward["block 1"]
    assert (room.site, room.room) == (site, 0) and room.largest == pytest.approx(4e4, rel=0.01)
    assert "block 1 (forward: 2^0 in mlp.down_proj y" in room_sentence(layers, 1.0)
    assert "there is no loss scale" in room_sentence(layers, 1.0)


def test_gradients_are_times_the_loss_scale(tmp_path: Path) -> None:
    tensors, largest = small_llama(), {}
    for scale in (1, 256):
        config, first = from_folder(tmp_path / str(scale), tensors, recipe="fp16", loss_scale=str(scale))
        layers = layers_of(config, first)
        largest[scale] = {layer.name: layer.backward.largest for layer in layers if layer.backward}
        rooms = {layer.name: (layer.backward, layer.forward) for layer in layers}
    assert list(largest[1]) == ["embedding", "block 0", "block 1", "head"]
    for name, value in largest[1].items():
        assert largest[256][name] == pytest.approx(256 * value, rel=0.01)  # some were subnormal at 1
    gradients = rooms["block 0"][0]
    assert gradients is not None and gradients.site.startswith("model.layers.0.")


def test_an_overflow_comes_before_what_arrives_because_of_it(tmp_path: Path) -> None:
    config, first = from_folder(tmp_path / "hf", small_llama(), recipe="fp16", loss_scale="1e9")
    rooms = {layer.name: layer.backward for layer in layers_of(config, first)}
    head = rooms["head"]
    assert head is not None and head.room is not None and head.room < 0 and head.is_little
    block = rooms["block 0"]
    assert block is not None and block.room is None and block.is_little  # Inf from the layers above
    rows = {row[0]: row for row in room_rows(layers_of(config, first))[1]}
    assert rows["head"][3] == "overflow" and rows["block 0"][3] == "Inf/NaN"


def test_values_that_have_their_own_scales_are_left_out() -> None:
    found, x = LargestBySite(), np.array([3.0, -7.0, np.inf], np.float32)
    found("a", x, cast(x, "fp16"))
    found("a", 2 * x[:2], cast(x[:2], "fp16"))
    found("b", x, cast(x, "e4m3", overflow="saturate"))
    assert found.sites == {"a": (14.0, False)}


def test_nothing_of_the_run_changes(tmp_path: Path) -> None:
    config, first = from_folder(tmp_path / "hf", small_llama(), recipe="fp8-delayed", steps=3)
    source, other = fresh(config, first), start(config, first=first)
    batches = list(source.batches)
    inspect_layers(source.training, batches[0])
    for step in batches:
        assert float(source.training.step(step).loss) == float(other.step(step).loss)
    assert (source.training.state.master == other.state.master).all()


# -- what is shown -----------------------------------------------------------------------------------------------------


def layer(name: str, top: float = 0.5, flushed: float = 0.25) -> Layer:
    operand = Operand("mlp.c_fc", top, 20.0, {recipe: Effect(0.01, flushed) for recipe in NARROW})
    return Layer(name, [operand], [operand], Room("h.0.mlp.c_fc:linear.y.y", 100.0, 9), None)


def test_rows_and_sentences() -> None:
    layers = [Layer("embedding"), layer("block 0"), layer("block 1", math.nan, 0.0001)]
    assert outlier_rows(layers)[1] == [
        ["block 0", "mlp.c_fc", "50.0 %", "20.0"], ["block 1", "mlp.c_fc", "-", "20.0"],
    ]  # fmt: skip
    assert effect_rows(layers, "inputs")[1][0] == ["block 0", *["40.0 25%"] * 6]
    assert effect_rows(layers, "weights")[1][1] == ["block 1", *["40.0 <.1%"] * 6]
    assert room_rows(layers)[1][0] == ["block 0", "2^9", "mlp.c_fc y", "-", "-"]
    assert "Every layer has room" in room_sentence(layers, 65536.0) and "S = 2^16" in room_sentence(layers, 65536.0)
    assert "rounds nothing to 16 bits" in room_sentence([Layer("embedding")], 1.0)
    many = [layer(f"block {i}") for i in range(12)]
    for each in many:
        each.forward = Room("h.0.mlp.c_fc:linear.y.y", 5e4, 0)
    assert "12 of 12 layers" in room_sentence(many, 1.0) and room_sentence(many, 1.0).endswith("and 4 more.")
    assert layer_parts([], 1.0) == []


def test_the_terminal_and_the_data_have_the_layers_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refimpl.tools.precision_report.collect.SWEEP", range(2))
    write(tmp_path / "hf", {**LLAMA, "vocab_size": 256}, small_llama())
    script, numbers = load_script("inspect_precision"), tmp_path / "data.json"
    flags = "--tokenizer bytes --batch-size 2 --block-size 8 --no-page"
    arguments = vars(script.parser().parse_args([*flags.split(), "--init-from", str(tmp_path / "hf"), "--json", str(numbers)]))
    own = {name: arguments.pop(name) for name in script.OWN_FLAGS}
    script.inspect_precision(arguments, **own)
    shown = capsys.readouterr().out
    assert shown.startswith("A new run of 5 steps from the weights of hf: llama with")
    stored = json.loads(numbers.read_text())
    assert [row["layer"] for row in stored["layers"]] == ["embedding", "block 0", "block 1", "head"]
    assert stored["layers_loss_scale"] == 65536 and set(stored["layers"][1]["inputs"][0]["formats"]) == set(NARROW)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_figures_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refimpl.tools.precision_report.collect.SWEEP", range(2))
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 2}
    source = fresh(Config.of({**sizes, "steps": 1, "recipe": "bf16"}))
    layers = inspect_layers(source.training, next(iter(source.batches)))
    captions = [picture.caption for picture in layer_pictures(layers)]
    largest = max(one.peak for each in layers[1:3] for one in each.inputs)
    assert len(captions) == 4 and f"{largest:.3g}" in captions[0] and "mxfp4" in captions[2]
    assert layer_pictures(layers[:2]) == []
    script = load_script("inspect_precision")
    flags = "--steps 1 --n-layer 2 --n-head 2 --n-embd 16 --block-size 8 --batch-size 2 --no-page --plot"
    arguments = vars(script.parser().parse_args([*flags.split(), str(tmp_path / "layers.png")]))
    own = {name: arguments.pop(name) for name in script.OWN_FLAGS}
    script.inspect_precision(arguments, **own)
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match="at least two blocks"):
        draw_layers(None, layers[:2], "")
