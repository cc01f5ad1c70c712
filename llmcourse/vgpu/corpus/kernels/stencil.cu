// Stencils: each output needs its neighbours, from global memory or from a tile with a halo.

#define RADIUS 3
#define THREADS 128

__device__ float at(const float* in, int i, int n) { return i >= 0 && i < n ? in[i] : 0.f; }

extern "C" __global__ void stencil_1d_global(const float* in, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = 0;
    for (int r = -RADIUS; r <= RADIUS; r++) sum += at(in, i + r, n);
    out[i] = sum;
}

extern "C" __global__ void stencil_1d_shared(const float* in, float* out, int n) {
    __shared__ float tile[THREADS + 2 * RADIUS];
    int t = threadIdx.x, i = blockIdx.x * THREADS + t;
    tile[t + RADIUS] = at(in, i, n);
    if (t < RADIUS) {
        tile[t] = at(in, i - RADIUS, n);
        tile[t + THREADS + RADIUS] = at(in, i + THREADS, n);
    }
    __syncthreads();
    if (i >= n) return;
    float sum = 0;
    for (int r = 0; r <= 2 * RADIUS; r++) sum += tile[t + r];
    out[i] = sum;
}

// Five points; the border keeps its values.
extern "C" __global__ void stencil_2d_global(const float* in, float* out, int rows, int columns) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y, i = y * columns + x;
    if (x >= columns || y >= rows) return;
    if (x == 0 || y == 0 || x == columns - 1 || y == rows - 1) out[i] = in[i];
    else out[i] = 0.2f * (in[i] + in[i - 1] + in[i + 1] + in[i - columns] + in[i + columns]);
}

// A tile of 32 × 8 with a halo of one on each side; outside the matrix lie zeros.
extern "C" __global__ void stencil_2d_shared(const float* in, float* out, int rows, int columns) {
    __shared__ float tile[10][34];
    int left = blockIdx.x * 32 - 1, top = blockIdx.y * 8 - 1;
    for (int k = threadIdx.y * 32 + threadIdx.x; k < 340; k += 256) {
        int x = left + k % 34, y = top + k / 34;
        tile[k / 34][k % 34] = x >= 0 && x < columns && y >= 0 && y < rows ? in[y * columns + x] : 0.f;
    }
    __syncthreads();
    int x = left + 1 + threadIdx.x, y = top + 1 + threadIdx.y, p = threadIdx.x + 1, q = threadIdx.y + 1;
    if (x < columns && y < rows)
        out[y * columns + x] = 0.2f * (tile[q][p] + tile[q][p - 1] + tile[q][p + 1] + tile[q - 1][p] + tile[q + 1][p]);
}

// A 3 × 3 convolution whose weights lie in constant memory.
__constant__ float blur[9] = {1 / 16.f, 2 / 16.f, 1 / 16.f, 2 / 16.f, 4 / 16.f, 2 / 16.f, 1 / 16.f, 2 / 16.f, 1 / 16.f};

extern "C" __global__ void stencil_blur(const float* in, float* out, int rows, int columns) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= columns || y >= rows) return;
    float sum = 0;
    for (int j = -1; j <= 1; j++)
        for (int i = -1; i <= 1; i++)
            if (x + i >= 0 && x + i < columns && y + j >= 0 && y + j < rows)
                sum += blur[(j + 1) * 3 + i + 1] * in[(y + j) * columns + x + i];
    out[y * columns + x] = sum;
}
