// All kernels of the CuPy backend. Each has the name, the formula and the order of operations of its NumPy definition in
// refimpl/nn or refimpl/optim, which also name the sources.
//
// The file is compiled once per storage format, with -DSTORAGE=fp32, fp16 or bf16, which is T here. Arithmetic is always fp32.
// Only widen() and round_to<T>() of cast.cuh convert between formats.
//
// Results depend on inputs alone, bit for bit:
//   - No product is fused with a sum: add, sub, mul, div and root below each round once, as NumPy's operations do.
//   - A sum has one order, which its length determines: each thread adds its own elements first to last, then a fixed tree adds
//     the sums of the threads. There are no atomics.
//   - Launches have the block sizes of the constants below (`launch.py` refuses others); elementwise kernels take any grid.
//
// The first loop over a row or a column is unrolled, so that a thread loads several values before it waits for one.
//
// Differs from the NumPy definitions: long sums have another order; exp, log and tanh are CUDA's; and CuPy compiles everything
// with -ftz=true, so fp32 numbers below 2^-126 become zero in any computation.

#include "cast.cuh"

using T = STORAGE;

constexpr int THREADS = 256;  // threads per block of elementwise kernels, and of those with one block per row
constexpr int WARP = 32;      // threads per warp; in kernels with one warp per row,
constexpr int WARPS = 8;      // warps per block
constexpr int COLUMNS = 8;    // in kernels that sum columns, columns per block,
constexpr int LANES = 128;    // and threads per column, which share its rows

constexpr unsigned ALL_LANES = 0xffffffffu;  // all threads of a warp


// ----------------------------------------------------------------------------------------------------------------- arithmetic

__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float div(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float root(float a) { return __fsqrt_rn(a); }

__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }

// The larger of two numbers, or NaN where one of them is NaN: NumPy's maximum. | instead of || avoids a branch.
__device__ inline float larger(float a, float b) { return (a > b) | isnan(a) ? a : b; }

// The first element of this thread in an elementwise kernel, and the distance to its next one.
__device__ inline long long first_element() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline long long stride() { return (long long)gridDim.x * blockDim.x; }

// The row of this thread's warp, in blocks of WARPS warps.
__device__ inline long long row_of_warp() { return (long long)blockIdx.x * WARPS + threadIdx.y; }

using Word = uint4;  // 16 bytes, the most that a thread loads or stores at once
constexpr int IN_WORD = sizeof(Word) / sizeof(T);
__device__ inline bool at_word(const T* x) { return (size_t)x % sizeof(Word) == 0; }

// Reduces one value per lane of a warp to one result, which every lane gets. The tree: lane t takes in t + 16, then t + 8, ...,
// t + 1. warp_fold<add> is a sum, warp_fold<larger> a maximum.
template <float (*fold)(float, float)> __device__ inline float warp_fold(float mine) {
    for (int half = WARP / 2; half > 0; half /= 2) mine = fold(mine, __shfl_down_sync(ALL_LANES, mine, half));
    return __shfl_sync(ALL_LANES, mine, 0);
}

// Reduces one value per thread of a block of THREADS: t takes in t + 128, t + 64, t + 32; then each warp reduces the rest.
template <float (*fold)(float, float)> __device__ inline float block_fold(float mine) {
    __shared__ float values[THREADS];
    int t = threadIdx.x;
    values[t] = mine;
    for (int half = THREADS / 2; half >= WARP; half /= 2) {
        __syncthreads();
        if (t < half) values[t] = fold(values[t], values[t + half]);
    }
    __syncthreads();
    float result = warp_fold<fold>(values[t % WARP]);
    __syncthreads();  // all have read before the next reduction writes
    return result;
}

// Sums one value per thread of a column of LANES threads; every thread of the column gets the sum.
__device__ inline float lanes_sum(float mine) {
    __shared__ float values[LANES][COLUMNS];
    int column = threadIdx.x, lane = threadIdx.y;
    values[lane][column] = mine;
    for (int half = LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        if (lane < half) values[lane][column] = add(values[lane][column], values[lane + half][column]);
    }
    __syncthreads();
    float result = values[0][column];
    __syncthreads();
    return result;
}


