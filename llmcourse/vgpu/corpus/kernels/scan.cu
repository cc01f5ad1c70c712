// Inclusive and exclusive prefix sums of segments, one block each.

#define THREADS 128

// Hillis and Steele (1986): log2 n steps of n additions, between two buffers.
extern "C" __global__ void scan_hillis_steele(const int* in, int* out) {
    __shared__ int buffer[2][THREADS];
    int t = threadIdx.x, source = 0;
    buffer[0][t] = in[blockIdx.x * THREADS + t];
    __syncthreads();
    for (int s = 1; s < THREADS; s *= 2) {
        int v = buffer[source][t];
        if (t >= s) v += buffer[source][t - s];
        source = 1 - source;
        buffer[source][t] = v;
        __syncthreads();
    }
    out[blockIdx.x * THREADS + t] = buffer[source][t];
}

// Blelloch (1990): up the tree and down again, n additions each way. SHIFT > 0 pads one word every 2^SHIFT.
template <int SHIFT>
__device__ int place(int i) { return SHIFT ? i + (i >> SHIFT) : i; }

template <int SHIFT>
__device__ void scan_blelloch_of(const int* in, int* out) {
    __shared__ int tree[2 * THREADS + 2 * THREADS / 32];
    int t = threadIdx.x, first = blockIdx.x * 2 * THREADS;
    tree[place<SHIFT>(t)] = in[first + t];
    tree[place<SHIFT>(t + THREADS)] = in[first + t + THREADS];
    int s = 1;
    for (int active = THREADS; active > 0; active /= 2, s *= 2) {
        __syncthreads();
        if (t < active) tree[place<SHIFT>(s * (2 * t + 2) - 1)] += tree[place<SHIFT>(s * (2 * t + 1) - 1)];
    }
    if (t == 0) tree[place<SHIFT>(2 * THREADS - 1)] = 0;
    for (int active = 1; active <= THREADS; active *= 2) {
        s /= 2;
        __syncthreads();
        if (t < active) {
            int left = place<SHIFT>(s * (2 * t + 1) - 1), right = place<SHIFT>(s * (2 * t + 2) - 1);
            int v = tree[left];
            tree[left] = tree[right];
            tree[right] += v;
        }
    }
    __syncthreads();
    out[first + t] = tree[place<SHIFT>(t)];
    out[first + t + THREADS] = tree[place<SHIFT>(t + THREADS)];
}

extern "C" __global__ void scan_blelloch(const int* in, int* out) { scan_blelloch_of<0>(in, out); }
extern "C" __global__ void scan_blelloch_padded(const int* in, int* out) { scan_blelloch_of<5>(in, out); }

// Warps scan through registers, the first warp scans their totals.
extern "C" __global__ void scan_warps(const int* in, int* out) {
    __shared__ int totals[THREADS / 32];
    int t = threadIdx.x, lane = t % 32, v = in[blockIdx.x * THREADS + t];
    for (int s = 1; s < 32; s *= 2) {
        int before = __shfl_up_sync(0xffffffff, v, s);
        if (lane >= s) v += before;
    }
    if (lane == 31) totals[t / 32] = v;
    __syncthreads();
    for (int w = 0; w < t / 32; w++) v += totals[w];
    out[blockIdx.x * THREADS + t] = v;
}
