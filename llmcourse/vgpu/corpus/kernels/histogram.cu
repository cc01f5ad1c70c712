// Histograms: every thread adds to a bin that only its data knows.

#define BINS 64

extern "C" __global__ void histogram_global(const unsigned char* in, int* bins, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(&bins[in[i] % BINS], 1);
}

extern "C" __global__ void histogram_shared(const unsigned char* in, int* bins, int n) {
    __shared__ int own[BINS];
    for (int b = threadIdx.x; b < BINS; b += blockDim.x) own[b] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&own[in[i] % BINS], 1);
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += blockDim.x) atomicAdd(&bins[b], own[b]);
}

// No atomics within a block: each thread counts in bytes of its own, laid out so that a warp meets 32 banks.
extern "C" __global__ void histogram_private(const unsigned char* in, int* bins, int n) {
    __shared__ unsigned int own[BINS / 4][64];
    unsigned char* bytes = reinterpret_cast<unsigned char*>(own);
    for (int b = 0; b < BINS / 4; b++) own[b][threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        int b = in[i] % BINS;
        bytes[(b / 4 * 64 + threadIdx.x) * 4 + b % 4] += 1;
    }
    __syncthreads();
    int total = 0;
    for (int t = 0; t < 64; t++) total += bytes[(threadIdx.x / 4 * 64 + t) * 4 + threadIdx.x % 4];
    atomicAdd(&bins[threadIdx.x], total);
}
