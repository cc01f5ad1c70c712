// Weights in 4 and 8 bits times a vector: one warp a row.

// Eight weights of 4 bits in each word, value w - 8; one scale for every 32 weights.
extern "C" __global__ void int4_gemv(const unsigned int* packed, const float* scale, const float* x, float* y, int columns) {
    int row = blockIdx.x, lane = threadIdx.x, words = columns / 8;
    float sum = 0;
    for (int w = lane; w < words; w += 32) {
        unsigned int bits = packed[row * words + w];
        float part = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) part += (float)((int)(bits >> 4 * j & 15) - 8) * x[w * 8 + j];
        sum += part * scale[row * (columns / 32) + w / 4];
    }
    for (int s = 16; s > 0; s /= 2) sum += __shfl_down_sync(0xffffffff, sum, s);
    if (lane == 0) y[row] = sum;
}

// Four weights of 8 bits in each access.
extern "C" __global__ void int8_gemv(const char4* weight, float scale, const float4* x, float* y, int quads) {
    int row = blockIdx.x, lane = threadIdx.x;
    float sum = 0;
    for (int i = lane; i < quads; i += 32) {
        char4 w = weight[row * quads + i];
        float4 v = x[i];
        sum += w.x * v.x + w.y * v.y + w.z * v.z + w.w * v.w;
    }
    for (int s = 16; s > 0; s /= 2) sum += __shfl_down_sync(0xffffffff, sum, s);
    if (lane == 0) y[row] = sum * scale;
}