// ----------------------------------------------------------------------------------------------- elementwise (elementwise.py)

// y = R(f(x, ...)), elementwise for arrays (n,); in whole words if all arrays are aligned to words.
struct alignas(sizeof(Word)) Values { T at[IN_WORD]; };

template <class F, class... X> __device__ inline void each(F f, T* y, long long n, const X*... x) {
    long long words = (at_word(y) && ... && at_word(x)) ? n / IN_WORD : 0;
    auto on_word = [f](auto... read) {
        Values result;
        for (int k = 0; k < IN_WORD; k++) result.at[k] = round_to<T>(f(widen(read.at[k])...));
        return result;
    };
    #pragma unroll 1  // one load in flight is enough, and leaves registers for more threads
    for (long long i = first_element(); i < words; i += stride()) ((Values*)y)[i] = on_word(((const Values*)x)[i]...);
    for (long long i = words * IN_WORD + first_element(); i < n; i += stride()) y[i] = round_to<T>(f(widen(x[i])...));
}

// y = a + b.  All (n,).  Also used for `fan_in`, the sum of two gradients of one tensor.
extern "C" __global__ void __launch_bounds__(THREADS)
add_forward(const T* a, const T* b, T* y, long long n) {
    each(add, y, n, a, b);
}

constexpr float KAPPA = 0.044715f;
constexpr float BETA = 0.7978845608028654f;              // sqrt(2/pi)
constexpr float THREE_KAPPA_BETA = 0.10703222440890037f;  // 3 KAPPA BETA, rounded once

// t = tanh(sqrt(2/pi) (x + 0.044715 x^3)), from x and x^2.
__device__ inline float gelu_tanh(float x, float square) {
    return tanhf(mul(add(mul(mul(square, x), KAPPA), x), BETA));
}

// y = x/2 (1 + t).  x, y (n,).
extern "C" __global__ void __launch_bounds__(THREADS)
gelu_tanh_forward(const T* x, T* y, long long n) {
    auto gelu = [](float z) { return mul(add(gelu_tanh(z, mul(z, z)), 1.0f), mul(0.5f, z)); };
    each(gelu, y, n, x);
}

// dx = dy/2 (1 + t + x (1 - t^2) sqrt(2/pi) (1 + 3 0.044715 x^2));  t is computed again.  dy, x, dx (n,).
extern "C" __global__ void __launch_bounds__(THREADS)
gelu_tanh_backward(const T* dy, const T* x, T* dx, long long n) {
    auto gradient = [](float d, float z) {
        float square = mul(z, z);
        float t = gelu_tanh(z, square);
        float slope = add(mul(square, THREE_KAPPA_BETA), BETA);  // the derivative of the argument of tanh
        slope = mul(mul(slope, z), sub(1.0f, mul(t, t)));
        return mul(mul(add(add(t, 1.0f), slope), 0.5f), d);
    };
    each(gradient, dx, n, dy, x);
}

// 1 + exp(-z), the inverse of the sigmoid;  and the derivative of silu over the sigmoid s.
__device__ inline float one_plus_exp(float z) { return add(expf(-z), 1.0f); }
__device__ inline float silu_slope(float z, float s) { return add(mul(sub(1.0f, s), z), 1.0f); }

// y = x / (1 + exp(-x)).  x, y (n,).
extern "C" __global__ void __launch_bounds__(THREADS)
silu_forward(const T* x, T* y, long long n) {
    each([](float z) { return div(z, one_plus_exp(z)); }, y, n, x);
}

// dx = dy s (1 + x (1 - s)),  s = sigmoid(x).  dy, x, dx (n,).
extern "C" __global__ void __launch_bounds__(THREADS)
silu_backward(const T* dy, const T* x, T* dx, long long n) {
    auto gradient = [](float d, float z) {
        float s = div(1.0f, one_plus_exp(z));
        return mul(mul(d, s), silu_slope(z, s));
    };
    each(gradient, dx, n, dy, x);
}

// y = R(R(silu(gate)) up).  All (n,).
extern "C" __global__ void __launch_bounds__(THREADS)
swiglu_forward(const T* gate, const T* up, T* y, long long n) {
    each([](float g, float u) { return mul(widen(round_to<T>(div(g, one_plus_exp(g)))), u); }, y, n, gate, up);
}

