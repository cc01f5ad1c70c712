// LayerNorm and RMSNorm of the rows of a matrix [rows, columns].

#define THREADS 128

__device__ float block_sum(float v) {
    __shared__ float of_warp[THREADS / 32];
    for (int s = 16; s > 0; s /= 2) v += __shfl_xor_sync(0xffffffff, v, s);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < THREADS / 32; w++) v += of_warp[w];
    return v;
}

extern "C" __global__ void layernorm(const float* in, const float* weight, const float* bias, float* out, int columns) {
    const float* row = in + blockIdx.x * columns;
    float sum = 0, squares = 0;
    for (int i = threadIdx.x; i < columns; i += THREADS) sum += row[i];
    float mean = block_sum(sum) / columns;
    for (int i = threadIdx.x; i < columns; i += THREADS) squares += (row[i] - mean) * (row[i] - mean);
    float scale = rsqrtf(block_sum(squares) / columns + 1e-5f);
    for (int i = threadIdx.x; i < columns; i += THREADS)
        out[blockIdx.x * columns + i] = (row[i] - mean) * scale * weight[i] + bias[i];
}

// Four columns an access; `quads` = columns / 4.
extern "C" __global__ void rmsnorm_float4(const float4* in, const float4* weight, float4* out, int quads) {
    const float4* row = in + blockIdx.x * quads;
    float squares = 0;
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        float4 v = row[i];
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float scale = rsqrtf(block_sum(squares) / (4 * quads) + 1e-5f);
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        float4 v = row[i], w = weight[i];
        out[blockIdx.x * quads + i] = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
    }
}
