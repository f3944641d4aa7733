"""Whatever somebody else's trace looks like, `trace.py diff` gives a verdict or one line: no traceback."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from script_loader import load_script, run_here
from trace_mutations import MUTATIONS, mutated

from refimpl.errors import UsageError
from refimpl.parity.coverage import EXIT_CODES
from refimpl.parity.diff import diff_traces
from refimpl.parity.trace import BY_PARAMETER, BY_PLACE, POINTS, Trace, key, load, parse_key, record, save
from refimpl.parity.trace_checks import checked, scalar
from refimpl.parity.trace_settings import SETTINGS, config_from, stated
from refimpl.training.config import Config

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "batch_size": 2, "lr": 1e-3, "steps": 1, "warmup": 1,
    "recipe": "fp16", "init_scale": 1024.0,
}  # fmt: skip


@functools.cache
def run(**more: Any) -> Trace:
    return record(Config.of({**TINY, **more}))


def changed(**tensors: Any) -> Trace:
    """The run with tensors of step 1 in the place of its own; '2_loss' stands for '1/2.loss'."""
    return Trace({}, {**run().tensors, **{"1/" + name.replace("_", ".", 1): np.asarray(x) for name, x in tensors.items()}})


def refusal(trace: Trace) -> str:
    with pytest.raises(UsageError) as error:
        checked(trace, Config.of(TINY).make_model())
    assert "\n" not in str(error.value)
    return str(error.value)


TOKENS = np.zeros((2, 4), np.int64)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"0_targets": TOKENS + 256}, "1/0.targets holds 256; this model knows 0 to 255"),
        ({"0_targets": TOKENS - 1}, "1/0.targets holds -1"),  # -100 is PyTorch's ignore_index, -1 is nothing
        ({"0_tokens": TOKENS + 300}, "1/0.tokens holds 300"),
        ({"0_tokens": TOKENS - 100}, "1/0.tokens holds -100"),
        ({"0_tokens": TOKENS.reshape(-1)}, "1/0.tokens is int64 (8,); it must be integers (B, T)"),
        ({"0_tokens": TOKENS[None, None]}, "1/0.tokens is int64 (1, 1, 2, 4)"),
        ({"0_tokens": TOKENS * 0.0}, "1/0.tokens is float64 (2, 4); it must be integers"),
        ({"0_tokens": TOKENS == 0}, "1/0.tokens is bool"),
        ({"0_tokens": TOKENS[:0]}, "1/0.tokens is int64 (0, 4)"),
        ({"0_tokens": np.stack([TOKENS] * 3), "0_targets": np.stack([TOKENS] * 2)}, "(3, 2, 4) and 0.targets (2, 2, 4); they"),
        ({"0_tokens": TOKENS.repeat(2, 1), "0_targets": TOKENS.repeat(2, 1)}, "has 8 positions; this model has 4"),
        ({"2_loss": [1.0, 2.0]}, "1/2.loss is float64 (2,); it must be one number"),
        ({"2_loss": np.zeros((0,))}, "1/2.loss is float64 (0,); it must be one number"),
        ({"2_loss_scale": np.nan}, "1/2.loss_scale is nan; it must be 0 or more"),
        ({"4_scale": -4.0}, "1/4.scale is -4; it must be 0 or more"),
        ({"4_lr": np.nan}, "1/4.lr is nan"),
        ({"3_found_inf": 2}, "1/3.found_inf is 2; it must be 0 or 1"),
        ({"3_found_inf": np.nan}, "1/3.found_inf is nan; it must be 0 or 1"),
        ({"4_t": 1.5}, "1/4.t is 1.5; it must be a whole number"),
        ({"4_t": 2.0**40}, "1/4.t is 1.09951e+12; it must be a whole number, from 0 to 2^31 - 1"),
        ({"4_growth_tracker": -1}, "1/4.growth_tracker is -1"),
        ({"4_master/transformer.ln_f.bias": np.zeros(7, np.float32)}, "the shape (7,) in the trace; in this model it"),
        ({"4_master/transformer.ln_f.bias": np.zeros(8, np.int64)}, "is int64; it must be in FP16, BF16, FP32 or FP64"),
        ({"4_master/transformer.ln_f.bias": np.zeros(8, np.complex64)}, "is complex64; it must be"),
        ({"2_activations/lm_head": np.zeros((0, 4), np.float32)}, "1/2.activations/lm_head is empty"),
        ({"2_activations/1:lm_head": np.zeros((1,), np.float32)}, "are the same place in the first micro-batch"),
        ({"2_activations/0:lm_head": np.zeros((1,), np.float32)}, "micro-batches are counted from 1"),
        ({"2_activations": np.zeros((1,), np.float32)}, "'1/2.activations' is not a tensor of a trace"),
        ({"2_loss/lm_head": np.zeros((1,), np.float32)}, "'1/2.loss/lm_head' is not a tensor of a trace"),
        ({"9_loss": np.zeros((1,), np.float32)}, "'1/9.loss' is not a tensor of a trace"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named_in_one_line(tensors: dict[str, Any], words: str) -> None:
    assert words in refusal(changed(**tensors))


def test_a_scalar_of_one_element_is_a_number() -> None:
    names = [name for name in run().tensors if "/" not in name.partition("/")[2] and "/0." not in name]
    assert len(names) >= 12
    theirs = Trace({}, {name: x.reshape(1) if name in names else x for name, x in run().tensors.items()})
    assert diff_traces(run(), theirs)["verdict"] == "AGREES"
    assert scalar("1/4.t", np.array([[3]])).shape == () and scalar("1/3.found_inf", np.array(True)) == 1


def test_targets_that_are_ignored_are_welcome() -> None:
    targets = run().tensors["1/0.targets"].copy()
    targets[0, 0] = -100
    checked(changed(**{"0_targets": targets}), Config.of(TINY).make_model())
    assert "holds -100" in refusal_under(changed(**{"0_targets": targets}), ignore_index=-1)


def refusal_under(trace: Trace, **more: Any) -> str:
    with pytest.raises(UsageError) as error:
        checked(trace, Config.of({**TINY, **more}).make_model())
    return str(error.value)


def test_step_0_is_a_start() -> None:
    assert "step 0 holds initial states" in refusal(Trace({}, {**run().tensors, "0/2.loss": np.float32(1)}))


@pytest.mark.parametrize("name", ["1/2.loss", "12/2.activations/2:lm_head", "0/4.master/a.b"])
def test_names_are_taken_apart_and_put_together(name: str) -> None:
    assert key(*parse_key(name)) == name


@pytest.mark.parametrize(
    "name", ["", "1", "1/", "/2.loss", "01/2.loss", "²/2.loss", "-1/2.loss", "1/2.loss/", "1/2.grads", "1/2.grads/", "x/2.loss"]
)
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_key(name)
    if name:
        save_file({name: np.zeros(1, np.float32)}, tmp_path / "x")
        with pytest.raises(UsageError, match="is not a tensor of a trace"):
            load(tmp_path / "x")


def test_every_point_has_names_or_none() -> None:
    assert {*BY_PARAMETER, *BY_PLACE} < {*POINTS}


def verdict_or_refusal(theirs: Trace) -> str:
    """What diff says; whatever else than a UsageError it raises goes on, and a warning is an error."""
    try:
        verdict = diff_traces(run(), theirs)
    except UsageError as error:
        assert "\n" not in str(error)
        return "refused"
    assert verdict["verdict"] in EXIT_CODES
    return str(verdict["verdict"])


def fuzz(monkeypatch: pytest.MonkeyPatch, kinds: list[str], seed: int) -> set[str]:
    monkeypatch.setattr("refimpl.parity.diff.explanations", lambda *_: [])  # each costs as many replays as there are mistakes
    rng = np.random.default_rng(seed)
    points: dict[str, list[str]] = {}
    for name in run().tensors:
        points.setdefault("/".join(name.split("/")[:2]), []).append(name)
    said = set()
    for kind in kinds:
        for point in points if len(kinds) > 1 else rng.choice([*points], 3, replace=False):
            names = points[point]
            said.add(verdict_or_refusal(mutated(run(), kind, names[rng.integers(len(names))], rng)))
    return said


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # the mutation's own
@pytest.mark.parametrize("kind", ["another step", "Inf", "huge", "empty", "a wrapped twin", "twice"])
def test_a_damaged_tensor_never_makes_a_traceback(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz(monkeypatch, [kind], 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("seed", range(3))
def test_no_damage_makes_a_traceback(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz(monkeypatch, [*MUTATIONS], seed) == {"refused", *EXIT_CODES}


VALUES: tuple[Any, ...] = (None, "x", -1, 0.5, 1e999, float("nan"), 2**70, [1], {"a": 1}, True)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_be_is_one_line(name: str) -> None:
    config, refused = Config.of(TINY), 0
    for value in VALUES:
        try:
            stated(config, {name: value})
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 5


def test_a_configuration_that_cannot_be_is_one_line() -> None:
    for name in run().config:
        for value in ("x", [1], {"a": 1}, 1e999):
            try:
                config_from({**run().config, name: value})
            except UsageError as error:
                assert "\n" not in str(error)
    with pytest.raises(UsageError):
        config_from({**run().config, "no such field": 1})


@pytest.mark.parametrize(
    "header", ["", "[]", "3", "{", '{"version": "1"}', '{"order": 3}', '{"order": [[1]]}', '{"settings": [1]}', '{"config": 3}']
)
def test_a_damaged_header_is_one_line(header: str, tmp_path: Path) -> None:
    save_file({"1/2.loss": np.float32(1).reshape(1)}, tmp_path / "x", metadata={"refimpl-trace": header})
    with pytest.raises(UsageError) as error:
        load(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 AGREES, 1 DEPARTS, 2 bad usage, 3 PARTLY JUDGED; and the verdict as data says over what it is."""
    save(tmp_path / "ours", run())
    wrong = run().tensors["1/4.v/transformer.ln_f.bias"] + np.float32(1)
    script = load_script("trace")
    for code, said, theirs in (
        (0, "AGREES", run()),
        (1, "DEPARTS", changed(**{"4_v/transformer.ln_f.bias": wrong})),
        (3, "PARTLY JUDGED", Trace({}, {name: x for name, x in run().tensors.items() if "/2.activ" not in name})),
    ):
        save(tmp_path / "theirs", theirs)
        files = [str(tmp_path / name) for name in ("ours", "theirs", f"{code}.json")]
        assert script.run(vars(script.parser().parse_args(["diff", *files[:2], "--json", files[2]]))) == code
        assert f"\n{said}" in capsys.readouterr().out
        data = json.loads(Path(files[2]).read_text(encoding="utf-8"))
        assert data["verdict"] == said and data["coverage"]["judged"] <= data["coverage"]["tensors"]
        assert bool(data["coverage"]["judged_by_the_weaker_bound"]) == (code == 3)
    save(tmp_path / "theirs", changed(**{"0_targets": TOKENS + 256}))
    done = run_here("trace", "diff", *files[:2])
    assert done.returncode == 2 and done.stderr.startswith("error: 1/0.targets holds 256") and done.stderr.count("\n") == 1
