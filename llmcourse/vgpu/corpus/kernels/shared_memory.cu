// Shared memory alone: each thread writes one element and reads another, for every pattern of banks.

#define SIZE 4096

// `out` gets buffer[(t * stride) % SIZE]; the buffer is filled without conflicts.
extern "C" __global__ void shared_strided_read(float* out, int stride) {
    __shared__ float buffer[SIZE];
    for (int i = threadIdx.x; i < SIZE; i += blockDim.x) buffer[i] = i;
    __syncthreads();
    out[threadIdx.x] = buffer[threadIdx.x * stride % SIZE];
}

// Thread t writes element t * stride, threads then read back in order what was written.
extern "C" __global__ void shared_strided_write(float* out, int stride) {
    extern __shared__ float dynamic[];
    dynamic[threadIdx.x * stride] = threadIdx.x;
    __syncthreads();
    int partner = blockDim.x - 1 - threadIdx.x;
    out[threadIdx.x] = dynamic[partner * stride];
}

template <typename T>
__device__ void round_trip(const T* in, T* out, int stride) {
    extern __shared__ double storage[];
    T* buffer = reinterpret_cast<T*>(storage);
    buffer[threadIdx.x * stride] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = buffer[(threadIdx.x ^ 1) * stride];
}

extern "C" __global__ void shared_char(const char* in, char* out, int stride) { round_trip(in, out, stride); }
extern "C" __global__ void shared_double(const double* in, double* out, int stride) { round_trip(in, out, stride); }
extern "C" __global__ void shared_float2(const float2* in, float2* out, int stride) { round_trip(in, out, stride); }

extern "C" __global__ void shared_float4(const float4* in, float4* out, int stride) {
    extern __shared__ float4 vectors[];
    vectors[threadIdx.x * stride] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = vectors[(threadIdx.x ^ 1) * stride];
}

// Lanes read from `distinct` different words: a word that several lanes want is sent to all of them at once.
extern "C" __global__ void shared_broadcast(const float* in, float* out, int distinct, int spacing) {
    __shared__ float buffer[SIZE];
    for (int i = threadIdx.x; i < SIZE; i += blockDim.x) buffer[i] = in[i];
    __syncthreads();
    out[threadIdx.x] = buffer[threadIdx.x % distinct * spacing];
}

// Random words, as a table look-up has them.
extern "C" __global__ void shared_lookup(const float* table, const int* index, float* out) {
    __shared__ float buffer[1024];
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) buffer[i] = table[i];
    __syncthreads();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = buffer[index[i]];
}
