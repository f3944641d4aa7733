"""What the judge of traces looks at, and what it says of the rest: coverage, names, missing tensors, micro-batches, settings.

`judged` is the whole of it: findings, coverage and verdict of a trace under a configuration. Each test of a welcome input has a
damaged twin, which must depart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from recipe_lists import others_slow

from refimpl.errors import UsageError
from refimpl.numerics.casts import cast
from refimpl.parity.coverage import Coverage, coverage_of, verdict
from refimpl.parity.diff import diff_traces
from refimpl.parity.findings import Finding, without_overflows
from refimpl.parity.judge import Judge, explanations
from refimpl.parity.trace import Trace, in_batch, record, split_batch
from refimpl.training.config import Config

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "lr": 1e-3, "steps": 2, "warmup": 1,
    "recipe": "fp16", "init_scale": 1024.0,
}  # fmt: skip
WPE = "transformer.wpe.weight"
IN_STAGE_2 = ["cast-twice", "sum-in-16-bits", "missing-cast", "softmax-in-16-bits", "accumulate-in-16-bits"]


@functools.cache
def run(**more: Any) -> Trace:
    """A recorded run; do not change its arrays."""
    return record(config(**more))


def config(**more: Any) -> Config:
    return Config.of({**TINY, **more})


def like(trace: Trace, keep: Callable[[str], bool] = lambda name: True, **settings: Any) -> Trace:
    """What is kept of a trace, without a configuration, as somebody else would write it."""
    return Trace({}, {name: x for name, x in trace.tensors.items() if keep(name)}, settings)


def judged(theirs: Trace, **more: Any) -> tuple[str, Coverage, list[Finding]]:
    judge = Judge(config(**more), theirs)
    findings = list(judge.findings())
    covered = coverage_of(judge.theirs, findings, judge.reasons)
    return verdict(findings, covered), covered, findings


def departs_at(theirs: Trace, **more: Any) -> str | None:
    """The point of the first departure."""
    return next((f.point for f in judged(theirs, **more)[2] if f.departs), None)


# -- coverage ----------------------------------------------------------------------------------------------------------


def test_a_whole_trace_is_judged_to_its_last_tensor() -> None:
    said, covered, findings = judged(like(run()))
    starts = sum(name.startswith("0/") or "/0." in name for name in run().tensors)
    assert said == "AGREES" and covered.complete and covered.judged == covered.tensors == len(findings)
    assert covered.inputs == starts and covered.tensors + starts == len(run().tensors)
    assert covered.sentence.startswith(f"judged {covered.tensors} of {covered.tensors} tensors, 100 % of the values")


def test_every_tensor_of_the_file_is_judged_or_has_a_reason() -> None:
    """Whatever single point is missing: judged and not judged together are the file, and no reason is a shrug."""
    points = {name.split("/")[1] for name in run().tensors if name.startswith("1/")}
    for point in ("2.grads", "1.weights", "4.master", "2.activation_grads"):
        assert point in points
        said, covered, _ = judged(like(run(), lambda name, point=point: name.split("/")[1] != point or name[0] == "0"))
        missed = sum(group.tensors for group in covered.not_judged)
        assert covered.judged + missed == covered.tensors and said in ("AGREES", "PARTLY JUDGED")
        assert not any("no such tensor" in group.reason for group in covered.not_judged), point
        assert (said == "AGREES") == covered.complete


def test_the_share_is_never_rounded_to_all_or_nothing() -> None:
    def share(judged: int, of: int) -> str:
        return Coverage(1, 2, judged, of, 0, (), ()).sentence.split(", ")[1]

    assert [share(*x) for x in ((0, 9), (9, 9), (1, 10**6), (10**6 - 1, 10**6), (1, 3))] == [
        "0 % of the values", "100 % of the values", "0.1 % of the values", "99.9 % of the values", "33.3 % of the values",
    ]  # fmt: skip


def test_scales_alone_are_judged_and_losses_without_a_batch_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    few = like(run(), lambda name: name.split("/")[1] in ("2.loss_scale", "4.scale", "3.found_inf", "2.loss"))
    few.tensors["2/2.loss"] = np.float32(99.0)
    verdict = diff_traces(run(), few)
    text = capsys.readouterr().out
    assert verdict["verdict"] == "PARTLY JUDGED" and "PARTLY JUDGED" in text and "AGREES" not in text
    assert "not judged: step 2, 2.loss: 1.weights of transformer.wte.weight is missing" in text
    assert {tuple(group["steps"]) for group in verdict["coverage"]["not_judged"]} == {(2,), (1, 2)}
    few.tensors["2/2.loss_scale"] = np.float32(512.0)  # no step was skipped
    assert diff_traces(run(), few)["first_departure"]["point"] == "2.loss_scale"


def test_a_scale_is_judged_until_nobody_knows_whether_a_step_was_skipped() -> None:
    few = like(run(steps=3), lambda name: name.split("/")[1] in ("4.scale", "3.found_inf", "4.growth_tracker"))
    assert departs_at(few, steps=3) is None
    del few.tensors["2/3.found_inf"]
    few.tensors["3/4.scale"] = np.float32(1.0)  # nobody can say that it is wrong, and that is said
    said, covered, _ = judged(few, steps=3)
    reasons = {group.reason for group in covered.not_judged if group.point == "4.scale"}
    assert said == "PARTLY JUDGED" and reasons == {"it is not known whether step 2 was skipped (3.found_inf is missing)"}
    few.tensors["1/4.scale"] = np.float32(1.0)  # but of this one everybody can
    assert departs_at(few, steps=3) == "4.scale"


def test_what_the_trace_states_after_an_unknown_step_goes_on_from_there() -> None:
    trace = like(run(steps=3), lambda name: not name.startswith("1/2.") and not name.startswith("1/3."))
    trace.tensors["2/4.scale"] = np.float32(512.0)
    assert departs_at(trace, steps=3) == "4.scale"  # 4.t, 4.scale and the tracker after step 1 say what they are


def test_nothing_judged_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = diff_traces(run(), like(run(), lambda name: "/3.norm" in name))
    assert verdict["verdict"] == "PARTLY JUDGED" and verdict["coverage"]["judged"] == 0
    assert "judged 0 of 2 tensors, 0 % of the values" in capsys.readouterr().out
    with pytest.raises(UsageError, match="nothing in this trace can be judged"):
        diff_traces(run(), like(run(), lambda name: name.startswith("0/")))


# -- names -------------------------------------------------------------------------------------------------------------


def renamed(change: Callable[[str], str]) -> Trace:
    parts = {name: name.split("/") for name in run().tensors}
    new = {name: "/".join([step, point, *map(change, rest)]) for name, (step, point, *rest) in parts.items()}
    return Trace({}, {new[name]: x for name, x in run().tensors.items()})


@pytest.mark.parametrize("prefix", others_slow(["module.", "model._orig_mod.module."], plain=["model._orig_mod.module."]))
def test_names_of_wrapped_models_are_judged_and_it_is_said(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = renamed(lambda name: prefix + name.replace("transformer.h.0.attn", "transformer.h.0._orig_mod.attn"))
    verdict = diff_traces(run(), wrapped)
    assert verdict["verdict"] == "AGREES" and verdict["coverage"]["judged"] == judged(run())[1].judged
    assert f"'{prefix.split('.')[0]}'" in capsys.readouterr().out
    name = f"1/4.master/{prefix}{WPE}"
    wrapped.tensors[name] = wrapped.tensors[name] * 0 + 7
    assert diff_traces(run(), wrapped)["first_departure"]["point"] == "4.master"


def test_a_tied_head_is_its_embedding() -> None:
    head = renamed(lambda name: "lm_head.weight" if name == "transformer.wte.weight" else name)
    assert judged(head)[0] == "AGREES"
    both = Trace({}, {**run().tensors, "1/2.grads/lm_head.weight": run().tensors["1/2.grads/transformer.wte.weight"]})
    assert judged(both)[0] == "AGREES"
    both.tensors["1/2.grads/lm_head.weight"] = cast(run().tensors["1/2.grads/transformer.wte.weight"], "fp32")
    assert judged(both)[0] == "AGREES"  # equal values; the format may be a wider one
    both.tensors["1/2.grads/lm_head.weight"] = both.tensors["1/2.grads/lm_head.weight"] * 2
    with pytest.raises(UsageError, match="their values differ"):
        judged(both)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("1/2.grads/transformer.wpe.wieght", "no parameter .*wieght'; the nearest name is 'transformer.wpe.weight'"),
        ("1/2.activations/transformer.h.0.atn", "no operation .*atn'; the nearest name is 'transformer.h.0.attn'"),
        ("1/2.activations/2:transformer.h.0.atn", "no operation .*atn'; the nearest name is 'transformer.h.0.attn'"),
    ],
)
def test_an_unknown_name_is_an_error_that_shows_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=near):
        judged(Trace({}, {**run().tensors, name: np.zeros(1, np.float32)}))


# -- what is missing of one leaves the others as they are ----------------------------------------------------------------


def without(point: str, name: str, **more: Any) -> Trace:
    return like(run(**more), lambda key: key.split("/", 2)[1:] != [point, name])


def test_a_parameter_without_gradient_silences_no_other() -> None:
    """p.grad was None: the parameter is unused, or frozen. Its own stages 3 and 4 alone are not judged."""
    said, covered, findings = judged(without("2.grads", WPE))
    assert said == "PARTLY JUDGED" and {f.point for f in findings} >= {"3.unscaled", "4.m", "4.v", "4.master"}
    of_parameters = {group.names for group in covered.not_judged if group.point in ("3.unscaled", "4.m", "4.v", "4.master")}
    assert of_parameters == {(WPE,)}
    assert {group.point for group in covered.not_judged} >= {"3.norm", "3.found_inf"}  # they need all gradients
    for point in ("3.unscaled", "4.m", "4.v", "4.master"):
        theirs, name = without("2.grads", WPE), f"2/{point}/transformer.ln_f.bias"
        theirs.tensors[name] = theirs.tensors[name] * np.float32(1.01)
        assert departs_at(theirs) == point


def test_without_norm_and_clip_a_missing_gradient_leaves_no_update_to_judge() -> None:
    theirs = like(without("2.grads", WPE), lambda name: name.split("/")[1] not in ("3.norm", "4.clip"))
    _, covered, findings = judged(theirs)
    assert not any(f.point in ("4.m", "4.v", "4.master") for f in findings)
    assert f"2.grads of {WPE} is missing, and so are 3.norm and 4.clip" in {group.reason for group in covered.not_judged}
    assert any(f.point == "4.master" for f in judged(theirs, clip=0.0)[2])  # where nothing is clipped no norm is needed


def test_one_moment_less_is_one_tensor_less() -> None:
    _, covered, findings = judged(like(run(), lambda name: name != f"1/4.v/{WPE}"))
    assert [(group.point, group.steps, group.names) for group in covered.not_judged] == [
        ("4.v", (2,), (WPE,)), ("4.master", (2,), (WPE,)),
    ]  # fmt: skip
    assert sum(f.point == "4.master" for f in findings) == 2 * 16 - 1


@pytest.mark.parametrize("place", ["transformer.wpe", "transformer.h.0.ln_1", "transformer.h.0.mlp.gelu", "lm_head"])
def test_an_activation_less_weakens_its_neighbors_alone(place: str) -> None:
    said, covered, findings = judged(without("2.activations", place))
    weak = {f.name for f in findings if f.weak}
    if place == "transformer.wpe":  # a copy of rows: the same bits, whoever computes it
        assert said == "AGREES" and not weak
        return
    assert said == "PARTLY JUDGED" and weak and len(weak) <= 6 and not covered.not_judged
    assert all(f.weak == f"2.activations of {place} is missing" for f in findings if f.weak)


def test_a_weight_less_leaves_operations_that_do_not_need_it() -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    theirs = like(run(), lambda key: key.split("/", 2)[1:] not in (["1.weights", name], ["4.master", name]))
    _, covered, findings = judged(theirs)
    places = {f.name for f in findings if f.point == "2.activations"}
    assert "transformer.h.0.mlp.c_fc" not in places and {"transformer.h.0.mlp.gelu", "lm_head"} <= places
    assert all(name in group.reason for group in covered.not_judged)


@pytest.mark.parametrize("mistake", IN_STAGE_2[:-1])
def test_a_known_mistake_is_found_with_an_activation_missing_and_never_agrees_without_any(mistake: str) -> None:
    size = {"n_embd": 32, "block_size": 16}  # where a rounding more is more than three results an ulp away
    theirs = run(mistake=mistake, **size)
    assert departs_at(like(theirs, lambda name: not name.endswith("/transformer.h.0.mlp.gelu")), **size) == "2.activations"
    assert judged(like(theirs, lambda name: "/2.activ" not in name), **size)[0] in ("PARTLY JUDGED", "DEPARTS")


# -- micro-batches -----------------------------------------------------------------------------------------------------


def test_names_of_micro_batches() -> None:
    assert [in_batch("lm_head", n) for n in (1, 2)] == ["lm_head", "2:lm_head"]
    assert [split_batch(name) for name in ("lm_head", "1:lm_head", "12:h.0.fc")] == [
        ("lm_head", 1), ("lm_head", 1), ("h.0.fc", 12),
    ]  # fmt: skip
    names = [name for name in run(grad_accum=3).tensors if name.startswith("1/2.activations/") and "lm_head" in name]
    assert names == ["1/2.activations/lm_head", "1/2.activations/2:lm_head", "1/2.activations/3:lm_head"]


def test_all_micro_batches_are_judged_operation_by_operation() -> None:
    said, covered, _ = judged(run(grad_accum=3), grad_accum=3)
    assert said == "AGREES" and covered.complete
    judge = Judge(config(), like(run(grad_accum=3)))  # the trace's own number of them holds
    assert all(f.identical == 1 for f in judge.findings()) and "the trace has 3 micro-batches per step" in judge.notes
    old = like(run(grad_accum=3), lambda name: ":" not in name)  # as traces were: those of the first alone
    said, covered, _ = judged(old, grad_accum=3)
    assert said == "PARTLY JUDGED" and {group.point for group in covered.weakly} == {"2.loss", "2.grads"}


@pytest.mark.parametrize("mistake", IN_STAGE_2)
def test_a_known_mistake_with_micro_batches_is_found(mistake: str) -> None:
    more = {"grad_accum": 2, "n_embd": 32, "block_size": 16, "steps": 2 if mistake == "cast-twice" else 1}  # biases start at 0
    theirs = run(mistake=mistake, **more)
    first = next(f for f in judged(theirs, **more)[2] if f.departs)
    assert first.point == ("2.grads" if mistake == "accumulate-in-16-bits" else "2.activations")


@pytest.mark.slow
@pytest.mark.parametrize("mistake", IN_STAGE_2)
def test_a_known_mistake_with_micro_batches_is_named(mistake: str) -> None:
    more = {"grad_accum": 2, "n_embd": 32, "block_size": 16, "steps": 2}
    theirs = run(mistake=mistake, **more)
    first = next(f for f in judged(theirs, **more)[2] if f.departs)
    assert explanations(config(**more), theirs, first) == [mistake]


def test_a_gradient_in_another_format_departs_whatever_its_size() -> None:
    """Sums over micro-batches that all fit 16 bits were kept in 16; one 16-bit gradient that does not fit was not rounded."""
    name = "1/2.grads/transformer.h.0.mlp.c_fc.weight"
    sums = Trace({}, dict(run(grad_accum=2).tensors))
    sums.tensors[name] = cast(sums.tensors[name], "fp16")
    first = next(f for f in judged(sums, grad_accum=2)[2] if f.departs)
    assert first.point == "2.grads" and first.note == "all values fit fp16: they should have more bits"
    one = Trace({}, dict(run().tensors))
    one.tensors[name] = np.array(one.tensors[name], np.float32) * np.float32(1 + 2**-20)
    first = next(f for f in judged(one)[2] if f.departs)
    assert first.point == "2.grads" and "do not fit fp16: they should have been rounded" in first.note
    one.tensors[name] = np.array(run().tensors[name], np.float64)  # a wider format with the same values is welcome
    assert judged(one)[0] == "AGREES"


# -- a trace that begins in the middle ----------------------------------------------------------------------------------


def middle(trace: Trace, step: int) -> Trace:
    """The trace from a step on."""
    tensors = {}
    for name, x in trace.tensors.items():
        number, _, rest = name.partition("/")
        if int(number) > step or (int(number) == step and rest.startswith(("4.m", "4.v", "4.scale", "4.t", "4.growth"))):
            tensors[f"{int(number) - step}/{rest}"] = x
    return Trace({}, tensors)


def test_a_trace_may_begin_in_the_middle_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    more = {"steps": 4, "growth_interval": 3}  # S grows after the third good step, the second of this trace
    whole = run(**more)
    cut = middle(whole, 1)
    assert diff_traces(whole, cut)["verdict"] == "AGREES" and float(cut.tensors["2/4.scale"]) == 2048
    cut.tensors["0/4.t"] = np.array(2)  # the count is used: another one departs, in the count itself and in the rate
    assert diff_traces(whole, cut)["first_departure"]["point"] == "4.lr"
    cut = middle(whole, 1)
    cut.tensors["0/4.growth_tracker"] = np.array(0)
    del cut.tensors["1/4.growth_tracker"], cut.tensors["2/4.growth_tracker"]
    assert diff_traces(whole, cut)["first_departure"]["point"] == "4.scale"


@pytest.mark.parametrize("missing", ["4.t", "4.scale", "4.growth_tracker", "4.m"])
def test_what_a_trace_from_the_middle_lacks_is_asked_for_by_name(missing: str) -> None:
    more = {"steps": 4, "growth_interval": 3}
    cut = like(middle(run(**more), 1), lambda name: not name.startswith("0/4.m/" if missing == "4.m" else f"0/{missing}"))
    if missing == "4.m":
        cut = like(cut, lambda name: not name.startswith("0/4.v"))
    with pytest.raises(UsageError, match=f"needs 0/{missing}"):
        diff_traces(run(**more), cut)


def test_a_tracker_that_cannot_matter_is_not_asked_for() -> None:
    cut = like(middle(run(steps=4), 1), lambda name: "growth_tracker" not in name)  # S grows after 2000 good steps
    assert diff_traces(run(steps=4), cut)["verdict"] == "AGREES"


@pytest.mark.parametrize("kind", ["4.m", "4.v"])
def test_a_moment_missing_at_the_start_of_a_later_trace_is_not_zero(kind: str) -> None:
    """All of them are asked for, though the other moment is there; of one parameter alone its own update is not judged."""
    cut = middle(run(steps=4), 1)
    with pytest.raises(UsageError, match=f"needs 0/{kind}"):
        diff_traces(run(steps=4), like(cut, lambda name: not name.startswith(f"0/{kind}/")))
    said, covered, _ = judged(like(cut, lambda name: name != f"0/{kind}/{WPE}"), steps=4)
    assert said == "PARTLY JUDGED" and {group.names for group in covered.not_judged} == {(WPE,)}


# -- batches of the reference -----------------------------------------------------------------------------------------------


def test_batches_are_taken_from_the_reference_and_it_is_said() -> None:
    verdict = diff_traces(run(), like(run(), lambda name: name != "2/0.tokens"))
    assert verdict["verdict"] == "AGREES" and verdict["notes"] == ["the batch of step 2 is the reference's"]


@pytest.mark.parametrize("missing", ["2/0.tokens", "2/0."])
def test_no_batch_is_taken_from_a_run_on_other_batches(missing: str) -> None:
    """It is correct, but step 2 cannot be judged on the reference's batch; a master of that step still can."""
    theirs = like(run(seed=7), lambda name: not name.startswith(missing))
    verdict = diff_traces(run(), theirs)
    assert verdict["verdict"] == "PARTLY JUDGED" and verdict["notes"] == []
    assert {group["reason"] for group in verdict["coverage"]["not_judged"]} == {"0.tokens or 0.targets is missing"}
    theirs.tensors[f"2/4.master/{WPE}"] = theirs.tensors[f"2/4.master/{WPE}"] * np.float32(1.01)
    assert diff_traces(run(), theirs)["first_departure"]["point"] == "4.master"


