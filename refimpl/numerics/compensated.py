"""BF16 weights without an FP32 master that still keep their small updates.

`split` and `merge`: a master in 2 + 2 bytes, whose rounded upper half is the BF16 weight. Nothing is lost.
`kahan_update`: the error of each update, rounded to BF16, is added to the next. Some 16 significant bits are kept.
"""

from __future__ import annotations

from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of, from_bits, resized
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import format_of

_HALF = 0x8000


def split(master: Array) -> tuple[Array, Array]:
    """Return the BF16 weight nearest to each master, and the 16 bits from which `merge` restores the master.

        remainder = the lower 16 bits of the master
        weight    = the upper 16 bits, plus 1 where remainder >= 2^15

    master: fp32 -> (weight bf16, remainder uint16), of the same shape.
    Weights are rounded to nearest, ties (remainder = 2^15) away from zero: if ties went to even, the masters half an ulp above
    and half an ulp below an even weight would have the same two halves. The largest masters become infinite as weights, as in
    `cast`. Infinities, and NaNs whose lower half is zero (those that arithmetic makes), do not change; other NaNs may give a
    weight that is infinite or zero.

    Source: NVIDIA Transformer Engine, multi_tensor/adam.cu; Megatron-LM, store_param_remainders. They keep the remainder as
      int16, with the same bits.
    """
    pattern = bits_of(master)
    remainder = pattern & 0xFFFF
    weight = (pattern >> 16) + (remainder >= _HALF)
    return from_bits(resized(weight, 2), "bf16"), resized(remainder, 2)


def merge(weight: Array, remainder: Array) -> Array:
    """Return the masters that `split` made these from, to the bit: weight bf16, remainder uint16 -> fp32.

    The upper half is the weight's bits, less 1 where remainder >= 2^15; the lower half is the remainder.
    """
    lower = resized(remainder, 4)
    upper = resized(bits_of(weight), 4) - (lower >= _HALF)
    return from_bits(upper << 16 | lower, "fp32")


def kahan_update(w: Array, c: Array, update: Array) -> tuple[Array, Array]:
    """Add an update to 16-bit weights, and keep the rounding error for the next update.

        c = R(c + update);   w' = R(w + c);   c = R(c + R(w - w'))

    w, c: both bf16 or both fp16, update: fp32 -> the new w and c. R rounds to their format; sums are formed in fp32.
    w + c holds some 16 significant bits. Weight decay that multiplies w directly is not compensated: where w (1 - lr wd) rounds
    to w it is lost, unless it is part of the update.
    Errors: TypeError where w and c have different formats.
    Source: Kahan 1965, 'Further remarks on reducing truncation errors'; Zamirai et al. 2020, arXiv 2010.06192 (BF16 weights).
    PyTorch: none; torchdistx's AnyPrecisionAdamW has these lines in this order.
    """
    fmt = format_of(w)
    if format_of(c) != fmt:
        raise TypeError(f"kahan_update: the weights are {fmt}, their compensation is {format_of(c)}")
    old = widen(w, "fp32")
    step = widen(cast(widen(c, "fp32") + update, fmt), "fp32")
    w = cast(old + step, fmt)
    lost = widen(cast(old - widen(w, "fp32"), fmt), "fp32")
    return w, cast(step + lost, fmt)
