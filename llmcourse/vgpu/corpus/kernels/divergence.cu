// Lanes of a warp that want to go different ways.

extern "C" __global__ void odd_even(const float* in, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = in[i];
    if (i % 2) {
        for (int k = 0; k < 8; k++) v = v * 1.5f - 0.25f;
    } else {
        for (int k = 0; k < 12; k++) v = v * 0.5f + 1.f;
    }
    out[i] = v;
}

// Steps of the Collatz sequence until 1: every lane leaves the loop when its own number is done.
extern "C" __global__ void collatz(int* steps, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int v = i + 1, count = 0;
    while (v != 1) {
        v = v % 2 ? 3 * v + 1 : v / 2;
        count++;
    }
    steps[i] = count;
}

// Whole warps leave early: no divergence, fewer requests.
extern "C" __global__ void early_exit(const float* in, float* out, int n, int active_warps) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (threadIdx.x / 32 >= active_warps || i >= n) return;
    out[i] = in[i] * 2;
}

// Four ways by lane, with a memory access in each.
extern "C" __global__ void four_ways(const float* in, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    switch (i & 3) {
        case 0: out[i] = in[i] + in[(i + 1) % n]; break;
        case 1: out[i] = in[i] * in[(i + 2) % n]; break;
        case 2: out[i] = in[i] - in[(i + 3) % n]; break;
        default: out[i] = sqrtf(in[i]);
    }
}

// A loop as long as the data says, reading as it goes: fewer and fewer lanes ask.
extern "C" __global__ void ragged_sum(const float* in, const int* length, float* out, int rows, int pitch) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float sum = 0;
    for (int i = 0; i < length[row]; i++) sum += in[row * pitch + i];
    out[row] = sum;
}

// Binary search in a sorted array.
extern "C" __global__ void binary_search(const int* sorted, const int* wanted, int* found, int length, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int low = 0, high = length;
    while (low < high) {
        int middle = (low + high) / 2;
        if (sorted[middle] < wanted[i]) low = middle + 1;
        else high = middle;
    }
    found[i] = low;
}
