"""Number formats and every way to round to them. Nothing here knows autograd or policies.

    formats.py         each format as a row of facts: bits, exponent range, what overflow gives
    cast.py            `cast` rounds to nearest, ties to even; `widen` is exact and refuses any other conversion
    fast_cast.py       bit tricks behind cast.py for long FP16 arrays
    bits.py            arrays of numbers as arrays of bit patterns, and back
    stochastic.py      stochastic rounding, and the random bits that it takes
    compensated.py     Kahan summation, and masters split into upper and lower 16 bits
    accumulators.py    matrix products summed in fewer bits than FP32
    quantization/      FP8, MX and NVFP4: codes with scales

Six places round: `cast` here; `stochastic.round_exactly` and its BF16 version; `compensated.split`; the accumulators; the
codebooks in `precision/state_encodings.py`; and on a device the kernels (`backends/cupy/kernels/cast.cuh`).
"""
