// Softmax of rows in CUDA C++: the twin of softmax.py's kernels `row` and `online`.
//
// What a Triton program says about a whole row is said here for one thread: which elements it loads, how the
// threads of a warp combine their maxima (shuffles), and how the warps do (shared memory and a barrier).
//
//   softmax_rows     a row in registers: 2·M·N·sizeof(T) bytes, columns up to VECTOR·HELD·blockDim.x
//   softmax_online   any width, in two passes: the second finds the row in the L2 cache
//
// One block a row. A thread moves VECTOR elements at once (16 bytes where rows are aligned), and neighbouring
// threads move neighbouring vectors. Launch with a multiple of 32 threads, at most 1024.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define INF __int_as_float(0x7f800000)

template <typename T, int VECTOR>
struct alignas(sizeof(T) * VECTOR) Pack {
    T at[VECTOR];
};

// Combine one number of every thread of the block; every thread gets the result.
template <typename Combine>
__device__ float across_block(float value, float neutral, Combine combine) {
    __shared__ float of_warp[32];
    for (int distance = 16; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) of_warp[warp] = value;
    __syncthreads();
    value = lane < blockDim.x / 32 ? of_warp[lane] : neutral;
    for (int distance = 16; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
    __syncthreads();  // of_warp may be written again only when all warps have read it
    return value;
}

__device__ float block_max(float value) {
    return across_block(value, -INF, [](float a, float b) { return fmaxf(a, b); });
}

__device__ float block_sum(float value) {
    return across_block(value, 0.0f, [](float a, float b) { return a + b; });
}

template <typename T, int VECTOR, int HELD>
__global__ void softmax_rows(const T* x, T* y, long long x_stride, long long y_stride, int columns) {
    x += blockIdx.x * x_stride;
    y += blockIdx.x * y_stride;
    float held[HELD][VECTOR];  // in registers: every index is known when the loops are unrolled
    float top = -INF;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int c = (i * blockDim.x + threadIdx.x) * VECTOR;
        if (c < columns) {
            const auto pack = *reinterpret_cast<const Pack<T, VECTOR>*>(x + c);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                held[i][k] = static_cast<float>(pack.at[k]);
                top = fmaxf(top, held[i][k]);
            }
        } else {
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) held[i][k] = -INF;
        }
    }
    top = block_max(top);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; ++i)
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) {
            held[i][k] = __expf(held[i][k] - top);
            sum += held[i][k];
        }
    const float scale = 1.0f / block_sum(sum);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int c = (i * blockDim.x + threadIdx.x) * VECTOR;
        if (c < columns) {
            Pack<T, VECTOR> pack;
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) pack.at[k] = static_cast<T>(held[i][k] * scale);
            *reinterpret_cast<Pack<T, VECTOR>*>(y + c) = pack;
        }
    }
}

template <typename T, int VECTOR>
__global__ void softmax_online(const T* x, T* y, long long x_stride, long long y_stride, int columns) {
    x += blockIdx.x * x_stride;
    y += blockIdx.x * y_stride;
    float top = -INF, sum = 0.0f;  // of the columns that this thread has seen
    for (int c = threadIdx.x * VECTOR; c < columns; c += blockDim.x * VECTOR) {
        const auto pack = *reinterpret_cast<const Pack<T, VECTOR>*>(x + c);
        float larger = top;
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) larger = fmaxf(larger, static_cast<float>(pack.at[k]));
        const float shift = larger == -INF ? 0.0f : larger;  // −inf − (−inf) is no number
        sum *= __expf(top - shift);
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) sum += __expf(static_cast<float>(pack.at[k]) - shift);
        top = larger;
    }
    const float highest = block_max(top);
    const float scale = 1.0f / block_sum(top == -INF ? 0.0f : sum * __expf(top - highest));
    for (int c = threadIdx.x * VECTOR; c < columns; c += blockDim.x * VECTOR) {
        auto pack = *reinterpret_cast<const Pack<T, VECTOR>*>(x + c);
#pragma unroll
        for (int k = 0; k < VECTOR; ++k)
            pack.at[k] = static_cast<T>(__expf(static_cast<float>(pack.at[k]) - highest) * scale);
        *reinterpret_cast<Pack<T, VECTOR>*>(y + c) = pack;
    }
}