// dup = R(dy R(silu(gate))),  dgate = R(R(dy up) s (1 + gate (1 - s))),  s = sigmoid(gate).  All (n,).
extern "C" __global__ void __launch_bounds__(THREADS)
swiglu_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, long long n) {
    for (long long i = first_element(); i < n; i += stride()) {
        float d = widen(dy[i]), g = widen(gate[i]), e = one_plus_exp(g), s = div(1.0f, e);
        float ds = widen(round_to<T>(mul(d, widen(up[i]))));
        dup[i] = round_to<T>(mul(widen(round_to<T>(div(g, e))), d));
        dgate[i] = round_to<T>(mul(mul(ds, s), silu_slope(g, s)));
    }
}


// -------------------------------------------------------------------------------------------- rotary position embedding (rope.py)

// y_i = R(R(a cos) - R(b sin)),  y_{i + half} = R(R(b cos) + R(a sin)),  for the pairs (a, b) = (x_i, x_{i + half}) of each head.
// One block per row (b, position); sign is 1, or -1 backward.  x, y (rows, H 2 half);  cos, sin (positions, half), rounded to T.
extern "C" __global__ void __launch_bounds__(THREADS)
rope(const T* x, const float* cos, const float* sin, T* y, int positions, int H, int half, float sign) {
    long long row = blockIdx.x;
    x += row * H * 2 * half;
    y += row * H * 2 * half;
    cos += row % positions * half;
    sin += row % positions * half;
    auto product = [](float p, float q) { return widen(round_to<T>(mul(p, q))); };
    for (int pair = threadIdx.x; pair < H * half; pair += THREADS) {
        int j = pair % half, first = pair / half * 2 * half + j, second = first + half;
        float a = widen(x[first]), b = widen(x[second]);
        float c = widen(round_to<T>(cos[j])), s = mul(widen(round_to<T>(sin[j])), sign);
        y[first] = round_to<T>(sub(product(a, c), product(b, s)));
        y[second] = round_to<T>(add(product(b, c), product(a, s)));
    }
}


// ------------------------------------------------------------------------------------------------------- layer norm (norm.py)

// y = (x - mean) rstd w + b,  rstd = 1 / sqrt(var + eps).  One warp per row.
// x, y (rows, C);  w, b (C,);  mean, rstd (rows,) in fp32, for backward.
extern "C" __global__ void __launch_bounds__(WARP * WARPS)
layernorm_forward(const T* x, const T* w, const T* b /*or null*/, T* y, float* mean, float* rstd, int rows, int C,
                  float eps) {
    long long row = row_of_warp();
    if (row >= rows) return;
    x += row * C;
    y += row * C;

    float sum = 0.0f;
    #pragma unroll 8
    for (int i = threadIdx.x; i < C; i += WARP) sum = add(sum, widen(x[i]));
    float m = div(warp_fold<add>(sum), (float)C);

    float squares = 0.0f;
    for (int i = threadIdx.x; i < C; i += WARP) {
        float centered = sub(widen(x[i]), m);
        squares = add(squares, mul(centered, centered));
    }
    float r = div(1.0f, root(add(div(warp_fold<add>(squares), (float)C), eps)));

    for (int i = threadIdx.x; i < C; i += WARP) {
        float z = mul(mul(sub(widen(x[i]), m), r), widen(w[i]));
        if (b) z = add(z, widen(b[i]));
        y[i] = round_to<T>(z);
    }
    if (threadIdx.x == 0) {
        mean[row] = m;
        rstd[row] = r;
    }
}

