// C [m, n] = A [m, k] · B [k, n] on tensor cores, one warp a tile of 16 × 16. Dimensions are multiples of 16.
#include <cuda_bf16.h>
#include <mma.h>
using namespace nvcuda;

// Fragments straight from global memory.
template <typename T, typename Sum>
__device__ void wmma_global(const T* a, const T* b, Sum* c, int n, int k) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> right;
    wmma::fragment<wmma::accumulator, 16, 16, 16, Sum> sum;
    wmma::fill_fragment(sum, Sum(0));
    int row = blockIdx.y * 16, column = blockIdx.x * 16;
    for (int i = 0; i < k; i += 16) {
        wmma::load_matrix_sync(left, a + row * k + i, k);
        wmma::load_matrix_sync(right, b + i * n + column, n);
        wmma::mma_sync(sum, left, right, sum);
    }
    wmma::store_matrix_sync(c + row * n + column, sum, n, wmma::mem_row_major);
}

extern "C" __global__ void wmma_half(const __half* a, const __half* b, float* c, int n, int k) {
    wmma_global(a, b, c, n, k);
}

extern "C" __global__ void wmma_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int n, int k) {
    wmma_global(a, b, c, n, k);
}

extern "C" __global__ void wmma_int8(const signed char* a, const signed char* b, int* c, int n, int k) {
    wmma_global(a, b, c, n, k);
}

extern "C" __global__ void wmma_half_sums(const __half* a, const __half* b, __half* c, int n, int k) {
    wmma_global(a, b, c, n, k);
}

// Two warps share a strip of A and of B in shared memory; PITCH in elements.
template <int PITCH>
__device__ void wmma_shared(const __half* a, const __half* b, float* c, int n, int k) {
    __shared__ __align__(32) __half tile_a[16 * PITCH], tile_b[16 * PITCH];
    int t = threadIdx.x, warp = t / 32, row = blockIdx.y * 16, column = blockIdx.x * 32;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> right;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::fill_fragment(sum, 0.f);
    for (int start = 0; start < k; start += 16) {
        for (int i = t; i < 256; i += 64) tile_a[i / 16 * PITCH + i % 16] = a[(row + i / 16) * k + start + i % 16];
        for (int i = t; i < 512; i += 64) tile_b[i / 32 * PITCH + i % 32] = b[(start + i / 32) * n + column + i % 32];
        __syncthreads();
        wmma::load_matrix_sync(left, tile_a, PITCH);
        wmma::load_matrix_sync(right, tile_b + warp * 16, PITCH);
        wmma::mma_sync(sum, left, right, sum);
        __syncthreads();
    }
    wmma::store_matrix_sync(c + row * n + column + warp * 16, sum, n, wmma::mem_row_major);
}

extern "C" __global__ void wmma_shared_tiles(const __half* a, const __half* b, float* c, int n, int k) {
    wmma_shared<32>(a, b, c, n, k);
}

extern "C" __global__ void wmma_shared_padded(const __half* a, const __half* b, float* c, int n, int k) {
    wmma_shared<40>(a, b, c, n, k);
}

// mma.sync m16n8k16 by hand: each lane loads the pairs that the PTX manual assigns to it. B is [n, k] here.
extern "C" __global__ void mma_half(const __half* a, const __half* b, float* c, int n, int k) {
    int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2, row = blockIdx.y * 16, column = blockIdx.x * 8;
    float sum[4] = {};
    for (int i = 0; i < k; i += 16) {
        const __half* left = a + (row + group) * k + i + pair;
        const __half* right = b + (column + group) * k + i + pair;
        unsigned int a0 = *reinterpret_cast<const unsigned int*>(left);
        unsigned int a1 = *reinterpret_cast<const unsigned int*>(left + 8 * k);
        unsigned int a2 = *reinterpret_cast<const unsigned int*>(left + 8);
        unsigned int a3 = *reinterpret_cast<const unsigned int*>(left + 8 * k + 8);
        unsigned int b0 = *reinterpret_cast<const unsigned int*>(right);
        unsigned int b1 = *reinterpret_cast<const unsigned int*>(right + 8);
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
    float* out = c + (row + group) * n + column + pair;
    out[0] = sum[0];
    out[1] = sum[1];
    out[8 * n] = sum[2];
    out[8 * n + 1] = sum[3];
}
