// Transposes of a row-major matrix [rows, columns]: one side coalesced, then both through shared memory.

#define TILE 32
#define ROWS 8   // blockDim = (TILE, ROWS): each thread carries TILE / ROWS elements

extern "C" __global__ void transpose_read_coalesced(const float* in, float* out, int rows, int columns) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x < columns && y < rows) out[x * rows + y] = in[y * columns + x];
}

extern "C" __global__ void transpose_write_coalesced(const float* in, float* out, int rows, int columns) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x < rows && y < columns) out[y * rows + x] = in[x * columns + y];
}

template <int PITCH>
__device__ void transpose_tiled(const float* in, float* out, int rows, int columns) {
    __shared__ float tile[TILE * PITCH];
    int x = blockIdx.x * TILE + threadIdx.x, y = blockIdx.y * TILE + threadIdx.y;
    for (int j = 0; j < TILE; j += ROWS)
        if (x < columns && y + j < rows) tile[(threadIdx.y + j) * PITCH + threadIdx.x] = in[(y + j) * columns + x];
    __syncthreads();
    x = blockIdx.y * TILE + threadIdx.x;
    y = blockIdx.x * TILE + threadIdx.y;
    for (int j = 0; j < TILE; j += ROWS)
        if (x < rows && y + j < columns) out[(y + j) * rows + x] = tile[threadIdx.x * PITCH + threadIdx.y + j];
}

extern "C" __global__ void transpose_shared(const float* in, float* out, int rows, int columns) {
    transpose_tiled<TILE>(in, out, rows, columns);
}

extern "C" __global__ void transpose_padded(const float* in, float* out, int rows, int columns) {
    transpose_tiled<TILE + 1>(in, out, rows, columns);
}

extern "C" __global__ void transpose_padded_too_little(const float* in, float* out, int rows, int columns) {
    transpose_tiled<TILE + 4>(in, out, rows, columns);
}

// No padding: element (row, column) lies at column ^ row.
extern "C" __global__ void transpose_swizzled(const float* in, float* out, int rows, int columns) {
    __shared__ float tile[TILE][TILE];
    int x = blockIdx.x * TILE + threadIdx.x, y = blockIdx.y * TILE + threadIdx.y;
    for (int j = 0; j < TILE; j += ROWS) {
        int row = threadIdx.y + j;
        if (x < columns && y + j < rows) tile[row][threadIdx.x ^ row] = in[(y + j) * columns + x];
    }
    __syncthreads();
    x = blockIdx.y * TILE + threadIdx.x;
    y = blockIdx.x * TILE + threadIdx.y;
    for (int j = 0; j < TILE; j += ROWS) {
        int column = threadIdx.y + j;
        if (x < rows && y + j < columns) out[(y + j) * rows + x] = tile[threadIdx.x][column ^ threadIdx.x];
    }
}