// With h = (x - mean) rstd and dh = dy w:  dx = rstd (dh - mean(dh) - h mean(dh h)).  One warp per row.
// dy, x, dx (rows, C);  w (C,);  mean, rstd (rows,).
extern "C" __global__ void __launch_bounds__(WARP * WARPS)
layernorm_backward(const T* dy, const T* x, const T* w, const float* mean, const float* rstd, T* dx, int rows, int C) {
    long long row = row_of_warp();
    if (row >= rows) return;
    dy += row * C;
    x += row * C;
    dx += row * C;
    float m = mean[row], r = rstd[row];

    float sum_dh = 0.0f, sum_dhh = 0.0f;
    #pragma unroll 4
    for (int i = threadIdx.x; i < C; i += WARP) {
        float h = mul(sub(widen(x[i]), m), r);
        float dh = mul(widen(dy[i]), widen(w[i]));
        sum_dh = add(sum_dh, dh);
        sum_dhh = add(sum_dhh, mul(dh, h));
    }
    float mean_dh = div(warp_fold<add>(sum_dh), (float)C);
    float mean_dhh = div(warp_fold<add>(sum_dhh), (float)C);

    for (int i = threadIdx.x; i < C; i += WARP) {
        float h = mul(sub(widen(x[i]), m), r);
        float dh = mul(widen(dy[i]), widen(w[i]));
        dx[i] = round_to<T>(mul(sub(sub(dh, mean_dh), mul(h, mean_dhh)), r));
    }
}

// dw = sum(dy h),  db = sum(dy), over the rows.  One block per COLUMNS columns; lane k adds rows k, k + LANES, ...
// dy, x (rows, C);  mean, rstd (rows,);  dw, db (C,).
extern "C" __global__ void __launch_bounds__(COLUMNS * LANES)
layernorm_weights_backward(const T* dy, const T* x, const float* mean, const float* rstd, T* dw, T* db /*or null*/,
                           int rows, int C) {
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    float sum_dyh = 0.0f, sum_dy = 0.0f;
    if (column < C) {
        #pragma unroll 4
        for (int row = threadIdx.y; row < rows; row += LANES) {
            long long i = (long long)row * C + column;
            float d = widen(dy[i]);
            sum_dyh = add(sum_dyh, mul(d, mul(sub(widen(x[i]), mean[row]), rstd[row])));
            sum_dy = add(sum_dy, d);
        }
    }
    sum_dyh = lanes_sum(sum_dyh);
    sum_dy = lanes_sum(sum_dy);
    if (threadIdx.y == 0 && column < C) {
        dw[column] = round_to<T>(sum_dyh);
        if (db) db[column] = round_to<T>(sum_dy);
    }
}

// y = R(w n),  n = R(x rrms),  rrms = 1 / sqrt(mean(x^2) + eps).  One warp per row.
// x, y (rows, C);  w (C,);  rrms (rows,) in fp32, for backward.
extern "C" __global__ void __launch_bounds__(WARP * WARPS)
llama_rmsnorm_forward(const T* x, const T* w, T* y, float* rrms, int rows, int C, float eps) {
    long long row = row_of_warp();
    if (row >= rows) return;
    x += row * C;
    y += row * C;

    float sum = 0.0f;
    #pragma unroll 8
    for (int i = threadIdx.x; i < C; i += WARP) sum = add(sum, mul(widen(x[i]), widen(x[i])));
    float r = div(1.0f, root(add(div(warp_fold<add>(sum), (float)C), eps)));

    for (int i = threadIdx.x; i < C; i += WARP) {
        T n = round_to<T>(mul(widen(x[i]), r));
        y[i] = round_to<T>(mul(widen(n), widen(w[i])));
    }
    if (threadIdx.x == 0) rrms[row] = r;
}

// With h = x rrms and dn = R(dy w):  dx = rrms (dn - h mean(dn h)).  One warp per row.
// dy, x, dx (rows, C);  w (C,);  rrms (rows,).
extern "C" __global__ void __launch_bounds__(WARP * WARPS)
llama_rmsnorm_backward(const T* dy, const T* x, const T* w, const float* rrms, T* dx, int rows, int C) {
    long long row = row_of_warp();
    if (row >= rows) return;
    x += row * C;
    dy += row * C;
    dx += row * C;
    float r = rrms[row];
    auto dn = [=](int i) { return widen(round_to<T>(mul(widen(dy[i]), widen(w[i])))); };

    float sum = 0.0f;
    #pragma unroll 4
    for (int i = threadIdx.x; i < C; i += WARP) sum = add(sum, mul(dn(i), mul(widen(x[i]), r)));
    float mean = div(warp_fold<add>(sum), (float)C);

    for (int i = threadIdx.x; i < C; i += WARP) {
        float h = mul(widen(x[i]), r);
        dx[i] = round_to<T>(mul(sub(dn(i), mul(h, mean)), r));
    }
}

