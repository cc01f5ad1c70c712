// Softmax of the rows of a matrix [rows, columns].

#define THREADS 128

__device__ float warp_max(float v) {
    for (int s = 16; s > 0; s /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, s));
    return v;
}

__device__ float warp_sum(float v) {
    for (int s = 16; s > 0; s /= 2) v += __shfl_xor_sync(0xffffffff, v, s);
    return v;
}

// One block a row: maximum, sum, result, with trees in shared memory.
extern "C" __global__ void softmax_block(const float* in, float* out, int columns) {
    __shared__ float partial[THREADS];
    const float* row = in + blockIdx.x * columns;
    int t = threadIdx.x;
    float m = -INFINITY;
    for (int i = t; i < columns; i += THREADS) m = fmaxf(m, row[i]);
    partial[t] = m;
    __syncthreads();
    for (int s = THREADS / 2; s > 0; s /= 2) {
        if (t < s) partial[t] = fmaxf(partial[t], partial[t + s]);
        __syncthreads();
    }
    m = partial[0];
    __syncthreads();
    float sum = 0;
    for (int i = t; i < columns; i += THREADS) sum += __expf(row[i] - m);
    partial[t] = sum;
    __syncthreads();
    for (int s = THREADS / 2; s > 0; s /= 2) {
        if (t < s) partial[t] += partial[t + s];
        __syncthreads();
    }
    sum = partial[0];
    for (int i = t; i < columns; i += THREADS) out[blockIdx.x * columns + i] = __expf(row[i] - m) / sum;
}

// One pass for maximum and sum together (Milakov and Gimelshein 2018, arXiv:1805.02867).
extern "C" __global__ void softmax_online(const float* in, float* out, int columns) {
    __shared__ float maxima[THREADS / 32], sums[THREADS / 32];
    const float* row = in + blockIdx.x * columns;
    int t = threadIdx.x;
    float m = -INFINITY, sum = 0;
    for (int i = t; i < columns; i += THREADS) {
        float v = row[i], larger = fmaxf(m, v);
        sum = sum * __expf(m - larger) + __expf(v - larger);
        m = larger;
    }
    float of_warp = warp_max(m);
    sum = warp_sum(m == -INFINITY ? 0.f : sum * __expf(m - of_warp));
    if (t % 32 == 0) {
        maxima[t / 32] = of_warp;
        sums[t / 32] = sum;
    }
    __syncthreads();
    m = maxima[0];
    for (int w = 1; w < THREADS / 32; w++) m = fmaxf(m, maxima[w]);
    sum = 0;
    for (int w = 0; w < THREADS / 32; w++) sum += sums[w] * __expf(maxima[w] - m);
    for (int i = t; i < columns; i += THREADS) out[blockIdx.x * columns + i] = __expf(row[i] - m) / sum;
}

// One warp a row of at most 128 columns, held in registers.
extern "C" __global__ void softmax_warp(const float* in, float* out, int rows, int columns) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float v[4], m = -INFINITY, sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int i = j * 32 + lane;
        v[j] = i < columns ? in[row * columns + i] : -INFINITY;
        m = fmaxf(m, v[j]);
    }
    m = warp_max(m);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        v[j] = __expf(v[j] - m);
        sum += v[j];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int i = j * 32 + lane;
        if (i < columns) out[row * columns + i] = v[j] / sum;
    }
}