# -- steps that overflow ------------------------------------------------------------------------------------------------


def test_an_overflow_excuses_no_nan_before_it_and_none_beside_it() -> None:
    """Which gradients overflow depends on the order of sums, but only near the largest number."""
    whole = run(init_scale=2.0**24)
    assert float(whole.tensors["1/3.found_inf"]) == 1 and judged(like(whole), init_scale=2.0**24)[0] == "AGREES"
    for name in ("1/2.loss", "1/2.activations/transformer.h.0.mlp.gelu", "1/2.grads/transformer.wte.weight"):
        theirs = like(whole)
        x = np.array(theirs.tensors[name])
        smallest = np.nanargmin(np.abs(np.float64(x)))
        x.reshape(-1)[smallest] = np.nan
        theirs.tensors[name] = x
        assert departs_at(theirs, init_scale=2.0**24) == name.split("/")[1]


def test_a_result_near_the_largest_number_may_overflow_or_not() -> None:
    a, b = np.array([65504, 3, np.inf, np.nan, 1], np.float16), np.array([np.inf, np.inf, np.nan, np.inf, 1], np.float16)
    x, y = without_overflows(a, b, 65504 / 4)
    assert x.tolist() == [0, 3, 0, 0, 1] and y.tolist() == [0, np.inf, 0, 0, 1]
    x, y = without_overflows(a, b, 0.0)
    assert x.tolist() == y.tolist() == [0, 0, 0, 0, 1]
    assert without_overflows(a, b[:2], 0.0)[1].shape == (2,)


