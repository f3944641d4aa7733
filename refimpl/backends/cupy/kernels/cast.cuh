// Conversions between floating-point formats, as in numerics/casts.py: no other file converts in CUDA.
//
//     widen(x)         fp16 or bf16 -> fp32, exact; fp32 is returned as it is
//     round_to<T>(x)   fp32 -> T, to nearest, ties to the even fraction; values beyond the largest become infinities
//
// 16-bit types are for storage only: a kernel widens what it loads, computes in fp32, and rounds when it stores.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using fp32 = float;
using fp16 = __half;
using bf16 = __nv_bfloat16;

__device__ inline float widen(fp32 x) { return x; }
__device__ inline float widen(fp16 x) { return __half2float(x); }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }

template <class T> __device__ inline T round_to(float x);
template <> __device__ inline fp32 round_to<fp32>(float x) { return x; }
template <> __device__ inline fp16 round_to<fp16>(float x) { return __float2half_rn(x); }
template <> __device__ inline bf16 round_to<bf16>(float x) { return __float2bfloat16_rn(x); }
