"""Traces as files: what is written is read back, what is no trace is refused, and a trace with few points is welcome."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from safetensors.numpy import save_file
from script_loader import load_script, run_here

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.parity.diff import diff_traces
from refimpl.parity.judge import Judge, judge_trace
from refimpl.parity.state_dict import import_
from refimpl.parity.trace import POINTS, Trace, load, record, save
from refimpl.training import checkpoint
from refimpl.training.checkpoint_states import load_for_inference, read_weights
from refimpl.training.config import Config
from refimpl.training.setup import start

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "lr": 1e-3, "steps": 2, "warmup": 1,
}  # fmt: skip


def config(recipe: str = "fp16", **more: Any) -> Config:
    return Config.of({**TINY, "recipe": recipe, **more})


def only(trace: Trace, *points: str) -> Trace:
    """A trace with some of the points alone, and without a configuration, as somebody else would write it."""
    return Trace({}, {k: x for k, x in trace.tensors.items() if k.split("/")[1] in points})


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16", "amp-bf16"])
def test_a_file_gives_back_what_was_written(recipe: str, tmp_path: Path) -> None:
    trace = record(config(recipe))
    save(tmp_path / "t", trace)
    again = load(tmp_path / "t")
    assert again.config == trace.config and list(again.tensors) == list(trace.tensors)
    for name, array in trace.tensors.items():
        assert again.tensors[name].dtype == array.dtype and again.tensors[name].tobytes() == array.tobytes(), name


def test_every_point_is_recorded_in_the_order_of_a_step() -> None:
    trace = record(config())
    points = dict.fromkeys(k.split("/")[1] for k in trace.tensors if k.startswith("1/"))
    others = {"4.hysteresis_tracker", "4.overflowed"}  # of loss scales that this recipe does not have
    assert set(points) == set(POINTS) - others
    assert trace.steps == [1, 2] and set(trace.at(0, "4.master")) == set(config().make_model().parameters)
    weights = trace.at(1, "1.weights")["transformer.wte.weight"]
    assert weights.dtype == np.float16 and trace.at(1, "2.grads")["transformer.wte.weight"].dtype == np.float16
    assert trace.tensors["1/3.unscaled/transformer.wte.weight"].dtype == np.float32


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("recipe", ["fp16", "fp64"])
def test_the_numbers_of_an_update_are_in_the_format_of_its_arithmetic(
    recipe: str, clip: float, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device too, where a bare 1.0 would be FP64 beside FP32, and an FP32 1/S no factor of FP64 gradients."""
    here = record(config(recipe, clip=clip))
    monkeypatch.setattr(Config, "make_backend", lambda self: backend)
    there, points = record(config(recipe, clip=clip)), ("3.unscaled", "3.norm", "4.clip")
    assert list(there.tensors) == list(here.tensors)
    formats = {str(x.dtype) for k, x in there.tensors.items() if k.split("/")[1] in points}
    assert formats == {"float64" if recipe == "fp64" else "float32"}
    assert there.tensors["1/4.clip"] == 1.0 if clip == 0 else there.tensors["1/4.clip"] < 1


def test_recording_changes_nothing() -> None:
    """The run that is written down is the run that train_step makes: same losses, same weights."""
    c = config()
    trace, training = record(c), c.make_training(c.make_backend())
    training.state.load_weights(trace.at(0, "4.master"))
    for step in trace.steps:
        batches = trace.inputs(step)
        assert batches is not None and training.step(batches).loss == trace.get(step, "2.loss")
    for name, view in training.state.layout.views(training.state.master).items():
        assert np.array_equal(view, trace.at(2, "4.master")[name])


def test_the_start_and_the_batches_of_another_trace_are_used() -> None:
    other = only(record(config("bf16", seed=5)), "0.tokens", "0.targets", "4.master")
    trace = record(config("fp16", seed=1), other)
    assert all(np.array_equal(x, other.tensors[k]) for k, x in trace.tensors.items() if k.startswith("0/4.master"))
    assert np.array_equal(trace.tensors["2/0.tokens"], other.tensors["2/0.tokens"])
    with pytest.raises(UsageError, match=r"0/4.master/transformer.wte.weight\) is missing"):
        record(config(), only(other, "0.tokens", "0.targets"))
    with pytest.raises(UsageError, match=r"1/0\.tokens"):
        record(config(), only(other, "4.master"))
    with pytest.raises(UsageError, match=r"is \(256, 16\); this model's shape is \(256, 32\)"):
        record(config(n_embd=32), other)