// dw = sum(R(dy n)) over the rows, with n = R(x rrms).  One block per COLUMNS columns, as above.
// dy, x (rows, C);  rrms (rows,);  dw (C,).
extern "C" __global__ void __launch_bounds__(COLUMNS * LANES)
llama_rmsnorm_weights_backward(const T* dy, const T* x, const float* rrms, T* dw, int rows, int C) {
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (column < C) {
        #pragma unroll 4
        for (int row = threadIdx.y; row < rows; row += LANES) {
            long long i = (long long)row * C + column;
            T n = round_to<T>(mul(widen(x[i]), rrms[row]));
            sum = add(sum, widen(round_to<T>(mul(widen(dy[i]), widen(n)))));
        }
    }
    sum = lanes_sum(sum);
    if (threadIdx.y == 0 && column < C) dw[column] = round_to<T>(sum);
}


// ----------------------------------------------------------------------------------------- bias of a linear layer (linear.py)

// y = R(products + b),  products = x w^T in fp32, so that y is rounded once.  One block per row; y may be products.
// products, y (rows, C);  b (C,).
extern "C" __global__ void __launch_bounds__(THREADS)
bias_forward(const float* products, const T* b, T* y, int C) {
    long long row = blockIdx.x;
    for (int i = threadIdx.x; i < C; i += THREADS) y[row * C + i] = round_to<T>(add(products[row * C + i], widen(b[i])));
}

// db = the sum of the rows of dy.  One block per COLUMNS columns, as above.  dy (rows, C);  db (C,).
extern "C" __global__ void __launch_bounds__(COLUMNS * LANES)
bias_backward(const T* dy, T* db, int rows, int C) {
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (column < C) {
        #pragma unroll 8
        for (int row = threadIdx.y; row < rows; row += LANES) sum = add(sum, widen(dy[(long long)row * C + column]));
    }
    sum = lanes_sum(sum);
    if (threadIdx.y == 0 && column < C) db[column] = round_to<T>(sum);
}


// ------------------------------------------------------------------------------------------------------- heads (attention.py)

// Values are copied, in words where a head is a whole number of words: V is T or Word, and D counts Vs.
__device__ inline bool in_words(const T* x, const T* y, int D) { return D % IN_WORD == 0 && at_word(x) && at_word(y); }

// The index in y (parts, B, H, positions, D) of element i of row blockIdx.x of x (B, positions, parts, H, D).
__device__ inline long long among_heads(int i, int positions, int H, int D) {
    int B = gridDim.x / positions, b = blockIdx.x / positions, position = blockIdx.x % positions;
    int part = i / (H * D), h = i / D % H;
    return ((((long long)part * B + b) * H + h) * positions + position) * D + i % D;
}

template <class V> __device__ inline void split(const V* x, V* y, int positions, int parts, int H, int D) {
    int width = parts * H * D;
    x += (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += THREADS) y[among_heads(i, positions, H, D)] = x[i];
}

template <class V> __device__ inline void merge(const V* y, V* x, int positions, int parts, int H, int D) {
    int width = parts * H * D;
    x += (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += THREADS) x[i] = y[among_heads(i, positions, H, D)];
}

// y = x with the heads split: q, k and v where parts is 3.  One block per row (b, position) of x.
extern "C" __global__ void __launch_bounds__(THREADS)
split_heads(const T* x, T* y, int positions, int parts, int H, int D) {
    if (in_words(x, y, D)) split((const Word*)x, (Word*)y, positions, parts, H, D / IN_WORD);
    else split(x, y, positions, parts, H, D);
}

// x = y with the heads joined: the inverse of split_heads.
extern "C" __global__ void __launch_bounds__(THREADS)
merge_heads(const T* y, T* x, int positions, int parts, int H, int D) {
    if (in_words(x, y, D)) merge((const Word*)y, (Word*)x, positions, parts, H, D / IN_WORD);
    else merge(y, x, positions, parts, H, D);
}


// ---------------------------------------------------------------------------------- causal softmax (attention.py, softmax.py)

