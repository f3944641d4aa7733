"""The PyTorch training of compare_pytorch.py under the audit, which agrees with that script's own judge, or says where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from refimpl.parity.audit.agreement import Agreement, Both  # noqa: E402
from refimpl.parity.pytorch import STAGE_STEPS, Comparison, _batches, compare, report  # noqa: E402
from refimpl.parity.pytorch_model import Casts, PyTorchTraining  # noqa: E402
from refimpl.training.config import Config  # noqa: E402

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 3, "n_embd": 36, "block_size": 19, "batch_size": 5, "lr": 1e-3, "warmup": 10,
    "steps": STAGE_STEPS + 1,
}  # fmt: skip
GELU = "transformer.h.0.mlp.gelu"


def config(recipe: str, **more: Any) -> Config:
    return Config.of({**TINY, "recipe": recipe, **more})


def run(recipe: str, **more: Any) -> tuple[Comparison, Agreement]:
    result = compare(config(recipe, **more), spread=False)
    assert result.agreement is not None
    return result, result.agreement


def of(agreement: Agreement, point: str, name: str) -> Both:
    """The first step's tensor."""
    return next(b for b in agreement.both if (b.finding.point, b.finding.name) == (point, name))


def made_by(both: Both) -> set[str]:
    return {operation.name.split(".")[1] for operation, _ in both.made}


class Wrong(TorchDispatchMode):
    """PyTorch with a mistake in one operation: `change` is applied to what it returns, or to the first of several.

    Not in FP64, where the audit computes what it compares with.
    """

    def __init__(self, name: str, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.name, self.change, self.ran = name, change, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, tuple | list) else output
        if str(func) == self.name and first.dtype == torch.float32:
            self.ran += 1
            self.change(first)
        return output


@pytest.mark.parametrize(("recipe", "more"), [
    ("fp32", {"optimizer": "sgd"}), ("fp16", {"init_scale": 2.0**18}), ("amp-bf16", {}), ("bf16", {"model": "mlp"}),
])  # fmt: skip
def test_the_two_judges_agree_and_the_training_is_the_one_without_the_audit(recipe: str, more: dict[str, Any]) -> None:
    result, agreement = run(recipe, **more)
    assert result.agrees and not agreement.disagreements, report(result)
    assert {b.finding.step for b in agreement.both} == set(range(1, STAGE_STEPS + 1))
    assert agreement.operations > len({b.finding.where for b in agreement.both}) > 20
    judged = len(agreement.both)
    counts = f"judged {judged} tensors, made by {agreement.operations} operations of PyTorch, too"
    assert f"the audit has {counts}: the two judges agree on all of them" in report(result)
    assert result.summary()["audit"]["tensors"] == judged and judged + agreement.alone == len(result.findings)
    plain, batches = config(recipe, **more), list(_batches(config(recipe, **more)))
    alone = PyTorchTraining(plain, plain.make_model().initial_weights(np.random.default_rng(plain.seed)))
    assert [alone.step(*batch)["loss"] for batch in batches] == [row["loss_torch"] for row in result.rows]


def test_tensors_are_made_by_the_operations_between_them_and_those_before() -> None:
    _, agreement = run("fp16", optimizer="sgd", init_scale=256.0)
    block = "transformer.h.0"
    expected = {
        ("1.weights", f"{block}.mlp.c_fc.weight"): {"copy_"},
        ("2.activations", GELU): {"gelu"}, ("2.activations", f"{block}.mlp.c_fc"): {"addmm"},
        ("2.activations", f"{block}.residual_1"): {"add"},
        ("2.activation_grads", f"{block}.mlp.c_fc"): {"gelu_backward", "clone"},
        ("2.activation_grads", GELU): {"mm", "clone"},
        ("2.grads", f"{block}.mlp.c_fc.weight"): {"mm"}, ("2.grads", f"{block}.mlp.c_fc.bias"): {"sum"},
    }  # fmt: skip
    for (point, name), operations in expected.items():
        assert made_by(of(agreement, point, name)) == operations, (point, name)
    attention = made_by(of(agreement, "2.activations", f"{block}.attn"))
    assert {"bmm", "mul", "masked_fill", "_softmax"} <= attention and "addmm" not in attention
    unscaled = made_by(of(agreement, "3.unscaled", f"{block}.mlp.c_fc.weight"))
    assert unscaled >= {"_amp_foreach_non_finite_check_and_unscale_", "_to_copy"} and "mm" not in unscaled
    update = made_by(of(agreement, "4.master", f"{block}.mlp.c_fc.weight"))
    assert unscaled < update and not update & {"mm", "addmm", "gelu"}, update


@pytest.mark.parametrize(("name", "point", "where"), [
    ("aten.gelu.default", "2.activations", GELU),
    pytest.param("aten._softmax.default", "2.activations", "transformer.h.0.attn", marks=pytest.mark.slow),
    pytest.param("aten.native_layer_norm.default", "2.activations", "transformer.h.0.ln_1", marks=pytest.mark.slow),
    ("aten.gelu_backward.default", "2.activation_grads", "transformer.h.0.mlp.c_fc"),
    ("aten._foreach_norm.Scalar", "3.norm", ""),
])  # fmt: skip
def test_a_planted_mistake_is_named_by_both(name: str, point: str, where: str) -> None:
    with Wrong(name, lambda output: output.mul_(1.01)) as planted:
        result, agreement = run("fp32")
    assert planted.ran and not result.agrees and not agreement.disagreements, report(result)
    first = result.first_departure
    assert first is not None and (first.point, first.name) == (point, where)
    operation, verdict = of(agreement, point, where).worst
    assert operation.name == name and verdict.level == "wrong"


def test_right_operations_that_are_not_the_recipes_are_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another eps: only the comparison can know."""

    def norm(self: Casts, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, 1e-2)

    monkeypatch.setattr(Casts, "norm", norm)
    result, agreement = run("fp32")
    assert not result.agrees and agreement.disagreements
    first = of(agreement, "2.activations", "transformer.h.0.ln_1")
    assert first in agreement.disagreements and first.finding.departs
    assert "ln_1: the comparison departs (" in first.sentence and first.sentence.endswith("by the audit its operation is right")
    assert f"the two judges disagree on {len(agreement.disagreements)}:" in report(result)
    assert result.summary()["audit"]["disagreements"][0] == agreement.disagreements[0].sentence


def test_an_error_that_a_tensors_bound_hides_is_a_disagreement() -> None:
    """One element, wrong by 64 units in the last place: the comparison's bound is for the norm of the tensor."""
    with Wrong("aten.gelu.default", lambda output: output.view(-1)[int(output.abs().argmax())].mul_(1 + 2.0**-17)):
        result, agreement = run("fp32")
    assert result.first_departure is None and not result.agrees
    assert {(b.finding.point, b.finding.name) for b in agreement.disagreements} == {("2.activations", GELU)}
    sentence = agreement.disagreements[0].sentence
    assert "the comparison agrees (" in sentence and "aten.gelu.default is wrong: error" in sentence
