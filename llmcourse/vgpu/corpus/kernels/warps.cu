// Lanes of a warp that speak to each other through registers.

extern "C" __global__ void warp_reduce(const float* in, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v = i < n ? in[i] : 0.f;
    for (int s = 16; s > 0; s /= 2) v += __shfl_down_sync(0xffffffff, v, s);
    if (threadIdx.x % 32 == 0) out[i / 32] = v;
}

extern "C" __global__ void warp_reduce_integer(const int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int v = __reduce_add_sync(0xffffffff, i < n ? in[i] : 0);
    if (threadIdx.x % 32 == 0) out[i / 32] = v;
}

extern "C" __global__ void ballot_count(const int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned int votes = __ballot_sync(0xffffffff, i < n && in[i] > 0);
    if (threadIdx.x % 32 == 0) out[i / 32] = __popc(votes);
}

// Keeps the positive elements of each warp, packed from the warp's first place on.
extern "C" __global__ void warp_compact(const int* in, int* out, int* kept) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, v = in[i];
    unsigned int votes = __ballot_sync(0xffffffff, v > 0);
    if (v > 0) out[i - lane + __popc(votes & ((1u << lane) - 1))] = v;
    if (lane == 0) kept[i / 32] = __popc(votes);
}

// How many lanes of the warp hold the same value.
extern "C" __global__ void warp_match(const int* in, int* out) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = __popc(__match_any_sync(0xffffffff, in[i]));
}

// Rotates values around the warp.
extern "C" __global__ void warp_rotate(const float* in, float* out, int by) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = __shfl_sync(0xffffffff, in[i], (threadIdx.x + by) % 32);
}
