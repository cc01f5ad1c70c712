// Atomic operations: with and without a result, contended or spread.

extern "C" __global__ void atomic_float_spread(const float* in, float* out, int n, int cells) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(&out[i % cells], in[i]);
}

extern "C" __global__ void atomic_max(const int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicMax(&out[in[i] & 15], in[i]);
}

// Every thread draws a number; the order is anyone's.
extern "C" __global__ void atomic_ticket(int* counters, int* tickets, int n, int cells) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) tickets[i] = atomicAdd(&counters[i % cells], i % 7 + 1);
}

extern "C" __global__ void atomic_exchange(int* slots, int* old, int n, int stride) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) old[i] = atomicExch(&slots[i * stride], i);
}

// Compare and swap without contention: every thread has a cell of its own.
extern "C" __global__ void atomic_compare_and_swap(int* cells, const int* expected, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicCAS(&cells[i], expected[i], -1);
}

// All threads add to one word: compilers may let one lane add for its warp.
extern "C" __global__ void atomic_count(const int* in, int* count, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && in[i] > 0) atomicAdd(count, 1);
}

extern "C" __global__ void atomic_shared_float(const float* in, float* out, int n, int cells) {
    extern __shared__ float own[];
    for (int c = threadIdx.x; c < cells; c += blockDim.x) own[c] = 0;
    __syncthreads();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(&own[i % cells], in[i]);
    __syncthreads();
    for (int c = threadIdx.x; c < cells; c += blockDim.x) atomicAdd(&out[c], own[c]);
}
