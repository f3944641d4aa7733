"""How a kind of model state is kept: as plain numbers of one format, or in one of the ways that make fewer bits do.

    read     what is kept -> FP32 values, for the update
    change   let the update act on the values
    write    FP32 values -> what is kept

A storage has a main part, one element a parameter, and perhaps another: what rounding left over, or a scale for each 256
values. Parts are slices of flat buffers, named by kind and part: 'weights', 'weights_compensation', 'm', 'm_scales'.

    plain          fp64, fp32, fp16, bf16: rounded to nearest
    stochastic     up or down by chance, so that the mean of many small updates is kept
    kahan          what a rounding took away is kept in 16 bits and added to the next update
    remainder      the lower half of an FP32 master, of which the BF16 weight is the upper half
    blockwise      8-bit codes and an FP32 scale for each 256 values; perhaps FP32 for the embeddings, which lie first
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import UsageError, unknown
from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.compensated import kahan_update, merge, split
from refimpl.numerics.formats import FORMATS, dtype_of, is_float
from refimpl.numerics.philox import STREAMS, random_bits
from refimpl.numerics.stochastic_rounding import stochastic_round

BufferSlices = Mapping[str, Array]
Update = Callable[[Array], None]

MAIN = ""
"""The part that holds one element a parameter, in the storage's format."""


