// cp.async: global to shared memory without passing through registers, while the block computes.
#include <cuda_pipeline.h>

#define THREADS 64

__device__ float add(float a, float b) { return a + b; }
__device__ float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Each block sums `tiles` tiles of THREADS elements into one; the next tile arrives while this one is added.
template <typename T>
__device__ void stream_tiles(const T* in, T* out, int tiles) {
    __shared__ T buffer[2][THREADS];
    int t = threadIdx.x;
    const T* mine = in + blockIdx.x * tiles * THREADS;
    __pipeline_memcpy_async(&buffer[0][t], &mine[t], sizeof(T));
    __pipeline_commit();
    T sum = T();
    for (int i = 0; i < tiles; i++) {
        if (i + 1 < tiles) __pipeline_memcpy_async(&buffer[(i + 1) % 2][t], &mine[(i + 1) * THREADS + t], sizeof(T));
        __pipeline_commit();
        __pipeline_wait_prior(1);
        __syncthreads();
        T other = buffer[i % 2][THREADS - 1 - t];  // another thread's element: the barrier is needed
        sum = add(sum, other);
        __syncthreads();
    }
    out[blockIdx.x * THREADS + t] = sum;
}

extern "C" __global__ void async_float(const float* in, float* out, int tiles) { stream_tiles(in, out, tiles); }
extern "C" __global__ void async_float4(const float4* in, float4* out, int tiles) { stream_tiles(in, out, tiles); }

// Copies a strip of a matrix, column by column: the global side is uncoalesced, the shared side conflicts.
extern "C" __global__ void async_columns(const float* in, float* out, int columns) {
    __shared__ float tile[32 * 32];
    int t = threadIdx.x;
    for (int i = 0; i < 32; i++) __pipeline_memcpy_async(&tile[t * 32 + i], &in[(blockIdx.x * 32 + t) * columns + i], 4);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    for (int i = 0; i < 32; i++) out[(blockIdx.x * 32 + i) * 32 + t] = tile[i * 32 + t];
}