@pytest.mark.parametrize("recipe", ["megatron-bf16", "apex-o2", "bf16"])
def test_a_run_is_recorded_from_the_start_that_training_has(recipe: str) -> None:
    """Where masters start from the rounded weights, so does a trace."""
    training, trace = start(config(recipe)), record(config(recipe))
    for name, master in training.state.layout.views(training.state.master).items():
        assert np.array_equal(master, trace.at(0, "4.master")[name])
    other = record(config("fp32", seed=1))  # the start of another trace is taken as it is
    same = record(config(recipe), other)
    assert all(np.array_equal(same.at(0, "4.master")[name], x) for name, x in other.at(0, "4.master").items())


@pytest.mark.parametrize("recipe", ["bf16-sr", "bf16-kahan", "bf16-remainder", "adam-8bit", "fp8", "nvfp4", "fp16-sums"])
def test_recipes_that_no_bound_is_derived_for_are_recorded_and_not_judged(recipe: str) -> None:
    trace = record(config(recipe))
    assert trace.steps == [1, 2]
    with pytest.raises(UsageError, match=f"traces of recipe {recipe} cannot be judged, only those of fp64, .*apex-o2"):
        diff_traces(trace, trace)


@pytest.mark.parametrize("recipe", ["bf16-no-master", "bf16-moments", "fp16-moments", "megatron-bf16", "apex-o2"])
def test_variants_that_round_to_nearest_are_judged(recipe: str) -> None:
    trace = record(config(recipe))
    assert all(finding.identical == 1 for finding in judge_trace(config(recipe), trace))


