// Sparse convolution on a GPU, with the order of the CPU: sites sorted by (batch, z, y, x), sums over kernel positions,
// then input channels, by fused multiply-add from the bias on. So float32 results have the CPU's bits, INT8 ones are exact.
//
// A set of sites is a grid of bits, 32 cells a word along x, and for each word the number of sites before it; so every
// site's number is its rank, nothing is sorted, and a look-up is a bit test and a population count. Launches in turn,
// `launches` of cuda.py:
//   sites       sparse_clear, sparse_mark (inputs) or sparse_mark_strided (outputs), sparse_count, sparse_scan,
//               sparse_rank, sparse_emit
//   rulebook    sparse_neighbours
//   each layer  sparse_conv or sparse_conv8
// Compiled by NVRTC without headers (edgekit/kernels/cuda.py). The structures of cuda.py have the same fields.

typedef unsigned int u32;
typedef long long i64;

struct SparseGrid {
    u32* bits;            // [batch, z, y, words]
    int* before;          // [batch, z, y, words]: sites of earlier words
    int* partial;         // [pieces]
    int* coordinates;     // [most, 4], sorted
    int* total;           // sites that there are, even if more than `most`
    const int* source;    // [n, 4]: voxels to mark
    int n, most, batch, z, y, x, words, pieces;
    int kernel[3], stride[3], padding[3];  // of sparse_mark_strided, z y x
};

struct SparseBook {
    const u32* bits;         // of the inputs
    const int* before;
    const int* outputs;      // [m, 4]
    int* neighbours;         // [m, volume]: input site or -1
    int m, z, y, x, words;   // z, y, x: the inputs' grid
    int kernel[3], stride[3], padding[3];
};

struct SparseConv {
    const int* neighbours;   // [m, volume]
    const float* features;   // [n, channels]; int8 in sparse_conv8, four to a word
    const float* weights;    // [volume, channels, outputs]; int8 [volume, channels / 4, outputs, 4]
    const float* scale;      // [outputs], sparse_conv8 only
    const float* bias;       // [outputs]
    const float* residual;   // [m, outputs] or null
    const signed char* residual8;
    float* out;              // [m, outputs] or null
    signed char* out8;
    float residual_scale, out_scale;
    int m, volume, channels, outputs, relu;
};

enum : int { kPiece = 64, kChannels = 4 };

