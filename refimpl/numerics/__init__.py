"""Number formats and every way to round to them. Nothing here knows autograd or policies.

    formats.py               each format as one row: bits, bias, what the largest exponent means
    casts.py                 `cast` rounds to nearest, ties to even; `widen` is exact and refuses any other conversion
    rounding.py              rounding to nearest, ties to even, written out for one number: the definition of `cast`
    rounding_effects.py      what roundings did: exact, rounded, flushed, overflowed; rounding_words.py: the same in words
    fast_cast.py             the same for FP32 <-> FP16, faster, for the NumPy backend
    bits.py                  arrays of numbers as arrays of bit patterns, and back
    stochastic_rounding.py   stochastic rounding
    philox.py                the random bits that it takes
    compensated.py           Kahan summation, and masters split into upper and lower 16 bits
    accumulators.py          matrix products summed in fewer bits than FP32
    quantization/            FP8, MX and NVFP4: codes with scales
    arrays.py                the type `Array`

`casts.cast`, and `fast_cast.cast` with the same bits, are the only ways to round arrays to nearest on the host. The other
places that round: `stochastic_rounding`; `compensated.split`, whose ties go away from zero; `accumulators`, which can cut sums;
the power-of-two scales of `quantization/fp8.py` and `mx.py`; the codebooks of `precision/state_encodings.py`; and on a device
the kernels (`backends/cupy/kernels/cast.cuh`) and cuBLAS.
"""