def test_a_trace_is_judged_on_its_own_backend_or_for_a_device_on_the_host() -> None:
    trace = record(config(backend="reference"))
    assert trace.config["backend"] == "reference"
    for name, backend in (("reference", REFERENCE), ("numpy", NUMPY), ("cupy", NUMPY)):
        judge = Judge(config(backend=name), trace)
        assert judge.training.run.backend is backend
        findings = list(judge.findings())
        assert not any(finding.departs for finding in findings)
        assert backend is NUMPY or all(finding.identical == 1 for finding in findings)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(UsageError, match=r"^no trace at .*x: scripts/trace.py record writes .*, and docs/traces.md shows"):
        load(path)
    with pytest.raises(UsageError, match=r" is a folder, and a trace is a file: scripts/trace.py record writes"):
        load(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="not a valid safetensors file"):
        load(path)
    save_file({"wte.weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(UsageError, match=r"'wte.weight' is not a tensor of a trace"):
        load(path)
    save_file({"1/2.loss": np.zeros((), np.float32)}, path, metadata={"refimpl-trace": '{"version": 99}'})
    with pytest.raises(UsageError, match="reads version 1"):
        load(path)
    save(path, record(config(steps=1)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="not a valid safetensors file"):
        load(path)


def test_a_trace_is_no_checkpoint_and_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    save(path, record(config(steps=1)))
    for read in (read_weights, load_for_inference, lambda path: import_(path, tmp_path / "start", 2)):
        with pytest.raises(UsageError, match=r"ours.safetensors is a trace, for scripts/trace.py diff: weights are in"):
            read(path)


def test_a_trace_without_our_header_is_read(tmp_path: Path) -> None:
    save_file({"1/2.loss": np.array(3, np.float32), "2/2.loss": np.array(2, np.float32)}, tmp_path / "x")
    trace = load(tmp_path / "x")
    assert trace.config == {} and trace.steps == [1, 2] and trace.get(2, "2.loss") == 2


@pytest.mark.parametrize(
    ("points", "judged"),
    [
        (("2.loss",), {"2.loss"}),  # of the first step, from our start on our batch
        (("2.grads",), {"2.grads"}),
        (("2.grads", "2.loss_scale", "3.unscaled", "3.norm"), {"2.grads", "2.loss_scale", "3.unscaled", "3.norm"}),
        (("4.master", "4.m", "4.v", "1.weights"), {"1.weights"}),  # an update needs the gradients that it is made from
        (("2.activations",), {"2.activations"}),
    ],
)
def test_a_trace_of_some_points_is_judged_by_them(points: tuple[str, ...], judged: set[str]) -> None:
    ours = record(config())
    given = {k: v for k, v in ours.tensors.items() if k.startswith("0/") or "/0." in k}
    findings = judge_trace(config(), Trace({}, {**given, **only(ours, *points).tensors}))
    assert {f.point for f in findings} == judged and not any(f.departs for f in findings)


def test_diff_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    ours = record(config())
    verdict = diff_traces(ours, ours)
    assert (verdict["verdict"], verdict["first_departure"], verdict["explained_by"]) == ("AGREES", None, [])
    assert "AGREES" in capsys.readouterr().out
    some = diff_traces(ours, only(ours, "2.loss", "2.grads"))  # the start and the batches are taken from ours
    assert some["verdict"] == "PARTLY JUDGED" and not some["first_departure"] and some["coverage"]["judged"] > 0
    assert "2.grads" in capsys.readouterr().out
    theirs = Trace({}, {k: x.copy() for k, x in ours.tensors.items()})
    theirs.tensors["2/4.v/transformer.ln_f.bias"] *= np.float32(1.001)
    assert diff_traces(ours, theirs)["first_departure"]["point"] == "4.v"
    text = capsys.readouterr().out
    assert "DEPARTS first at step 2, 4.v of transformer.ln_f.bias" in text and "none of the known mistakes" in text
    assert diff_traces(theirs, ours)["first_departure"]["point"] == "4.v"  # the reference has a configuration
    with pytest.raises(UsageError, match="neither file holds a configuration"):
        diff_traces(theirs, theirs)


def test_a_checkpoint_and_exported_weights_are_no_trace_and_not_damaged(tmp_path: Path) -> None:
    weights = {"lm_head.weight": np.ones((2, 2), np.float32)}
    checkpoint.save(tmp_path / "checkpoint", weights, {})
    checkpoint.write_tensors(tmp_path / "exported", weights, {})
    for name in ("checkpoint", "exported"):
        with pytest.raises(UsageError, match="is a checkpoint or exported weights, not a trace"):
            load(tmp_path / name)


def test_other_sizes_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"wte.weight has the shape \(256, 16\) in the trace; .* it has \(256, 32\)"):
        judge_trace(config(n_embd=32), record(config()))
    with pytest.raises(UsageError, match="nothing in this trace can be judged"):
        judge_trace(config(), Trace({}, {"1/0.tokens": np.zeros((4, 8), np.int64)}))


def test_which_elements_overflow_is_left_to_the_order_of_the_sums() -> None:
    c = config(init_scale=2.0**24, steps=1)
    theirs = record(c)
    name = next(k for k, x in theirs.tensors.items() if k.startswith("1/2.grads/") and np.isinf(x).sum() > 1)
    overflowed = theirs.tensors[name].reshape(-1)
    overflowed[np.flatnonzero(np.isinf(overflowed))[0]] = 65504
    for kept in (theirs, only(theirs, "0.tokens", "0.targets", "1.weights", "2.grads")):
        assert not any(f.departs for f in judge_trace(c, kept) if f.point == "2.grads")
    finite = Trace({}, {k: np.nan_to_num(x) if k.startswith("1/2.grads/") else x for k, x in theirs.tensors.items()})
    assert next(f for f in judge_trace(c, finite) if f.departs).point == "2.grads"  # but one of the elements must


def test_one_bit_in_an_exact_point_departs() -> None:
    ours = record(config())
    for point in ("1.weights", "3.unscaled"):
        key = next(k for k in ours.tensors if k.startswith(f"2/{point}/"))
        theirs = replace(ours, tensors=dict(ours.tensors))
        theirs.tensors[key] = np.nextafter(ours.tensors[key], np.inf, dtype=ours.tensors[key].dtype)
        first = next(f for f in judge_trace(config(), theirs) if f.departs)
        assert first.point == point, first


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "trace.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_has_defaults_of_its_own() -> None:
    script = load_script("trace")
    recorded = vars(script.parser().parse_args(["record", "--out", "x"]))
    assert {name: recorded[name] for name in script.DEFAULTS} == script.DEFAULTS
    assert "recipe" not in recorded


def test_command_line(tmp_path: Path) -> None:
    """Recorded and judged by real processes once."""
    small = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert run_here("trace", "record", "--recipe=fp16", *small, "--out", ours).returncode == 0
    done = script("record", "--recipe=fp16", "--mistake=coupled-decay", *small, "--like", ours, "--out", theirs)
    assert done.returncode == 0 and "2 steps" in done.stdout
    assert run_here("trace", "diff", ours, ours).returncode == 0
    before = theirs.read_bytes()
    refused = run_here("trace", "record", "--recipe=bf16", *small, "--out", theirs)
    assert refused.returncode == 2 and f"--out {theirs} exists: name another file" in refused.stderr
    assert refused.stderr.count("\n") == 1 and theirs.read_bytes() == before
    assert run_here("trace", "record", "--recipe=bf16", *small, "--out", tmp_path / "new", "--overwrite").returncode == 0
    assert run_here("trace", "record", "--recipe=fp16", *small, "--out", tmp_path / "new", "--overwrite").returncode == 0
    assert (tmp_path / "new").read_bytes() == ours.read_bytes()
    done = script("diff", ours, theirs, "--json", tmp_path / "verdict")
    assert done.returncode == 1 and "explained by --mistake coupled-decay" in done.stdout
    verdict = json.loads((tmp_path / "verdict").read_text())
    assert verdict["explained_by"] == ["coupled-decay"] and verdict["first_departure"]["point"] == "4.m"
    done = run_here("trace", "diff", ours, tmp_path / "none")
    assert done.returncode == 2 and done.stderr.startswith("error: no trace at") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", ["amp-fp16-cpu", "amp-bf16-cpu"])
def test_a_trace_dumped_from_a_pytorch_loop(recipe: str, tmp_path: Path) -> None:
    """The script of the documentation: its loop agrees, and with the classic mistake in it departs and is explained."""
    pytest.importorskip("torch", reason="the loop is PyTorch's: torch==2.13.0")
    save(tmp_path / "ours", record(config(recipe)))
    for flags, code, text in (((), 0, "AGREES"), (("--unscale-late",), 1, "explained by --mistake unscale-after-clip")):
        if "bf16" in recipe and flags:
            continue  # without a loss scale there is nothing to unscale
        command = [sys.executable, str(ROOT / "scripts" / "pytorch_trace.py"), "--like", tmp_path / "ours", *flags]
        done = subprocess.run([*command, "--out", tmp_path / "theirs"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        done = script("diff", tmp_path / "ours", tmp_path / "theirs")
        assert done.returncode == code and text in done.stdout, done.stdout


@pytest.mark.parametrize("scale", ["megatron", "1024"])
def test_the_pytorch_loop_refuses_a_loss_scale_that_it_does_not_have(scale: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the loop is PyTorch's: torch==2.13.0")
    save(tmp_path / "ours", record(config("amp-fp16-cpu", loss_scale=scale)))
    with pytest.raises(UsageError, match=f"has the loss scale {scale}: this loop has only PyTorch's"):
        load_script("pytorch_trace").train(tmp_path / "ours", tmp_path / "theirs", False)


def test_the_documentation_lists_every_point() -> None:
    text = (ROOT / "docs" / "traces.md").read_text(encoding="utf-8")
    assert all(f"`{point}" in text for point in POINTS)


def test_beyond_the_schedule_a_trace_is_judged_by_its_own_rates() -> None:
    trace = record(config(steps=3, min_lr=1e-4, init_scale=1024.0))  # no step is skipped
    judged = Judge(config(init_scale=1024.0), trace)
    findings = list(judged.findings())
    assert {f.step for f in findings if f.point == "4.lr"} == {1, 2}
    assert {f.step for f in findings if f.point == "4.master"} == {1, 2, 3}
    assert judged.reasons["3/4.lr"] == "the schedule ends after 2 updates"
    del trace.tensors["3/4.lr"]
    assert {f.step for f in judge_trace(config(init_scale=1024.0), trace) if f.point == "4.master"} == {1, 2}


def test_a_skip_that_the_trace_does_not_tell_is_not_held_against_it() -> None:
    """Without gradients or found_inf nobody knows whether a step was skipped, nor what the scale and t are from there on."""
    c = config(init_scale=2.0**24, steps=3)
    ours = record(c)
    assert ours.get(1, "3.found_inf")
    start = {k: v for k, v in ours.tensors.items() if k.startswith("0/") or "/0." in k}
    theirs = {k: v for k, v in ours.tensors.items() if k.split("/")[1] in ("2.loss_scale", "2.loss", "4.scale")}
    findings = judge_trace(c, Trace({}, {**start, **theirs}))
    assert {f.point for f in findings} == {"2.loss_scale", "2.loss"} and not any(f.departs for f in findings)
    later = {k: v for k, v in ours.tensors.items() if k.startswith(("3/", "2/4."))}
    findings = judge_trace(c, Trace({}, {**start, **theirs, **later}))
    assert not any(f.departs for f in findings) and "2.activations" in {f.point for f in findings}