// P = R(softmax(S')),  S' = R(S scale),  over the keys up to the query; later keys get 0.  P may be S where it has T.
// S, P (heads, queries, keys), as many keys as queries.  One warp per row: grid (heads, queries / WARPS).
// Each loop computes S' again, since there is no memory for it where P is S.
// Differs from NumPy: later keys are 0 also where a row is NaN.
template <class U> __device__ inline void causal_softmax(const T* S, U* P, int queries, float scale) {
    unsigned query = blockIdx.y * WARPS + threadIdx.y;
    if (query >= queries) return;
    int keys = query + 1;
    long long row = (long long)blockIdx.x * queries + query;
    S += row * queries;
    P += row * queries;
    auto scaled = [=](int i) { return widen(round_to<T>(mul(widen(S[i]), scale))); };

    float largest = minus_infinity();
    #pragma unroll 8
    for (int i = threadIdx.x; i < keys; i += WARP) largest = larger(largest, scaled(i));
    largest = warp_fold<larger>(largest);

    float sum = 0.0f;
    #pragma unroll 4
    for (int i = threadIdx.x; i < keys; i += WARP) sum = add(sum, expf(sub(scaled(i), largest)));
    sum = warp_fold<add>(sum);

    int i = threadIdx.x;
    for (; i < keys; i += WARP) P[i] = round_to<U>(div(expf(sub(scaled(i), largest)), sum));
    for (; i < queries; i += WARP) P[i] = round_to<U>(0.0f);
}

extern "C" __global__ void __launch_bounds__(WARP * WARPS)
causal_softmax_forward(const T* S, T* P, int queries, float scale) {
    causal_softmax(S, P, queries, scale);
}

// The same with P in fp32, as grouped attention has it (grouped_attention.py).
extern "C" __global__ void __launch_bounds__(WARP * WARPS)
wide_causal_softmax_forward(const T* S, float* P, int queries, float scale) {
    causal_softmax(S, P, queries, scale);
}

// dS = R(dS' scale),  dS' = R(P (dP - sum(dP P))); later keys get 0, also where dP is infinite.  dS may be dP.
// P, dP, dS and the grid as in forward.
template <class U> __device__ inline void causal_softmax_slope(const U* P, const T* dP, T* dS, int queries, float scale) {
    unsigned query = blockIdx.y * WARPS + threadIdx.y;
    if (query >= queries) return;
    int keys = query + 1;
    long long row = (long long)blockIdx.x * queries + query;
    P += row * queries;
    dP += row * queries;
    dS += row * queries;

    float sum = 0.0f;
    #pragma unroll 8
    for (int i = threadIdx.x; i < keys; i += WARP) sum = add(sum, mul(widen(dP[i]), widen(P[i])));
    sum = warp_fold<add>(sum);

    int i = threadIdx.x;
    for (; i < keys; i += WARP) {
        T unscaled = round_to<T>(mul(sub(widen(dP[i]), sum), widen(P[i])));
        dS[i] = round_to<T>(mul(widen(unscaled), scale));
    }
    for (; i < queries; i += WARP) dS[i] = round_to<T>(0.0f);
}

extern "C" __global__ void __launch_bounds__(WARP * WARPS)
causal_softmax_backward(const T* P, const T* dP, T* dS, int queries, float scale) {
    causal_softmax_slope(P, dP, dS, queries, scale);
}

extern "C" __global__ void __launch_bounds__(WARP * WARPS)
wide_causal_softmax_backward(const float* P, const T* dP, T* dS, int queries, float scale) {
    causal_softmax_slope(P, dP, dS, queries, scale);
}


// ------------------------------------------------------------------------------------------------------------- loss (loss.py)

// Whether a target is in range. The loss is NaN for one that is neither in range nor ignored.
__device__ inline bool is_class(long long target, int V) { return 0 <= target && target < V; }
__device__ inline float not_a_number() { return __int_as_float(0x7fc00000); }

