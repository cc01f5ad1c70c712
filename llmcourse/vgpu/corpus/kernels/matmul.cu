// C [m, n] = A [m, k] · B [k, n], all row-major: the ladder from one thread per element to registers.

extern "C" __global__ void matmul_naive(const float* a, const float* b, float* c, int m, int n, int k) {
    int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= m || column >= n) return;
    float sum = 0;
    for (int i = 0; i < k; i++) sum += a[row * k + i] * b[i * n + column];
    c[row * n + column] = sum;
}

// Neighbouring threads take neighbouring rows: lanes read A and write C a whole row apart.
extern "C" __global__ void matmul_uncoalesced(const float* a, const float* b, float* c, int m, int n, int k) {
    int row = blockIdx.x * blockDim.x + threadIdx.x, column = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= m || column >= n) return;
    float sum = 0;
    for (int i = 0; i < k; i++) sum += a[row * k + i] * b[i * n + column];
    c[row * n + column] = sum;
}

template <int TILE, int PITCH>
__device__ void matmul_tiled(const float* a, const float* b, float* c, int m, int n, int k) {
    __shared__ float tile_a[TILE * PITCH], tile_b[TILE * PITCH];
    int x = threadIdx.x, y = threadIdx.y;
    int row = blockIdx.y * TILE + y, column = blockIdx.x * TILE + x;
    float sum = 0;
    for (int start = 0; start < k; start += TILE) {
        tile_a[y * PITCH + x] = row < m && start + x < k ? a[row * k + start + x] : 0.f;
        tile_b[y * PITCH + x] = start + y < k && column < n ? b[(start + y) * n + column] : 0.f;
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += tile_a[y * PITCH + i] * tile_b[i * PITCH + x];
        __syncthreads();
    }
    if (row < m && column < n) c[row * n + column] = sum;
}

extern "C" __global__ void matmul_tiled_16(const float* a, const float* b, float* c, int m, int n, int k) {
    matmul_tiled<16, 16>(a, b, c, m, n, k);
}

extern "C" __global__ void matmul_tiled_32(const float* a, const float* b, float* c, int m, int n, int k) {
    matmul_tiled<32, 32>(a, b, c, m, n, k);
}

extern "C" __global__ void matmul_tiled_padded(const float* a, const float* b, float* c, int m, int n, int k) {
    matmul_tiled<32, 33>(a, b, c, m, n, k);
}

// B is given transposed, [n, k]. Its tile is read down a column: PITCH 32 meets one bank, 33 all of them.
template <int PITCH>
__device__ void matmul_transposed(const float* a, const float* b, float* c, int m, int n, int k) {
    __shared__ float tile_a[32 * PITCH], tile_b[32 * PITCH];
    int x = threadIdx.x, y = threadIdx.y;
    int row = blockIdx.y * 32 + y, column = blockIdx.x * 32 + x;
    float sum = 0;
    for (int start = 0; start < k; start += 32) {
        int other = blockIdx.x * 32 + y;
        tile_a[y * PITCH + x] = row < m && start + x < k ? a[row * k + start + x] : 0.f;
        tile_b[y * PITCH + x] = other < n && start + x < k ? b[other * k + start + x] : 0.f;
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < 32; i++) sum += tile_a[y * PITCH + i] * tile_b[x * PITCH + i];
        __syncthreads();
    }
    if (row < m && column < n) c[row * n + column] = sum;
}

extern "C" __global__ void matmul_transposed_conflicts(const float* a, const float* b, float* c, int m, int n, int k) {
    matmul_transposed<32>(a, b, c, m, n, k);
}

extern "C" __global__ void matmul_transposed_padded(const float* a, const float* b, float* c, int m, int n, int k) {
    matmul_transposed<33>(a, b, c, m, n, k);
}

// 64 threads make a tile of 32 × 32, each a patch of 4 × 4 held in registers.
extern "C" __global__ void matmul_registers(const float* a, const float* b, float* c, int m, int n, int k) {
    __shared__ float tile_a[8][33], tile_b[8][32];
    int t = threadIdx.x, patch_row = t / 8 * 4, patch_column = t % 8 * 4;
    int first_row = blockIdx.y * 32, first_column = blockIdx.x * 32;
    float sum[4][4] = {};
    for (int start = 0; start < k; start += 8) {
        for (int i = t; i < 256; i += 64) {
            int row = i / 8, column = i % 8;
            tile_a[column][row] = first_row + row < m && start + column < k ? a[(first_row + row) * k + start + column] : 0.f;
            row = i / 32, column = i % 32;
            tile_b[row][column] = start + row < k && first_column + column < n ? b[(start + row) * n + first_column + column] : 0.f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int s = 0; s < 4; s++) sum[r][s] += tile_a[i][patch_row + r] * tile_b[i][patch_column + s];
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int s = 0; s < 4; s++) {
            int row = first_row + patch_row + r, column = first_column + patch_column + s;
            if (row < m && column < n) c[row * n + column] = sum[r][s];
        }
}

// The same patch with 16-byte accesses throughout; m, n multiples of 32 and k of 8.
extern "C" __global__ void matmul_vectorised(const float* a, const float* b, float* c, int m, int n, int k) {
    __shared__ float4 tile_a[8][8], tile_b[8][8];
    int t = threadIdx.x, patch_row = t / 8, patch_column = t % 8;
    int first_row = blockIdx.y * 32, first_column = blockIdx.x * 32;
    float4 sum[4] = {};
    float* words_a = reinterpret_cast<float*>(tile_a);
    for (int start = 0; start < k; start += 8) {
        int row = t / 2, column = t % 2 * 4;
        float4 v = *reinterpret_cast<const float4*>(&a[(first_row + row) * k + start + column]);
        words_a[(column + 0) * 32 + row] = v.x;
        words_a[(column + 1) * 32 + row] = v.y;
        words_a[(column + 2) * 32 + row] = v.z;
        words_a[(column + 3) * 32 + row] = v.w;
        tile_b[t / 8][t % 8] = *reinterpret_cast<const float4*>(&b[(start + t / 8) * n + first_column + t % 8 * 4]);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float4 p = tile_a[i][patch_row], q = tile_b[i][patch_column];
            float left[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
            for (int r = 0; r < 4; r++) {
                sum[r].x += left[r] * q.x;
                sum[r].y += left[r] * q.y;
                sum[r].z += left[r] * q.z;
                sum[r].w += left[r] * q.w;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
        *reinterpret_cast<float4*>(&c[(first_row + patch_row * 4 + r) * n + first_column + patch_column * 4]) = sum[r];
}
