"""The outputs of a model of transformers under the places of ours, seen by hooks while the model runs.

Most of our operations are modules there, with the same path. The others are what a module is given (the attention's output is
`o_proj`'s input), what a layer returns (its second sum), or, queries and keys after RoPE, what a function returns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from refimpl.parity.operations import Operation

See = Callable[[str, Tensor], Any]

GIVEN_TO = {
    "llama": {"self_attn.o_proj": "self_attn", "post_attention_layernorm": "residual_1", "mlp.down_proj": "mlp.act"},
    "gpt": {"attn.c_proj": "attn", "ln_2": "residual_1", "mlp.c_proj": "mlp.gelu"},
}
"""By model: a module of a layer, and the place of ours whose output it is given."""
LAYER = re.compile(r"(model\.layers|transformer\.h)\.\d+")
_ROPE = "apply_rotary_pos_emb"


@contextmanager
def seen(model: nn.Module, operations: Sequence[Operation], see: See) -> Iterator[None]:
    """Call see(place, tensor) with each output that an operation of ours has too, while the model runs forward inside.

    operations: those of our model.
    """
    kind = "gpt" if any(op.place == "transformer.wte" for op in operations) else "llama"
    modules = dict(model.named_modules())
    before, layers, handles = GIVEN_TO[kind], [path for path in modules if LAYER.fullmatch(path)], []
    elsewhere = {f"{path}.{place}" for path in layers for place in before.values()}  # some are modules there, of another output
    for op in operations:
        if op.place in modules and op.place not in elsewhere:
            handles.append(modules[op.place].register_forward_hook(_returned(see, op.place)))
    for path in layers:
        handles.append(modules[path].register_forward_hook(_returned(see, f"{path}.residual_2")))
        for name, place in before.items():
            handles.append(modules[f"{path}.{name}"].register_forward_pre_hook(_given(see, f"{path}.{place}")))
    if kind == "gpt":
        handles.append(modules["transformer.h.0"].register_forward_pre_hook(_given(see, "transformer.embedding")))
    try:
        with _rotated(model, modules, see):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _returned(see: See, place: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        see(place, output[0] if isinstance(output, tuple) else output)

    return hook


def _given(see: See, place: str) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        see(place, args[0])

    return hook


@contextmanager
def _rotated(model: nn.Module, modules: dict[str, nn.Module], see: See) -> Iterator[None]:
    """See queries and keys after RoPE: put a function around the one of the model's file that rotates them."""
    source: Any = sys.modules[type(model).__module__]
    rotate = getattr(source, _ROPE, None)
    if rotate is None:
        yield
        return
    running: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: running.append(path))
        for path, module in modules.items() if path.endswith(".self_attn")
    ]  # fmt: skip

    def watched(*args: Any, **kwargs: Any) -> Any:
        q, k = rotate(*args, **kwargs)
        see(f"{running[-1]}.q_rope", q)
        see(f"{running[-1]}.k_rope", k)
        return q, k

    setattr(source, _ROPE, watched)
    try:
        yield
    finally:
        setattr(source, _ROPE, rotate)
        for handle in handles:
            handle.remove()


def in_our_shape(place: str, array: np.ndarray) -> np.ndarray:
    """Return an output, or its gradient, in the shape that it has here: heads side by side, positions without a batch."""
    if place == "transformer.wpe":
        return array[0]
    if array.ndim == 4:
        by_head = array.swapaxes(1, 2) if place.endswith("_rope") else array
        return by_head.reshape(*by_head.shape[:2], -1)
    return array