// row_loss = log_sum - (z[target] - largest),  log_sum = log(sum exp(z - largest));  0 where the target is ignored, NaN where
// it is out of range.  One block per row.  cross_entropy_mean makes the loss of them.
// logits (rows, V);  target, row_loss, largest, log_sum (rows,), the last two for backward.
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_forward(const T* logits, const long long* target, float* row_loss, float* largest, float* log_sum, int V,
                      long long ignore_index) {
    long long row = blockIdx.x;
    logits += row * V;

    float most = minus_infinity();
    for (int i = threadIdx.x; i < V; i += THREADS) most = larger(most, widen(logits[i]));
    most = block_fold<larger>(most);

    float sum = 0.0f;
    for (int i = threadIdx.x; i < V; i += THREADS) sum = add(sum, expf(sub(widen(logits[i]), most)));
    sum = block_fold<add>(sum);

    if (threadIdx.x == 0) {
        float l = logf(sum);
        long long i = target[row];
        float at_target = is_class(i, V) ? widen(logits[i]) : not_a_number();
        row_loss[row] = i == ignore_index ? 0.0f : sub(l, sub(at_target, most));
        largest[row] = most;
        log_sum[row] = l;
    }
}

// dz = (softmax(z) - onehot(target)) dloss / counted;  0 where the target is ignored, NaN where it is out of range.
// One block per row; dloss is the loss scale, on the device.
// logits, dz (rows, V);  target, largest, log_sum (rows,);  counted, dloss (1,).
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_backward(const T* logits, const long long* target, const float* largest, const float* log_sum,
                       const float* counted, const float* dloss, T* dz, int V, long long ignore_index) {
    long long row = blockIdx.x;
    logits += row * V;
    dz += row * V;
    float each = is_class(target[row], V) ? div(*dloss, *counted) : not_a_number();
    if (target[row] == ignore_index) each = 0.0f;
    float most = largest[row], log = log_sum[row];
    for (int i = threadIdx.x; i < V; i += THREADS) {
        float d = mul(expf(sub(sub(widen(logits[i]), most), log)), each);
        if (i == target[row]) d = sub(d, each);
        dz[i] = round_to<T>(d);
    }
}

// counted = the number of targets that are not ignored;  loss = sum(row_loss) / counted, NaN for none.  One block.
// row_loss, target (rows,);  loss, counted (1,).
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_mean(const float* row_loss, const long long* target, float* loss, float* counted, int rows,
                   long long ignore_index) {
    float sum = 0.0f, n = 0.0f;
    for (long long i = threadIdx.x; i < rows; i += THREADS) {
        sum = add(sum, row_loss[i]);
        n = add(n, target[i] == ignore_index ? 0.0f : 1.0f);
    }
    sum = block_fold<add>(sum);
    n = block_fold<add>(n);
    if (threadIdx.x == 0) {
        *counted = n;
        *loss = div(sum, n);
    }
}


// --------------------------------------------------------------------------------------------------- embedding (embedding.py)

// dw[r] = the sum of dy over all positions of token r, first to last; 0 for a token that does not occur.
// One block per row r of the table and THREADS columns: grid (V, columns).  tokens (n,);  dy (n, C);  dw (V, C).
// A block compares THREADS tokens at a time with r, and shares the results as bits, one per token. Most bits are zero: each
// lane tests one word of them, and words of zeros are skipped.
extern "C" __global__ void __launch_bounds__(THREADS)
embedding_backward(const long long* tokens, const T* dy, T* dw, int n, int C) {
    constexpr int WORDS = THREADS / 32;
    __shared__ unsigned here[WORDS];
    long long row = blockIdx.x;
    int t = threadIdx.x, column = blockIdx.y * THREADS + t;

    float sum = 0.0f;
    for (long long start = 0; start < n; start += THREADS) {
        unsigned seen = __ballot_sync(ALL_LANES, start + t < n && tokens[start + t] == row);
        if (t % 32 == 0) here[t / 32] = seen;
        __syncthreads();
        unsigned words = __ballot_sync(ALL_LANES, t % 32 < WORDS && here[t % WORDS] != 0);
        for (; words != 0; words &= words - 1) {  // the lowest set bit is the next word
            int word = __ffs(words) - 1;
            for (unsigned left = here[word]; left != 0; left &= left - 1) {  // and here the next position
                long long place = start + 32 * word + __ffs(left) - 1;
                if (column < C) sum = add(sum, widen(dy[place * C + column]));
            }
        }
        __syncthreads();  // all have read these bits before the next ones are written
    }
    if (column < C) dw[row * C + column] = round_to<T>(sum);
}


