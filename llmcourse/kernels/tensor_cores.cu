// Matrix product in CUDA C++, from one thread an element to tensor cores:
//
//     C [M, N] = A [M, K] · B [K, N]      A and B in fp16, C and all sums in fp32, all in row-major order
//
//   naive          one thread an element of C: 2·K numbers fetched for 2·K FLOPs
//   tiled          16 × 16 threads share tiles of A and B: each number fetched serves 16 of them
//   wmma_global    one warp a 16 × 16 tile; the tensor core multiplies 16 × 16 × 16 in one instruction
//   wmma_shared    four warps share tiles of 64 × 64, each multiplies 2 × 2 fragments of them
//
// naive takes any sizes. For tiled and wmma_global they are multiples of 16, for wmma_shared of 64. A and B
// start on multiples of 32 bytes.

#include <cuda_fp16.h>
#include <mma.h>
using namespace nvcuda;

#ifndef PAD
#define PAD 8  // halves at the end of a row in shared memory, 16 bytes: 0 shows the bank conflicts
#endif

// Launch with blocks of 16 × 16 threads.
extern "C" __global__ void naive(const __half* a, const __half* b, float* c, int M, int N, int K) {
    const int row = blockIdx.y * 16 + threadIdx.y, column = blockIdx.x * 16 + threadIdx.x;
    if (row >= M || column >= N) return;
    float sum = 0.0f;
    for (int k = 0; k < K; ++k) sum += __half2float(a[row * K + k]) * __half2float(b[k * N + column]);
    c[row * N + column] = sum;
}

// Launch with blocks of 16 × 16 threads.
extern "C" __global__ void tiled(const __half* a, const __half* b, float* c, int M, int N, int K) {
    __shared__ float tile_a[16][16], tile_b[16][16];
    const int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * 16 + y, column = blockIdx.x * 16 + x;
    float sum = 0.0f;
    for (int start = 0; start < K; start += 16) {
        tile_a[y][x] = __half2float(a[row * K + start + x]);
        tile_b[y][x] = __half2float(b[(start + y) * N + column]);
        __syncthreads();
        for (int k = 0; k < 16; ++k) sum += tile_a[y][k] * tile_b[k][x];
        __syncthreads();  // the next tiles overwrite these
    }
    c[row * N + column] = sum;
}

// Launch with blocks of 32 threads, one warp. A fragment is spread over the registers of all 32; which lane
// holds which element is the compiler's business.
extern "C" __global__ void wmma_global(const __half* a, const __half* b, float* c, int M, int N, int K) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> right;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    const int row = blockIdx.y * 16, column = blockIdx.x * 16;
    wmma::fill_fragment(sum, 0.0f);
    for (int k = 0; k < K; k += 16) {
        wmma::load_matrix_sync(left, a + row * K + k, K);
        wmma::load_matrix_sync(right, b + k * N + column, N);
        wmma::mma_sync(sum, left, right, sum);
    }
    wmma::store_matrix_sync(c + row * N + column, sum, N, wmma::mem_row_major);
}

// Launch with blocks of 128 threads: four warps, each with a quarter of the 64 × 64 tile.
extern "C" __global__ void wmma_shared(const __half* a, const __half* b, float* c, int M, int N, int K) {
    constexpr int TILE = 64, PITCH = TILE + PAD, VECTOR = 8;  // VECTOR halves, 16 bytes, at once
    __shared__ alignas(32) __half tile_a[TILE][PITCH], tile_b[TILE][PITCH];
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> left[2];
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> right[2];
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[2][2];
    const int row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    const int warp_row = threadIdx.x / 64 * 32, warp_column = threadIdx.x / 32 % 2 * 32;
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) wmma::fill_fragment(sum[i][j], 0.0f);
    for (int start = 0; start < K; start += TILE) {
        for (int at = threadIdx.x * VECTOR; at < TILE * TILE; at += 128 * VECTOR) {
            const int y = at / TILE, x = at % TILE;  // eight threads move a row of 128 bytes
            *reinterpret_cast<uint4*>(&tile_a[y][x]) =
                *reinterpret_cast<const uint4*>(a + (row + y) * K + start + x);
            *reinterpret_cast<uint4*>(&tile_b[y][x]) =
                *reinterpret_cast<const uint4*>(b + (start + y) * N + column + x);
        }
        __syncthreads();
        for (int k = 0; k < TILE; k += 16) {
            for (int i = 0; i < 2; ++i) {
                wmma::load_matrix_sync(left[i], &tile_a[warp_row + 16 * i][k], PITCH);
                wmma::load_matrix_sync(right[i], &tile_b[k][warp_column + 16 * i], PITCH);
            }
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 2; ++j) wmma::mma_sync(sum[i][j], left[i], right[j], sum[i][j]);
        }
        __syncthreads();  // the next tiles overwrite these
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
            float* corner = c + (row + warp_row + 16 * i) * N + column + warp_column + 16 * j;
            wmma::store_matrix_sync(corner, sum[i][j], N, wmma::mem_row_major);
        }
}
