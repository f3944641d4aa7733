"""refimpl: mixed-precision training of language models, written out in NumPy.

`refimpl.step` is the algorithm on one page. This package provides what a training of your own needs. The example trains a
small GPT for 20 steps in FP16, with FP32 masters and a dynamic loss scale:

    import numpy as np
    import refimpl as rf

    text, rng = np.frombuffer(b"The masters are FP32, the weights are FP16. " * 10, np.uint8), np.random.default_rng(0)
    model = rf.gpt_model(rf.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16))
    scale = rf.make_loss_scale("dynamic", init_scale=2.0**17)  # too large: it halves
    training = rf.make_training(model, "fp16", rf.Schedule(lr=1e-2, min_lr=1e-3, warmup=2, steps=20), loss_scale=scale)
    for step in range(20):
        result = training.step([rf.sample_batch(text, 8, 16, rng)])
        print(step, float(result.loss), float(result.loss_scale), bool(result.skipped))

The names by purpose; `help(refimpl.State)` and so on say more:

    gpt_model, GPTConfig                          GPT-2, and its sizes
    llama_model, LlamaConfig                      Llama, Mistral or Qwen, and its sizes
    mlp_model, MLPConfig                          a byte language model of a few layers, and its sizes
    make_training, Training                       all that a step needs, as one object with a method `step`
    sample_batch                                  random blocks of a text, and the tokens that follow
    get_recipe                                    the formats of operations and states, by name: RECIPES holds all
    get_backend, Run                              the array backend; what the operations of a run share
    State, Optimizer, AdamW, SGD, Schedule        weights, gradients, masters and moments, and how they are updated
    make_loss_scale                               the loss scale: dynamic as PyTorch's, fixed, none, or another project's
    train_step, forward_backward, StepResult      one step, its first half, and what it returns
    cast, widen                                   round an array to a format; convert it to a wider one, exactly
    UsageError, TrainingStopped                   raised for wrong input; raised when a training cannot continue

`docs/library.md` shows the same with plots, and what else these objects offer; `docs/tour.ipynb` is a notebook.

The modules behind them are imported when a name is first used, so `import refimpl` alone takes no time.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from refimpl._library import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Import the library when one of its names is first used: a command must answer Ctrl-C before NumPy is imported."""
        if not name.startswith("_") or name == "__all__":
            from refimpl import _library

            if name in {*_library.__all__, "__all__"}:
                globals().update({"__all__": _library.__all__}, **{each: getattr(_library, each) for each in _library.__all__})
                return globals()[name]
        raise AttributeError(f"module 'refimpl' has no attribute {name!r}")

    def __dir__() -> list[str]:
        from refimpl import _library

        return sorted({*globals(), *_library.__all__})
