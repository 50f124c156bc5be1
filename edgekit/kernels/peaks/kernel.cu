// Peaks of heat maps on a GPU. reference.py defines the result; this follows it bit for bit.
//
// Three launches: peaks_clear, peaks (one thread per cell; a peak joins a list, in any order), peaks_pick (one thread per
// listed peak, which counts those before it and so knows its place: a total order, so that no order of threads
// changes the result). Compiled by NVRTC without headers and without fused multiply-add (edgekit/kernels/cuda.py).
// `Parameters` in cuda.py beside this has the same fields in the same order.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct PeakMaps {
    const float* heat;    // [classes, height, width]
    const int* windows;   // [classes]
    const float* map[8];  // [channels, height, width] each
    u64* keys;            // [capacity]
    u32* found;           // how many peaks there are; more than `capacity` and the result is void
    float* scores;        // [limit]
    int* cells;           // [limit, 3]
    float* values;        // [limit, sum of channels]
    int channels[8];
    int maps, classes, height, width, limit, capacity;
    float low;
};

__device__ inline u32 bits_of(float v) {
    union { float value; u32 bits; } u;
    u.value = v;
    return u.bits;
}

// Falls as the value rises, equal for both zeros.
__device__ inline u32 rank_of(float v) {
    const u32 bits = bits_of(v + 0.0f);
    return bits & 0x80000000u ? bits : 0x7fffffffu - bits;
}

// 1 / (1 + e^-x) as kernels/decode/reference.py writes it out.
__device__ inline float score_of(float logit) {
    const double factorials[14] = {1.0,           1.0,            1.0 / 2,         1.0 / 6,         1.0 / 24,
                                   1.0 / 120,     1.0 / 720,      1.0 / 5040,      1.0 / 40320,     1.0 / 362880,
                                   1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    const double x = -double(logit);
    if (x > 708.0) return 0.0f;
    if (x < -708.0) return 1.0f;
    // adding 1.5 * 2^52 rounds to the nearest whole number, ties to even
    const double n = (x * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0;
    const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double p = factorials[13];
    for (int k = 12; k >= 0; k--) p = p * r + factorials[k];
    union { u64 bits; double value; } scale;
    scale.bits = u64(i64(n) + 1023) << 52;
    return float(1.0 / (1.0 + p * scale.value));
}

__device__ inline bool greatest(const float* p, int x, int y, int width, int height) {
    const float v = *p;
    for (int dy = y > 0 ? -1 : 0; dy <= (y + 1 < height ? 1 : 0); dy++)
        for (int dx = x > 0 ? -1 : 0; dx <= (x + 1 < width ? 1 : 0); dx++) {
            const float other = p[i64(dy) * width + dx];
            const bool before = dy < 0 || (dy == 0 && dx < 0);
            if (other > v || (before && other == v)) return false;
        }
    return true;
}

// Grid: one thread.
extern "C" __global__ void peaks_clear(const PeakMaps p) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.found = 0;
}

// Grid: at least classes x height x width threads.
extern "C" __global__ void peaks(const PeakMaps p) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x, plane = i64(p.height) * p.width;
    if (at >= p.classes * plane) return;
    const float v = p.heat[at];
    if (!(v >= p.low) || bits_of(v) == 0x7f800000u) return;
    const int c = int(at / plane), cell = int(at % plane);
    if (p.windows[c] == 3 && !greatest(p.heat + at, cell % p.width, cell / p.width, p.width, p.height)) return;
    const u32 place = atomicAdd(p.found, 1u);
    if (place < u32(p.capacity)) p.keys[place] = u64(rank_of(v)) << 32 | u64(at);
}

// Grid: at least `capacity` threads.
extern "C" __global__ void peaks_pick(const PeakMaps p) {
    const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 count = *p.found < u32(p.capacity) ? *p.found : u32(p.capacity);
    if (at >= count) return;
    const u64 key = p.keys[at];
    u32 place = 0;
    for (u32 i = 0; i < count; i++) place += p.keys[i] < key;
    if (place >= u32(p.limit)) return;
    const i64 plane = i64(p.height) * p.width, index = i64(key & 0xffffffffu), cell = index % plane;
    p.scores[place] = score_of(p.heat[index]);
    p.cells[3 * i64(place)] = int(index / plane);
    p.cells[3 * i64(place) + 1] = int(cell / p.width);
    p.cells[3 * i64(place) + 2] = int(cell % p.width);
    int total = 0;
    for (int k = 0; k < p.maps; k++) total += p.channels[k];
    float* out = p.values + i64(place) * total;
    for (int k = 0; k < p.maps; k++)
        for (int c = 0; c < p.channels[k]; c++) *out++ = p.map[k][c * plane + cell];
}
