"""BF16 weights that lose nothing, or little, of their updates, without an FP32 master: two ways to keep the rest.

The 16-bit remainder: a master in 2 + 2 bytes, of which the upper half, rounded, is the BF16 weight itself. Nothing is lost.
Kahan's compensation: the error of the last update, rounded to BF16, is added to the next. Some 16 bits are kept.
"""

from __future__ import annotations

from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of, from_bits, resized
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import format_of

_HALF = 0x8000


def split(master: Array) -> tuple[Array, Array]:
    """The BF16 weight that is nearest to each master, and the 16 bits that give the master back.

        remainder = the lower 16 bits of the master
        weight    = the upper 16 bits, plus 1 where remainder >= 2^15

    master: fp32 -> (weight bf16, remainder uint16), of the same shape. `merge` is exact for every bit pattern.
    The weight is the master rounded to nearest, but exact ties (remainder = 2^15) go away from zero: could they go to the even
    one, the masters one half above and one half below an even weight would have the same two halves. The largest masters
    become infinite as weights, as they do in `cast`. Infinities and NaNs with an empty lower half, which is all that
    arithmetic makes, stay what they are; a NaN with something in the lower half may show as an infinity or as a zero.

    Source: NVIDIA Transformer Engine, multi_tensor/adam.cu; Megatron-LM, store_param_remainders. They keep the remainder as
      int16: the same bits.
    """
    pattern = bits_of(master)
    remainder = pattern & 0xFFFF
    weight = (pattern >> 16) + (remainder >= _HALF)
    return from_bits(resized(weight, 2), "bf16"), resized(remainder, 2)


def merge(weight: Array, remainder: Array) -> Array:
    """The masters of which `split` made these: weight bf16, remainder uint16 -> fp32, to the bit.

    The upper half is the weight's bits, less 1 where remainder >= 2^15; the lower half is the remainder.
    """
    lower = resized(remainder, 4)
    upper = resized(bits_of(weight), 4) - (lower >= _HALF)
    return from_bits(upper << 16 | lower, "fp32")


def kahan_update(w: Array, c: Array, update: Array) -> tuple[Array, Array]:
    """Add an update to 16-bit weights, and keep what the rounding took away for the next time.

        c = R(c + update);   w' = R(w + c);   c = R(c + R(w - w'))

    w, c: bf16 (or both fp16), update: fp32 -> the new w and c. R rounds to their format, all sums are formed in fp32.
    w + c has some 16 bits of the sum of all updates. Weight decay that multiplies w directly is not compensated: where
    w (1 - lr wd) rounds to w it is lost as ever. Hand it over as part of the update.
    Errors: TypeError where w and c have different formats.
    Source: Kahan 1965, 'Further remarks on reducing truncation errors'; Zamirai et al. 2020, arXiv 2010.06192 (for BF16
      weights). PyTorch: none; AnyPrecisionAdamW of torchdistx has these lines in this order.
    """
    fmt = format_of(w)
    if format_of(c) != fmt:
        raise TypeError(f"kahan_update: the weights are {fmt}, their compensation is {format_of(c)}")
    old = widen(w, "fp32")
    step = widen(cast(widen(c, "fp32") + update, fmt), "fp32")
    w = cast(old + step, fmt)
    lost = widen(cast(old - widen(w, "fp32"), fmt), "fp32")
    return w, cast(step + lost, fmt)
