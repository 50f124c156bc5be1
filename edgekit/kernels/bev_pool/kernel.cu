// BEV pooling on a GPU: one thread sums eight channels of one cell, over the cell's runs of the association table.
// reference.py defines order and rounding; this follows them bit for bit (float32 sums; half only in memory).
// Neighbouring threads are neighbouring cells, so that planes are written a warp at a time, and a thread's eight
// floats are one 32-byte sector of the features. No atomics, no lifted tensor.
//
// Compiled by NVRTC without headers (edgekit/kernels/cuda.py). `Parameters` in cuda.py beside this has the same
// fields in the same order. Plain C++ but for CUDA's keywords: tests compile it for the CPU as well.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Run {
    u32 depth, pixel, rows;  // rows: camera << 16 | number of them
};

struct BevPool {
    const int* starts;     // [cells + 1]
    const Run* runs;
    const void* depth;     // [cam, D, h, w]
    const void* features;  // [cam, h, w, channels]
    void* out;             // [channels, cells] or, where `last`, [cells, channels]
    u64 used;              // bit k: camera k counts
    int cells, width, channels;
    int half_in, half_out;  // float16 in memory, else float32
    int last;
};

enum { kChannels = 8 };

__device__ inline float from_half(u16 h) {
#ifdef __CUDA_ARCH__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#else
    const u32 sign = u32(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    union { u32 bits; float value; } f;
    if (exponent == 0) {
        f.value = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
        f.bits |= sign;
    } else {
        f.bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    }
    return f.value;
#endif
}

// Rounded to nearest, ties to even.
__device__ inline u16 to_half(float value) {
#ifdef __CUDA_ARCH__
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(value));
    return h;
#else
    union { float value; u32 bits; } f;
    f.value = value;
    const u32 sign = f.bits >> 16 & 0x8000, magnitude = f.bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return u16(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return u16(sign | 0x7c00);  // 65520 and above
    if (magnitude < 0x38800000) {                            // below 2^-14: whole multiples of 2^-24
        f.bits = magnitude;
        f.value += 0.5f;  // the unit of the last place of 0.5 .. 1 is 2^-24
        return u16(sign | (f.bits - 0x3f000000));
    }
    return u16(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
#endif
}

__device__ inline float value(const float* p) { return *p; }
__device__ inline float value(const u16* p) { return from_half(*p); }

template <class T>
__device__ inline void sum(const BevPool& p, int cell, int channel, int count, float* total) {
    const T* depth = static_cast<const T*>(p.depth);
    const T* features = static_cast<const T*>(p.features) + channel;
    for (int r = p.starts[cell]; r < p.starts[cell + 1]; r++) {
        const Run run = p.runs[r];
        if (!(p.used >> (run.rows >> 16) & 1)) continue;
        const T* weight = depth + run.depth;
        const T* feature = features + i64(run.pixel) * p.channels;
        for (u32 n = run.rows & 0xffff; n > 0; n--, weight += p.width, feature += i64(p.width) * p.channels) {
            const float w = value(weight);
            if (count == kChannels) {
                for (int k = 0; k < kChannels; k++) total[k] += w * value(feature + k);
            } else {
                for (int k = 0; k < count; k++) total[k] += w * value(feature + k);
            }
        }
    }
}

// Grid: at least cells x ceil(channels / 8) threads.
extern "C" __global__ void bev_pool(const BevPool p) {
    const i64 cell = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const int channel = int(blockIdx.y * blockDim.y + threadIdx.y) * kChannels;
    if (cell >= p.cells || channel >= p.channels) return;
    const int left = p.channels - channel, count = left < kChannels ? left : int(kChannels);
    float total[kChannels] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (p.half_in) sum<u16>(p, int(cell), channel, count, total);
    else sum<float>(p, int(cell), channel, count, total);
    for (int k = 0; k < count; k++) {
        const i64 at = p.last ? cell * p.channels + channel + k : (channel + k) * i64(p.cells) + cell;
        if (p.half_out) static_cast<u16*>(p.out)[at] = to_half(total[k]);
        else static_cast<float*>(p.out)[at] = total[k];
    }
}
