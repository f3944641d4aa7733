"""300 steps of a small GPT and a small Llama under each recipe: the Llama stays as near to its FP32 run as the GPT does.

*The claim*: where the validation loss of the GPT is within 0.03 nats of FP32's, that of the Llama is too. Both have the same
width, depth and heads, and but for their sizes the defaults of scripts/train.py, also its learning rate, 2e-3. A difference is
that of two runs from the same weights on the same batches; both losses are over the same 100 batches of held back text.

*What limits it.* Training is chaotic: runs that differ in a few roundings part.

- Sizes were chosen by FP32 runs, after a Llama of width 32 with 128 tokens per step had been 0.09 better in bf16 than in FP32.
  From weights that change by as much as BF16 rounds them, the loss of the Llama's FP32 changes by 0.06 to 0.08 at widths of 32
  and 48, or with 128 tokens, where it is still falling fast; by 0.005 to 0.025 at a width of 64 with 256 tokens or more. The
  first test has such runs, by the same rule as recipes.
- A difference beyond the limit is not believed at once: the mean over four seeds decides. (adam-fp8 gives the Llama -0.030,
  -0.070, +0.011 and +0.010.) That rule was fixed when no recipe had been seen beyond the limit at these sizes. A recipe that is
  within the limit by luck is not found.
- Learning rates are not raised. At 1e-2 such FP32 runs part by 0.09 and 0.05 (Llama, seeds 0 and 1) and by 0.04 (GPT), and so
  do recipes: a Llama with two layers of width 32 is 0.055 better under adam-8bit and 0.061 worse under bf16-sr, while its FP32
  run moves by 0.027 when last bits of the weights change.

The rows that the cases print, and times: pytest -m slow -s --durations=0 tests/training/test_gpt_and_llama.py
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from refimpl.numerics.casts import cast, widen
from refimpl.precision.recipes import RECIPES
from refimpl.tools.compare_recipes.runs import BASELINE, RecipeRun, for_recipe
from refimpl.training.config import Config
from refimpl.training.setup import INIT, generator

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("pythons_manual", "one_blas_thread")]

SIZES: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 32, "batch_size": 12, "steps": 300, "eval_batches": 100,
}  # fmt: skip
MODELS = ("gpt", "llama")
SEEDS = range(4)
LIMIT = 0.03

STARTS = ("last bit", "bf16 start")
"""FP32 from weights moved by one unit in the last place, or rounded to BF16: names that stand in place of a recipe's."""


@functools.cache
def loss(model: str, name: str, seed: int) -> float:
    """Return the validation loss after training under a recipe, or one of STARTS; infinite if a run ended before."""
    config = Config.of({**SIZES, "model": model, "recipe": BASELINE, "seed": seed})
    config = for_recipe(config, BASELINE if name in STARTS else name)
    run, corpus = RecipeRun(config, perturbation=int(name == "last bit")), config.make_corpus()
    if name == "bf16 start":
        weights = run.training.model.initial_weights(generator(seed, INIT))
        run.training.state.load_weights({key: widen(cast(w, "bf16"), "fp32") for key, w in weights.items()})
    for _ in range(config.steps):
        run.step(corpus)
    run.finish(corpus, seed)
    return math.inf if run.ended else run.val_loss


def differences(model: str, name: str) -> list[float]:
    """Return the loss minus FP32's for the first seed, and for all seeds if that is beyond the limit, but finite."""
    found = list[float]()
    for seed in SEEDS:
        found.append(loss(model, name, seed) - loss(model, BASELINE, seed))
        if abs(found[0]) <= LIMIT or math.isinf(found[0]):
            break
    return found


def are_near(name: str) -> list[bool]:
    """Return for each model whether the mean difference is within the limit, and print a row."""
    found = {model: differences(model, name) for model in MODELS}
    cells = [f"{model} {np.mean(each):+.4f} ({', '.join(f'{x:+.4f}' for x in each)})" for model, each in found.items()]
    print(f"\n{name:26} {'; '.join(cells)}")
    return [abs(float(np.mean(each))) <= LIMIT for each in found.values()]


@pytest.mark.parametrize("start", STARTS)
def test_fp32_from_changed_weights_is_near_fp32(start: str) -> None:
    """Otherwise a recipe would be beyond the limit by chance."""
    assert are_near(start) == [True, True]


DEPARTS = {
    "pure-fp16": "moments in FP16: Inf or NaN after some 40 steps, the GPT too",
    "fp16-moments": "second moments are 0 in FP16, so that updates are thousands of times too large; the GPT too",
    "pure-bf16": "updates smaller than half of a weight's ulp are lost; the GPT loses too",
    "bf16-no-master": "as pure-bf16",
}
"""The recipes of a mistake: under them the Llama is not near FP32."""


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != BASELINE])
def test_where_the_gpt_is_near_fp32_the_llama_is_too(recipe: str) -> None:
    gpt, llama = are_near(recipe)
    if recipe in DEPARTS:
        assert not llama, DEPARTS[recipe]
    else:
        assert llama or not gpt
