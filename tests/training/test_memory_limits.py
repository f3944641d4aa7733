"""Sizes that memory cannot hold: refused in one line, before anything is allocated, by the ledger that memory.py prints."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import UsageError
from refimpl.tools.compare_recipes.runs import compare
from refimpl.tools.memory.choice import choose
from refimpl.tools.memory.report import ledger_data
from refimpl.training import memory_limits
from refimpl.training.config import Config
from refimpl.training.memory_limits import TABLE_BYTES, TARGET_BYTES, Need, limits, n_params, need, require_memory
from refimpl.training.run import train
from refimpl.training.setup import start

GPT: dict[str, Any] = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4}


@pytest.mark.parametrize("model", ["gpt", "llama"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("recipe", ["fp16", "amp-bf16", "adam-8bit"])
def test_what_is_needed_is_what_memory_py_predicts(recipe: str, checkpointing: str, model: str) -> None:
    own: dict[str, Any] = {"n_kv_head": 1, "qk_norm": True, "mlp_bias": True} if model == "llama" else {}
    config = Config.of({**GPT, **own, "model": model, "recipe": recipe, "grad_accum": 2, "checkpointing": checkpointing})
    sizes = {name: GPT[name] for name in ("n_layer", "n_head", "n_embd")} | own
    more: dict[str, Any] = {"grad_accum": 2, "batch_size": 4, "block_size": 8, "checkpointing": checkpointing}
    told = ledger_data(choose(model=model, sizes=sizes, recipe=recipe, **more))
    found = need(config)
    assert found.total - found.tables == told["total_bytes"]
    lines = {line["name"]: line["nbytes"] for line in told["own_activations"]}
    assert found.logits == (0 if lines.get("more in backward") else lines["logits"])
    assert found.tables == TABLE_BYTES * 800 + TARGET_BYTES * 2 * 4 * 8


@pytest.mark.parametrize("model", ["gpt", "llama", "mlp"])
@pytest.mark.parametrize("n_layer", [1, 2, 5])
def test_parameters_are_counted_without_listing_them(model: str, n_layer: int) -> None:
    config = Config.of({"model": model, "n_layer": n_layer, "n_embd": 16})
    assert n_params(config) == config.make_model().n_params
    huge = n_params(Config.of({"model": model, "n_layer": 10**9, "n_embd": 8 * 10**8}))
    assert huge > 10**27  # more than int64 can count


@pytest.mark.parametrize(
    "flags",
    [
        {"n_embd": 10**9},
        {"n_embd": 100_000, "n_layer": 100},
        {"n_layer": 10**9},
        {"batch_size": 10**8},
        {"steps": 10**12},
        {"grad_accum": 10**12},
        {"model": "llama", "ffn_dim": 10**9},
        {"model": "llama", "n_layer": 10**9},
        {"model": "llama", "batch_size": 10**8},
        {"model": "mlp", "n_embd": 10**9, "n_head": 0},
        {"model": "mlp", "batch_size": 10**9},
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_allocated(flags: dict[str, Any], tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"needs at least [\d,]+ bytes of memory.*GiB") as refused:
            start(Config.of(flags))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="needs at least"):
        train(flags, tmp_path / "r", False, False, None)
    assert not (tmp_path / "r").exists()


def test_sizes_that_do_not_go_together_are_told_first() -> None:
    with pytest.raises(UsageError, match="not a multiple of n_head"):
        Config.of({"n_embd": 10**9 + 1})


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = need(Config.of(GPT))
    for limit, refused in ((wanted.total, False), (wanted.total - 1, True)):
        monkeypatch.setattr(memory_limits, "limits", lambda n=limit: [(10**15, "this machine has"), (n, "the limit is")])
        if refused:
            with pytest.raises(UsageError, match=f"{wanted.total:,} bytes.*but the limit is {wanted.total - 1:,}"):
                start(Config.of(GPT))
        else:
            start(Config.of(GPT))


def test_what_checkpointing_would_spare_is_told_where_it_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, checkpointed = (need(Config.of({**GPT, "n_layer": 9, "checkpointing": how})) for how in ("none", "full"))
    assert plain.total - plain.spared == checkpointed.total < plain.total and checkpointed.spared == 0
    for limit, advice in ((checkpointed.total, "give --checkpointing full, or a"), (checkpointed.total - 1, "give a smaller")):
        monkeypatch.setattr(memory_limits, "limits", lambda n=limit: [(n, "the limit is")])
        with pytest.raises(UsageError, match=advice):
            require_memory([plain])
    assert need(Config.of({"model": "mlp"})).spared == 0


def test_runs_that_are_there_together_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of all of them, activations of the largest: they take their steps in turn."""
    needs = [Need(100, 10, 0), Need(200, 50, 0, copies=5), Need(50, 30, 0, tables=7)]
    monkeypatch.setattr(memory_limits, "limits", lambda: [(412, "this machine has")])
    require_memory(needs)
    monkeypatch.setattr(memory_limits, "limits", lambda: [(411, "this machine has")])
    with pytest.raises(UsageError, match="needs at least 412 bytes"):
        require_memory(needs)
    one = need(Config.of({**GPT, "recipe": "fp32"})).total
    monkeypatch.setattr(memory_limits, "limits", lambda: [(2 * one, "this machine has")])
    with pytest.raises(UsageError, match="the comparison needs at least"):
        compare(Config.of({**GPT, "recipe": "fp32"}), ["fp32", "bf16"], 2, lambda: None)


def test_ranks_share_a_machine() -> None:
    config = Config.of({**GPT, "zero": 3})
    alone, four = need(config), need(config, 4, 4)
    assert alone.states <= four.states < alone.states + 4 * 64  # shards are padded
    assert four.tables == 4 * alone.tables and 4 * need(config, 4, 1).activations == four.activations


def test_limits_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = limits()
    assert all(n > 2**20 for n, _ in found)
    monkeypatch.setattr(memory_limits, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limits._of_cgroup() is None
    (tmp_path / "memory.max").write_text("123456\n")
    assert memory_limits._of_cgroup() in (None, 123456)  # None where there is no /proc
