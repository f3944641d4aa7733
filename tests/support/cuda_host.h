// What kernels.cu needs of CUDA, for g++: the whole of a launch runs on one thread of the host.
//
// Each thread of a block is a fiber that runs until it meets a barrier, and then lets the next one run. Warps take turns from one
// barrier of the block to the next; within a warp, lanes take turns from one exchange of the warp (a ballot, a shuffle) to the
// next. So no warp waits for another but where the kernel says so. NVIDIA's own headers convert fp16 and bf16.

#pragma once

#include <cmath>
#include <cstdlib>
#include <functional>
#include <setjmp.h>
#include <ucontext.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __device__  // NVIDIA's headers give these a meaning of their own under g++
#undef __global__
#undef __shared__
#undef __launch_bounds__
#define __device__
#define __global__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(threads)

using std::isfinite;
using std::isnan;

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fsqrt_rn(float a) { return sqrtf(a); }
static float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
static int __ffs(int bits) { return __builtin_ffs(bits); }

// --------------------------------------------------------------------------------------------------------------- fibers

constexpr int MOST_THREADS = 1024, STACK = 1 << 16;

static char* stacks = (char*)malloc((size_t)MOST_THREADS * STACK);
static ucontext_t starts[MOST_THREADS];   // a fiber begins here, on a stack of its own,
static jmp_buf waits[MOST_THREADS];       // and goes on here: a jump asks nothing of the operating system, as a context does
static jmp_buf scheduler;
static bool started[MOST_THREADS], finished[MOST_THREADS], in_warp[MOST_THREADS];  // in_warp: waits for its warp only
static float shown[MOST_THREADS];
static std::function<void()> kernel;

static int this_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }

static void wait(bool for_warp) {
    in_warp[this_thread()] = for_warp;
    if (_setjmp(waits[this_thread()]) == 0) _longjmp(scheduler, 1);
}

static void __syncthreads() { wait(false); }

// Each lane shows a value; then each looks at those of its warp.
template <class Look> static auto exchange(float mine, Look look) {
    int thread = this_thread(), first = thread / 32 * 32;
    shown[thread] = mine;
    wait(true);
    auto seen = look(shown + first, thread % 32);
    wait(true);
    return seen;
}

static unsigned __ballot_sync(unsigned, bool vote) {
    return exchange(vote, [](const float* votes, int) {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; lane++) bits |= (unsigned)(votes[lane] != 0) << lane;
        return bits;
    });
}

static float __shfl_sync(unsigned, float value, int from) {
    return exchange(value, [from](const float* values, int) { return values[from]; });
}

static float __shfl_down_sync(unsigned, float value, int by) {
    return exchange(value, [by](const float* values, int lane) { return values[lane + by < 32 ? lane + by : lane]; });
}

static void fiber() {
    kernel();
    finished[this_thread()] = true;
    _longjmp(scheduler, 1);
}

// Let a thread run to its next barrier, or to its end. Not inlined: the jump back must find the caller's variables as they were.
__attribute__((noinline)) static void resume(int thread) {
    threadIdx = {(unsigned)thread % blockDim.x, (unsigned)thread / blockDim.x, 0};
    if (_setjmp(scheduler) != 0) return;
    if (started[thread]) _longjmp(waits[thread], 1);
    started[thread] = true;
    setcontext(&starts[thread]);
}

// A warp, from one barrier of the block to the next, or to its end; its first thread is `first`. False: its lanes came apart.
static bool run_warp(int first, int lanes, bool reverse) {
    int exchanging = 0, ended = 0;
    do {
        exchanging = ended = 0;
        for (int turn = 0; turn < lanes; turn++) {
            int thread = first + (reverse ? lanes - 1 - turn : turn);
            resume(thread);
            ended += finished[thread];
            exchanging += !finished[thread] && in_warp[thread];
        }
    } while (exchanging == lanes);
    return exchanging == 0 && (ended == 0 || ended == lanes);
}

// One block. False: some threads ended, or exchanged values in their warp, while others waited at a barrier.
static bool run_block(bool reverse) {
    int threads = blockDim.x * blockDim.y, warps = (threads + 31) / 32;
    for (int thread = 0; thread < threads; thread++) {
        started[thread] = finished[thread] = false;
        getcontext(&starts[thread]);
        starts[thread].uc_stack.ss_sp = stacks + (size_t)thread * STACK;
        starts[thread].uc_stack.ss_size = STACK;
        makecontext(&starts[thread], fiber, 0);
    }
    while (true) {
        int ended = 0;
        for (int turn = 0; turn < warps; turn++) {
            int first = 32 * (reverse ? warps - 1 - turn : turn), lanes = threads - first < 32 ? threads - first : 32;
            if (!run_warp(first, lanes, reverse)) return false;
            ended += finished[first];
        }
        if (ended != 0) return ended == warps;
    }
}

// A whole grid; blocks and threads take turns first to last or, in reverse, last to first. False as above.
static bool run_grid(const int* grid, const int* block, bool reverse, std::function<void()> body) {
    kernel = body;
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], 1};
    blockDim = {(unsigned)block[0], (unsigned)block[1], 1};
    bool good = true;
    int blocks = grid[0] * grid[1];
    for (int turn = 0; turn < blocks; turn++) {
        unsigned at = reverse ? blocks - 1 - turn : turn;
        blockIdx = {at % gridDim.x, at / gridDim.x, 0};
        good = run_block(reverse) && good;
    }
    return good;
}

// The C library's functions, which the kernels call here, for arrays.
#define HOST_FUNCTION(NAME) \
    extern "C" void each_##NAME(const float* x, float* y, long long n) { for (long long i = 0; i < n; i++) y[i] = NAME(x[i]); }
HOST_FUNCTION(expf)
HOST_FUNCTION(logf)
HOST_FUNCTION(tanhf)
