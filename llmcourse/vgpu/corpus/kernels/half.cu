// Sixteen-bit numbers: half a float each, two to a register.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void copy_half(const __half* in, __half* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i];
}

extern "C" __global__ void half2_axpy(__half2 a, const __half2* x, __half2* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = __hfma2(a, x[i], y[i]);
}

// Products in half precision, sums in single; one warp a row.
extern "C" __global__ void half_dot(const __half* a, const __half* b, float* out, int columns) {
    float sum = 0;
    for (int i = threadIdx.x; i < columns; i += 32)
        sum += __half2float(a[blockIdx.x * columns + i]) * __half2float(b[blockIdx.x * columns + i]);
    for (int s = 16; s > 0; s /= 2) sum += __shfl_down_sync(0xffffffff, sum, s);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

extern "C" __global__ void bfloat16_scale(const __nv_bfloat16* in, __nv_bfloat16* out, float by, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __float2bfloat16(__bfloat162float(in[i]) * by);
}

// A tile of halves in shared memory: two neighbours share a bank's word.
extern "C" __global__ void half_transpose(const __half* in, __half* out, int n) {
    __shared__ __half tile[32][34];
    int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
    for (int j = 0; j < 32; j += 8)
        if (x < n && y + j < n) tile[threadIdx.y + j][threadIdx.x] = in[(y + j) * n + x];
    __syncthreads();
    x = blockIdx.y * 32 + threadIdx.x;
    y = blockIdx.x * 32 + threadIdx.y;
    for (int j = 0; j < 32; j += 8)
        if (x < n && y + j < n) out[(y + j) * n + x] = tile[threadIdx.x][threadIdx.y + j];
}