@dataclass(frozen=True)
class BufferSpec:
    """One buffer: the type of an element, and how many values share one.

    first: how many parameters it holds, the first ones of the flat index, where it does not hold all.
    """

    dtype: np.dtype
    values: int = 1
    first: int | None = None

    @property
    def bytes_per_parameter(self) -> Fraction:
        """Bytes a parameter; a scale for 256 values takes 4/256."""
        return Fraction(self.dtype.itemsize, self.values)

    def size(self, n: int) -> int:
        """Elements for n parameters; the last ones may be fewer than share an element."""
        return -(-(n if self.first is None else min(n, self.first)) // self.values)

    def slice(self, block: slice) -> slice:
        """The elements that belong to the parameters of a block. Errors: ValueError where it starts within an element's."""
        if block.start >= block.stop:  # the share of a rank for which nothing is left
            return slice(self.size(block.stop), self.size(block.stop))
        if block.start % self.values:
            raise ValueError(f"a block starts at {block.start}, within {self.values} values that share an element")
        return slice(self.size(block.start), self.size(block.stop))


class RandomKey(NamedTuple):
    """Where chance comes from: equal draws make equal bits, whatever the size of the blocks, and after a resume."""

    seed: int
    t: Array  # the number of updates made before this one
    start: int  # index of the first value in the flat buffer
    xp: Any = np  # the array library of the values, and of t
    kind: str = "weights"  # what is kept: each kind draws from a stream of its own, `philox.STREAMS`


@dataclass(frozen=True)
class Plain:
    """Numbers of one format, rounded to nearest even."""

    fmt: str

    @property
    def parts(self) -> Mapping[str, BufferSpec]:
        return {MAIN: BufferSpec(dtype_of(self.fmt))}

    def of(self, embeddings: int) -> Encoding:
        """The storage for a model whose first so many parameters are embeddings: the same for all."""
        return self

    def read(self, parts: BufferSlices, fmt: str) -> Array:
        """The values in the format `fmt`; where that is their own, the buffer itself."""
        return widen(parts[MAIN], fmt)

    def values(self, parts: BufferSlices) -> Array:
        """The values to look at, in the format that they are kept in."""
        return parts[MAIN]

    def change(self, parts: BufferSlices, values: Array, update: Update) -> None:
        """Update the values in place."""
        update(values)

    def write(self, parts: BufferSlices, values: Array, key: RandomKey) -> None:
        """Keep the values."""
        cast(values, self.fmt, out=parts[MAIN])

    def start(self, parts: BufferSlices, values: Array) -> None:
        """Keep the values that a run starts from, FP32: rounded to nearest, with nothing left over yet."""
        cast(values, self.fmt, out=parts[MAIN])


@dataclass(frozen=True)
class Stochastic(Plain):
    """Rounded up or down by chance, up with a probability of the distance from below: right in the mean.

    Source: Gupta et al. 2015, arXiv 1502.02551; llm.c, train_gpt2.cu -w 0; torchao, bf16_stochastic_round.
    Differs from the source: the random bits are a function of seed, update and index, not of a generator's history.
    """

    def write(self, parts: BufferSlices, values: Array, key: RandomKey) -> None:
        bits = random_bits(key.seed, key.t, key.start, values.size, STREAMS[key.kind], key.xp)
        stochastic_round(values, self.fmt, bits, out=parts[MAIN])


@dataclass(frozen=True)
class Kahan(Plain):
    """Kahan's sum: c takes the update, w takes c, and what w could not take stays in c.

        c = R(c + update);   w' = R(w + c);   c = R(c + R(w - w'))

    Weight decay multiplies w before that and is rounded by itself, so it can still be lost.
    Source: Zamirai et al. 2020, arXiv 2010.06192; torchdistx, AnyPrecisionAdamW.
    Differs from the source: moments are computed in FP32 and rounded once an update; there, after every operation.
    """

    @property
    def parts(self) -> Mapping[str, BufferSpec]:
        return {**super().parts, "compensation": BufferSpec(dtype_of(self.fmt))}

    def change(self, parts: BufferSlices, values: Array, update: Update) -> None:
        step = values * 0
        update(step)
        w, parts["compensation"][...] = kahan_update(cast(values, self.fmt), parts["compensation"], step)
        widen(w, "fp32", out=values)


@dataclass(frozen=True)
class Remainder(Plain):
    """An FP32 master in two halves: the BF16 weight, and 16 bits from which the whole is put together again exactly.

    The weight is the master rounded to nearest, but for ties, which go away from zero.
    Source: TransformerEngine, multi_tensor/adam.cu; Megatron-LM, store_param_remainders.
    """

    @property
    def parts(self) -> Mapping[str, BufferSpec]:
        return {**super().parts, "remainder": BufferSpec(np.dtype(np.uint16))}

    def read(self, parts: BufferSlices, fmt: str) -> Array:
        return widen(merge(parts[MAIN], parts["remainder"]), fmt)

    def values(self, parts: BufferSlices) -> Array:
        return merge(parts[MAIN], parts["remainder"])

    def write(self, parts: BufferSlices, values: Array, key: RandomKey) -> None:
        self.start(parts, values)

    def start(self, parts: BufferSlices, values: Array) -> None:
        parts[MAIN][...], parts["remainder"][...] = split(values)


def replace_unless(keep: Array, parts: BufferSlices, new: BufferSlices, xp: Any) -> None:
    """`parts` become `new`, in place, unless `keep` is set, a 0-d boolean of the device: nobody waits to see it.

    By their bits: `where` of CuPy makes FP32 of BF16, and no value may change on the way.
    """
    for name, part in parts.items():
        x, y = (bits_of(z) if is_float(z) else z for z in (part, new[name]))
        x[...] = xp.where(keep, x, y)


SHARING = 256
"""Values that share a scale. Source: Dettmers et al. 2022 (2048 there); bitsandbytes and torchao since: 256."""
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Blockwise:
    """8-bit codes of values divided by the largest of their block of 256, and that largest value in FP32.

    fmt: the format of the codes; '' where they are numbers of a table, `codebook`, in order of their values.
    Source: Dettmers et al. 2022, arXiv 2110.02861; torchao, optim/subclass_8bit.py and subclass_fp8.py.
    Differs from the source: blocks are 256 neighbors in the flat buffer, whatever tensors they belong to; there blocks
    end with their tensor, and tensors of fewer than 4096 elements stay FP32.
    """

    fmt: str
    codebook: Callable[[], Array] | None = None

    @property
    def parts(self) -> Mapping[str, BufferSpec]:
        return {MAIN: BufferSpec(np.dtype(np.uint8)), "scales": BufferSpec(dtype_of("fp32"), SHARING)}

    def of(self, embeddings: int) -> Encoding:
        """The storage for a model whose first so many parameters are embeddings: the same for all."""
        return self

    def read(self, parts: BufferSlices, fmt: str) -> Array:
        codes = parts[MAIN]
        values = self.codebook()[codes] if self.codebook else widen(from_bits(codes, self.fmt), "fp32")
        return values * parts["scales"].repeat(SHARING)[: codes.size]

    def values(self, parts: BufferSlices) -> Array:
        """The same, to look at."""
        return self.read(parts, "fp32")

    def change(self, parts: BufferSlices, values: Array, update: Update) -> None:
        """Update the values in place."""
        update(values)

    def write(self, parts: BufferSlices, values: Array, key: RandomKey) -> None:
        """Keep the values: the scale of each block, max |x| / largest code, and the codes nearest to x / scale."""
        blocks = np.zeros((len(parts["scales"]), SHARING), values.dtype)
        blocks.reshape(-1)[: values.size] = values
        largest = self.codebook()[-1] if self.codebook else cast(np.array(FORMATS[self.fmt].max), "fp32")
        scales = np.maximum(abs(blocks).max(1), cast(np.array(SMALLEST_SCALE), "fp32")) / largest
        parts["scales"][...] = scales
        scaled = (blocks / scales[:, None]).reshape(-1)[: values.size]
        parts[MAIN][...] = (
            nearest(self.codebook(), scaled) if self.codebook else bits_of(cast(scaled, self.fmt, overflow="saturate"))
        )

    def start(self, parts: BufferSlices, values: Array) -> None:
        """Moments start at zero, which is all that this is for."""
        self.write(parts, values, RandomKey(0, 0, 0))


@dataclass(frozen=True)
class FP32Embeddings(Blockwise):
    """Blockwise, but FP32 for the embeddings: a row that gets a gradient now and then needs small second moments to stay.

    Source: Dettmers et al. 2022, arXiv 2110.02861, section 2.3; bitsandbytes, StableEmbedding and override_config.
    Differs from the source: the embeddings' codes are there all the same, and zero: one byte in five that is not needed.
    """

    embeddings: int = 0

    @property
    def parts(self) -> Mapping[str, BufferSpec]:
        return {**super().parts, "embeddings": BufferSpec(dtype_of("fp32"), first=self.embeddings)}

    def of(self, embeddings: int) -> Encoding:
        return replace(self, embeddings=embeddings)

    def read(self, parts: BufferSlices, fmt: str) -> Array:
        values = super().read(parts, fmt)
        values[: parts["embeddings"].size] = parts["embeddings"]
        return values

    def write(self, parts: BufferSlices, values: Array, key: RandomKey) -> None:
        n = parts["embeddings"].size
        parts["embeddings"][...] = values[:n]
        others = values.copy()
        others[:n] = 0
        super().write(parts, others, key)


def nearest(codebook: Array, values: Array) -> Array:
    """The number of the nearest entry, of two equally near ones the lower; NaN gets the last. uint8."""
    return np.asarray(np.searchsorted(_between(codebook.tobytes()), values), np.uint8)


@cache
def _between(codebook: bytes) -> Array:
    entries = np.frombuffer(codebook, np.float32)
    return (entries[1:] + entries[:-1]) / 2


@cache
def dynamic_codebook(signed: bool) -> Array:
    """256 numbers from -1 (or 0) to 1 whose distances grow with their size: 0, 1, and seven decades down to 1e-7.

    In the decade 10^(i-7)..10^(i-6), i = 0..6, there are 2^i numbers (2^(i+1) without signs): the middles of so many
    equal parts of it. Source: Dettmers 2016, arXiv 1511.04561; the dynamic map of bitsandbytes and torchao.
    Differs from the source: formed in double precision and rounded once; there in FP32, which is up to 2 ulps away.
    """
    entries = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        entries.extend(middles)
        if signed:
            entries.extend(-middles)
    return cast(np.array(sorted(entries)), "fp32")


def signed_codebook() -> Array:
    """For first moments."""
    return dynamic_codebook(True)


def unsigned_codebook() -> Array:
    """For second moments, which are never negative."""
    return dynamic_codebook(False)


Encoding = Plain | Blockwise

ENCODINGS: dict[str, Encoding] = {
    **{fmt: Plain(fmt) for fmt in ("fp64", "fp32", "fp16", "bf16")},
    "bf16-stochastic": Stochastic("bf16"),
    "bf16-kahan": Kahan("bf16"),
    "bf16-remainder": Remainder("bf16"),
    "int8-signed": Blockwise("", signed_codebook),
    "int8-unsigned": Blockwise("", unsigned_codebook),
    "e4m3-blocks": Blockwise("e4m3"),
    "int8-signed-embeddings-fp32": FP32Embeddings("", signed_codebook),
    "int8-unsigned-embeddings-fp32": FP32Embeddings("", unsigned_codebook),
}
"""What a recipe may write into its table of states."""


def get_encoding(name: str) -> Encoding:
    """The storage of that name. Errors: UsageError that lists the names."""
    if name not in ENCODINGS:
        raise UsageError(unknown("storage", name, ENCODINGS))
    return ENCODINGS[name]


def buffer_name(kind: str, part: str) -> str:
    """What a part's buffer is called: its kind, and the part unless it is the main one."""
    return f"{kind}_{part}" if part else kind


def buffers_of(stored: Mapping[str, str], embeddings: int = 0) -> dict[str, BufferSpec]:
    """All buffers of a run by name, for a table kind -> storage and the number of parameters that are embeddings."""
    return {
        buffer_name(kind, part): spec
        for kind, name in stored.items() for part, spec in get_encoding(name).of(embeddings).parts.items()
    }  # fmt: skip