// ---------------------------------------------------------------------------------------- step 3: gradients up (gradients.py)

// For each `grain` of the flat gradients, one block: whether a scaled gradient, or 1/S, is Inf or NaN, and the sum of squares
// of the unscaled ones, g / S.  grads (n,);  inverse_scale (1,), which is 1/S;  partial, partial_bad (grains,).
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_norm(const T* grads, const float* inverse_scale, float* partial, bool* partial_bad, long long n, int grain) {
    long long start = (long long)blockIdx.x * grain;
    long long stop = start + grain < n ? start + grain : n;

    float squares = 0.0f;
    bool bad = !isfinite(*inverse_scale);
    for (long long i = start + threadIdx.x; i < stop; i += THREADS) {
        float scaled = widen(grads[i]);
        float g = mul(scaled, *inverse_scale);
        squares = add(squares, mul(g, g));
        bad = bad || !isfinite(scaled);
    }
    squares = block_fold<add>(squares);
    float bad_threads = block_fold<add>(bad ? 1.0f : 0.0f);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = squares;
        partial_bad[blockIdx.x] = bad_threads > 0.0f;
    }
}

// norm = sqrt(sum of partial);  found_inf = any of partial_bad.  One block.
// partial, partial_bad (grains,);  norm, found_inf (1,).
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_norm_fold(const float* partial, const bool* partial_bad, float* norm, bool* found_inf, int grains) {
    float sum = 0.0f;
    bool bad = false;
    for (int i = threadIdx.x; i < grains; i += THREADS) {
        sum = add(sum, partial[i]);
        bad = bad || partial_bad[i];
    }
    sum = block_fold<add>(sum);
    float bad_threads = block_fold<add>(bad ? 1.0f : 0.0f);
    if (threadIdx.x == 0) {
        *norm = root(sum);
        *found_inf = bad_threads > 0.0f;
    }
}


// ------------------------------------------------------------------------------------- step 4: update, or skip (optimizer.py)

// Whether i is in one of the ranges start..stop, which are sorted and disjoint: binary search for the first that ends after i.
__device__ inline bool in_ranges(long long i, const long long* start, const long long* stop, int ranges) {
    int low = 0, high = ranges;
    while (low < high) {
        int middle = (low + high) / 2;
        if (stop[middle] <= i) low = middle + 1;
        else high = middle;
    }
    return low < ranges && start[low] <= i;
}

//     g = grads / S clip
//     w = w (1 - lr wd)                                                    where i is in a decayed range
//     m = m + (1 - beta1) (g - m)
//     v = v beta2 + (1 - beta2) g g
//     w = w - (lr / (1 - beta1^t)) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Nothing changes where found_inf is set. The host has read no value on the way here.
// w, m, v (n,) in fp32, in place;  grads (n,);  inverse_scale, clip, found_inf (1,);
// scalars (3,): 1 - lr wd,  lr / (1 - beta1^t),  sqrt(1 - beta2^t), all rounded from double;  decayed_start, _stop (ranges,).
extern "C" __global__ void __launch_bounds__(THREADS)
adamw(float* w, float* m, float* v, const T* grads, const float* inverse_scale, const float* clip, const float* scalars,
      const bool* found_inf, const long long* decayed_start, const long long* decayed_stop, int ranges,
      float one_minus_beta1, float beta2, float one_minus_beta2, float eps, long long n) {
    if (*found_inf) return;
    float decay = scalars[0], step_size = scalars[1], root_correction = scalars[2];
    for (long long i = first_element(); i < n; i += stride()) {
        float g = mul(mul(widen(grads[i]), *inverse_scale), *clip);
        float master = w[i];
        if (in_ranges(i, decayed_start, decayed_stop, ranges)) master = mul(master, decay);
        float first = add(m[i], mul(sub(g, m[i]), one_minus_beta1));
        float second = add(mul(v[i], beta2), mul(mul(g, one_minus_beta2), g));
        float denominator = add(div(root(second), root_correction), eps);
        w[i] = sub(master, div(mul(first, step_size), denominator));
        m[i] = first;
        v[i] = second;
    }
}
