// How long one access takes and how many bytes a second come, from each level of the memory.

__device__ long long nanoseconds() {
    long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// One thread follows links through memory: each load needs the answer of the one before, so that nothing
// hides the latency. `steps` links are followed twice, first to bring them into the cache that they fit;
// the clock cycles and nanoseconds of the second time go to taken[0] and taken[1].
extern "C" __global__ void chase(const unsigned int* next, int steps, long long* taken, unsigned int* end) {
    unsigned int at = 0;
    for (int i = 0; i < steps; i++) at = next[at];
    long long cycles = clock64(), time = nanoseconds();
    for (int i = 0; i < steps; i++) at = next[at];
    taken[0] = clock64() - cycles;
    taken[1] = nanoseconds() - time;
    *end = at;
}

// The same within shared memory, 1024 words.
extern "C" __global__ void chase_shared(const unsigned int* next, int steps, long long* taken, unsigned int* end) {
    __shared__ unsigned int links[1024];
    for (int i = 0; i < 1024; i++) links[i] = next[i];
    unsigned int at = 0;
    long long cycles = clock64(), time = nanoseconds();
    for (int i = 0; i < steps; i++) at = links[at];
    taken[0] = clock64() - cycles;
    taken[1] = nanoseconds() - time;
    *end = at;
}

// Reads `count` float4 of the array `rounds` times with the whole grid, passing by L1 (ld.global.cg).
// `count` is a multiple of four times the number of threads; four loads of a thread are under way at once.
extern "C" __global__ void read_all(const float4* in, float* out, long long count, int rounds) {
    long long threads = (long long)gridDim.x * blockDim.x;
    float sum = 0;
    for (int r = 0; r < rounds; r++)
        for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += 4 * threads) {
            float4 a = __ldcg(&in[i]), b = __ldcg(&in[i + threads]);
            float4 c = __ldcg(&in[i + 2 * threads]), d = __ldcg(&in[i + 3 * threads]);
            sum += a.x + b.x + c.x + d.x + a.w + b.w + c.w + d.w;
        }
    if (sum == 0.123f) *out = sum;  // never: the array is zero, but the compiler can't know
}

// Each block reads `count` float4 of its own, small enough for its SM's L1.
extern "C" __global__ void read_own(const float4* in, float* out, int count, int rounds) {
    const float4* own = in + (long long)blockIdx.x * count;
    float sum = 0;
    for (int r = 0; r < rounds; r++)
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            float4 a;
            asm volatile("ld.global.ca.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(a.x), "=f"(a.y), "=f"(a.z), "=f"(a.w) : "l"(own + i));
            sum += a.x + a.w;
        }
    if (sum == 0.123f) *out = sum;
}

// Each block reads its shared memory, 16 KiB, again and again.
extern "C" __global__ void read_shared(float* out, int rounds) {
    __shared__ float4 tile[1024];
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) tile[i] = make_float4(0, 0, 0, 0);
    __syncthreads();
    unsigned int base = (unsigned int)__cvta_generic_to_shared(tile);
    float sum = 0;
    for (int r = 0; r < rounds; r++)
        for (int i = threadIdx.x; i < 1024; i += blockDim.x) {
            float4 a;
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(a.x), "=f"(a.y), "=f"(a.z), "=f"(a.w) : "r"(base + 16 * i));
            sum += a.x + a.w;
        }
    if (sum == 0.123f) *out = sum;
}

// A copy in which each thread has one load of sizeof(T) bytes under way at a time.
template <typename T>
__global__ void copy_one_by_one(const T* in, T* out, long long count) {
    long long threads = (long long)gridDim.x * blockDim.x;
#pragma unroll 1
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += threads) out[i] = in[i];
}
