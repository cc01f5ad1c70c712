// Two further spaces: local memory, where arrays go that registers cannot index, and constant memory.

// Counts digits in an array of the thread's own, indexed by data: it cannot lie in registers.
extern "C" __global__ void local_digits(const unsigned int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int count[10];
    for (int d = 0; d < 10; d++) count[d] = 0;
    for (unsigned int v = in[i]; v > 0; v /= 10) count[v % 10]++;
    int most = 0;
    for (int d = 1; d < 10; d++)
        if (count[d] > count[most]) most = d;
    out[i] = most;
}

// Insertion sort of eight numbers a thread.
extern "C" __global__ void local_sort(const float* in, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v[8];
    for (int j = 0; j < 8; j++) v[j] = in[j * n + i];
#pragma unroll 1
    for (int j = 1; j < 8; j++) {
        float x = v[j];
        int k = j;
#pragma unroll 1
        for (; k > 0 && v[k - 1] > x; k--) v[k] = v[k - 1];
        v[k] = x;
    }
    for (int j = 0; j < 8; j++) out[j * n + i] = v[j];
}

__constant__ float coefficients[6] = {1.f, 1.f, 0.5f, 0.25f, 0.125f, 0.0625f};
__constant__ int table[16] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3};

// All lanes want the same constant at the same time.
extern "C" __global__ void polynomial(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i], sum = 0;
    for (int k = 5; k >= 0; k--) sum = sum * v + coefficients[k];
    y[i] = sum;
}

// Each lane wants another one.
extern "C" __global__ void constant_lookup(const int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = table[in[i] & 15];
}
