// Sums of blocks in seven steps, the series of M. Harris, "Optimizing Parallel Reduction in CUDA" (2007).
// Each block writes one partial sum to out[blockIdx.x].

#define THREADS 128

__device__ float load(const float* in, int i, int n) { return i < n ? in[i] : 0.f; }

// 1. Neighbours add first: the working threads lie apart and every warp diverges.
extern "C" __global__ void reduce_1_interleaved(const float* in, float* out, int n) {
    __shared__ float partial[THREADS];
    int t = threadIdx.x;
    partial[t] = load(in, blockIdx.x * THREADS + t, n);
    __syncthreads();
    for (int s = 1; s < THREADS; s *= 2) {
        if (t % (2 * s) == 0) partial[t] += partial[t + s];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = partial[0];
}

// 2. The first threads work, but on elements that share banks.
extern "C" __global__ void reduce_2_conflicts(const float* in, float* out, int n) {
    __shared__ float partial[THREADS];
    int t = threadIdx.x;
    partial[t] = load(in, blockIdx.x * THREADS + t, n);
    __syncthreads();
    for (int s = 1; s < THREADS; s *= 2) {
        int i = 2 * s * t;
        if (i < THREADS) partial[i] += partial[i + s];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = partial[0];
}

// 3. The halves are added: neighbouring threads, neighbouring banks.
extern "C" __global__ void reduce_3_sequential(const float* in, float* out, int n) {
    __shared__ float partial[THREADS];
    int t = threadIdx.x;
    partial[t] = load(in, blockIdx.x * THREADS + t, n);
    __syncthreads();
    for (int s = THREADS / 2; s > 0; s /= 2) {
        if (t < s) partial[t] += partial[t + s];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = partial[0];
}

// 4. No thread idles in the first step: two elements are added on the way in.
extern "C" __global__ void reduce_4_first_add(const float* in, float* out, int n) {
    __shared__ float partial[THREADS];
    int t = threadIdx.x, i = blockIdx.x * 2 * THREADS + t;
    partial[t] = load(in, i, n) + load(in, i + THREADS, n);
    __syncthreads();
    for (int s = THREADS / 2; s > 0; s /= 2) {
        if (t < s) partial[t] += partial[t + s];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = partial[0];
}

// One step of a warp. Both barriers are needed: a lane must not write before its neighbours have read.
__device__ void warp_step(float* partial, int t, int s) {
    float v = partial[t] + partial[t + s];
    __syncwarp();
    if (t < s) partial[t] = v;
    __syncwarp();
}

// 5. The last warp needs no barrier of the block.
extern "C" __global__ void reduce_5_last_warp(const float* in, float* out, int n) {
    __shared__ float partial[THREADS];
    int t = threadIdx.x, i = blockIdx.x * 2 * THREADS + t;
    partial[t] = load(in, i, n) + load(in, i + THREADS, n);
    __syncthreads();
    for (int s = THREADS / 2; s > 32; s /= 2) {
        if (t < s) partial[t] += partial[t + s];
        __syncthreads();
    }
    if (t < 32)
        for (int s = 32; s > 0; s /= 2) warp_step(partial, t, s);
    if (t == 0) out[blockIdx.x] = partial[0];
}

// 6. The block size is known to the compiler, so that no loop is left.
template <int SIZE>
__device__ void reduce_unrolled(const float* in, float* out, int n) {
    __shared__ float partial[SIZE];
    int t = threadIdx.x, i = blockIdx.x * 2 * SIZE + t;
    partial[t] = load(in, i, n) + load(in, i + SIZE, n);
    __syncthreads();
    if (SIZE >= 512) { if (t < 256) partial[t] += partial[t + 256]; __syncthreads(); }
    if (SIZE >= 256) { if (t < 128) partial[t] += partial[t + 128]; __syncthreads(); }
    if (SIZE >= 128) { if (t < 64) partial[t] += partial[t + 64]; __syncthreads(); }
    if (t < 32) {
        warp_step(partial, t, 32);
        warp_step(partial, t, 16);
        warp_step(partial, t, 8);
        warp_step(partial, t, 4);
        warp_step(partial, t, 2);
        warp_step(partial, t, 1);
    }
    if (t == 0) out[blockIdx.x] = partial[0];
}

extern "C" __global__ void reduce_6_unrolled(const float* in, float* out, int n) {
    reduce_unrolled<THREADS>(in, out, n);
}

// 7. Each thread sums many elements; warps add through registers, and shared memory holds one value a warp.
extern "C" __global__ void reduce_7_shuffle(const float* in, float* out, int n) {
    __shared__ float of_warp[THREADS / 32];
    float v = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += in[i];
    for (int s = 16; s > 0; s /= 2) v += __shfl_down_sync(0xffffffff, v, s);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < THREADS / 32 ? of_warp[threadIdx.x] : 0.f;
        for (int s = THREADS / 64; s > 0; s /= 2) v += __shfl_down_sync(0xffffffff, v, s);
        if (threadIdx.x == 0) out[blockIdx.x] = v;
    }
}

// The same in double precision.
extern "C" __global__ void reduce_double(const double* in, double* out, int n) {
    __shared__ double partial[THREADS];
    int t = threadIdx.x, i = blockIdx.x * THREADS + t;
    partial[t] = i < n ? in[i] : 0.0;
    __syncthreads();
    for (int s = THREADS / 2; s > 0; s /= 2) {
        if (t < s) partial[t] += partial[t + s];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = partial[0];
}
