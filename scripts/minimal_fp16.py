"""The smallest training in FP16: a GPT learns the text below in 30 steps, with FP32 masters and a dynamic loss scale.

    python scripts/minimal_fp16.py

The algorithm is refimpl/step.py. To stop in its step 2 with a debugger, where `up` shows the other steps:

    python -m pdb -c "import refimpl.step" -c "b refimpl.step.forward_backward" -c c scripts/minimal_fp16.py

The backend 'reference' runs the definitions of operations, without any fast version; 'numpy' is faster.
"""

from typing import Any

import numpy as np

import refimpl as rf
from refimpl.training.arguments import Parser

TEXT = b"""
The masters are kept in FP32, and each step begins by rounding them to FP16 weights. Forward and backward run in FP16, from
the loss times S, because many gradients are too small for FP16. The gradients are widened to FP32, checked, and divided by S.
If one of them is infinite, the step is skipped and S is halved; otherwise the masters are updated, and after many good steps
S is doubled. An update is often smaller than half the distance between two FP16 numbers. The masters keep it nevertheless.
"""
STEPS, BATCH, BLOCK = 30, 16, 32


def draw_batch(rng: np.random.Generator) -> tuple[Any, Any]:
    """Return BATCH random pieces of the text: bytes (BATCH, BLOCK), and the bytes that follow each of them."""
    text = np.frombuffer(TEXT, np.uint8)
    starts = rng.integers(len(text) - BLOCK, size=(BATCH, 1))
    pieces = text[starts + np.arange(BLOCK + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def main() -> None:
    """Train, and print one line per step."""
    rng = np.random.default_rng(0)
    model = rf.gpt_model(rf.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=BLOCK))
    recipe, backend, rule = rf.get_recipe("fp16"), rf.get_backend("reference"), rf.AdamW()

    state = rf.State(model, recipe.state_encodings(rule.moments), backend)  # 2 + 2 + 4 + 4 + 4 bytes per weight
    state.load_weights(model.initial_weights(rng))  # FP32; the FP16 weights are rounded from these masters
    optimizer = rf.Optimizer(rule, rf.Schedule(lr=5e-3, min_lr=5e-4, warmup=3, steps=STEPS))
    loss_scale = rf.make_loss_scale("dynamic", init_scale=2.0**20, growth_interval=10)  # too large at first, as is usual
    run = rf.Run(recipe.policy, backend)  # which format where, and what computes

    skipped = 0
    print("step    loss     S  skipped so far")
    for step in range(1, STEPS + 1):
        result = rf.train_step(model, [draw_batch(rng)], state, optimizer, loss_scale, run, max_norm=1.0)
        skipped += bool(result.skipped)
        what = "  an overflow: skipped" if result.skipped else ""
        print(f"{step:4} {float(result.loss):7.3f} 2^{np.log2(result.loss_scale):g} {skipped:3}{what}")


if __name__ == "__main__":
    Parser(description=__doc__).parse_args()  # no arguments but --help
    main()
