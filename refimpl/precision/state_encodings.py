"""How each kind of model state is stored: as numbers of one format, or encoded in fewer bits.

    read     stored -> FP32 values, for the update
    change   apply the update to the values
    write    FP32 values -> stored

An encoding has a main buffer with one element per parameter, and may have another: rounding errors, or a scale per 256 values.
Buffers are flat arrays, named by kind and part: 'weights', 'weights_compensation', 'm', 'm_scales'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from refimpl.errors import UsageError, unknown
from refimpl.numerics import casts
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
"""The name of the part that holds one element per parameter."""


@dataclass(frozen=True)
class BufferSpec:
    """One buffer: the type of an element, and how many values share one.

    first: the number of parameters that it holds, the first of the flat index; None for all.
    """

    dtype: np.dtype
    values: int = 1
    first: int | None = None

    @property
    def bytes_per_parameter(self) -> Fraction:
        """Return the bytes per parameter: 4/256 for an FP32 scale per 256 values."""
        return Fraction(self.dtype.itemsize, self.values)

    def size(self, n: int) -> int:
        """Return the number of elements for n parameters, rounded up."""
        return -(-(n if self.first is None else min(n, self.first)) // self.values)

    def slice(self, block: slice) -> slice:
        """Return the elements of a block of parameters. Errors: ValueError for a block that starts within an element."""
        if block.start >= block.stop:  # a rank whose share is empty
            return slice(self.size(block.stop), self.size(block.stop))
        if block.start % self.values:
            raise ValueError(f"a block starts at {block.start}, within {self.values} values that share an element")
        return slice(self.size(block.start), self.size(block.stop))


@dataclass(frozen=True)
class RandomKey:
    """What random bits are a function of: they depend neither on the size of blocks nor on a resume."""

    seed: int
    t: Array  # the number of updates made before this one
    start: int  # index of the first value in the flat buffer
    xp: Any = np  # the array library of the values, and of t
    kind: str = "weights"  # the kind of state; each has its own stream, `philox.STREAMS`


@dataclass(frozen=True)
class Plain:
    """Store numbers of one format, rounded to nearest even.

    convert: what has `cast` and `widen`: the module of that name, or a backend.
    """

    fmt: str
    convert: Any = field(default=casts, compare=False, repr=False)

    @property
    def parts(self) -> Mapping[str, BufferSpec]:
        return {MAIN: BufferSpec(dtype_of(self.fmt))}

    def of(self, embeddings: int, convert: Any = casts) -> Encoding:
        """Return the encoding for a model whose first `embeddings` parameters are embeddings, and what converts."""
        return replace(self, convert=convert)

    def read(self, parts: BufferSlices, fmt: str) -> Array:
        """Return the values in the format `fmt`; where that is the stored one, the buffer itself."""
        return self.convert.widen(parts[MAIN], fmt)

    def values(self, parts: BufferSlices) -> Array:
        """Return the values in the format that they are stored in, for reading only."""
        return parts[MAIN]

    def change(self, parts: BufferSlices, values: Array, update: Update) -> None:
        """Update the values in place."""
        update(values)

    def write(self, parts: BufferSlices, values: Array, key: RandomKey) -> None:
        """Store the values."""
        self.convert.cast(values, self.fmt, out=parts[MAIN])

    def start(self, parts: BufferSlices, values: Array) -> None:
        """Store the FP32 values that a run starts from, rounded to nearest."""
        cast(values, self.fmt, out=parts[MAIN])


@dataclass(frozen=True)
class Stochastic(Plain):
    """Round stochastically, so that the mean of many small updates is kept.

    Source: Gupta et al. 2015, arXiv 1502.02551; llm.c, train_gpt2.cu -w 0; torchao, bf16_stochastic_round.
    Differs from the source: the random bits are a function of seed, update and index, not of a generator's history.
    """

    def write(self, parts: BufferSlices, values: Array, key: RandomKey) -> None:
        bits = random_bits(key.seed, key.t, key.start, values.size, STREAMS[key.kind], key.xp)
        stochastic_round(values, self.fmt, bits, out=parts[MAIN])


@dataclass(frozen=True)
class Kahan(Plain):
    """Add updates with Kahan summation: a second 16-bit buffer c keeps the rounding error for the next update.

        c = R(c + update);   w' = R(w + c);   c = R(c + R(w - w'))

    Weight decay multiplies w before that and is rounded separately, so it can still be lost.
    Source: Zamirai et al. 2020, arXiv 2010.06192; torchdistx, AnyPrecisionAdamW.
    Differs from the source: moments are computed in FP32 and rounded once per update; there, after every operation.
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
    """Store an FP32 master in two halves: the BF16 weight, and the 16 bits that restore the master exactly.

    The weight is the master rounded to nearest, with ties away from zero.
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
    """Overwrite `parts` with `new` unless `keep` is set, a 0-d boolean that stays on the device.

    Values are moved as bits, since CuPy's `where` converts BF16 to FP32.
    """
    for name, part in parts.items():
        x, y = (bits_of(z) if is_float(z) else z for z in (part, new[name]))
        x[...] = xp.where(keep, x, y)


@contextmanager
def changed_unless(found_inf: Array, stored: Mapping[str, BufferSlices], backend: Any) -> Iterator[Mapping[str, BufferSlices]]:
    """Yield the arrays to change for the update of a block; afterwards those of `stored` are changed unless found_inf is set.

    On the host `Optimizer.update` has looked at found_inf, and they are `stored` itself. On a device nobody knows found_inf
    without waiting: they are copies, and the device chooses between old and new.
    """
    if backend.on_host:
        yield stored
        return
    new = {kind: {part: x.copy() for part, x in parts.items()} for kind, parts in stored.items()}
    yield new
    for kind, parts in stored.items():
        replace_unless(found_inf, parts, new[kind], backend.xp)


SHARING = 256
"""Values that share a scale: 256 as in bitsandbytes and torchao; 2048 in Dettmers et al. 2022."""
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Blockwise:
    """Store 8-bit codes, and an FP32 scale per block of 256 values.

    fmt: the format of the codes; '' where they index a table of values in ascending order, `codebook`.
    Source: Dettmers et al. 2022, arXiv 2110.02861; torchao, optim/subclass_8bit.py and subclass_fp8.py.
    Differs from the source: blocks are 256 neighbors in the flat buffer, also across tensors. There blocks end with their
      tensor, and tensors of fewer than 4096 elements stay FP32.
    """

    fmt: str
    codebook: Callable[[], Array] | None = None

    @property
    def parts(self) -> Mapping[str, BufferSpec]:
        return {MAIN: BufferSpec(np.dtype(np.uint8)), "scales": BufferSpec(dtype_of("fp32"), SHARING)}

    def of(self, embeddings: int, convert: Any = casts) -> Encoding:
        """Return the encoding for a model whose first `embeddings` parameters are embeddings: here, itself."""
        return self

    def read(self, parts: BufferSlices, fmt: str) -> Array:
        codes = parts[MAIN]
        values = self.codebook()[codes] if self.codebook else widen(from_bits(codes, self.fmt), "fp32")
        return values * parts["scales"].repeat(SHARING)[: codes.size]

    def values(self, parts: BufferSlices) -> Array:
        """Return the decoded values, FP32."""
        return self.read(parts, "fp32")

    def change(self, parts: BufferSlices, values: Array, update: Update) -> None:
        """Update the values in place."""
        update(values)

    def write(self, parts: BufferSlices, values: Array, key: RandomKey) -> None:
        """Store scale = max |x| / largest code for each block, and the codes nearest to x / scale."""
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
        """Store the values that a run starts from: moments of zero."""
        self.write(parts, values, RandomKey(0, 0, 0))


@dataclass(frozen=True)
class FP32Embeddings(Blockwise):
    """Store embeddings in FP32 and all else blockwise: rows with rare gradients need their small second moments.

    embeddings: the number of parameters that are embeddings; they come first.
    Source: Dettmers et al. 2022, arXiv 2110.02861, section 2.3; bitsandbytes, StableEmbedding and override_config.
    Differs from the source: embeddings have codes too, all zero, so that they take 5 bytes per parameter instead of 4.
    """

    embeddings: int = 0

    @property
    def parts(self) -> Mapping[str, BufferSpec]:
        return {**super().parts, "embeddings": BufferSpec(dtype_of("fp32"), first=self.embeddings)}

    def of(self, embeddings: int, convert: Any = casts) -> Encoding:
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
    """Return the index of the nearest entry, the lower one of a tie; the last for NaN. uint8."""
    return np.asarray(np.searchsorted(_between(codebook.tobytes()), values), np.uint8)


@cache
def _between(codebook: bytes) -> Array:
    entries = np.frombuffer(codebook, np.float32)
    return (entries[1:] + entries[:-1]) / 2


@cache
def dynamic_codebook(signed: bool) -> Array:
    """Return 256 numbers from -1 (or 0, if not signed) to 1, denser near zero: 0, 1, and seven decades down to 1e-7.

    The decade 10^(i-7)..10^(i-6), i = 0..6, is cut into 2^i equal parts (2^(i+1) if not signed): their midpoints are entries.
    Source: Dettmers 2016, arXiv 1511.04561; the dynamic map of bitsandbytes and torchao.
    Differs from the source: computed in FP64 and rounded once; there in FP32, up to 2 ulps away.
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
    """Return the codebook of first moments."""
    return dynamic_codebook(True)


def unsigned_codebook() -> Array:
    """Return the codebook of second moments, which are never negative."""
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
"""Name in a recipe's table of states -> encoding."""


def get_encoding(name: str) -> Encoding:
    """Return the encoding of that name. Errors: UsageError that lists the names."""
    if name not in ENCODINGS:
        raise UsageError(unknown("state encoding", name, ENCODINGS))
    return ENCODINGS[name]


def buffer_name(kind: str, part: str) -> str:
    """Return the name of a buffer: its kind, followed by the part unless that is the main one."""
    return f"{kind}_{part}" if part else kind


def buffers_of(stored: Mapping[str, str], embeddings: int = 0) -> dict[str, BufferSpec]:
    """Return all buffers by name, for a table kind -> encoding and the number of parameters that are embeddings."""
    return {
        buffer_name(kind, part): spec
        for kind, name in stored.items() for part, spec in get_encoding(name).of(embeddings).parts.items()
    }  # fmt: skip