__device__ inline i64 thread_number() { return i64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline i64 words_of(const SparseGrid& p) { return i64(p.batch) * p.z * p.y * p.words; }

// Grid: one thread per word.
extern "C" __global__ void sparse_clear(const SparseGrid p) {
    const i64 at = thread_number();
    if (at < words_of(p)) p.bits[at] = 0;
}

__device__ inline void mark(const SparseGrid& p, int b, int z, int y, int x) {
    atomicOr(p.bits + ((i64(b) * p.z + z) * p.y + y) * p.words + x / 32, u32(1) << (x % 32));
}

// Grid: one thread per voxel of `source`.
extern "C" __global__ void sparse_mark(const SparseGrid p) {
    const i64 at = thread_number();
    if (at < p.n) mark(p, p.source[4 * at], p.source[4 * at + 1], p.source[4 * at + 2], p.source[4 * at + 3]);
}

// Every o with o * stride - padding + k = i. Grid: one thread per voxel of `source` and kernel position.
extern "C" __global__ void sparse_mark_strided(const SparseGrid p) {
    const int volume = p.kernel[0] * p.kernel[1] * p.kernel[2];
    const i64 at = thread_number() / volume;
    int k = int(thread_number() % volume);
    if (at >= p.n) return;
    int o[3];
    for (int a = 2; a >= 0; a--) {
        const int reach = p.source[4 * at + 1 + a] + p.padding[a] - k % p.kernel[a];
        k /= p.kernel[a];
        o[a] = reach / p.stride[a];
        if (reach < 0 || reach % p.stride[a] != 0) return;
    }
    if (o[0] < p.z && o[1] < p.y && o[2] < p.x) mark(p, p.source[4 * at], o[0], o[1], o[2]);
}

// Grid: one thread per kPiece words.
extern "C" __global__ void sparse_count(const SparseGrid p) {
    const i64 piece = thread_number(), begin = piece * kPiece, end = words_of(p);
    if (begin >= end) return;
    int count = 0;
    for (i64 at = begin; at < end && at < begin + kPiece; at++) count += __popc(p.bits[at]);
    p.partial[piece] = count;
}

// Grid: one block of 1024 threads, which take a share of the pieces each. Twice: `round` 0 adds them up, 1 spreads.
// Between the two, sparse_scan_shares (one thread) adds up the shares, which lie behind the pieces.
extern "C" __global__ void sparse_scan(const SparseGrid p, int round) {
    const int thread = int(thread_number()), share = (p.pieces + 1023) / 1024;
    if (thread >= 1024) return;
    int sum = round == 0 ? 0 : p.partial[p.pieces + thread];
    for (int piece = thread * share; piece < p.pieces && piece < (thread + 1) * share; piece++) {
        const int count = p.partial[piece];
        if (round == 1) p.partial[piece] = sum;
        sum += count;
    }
    if (round == 0) p.partial[p.pieces + thread] = sum;
}

extern "C" __global__ void sparse_scan_shares(const SparseGrid p) {
    if (thread_number() != 0) return;
    int sum = 0;
    for (int thread = 0; thread < 1024; thread++) {
        const int count = p.partial[p.pieces + thread];
        p.partial[p.pieces + thread] = sum;
        sum += count;
    }
    *p.total = sum;
}

// Grid: as sparse_count.
extern "C" __global__ void sparse_rank(const SparseGrid p) {
    const i64 piece = thread_number(), begin = piece * kPiece, end = words_of(p);
    if (begin >= end) return;
    int count = p.partial[piece];
    for (i64 at = begin; at < end && at < begin + kPiece; at++) {
        p.before[at] = count;
        count += __popc(p.bits[at]);
    }
}

// Grid: one thread per word.
extern "C" __global__ void sparse_emit(const SparseGrid p) {
    const i64 at = thread_number();
    if (at >= words_of(p)) return;
    const i64 row = at / p.words;
    int site = p.before[at];
    for (u32 bits = p.bits[at]; bits && site < p.most; bits &= bits - 1, site++) {
        int* c = p.coordinates + 4 * i64(site);
        c[0] = int(row / p.y / p.z);
        c[1] = int(row / p.y % p.z);
        c[2] = int(row % p.y);
        c[3] = int(at % p.words) * 32 + __popc((bits & -bits) - 1);
    }
}

// Grid: one thread per output and kernel position.
extern "C" __global__ void sparse_neighbours(const SparseBook p) {
    const int volume = p.kernel[0] * p.kernel[1] * p.kernel[2];
    const i64 at = thread_number(), m = at / volume;
    if (m >= p.m) return;
    const int k = int(at % volume), *c = p.outputs + 4 * m;
    const int z = c[1] * p.stride[0] - p.padding[0] + k / p.kernel[2] / p.kernel[1];
    const int y = c[2] * p.stride[1] - p.padding[1] + k / p.kernel[2] % p.kernel[1];
    const int x = c[3] * p.stride[2] - p.padding[2] + k % p.kernel[2];
    int found = -1;
    if (z >= 0 && z < p.z && y >= 0 && y < p.y && x >= 0 && x < p.x) {
        const i64 word = ((i64(c[0]) * p.z + z) * p.y + y) * p.words + x / 32;
        const u32 bits = p.bits[word], bit = u32(1) << (x % 32);
        if (bits & bit) found = p.before[word] + __popc(bits & (bit - 1));
    }
    p.neighbours[at] = found;
}

__device__ inline void finish(const SparseConv& p, i64 row, int o, float y) {
    const i64 at = row * p.outputs + o;
    if (p.residual8) y = y + float(p.residual8[at]) * p.residual_scale;
    else if (p.residual) y = y + p.residual[at];
    if (p.relu) y = y < 0.0f ? 0.0f : y;
    if (p.out) {
        p.out[at] = y;
        return;
    }
    const float v = y / p.out_scale, clamped = v > -127.0f ? (v < 127.0f ? v : 127.0f) : -127.0f;
    p.out8[at] = (signed char)((clamped + 12582912.0f) - 12582912.0f);  // to the nearest, halves to even
}

// Grid: one thread per output site and kChannels output channels; neighbouring threads share a row's features.
extern "C" __global__ void sparse_conv(const SparseConv p) {
    const int groups = (p.outputs + kChannels - 1) / kChannels;
    const i64 row = thread_number() / groups;
    const int first = int(thread_number() % groups) * kChannels;
    if (row >= p.m) return;
    const int count = p.outputs - first < kChannels ? p.outputs - first : kChannels;
    float sum[kChannels];
    for (int o = 0; o < count; o++) sum[o] = p.bias[first + o];
    for (int k = 0; k < p.volume; k++) {
        const int from = p.neighbours[row * p.volume + k];
        if (from < 0) continue;
        const float *x = p.features + i64(from) * p.channels, *w = p.weights + i64(k) * p.channels * p.outputs + first;
        for (int i = 0; i < p.channels; i++, w += p.outputs)
            for (int o = 0; o < count; o++) sum[o] = __fmaf_rn(x[i], w[o], sum[o]);
    }
    for (int o = 0; o < count; o++) finish(p, row, first + o, sum[o]);
}

// As sparse_conv, from int8: features [n, channels / 4] and weights [volume, channels / 4, outputs] words of four.
extern "C" __global__ void sparse_conv8(const SparseConv p) {
    const int groups = (p.outputs + kChannels - 1) / kChannels, quads = p.channels / 4;
    const i64 row = thread_number() / groups;
    const int first = int(thread_number() % groups) * kChannels;
    if (row >= p.m) return;
    const int count = p.outputs - first < kChannels ? p.outputs - first : kChannels;
    const int *features = (const int*)p.features, *weights = (const int*)p.weights;
    int sum[kChannels] = {0, 0, 0, 0};
    for (int k = 0; k < p.volume; k++) {
        const int from = p.neighbours[row * p.volume + k];
        if (from < 0) continue;
        const int *x = features + i64(from) * quads, *w = weights + i64(k) * quads * p.outputs + first;
        for (int i = 0; i < quads; i++, w += p.outputs)
            for (int o = 0; o < count; o++) sum[o] = __dp4a(x[i], w[o], sum[o]);
    }
    for (int o = 0; o < count; o++) finish(p, row, first + o, float(sum[o]) * p.scale[first + o] + p.bias[first + o]);
}