# -- hints ------------------------------------------------------------------------------------------------------------


def test_a_tensor_written_down_in_fewer_bits_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = like(run())
    theirs.tensors["1/2.loss"] = cast(theirs.tensors["1/2.loss"], "bf16")
    assert diff_traces(run(), theirs)["verdict"] == "DEPARTS"
    assert "the trace holds it in bf16, refimpl in fp32" in capsys.readouterr().out
    theirs.tensors["1/2.loss"] = run().tensors["1/2.loss"] * np.float32(2)
    diff_traces(run(), theirs)
    assert "the trace holds it in" not in capsys.readouterr().out


def test_a_tensor_under_another_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A hook on a module `attn` sees what is attn.c_proj here; two matrices of one shape are swapped."""
    attn, proj = "1/2.activations/transformer.h.0.attn", "1/2.activations/transformer.h.0.attn.c_proj"
    theirs = like(run())
    theirs.tensors[attn] = theirs.tensors[proj]
    assert diff_traces(run(), theirs)["first_departure"]["name"] == "transformer.h.0.attn"
    assert "it has exactly the values of 2.activations of transformer.h.0.attn.c_proj: was" in capsys.readouterr().out
    theirs = like(run())
    theirs.tensors[attn], theirs.tensors[proj] = theirs.tensors[proj], theirs.tensors[attn]
    diff_traces(run(), theirs)
    assert "are recorded as 2.activations of transformer.h.0.attn.c_proj: are the" in capsys.readouterr().out
    theirs = like(run())
    theirs.tensors[attn] = theirs.tensors[attn] * 2
    diff_traces(run(), theirs)
    text = capsys.readouterr().out
    assert "DEPARTS" in text and "exactly the values" not in text and "what belongs there" not in text


def test_a_model_without_biases_is_told_of_the_flag() -> None:
    theirs = like(run(bias=False))
    assert any("--no-bias" in note for note in diff_traces(run(), theirs)["notes"])
    assert diff_traces(run(bias=False), theirs)["notes"] == [] and diff_traces(run(), like(run()))["notes"] == []


def test_a_micro_batch_that_the_batch_has_not_is_told() -> None:
    theirs = like(run())
    theirs.tensors["1/2.activations/9:lm_head"] = theirs.tensors["1/2.activations/lm_head"]
    assert [group.reason for group in judged(theirs)[1].not_judged] == ["the batch of the step has 1 micro-batches"]


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_trace_states_its_settings_and_is_replayed_with_them() -> None:
    stated = {"beta2": 0.999, "eps": 1e-6, "weight_decay": 0.01, "schedule": "constant", "lr": 3e-3, "warmup": 0}
    theirs = run(**stated)
    assert departs_at(theirs) == "4.lr"
    with_settings = Trace({}, theirs.tensors, stated)
    verdict = diff_traces(run(), with_settings)
    assert verdict["verdict"] == "AGREES" and "beta2 0.999 (not 0.95)" in verdict["notes"][0]
    with_settings.settings = {**stated, "beta2": 0.99}
    assert diff_traces(run(), with_settings)["first_departure"]["point"] == "4.v"
    with pytest.raises(UsageError, match="did you mean beta2"):
        diff_traces(run(), Trace({}, theirs.tensors, {"beta_2": 0.9}))
    with pytest.raises(UsageError, match="beta2"):
        diff_traces(run(), Trace({}, theirs.tensors, {"beta2": 2}))
    for name in ("lr", "steps"):  # null would be the default of the model, which nobody stated
        with pytest.raises(UsageError, match=f"setting {name} is null"):
            diff_traces(run(), Trace({}, theirs.tensors, {name: None}))


def test_states_are_replayed_with_the_trace_s_own_rate() -> None:
    """Another schedule departs at 4.lr and nowhere else."""
    theirs = like(run(lr=2e-3))
    assert {f.point for f in judged(theirs)[2] if f.departs} == {"4.lr"}
    verdict = diff_traces(run(), Trace({}, theirs.tensors, {"schedule": "trace"}))
    assert verdict["verdict"] == "AGREES" and verdict["coverage"]["inputs"] > 2
    wrong = Trace({}, dict(theirs.tensors), {"schedule": "trace"})
    wrong.tensors[f"2/4.master/{WPE}"] = wrong.tensors[f"2/4.master/{WPE}"] * np.float32(1.001)
    assert departs_at(wrong) == "4.master"


def test_a_departure_is_explained_by_what_happens_up_to_its_point() -> None:
    """With other betas too: the moments depart later in that step under any explanation."""
    theirs = like(run(mistake="unscale-after-clip", beta2=0.999))
    first = next(f for f in judged(theirs)[2] if f.departs)
    assert first.point == "3.unscaled" and explanations(config(), theirs, first) == ["unscale-after-clip"]


SLOW = [pytest.param(other, marks=pytest.mark.slow) for other in ({"beta1": 0.8}, {"lr": 2e-3}, {"weight_decay": 0.3})]


@pytest.mark.parametrize("other", [{"beta2": 0.999}, {"eps": 1e-6}, *SLOW])
def test_other_settings_are_no_mistake(other: dict[str, float]) -> None:
    theirs = like(run(**other))
    first = next(f for f in judged(theirs)[2] if f.departs)
    assert explanations(config(), theirs, first) == []
