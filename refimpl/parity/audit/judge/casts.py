"""What must be equal to the bit: copies, casts, and whatever moves or selects numbers, or changes a sign.

The exact result is one of the inputs' numbers, so the only error is that of one rounding where formats differ: the bound is 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from refimpl.parity.audit.judge.again import in_fp64
from refimpl.parity.audit.values import Twin, Values, is_float


def cast(values: Values) -> Iterator[Twin]:
    """Judge `_to_copy`, `clone` and their like: the exact result is the input."""
    yield Twin("out", values.output, values.inputs["self"].double(), 0.0, by="exact")


def copied(values: Values) -> Iterator[Twin]:
    """Judge `copy_`: what is written is the source, broadcast."""
    target = values.written["self"]
    yield Twin("self", target, values.inputs["src"].double().expand(target.shape), 0.0, by="exact")


def moved(values: Values) -> Iterator[Twin]:
    """Judge what moves, selects or fills: the exact result is that of the same operation on FP64 inputs."""
    exact = in_fp64(values)
    for name, actual in values.results():
        if is_float(actual):
            yield Twin(name, actual, exact[name].double(), 0.0, by="exact")


def with_numbers_for(values: Values) -> Iterator[Twin]:
    """Judge nan_to_num: Inf becomes the largest number of the tensor's own format where no other is given."""
    given = values.inputs
    x, info = given["self"], torch.finfo(given["self"].dtype)
    largest = info.max if given.get("posinf") is None else given["posinf"]
    smallest = info.min if given.get("neginf") is None else given["neginf"]
    exact = x.double().nan_to_num(given.get("nan") or 0.0, largest, smallest)
    for name, actual in values.results():
        yield Twin(name, actual, exact, 0.0, by="exact")


CASTS = ("_to_copy", "clone", "lift_fresh_copy", "alias_copy", "_conj_physical")
MOVES = """
    _pack_padded_sequence _reshape_copy _unsafe_index _unsafe_masked_index abs abs_ adaptive_max_pool2d amax amin
    as_strided_copy as_strided_scatter block_diag cat ceil channel_shuffle clamp clamp_ clamp_max clamp_max_ clamp_min
    clamp_min_ constant_pad_nd copysign cummax cummin diag diag_embed diagonal_backward diagonal_copy diagonal_scatter
    expand_copy eye fill fill_ flip floor fmax fmin full full_like gather hardtanh hardtanh_ hardtanh_backward heaviside
    im2col index index_copy index_copy_ index_fill index_fill_ index_select kthvalue masked_fill masked_fill_ masked_scatter
    masked_scatter_ masked_select max max_pool2d_with_indices max_pool3d_with_indices maximum median min minimum mode neg
    neg_ new_full new_ones new_zeros ones ones_like permute_copy pixel_shuffle pixel_unshuffle reflection_pad1d
    reflection_pad2d reflection_pad3d relu relu_ relu6 repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d roll round round_ scalar_tensor scatter scatter_ select_backward select_copy select_scatter sgn sign
    slice_backward slice_copy slice_scatter sort split_copy split_with_sizes_copy squeeze_copy stack t_copy take threshold
    threshold_ threshold_backward topk transpose_copy tril tril_ triu triu_ trunc unbind_copy unfold_copy unsqueeze_copy
    view_copy where zero_ zeros zeros_like
"""

JUDGES = {
    **{f"aten.{name}": cast for name in CASTS},
    **{f"aten.{name}": moved for name in MOVES.split()},
    **dict.fromkeys(("fsdp.chunk_cat", "fsdp.split_with_sizes_copy", "fsdp.all_gather_copy_in"), moved),
    "aten.copy_": copied,
    **dict.fromkeys(("aten.nan_to_num", "aten.nan_to_num_"), with_numbers_for),
}
