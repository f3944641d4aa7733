"""Names of wrapped models: every combination of prefixes is mapped, a tied weight has two names, a wrong name is an error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.names import WRAPPERS, nearest, own_name, rename, unwrapped

MODEL = gpt_model(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=2))
KNOWN = MODEL.parameters.keys()


@pytest.mark.parametrize("prefixes", list(itertools.permutations(("module", "_orig_mod", "model"), 3)))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_prefixes_in_any_combination_and_order_are_mapped(prefixes: tuple[str, ...], count: int) -> None:
    prefix = ".".join(prefixes[:count])
    for name in KNOWN:
        assert own_name(f"{prefix}.{name}", KNOWN) == name


def test_a_wrapper_in_the_middle_of_a_name_is_mapped() -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    for at in range(len(name.split("."))):
        parts = name.split(".")
        parts.insert(at, "_orig_mod")
        assert own_name(".".join(parts), KNOWN) == name
    assert unwrapped("module.transformer.h.0._orig_mod.attn") == "transformer.h.0.attn"


def test_a_name_of_the_model_stays_even_if_a_wrapper_has_the_same() -> None:
    assert own_name("model.layers", ["model.layers"]) == "model.layers"
    assert own_name("module.layers", ["model.layers"]) is None


def test_arrays_get_their_own_names_and_it_is_said() -> None:
    arrays = {f"module.{name}": np.full(spec.shape, 2.0, np.float32) for name, spec in MODEL.parameters.items()}
    renamed, notes = rename(arrays, KNOWN, MODEL.tied)
    assert list(renamed) == list(KNOWN) and notes == ["names without 'module' (DistributedDataParallel)"]
    assert rename(renamed, KNOWN, MODEL.tied) == (renamed, [])  # nothing was mapped, and nothing is said


def test_a_tied_weight_stands_under_either_name_or_both() -> None:
    w = np.arange(3, dtype=np.float32)
    for names in (["lm_head.weight"], ["transformer.wte.weight", "_orig_mod.lm_head.weight"]):
        renamed, notes = rename(dict.fromkeys(names, w), KNOWN, MODEL.tied)
        assert list(renamed) == ["transformer.wte.weight"]
        assert "lm_head.weight is tied to transformer.wte.weight" in notes
    with pytest.raises(UsageError, match=r"both the parameter .*wte.*, and their values differ"):
        rename({"transformer.wte.weight": w, "lm_head.weight": w + 1}, KNOWN, MODEL.tied)
    assert own_name("lm_head.weight", KNOWN) is None  # a model that is not tied has no such parameter


def test_two_names_of_one_parameter_must_have_equal_values() -> None:
    nan = np.full(2, np.nan, np.float32)
    assert len(rename({"module.transformer.wpe.weight": nan, "transformer.wpe.weight": nan.copy()}, KNOWN)[0]) == 1
    with pytest.raises(UsageError, match="values differ"):
        rename({"module.transformer.wpe.weight": nan, "transformer.wpe.weight": nan[:1]}, KNOWN)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("transformer.wte.wieght", "transformer.wte.weight"),
        ("module.transformer.h.0.attn.c_atn.bias", "transformer.h.0.attn.c_attn.bias"),
        ("transformer.h.7.ln_1.weight", "transformer.h.0.ln_1.weight"),
    ],
)
def test_an_unknown_name_shows_the_nearest(wrong: str, near: str) -> None:
    assert nearest(wrong, KNOWN) == near
    with pytest.raises(UsageError, match=f"this model has no parameter {wrong!r}; the nearest name is {near!r}"):
        rename({wrong: np.zeros(1)}, KNOWN, MODEL.tied)
    assert nearest("x", KNOWN) in KNOWN  # however far it is


def test_every_wrapper_says_whose_it_is() -> None:
    assert all(WRAPPERS.values()) and not any("." in word for word in WRAPPERS)
