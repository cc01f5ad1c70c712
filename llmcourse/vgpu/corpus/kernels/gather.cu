// Addresses that come from data, and the layout of records.

extern "C" __global__ void gather(const float* in, const int* index, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[index[i]];
}

extern "C" __global__ void scatter(const float* in, const int* index, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[index[i]] = in[i];
}

// Rows of an embedding table: one block a token.
extern "C" __global__ void embedding(const float* table, const int* tokens, float* out, int width) {
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        out[blockIdx.x * width + i] = table[tokens[blockIdx.x] * width + i];
}

struct Particle {
    float x, y, z, mass, speed;
};

// Records one after another: a field's neighbours lie 20 bytes apart.
extern "C" __global__ void array_of_structures(const Particle* particles, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = particles[i].mass * particles[i].speed;
}

extern "C" __global__ void structure_of_arrays(const float* mass, const float* speed, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = mass[i] * speed[i];
}

// Aligned records of 16 bytes, read whole.
extern "C" __global__ void array_of_float4(const float4* points, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        float4 p = points[i];
        out[i] = p.x + p.y + p.z + p.w;
    }
}

// Sparse matrix (compressed rows) times vector, one thread a row.
extern "C" __global__ void sparse_rows(const int* start, const int* column, const float* value, const float* x, float* y, int rows) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float sum = 0;
    for (int i = start[row]; i < start[row + 1]; i++) sum += value[i] * x[column[i]];
    y[row] = sum;
}
