// The one door for rounding in CUDA, the twin of cast.py: kernels change a floating-point format here and nowhere else.
//
//     widen(x)         fp16 or bf16 -> fp32, exact; what is fp32 already passes as it is
//     round_to<T>(x)   fp32 -> T, to the nearest value, ties to the even fraction; beyond the largest: an infinity
//
// 16-bit types are storage, never arithmetic: a kernel widens what it loads, computes in fp32, and rounds once, at the store.

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
