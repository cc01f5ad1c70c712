// Copies: the same values moved by warps that touch memory in different shapes.

template <typename T>
__device__ void copy(const T* in, T* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i];
}

extern "C" __global__ void copy_char(const char* in, char* out, int n) { copy(in, out, n); }
extern "C" __global__ void copy_float(const float* in, float* out, int n) { copy(in, out, n); }
extern "C" __global__ void copy_double(const double* in, double* out, int n) { copy(in, out, n); }
extern "C" __global__ void copy_float2(const float2* in, float2* out, int n) { copy(in, out, n); }
extern "C" __global__ void copy_float4(const float4* in, float4* out, int n) { copy(in, out, n); }

extern "C" __global__ void copy_read_only(const float* __restrict__ in, float* __restrict__ out, int n) {
    copy(in, out, n);
}

extern "C" __global__ void copy_strided_read(const float* in, float* out, int n, int stride) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i * stride];
}

extern "C" __global__ void copy_strided_write(const float* in, float* out, int n, int stride) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i * stride] = in[i];
}

extern "C" __global__ void copy_strided_double(const double* in, double* out, int n, int stride) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i * stride];
}

extern "C" __global__ void copy_shifted(const float* in, float* out, int n, int shift) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i + shift];
}

extern "C" __global__ void copy_reversed(const float* in, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[n - 1 - i];
}

// Lanes change places: within a sector of eight floats for mask < 8, within a warp for mask < 32.
extern "C" __global__ void copy_permuted(const float* in, float* out, int mask) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[i ^ mask];
}

// `share` neighbours read the same element: all of a warp for share = 32.
extern "C" __global__ void copy_broadcast(const float* in, float* out, int n, int share) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i / share];
}

extern "C" __global__ void copy_even_lanes(const float* in, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && i % 2 == 0) out[i] = in[i];
}

extern "C" __global__ void copy_grid_stride(const float* in, float* out, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = in[i];
}

// A two-dimensional block over a row-major matrix: each warp covers 32 / blockDim.x rows.
extern "C" __global__ void copy_matrix(const float* in, float* out, int rows, int columns) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x < columns && y < rows) out[y * columns + x] = in[y * columns + x];
}

extern "C" __global__ void saxpy(float a, const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}

extern "C" __global__ void daxpy(double a, const double* x, double* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}
