// Trilinear interpolation from sparse voxels on a GPU: reference.py's arithmetic bit for bit. The sites are those that
// sparse_conv/kernel.cu makes: bits, and for each word the number of sites before it.
//
// Two launches: devoxelize_neighbours once per points and sites, devoxelize for each layer's features. Compiled by NVRTC
// without headers (edgekit/kernels/cuda.py). `Parameters` in cuda.py has the same fields.

typedef unsigned int u32;
typedef long long i64;

struct Devoxelize {
    const float* points;    // [n, step], x y z first
    const u32* bits;        // [batch, z, y, words]
    const int* before;
    int* index;             // [n, 8]
    float* weight;          // [n, 8]
    const float* features;  // [sites, channels]
    float* out;             // [n, channels]
    float low[3], size[3], center;  // x y z
    int n, step, batch, z, y, x, words, channels;
};

__device__ inline i64 thread_number() { return i64(blockIdx.x) * blockDim.x + threadIdx.x; }

// Grid: one thread per point.
extern "C" __global__ void devoxelize_neighbours(const Devoxelize p) {
    const i64 at = thread_number();
    if (at >= p.n) return;
    int* index = p.index + 8 * at;
    float *weight = p.weight + 8 * at, part[3][2];
    for (int k = 0; k < 8; k++) index[k] = -1, weight[k] = 0.0f;
    int base[3];
    for (int a = 0; a < 3; a++) {
        const float q = (p.points[at * p.step + a] - p.low[a]) / p.size[a] - p.center;
        if (!(q > -16777216.0f && q < 16777216.0f)) return;
        const float f = floorf(q);
        base[a] = int(f);
        part[a][1] = q - f;
        part[a][0] = 1.0f - part[a][1];
    }
    for (int k = 0; k < 8; k++) {
        const int dz = k >> 2, dy = k >> 1 & 1, dx = k & 1;
        const int z = base[2] + dz, y = base[1] + dy, x = base[0] + dx;
        if (z < 0 || z >= p.z || y < 0 || y >= p.y || x < 0 || x >= p.x) continue;
        const i64 word = ((i64(p.batch) * p.z + z) * p.y + y) * p.words + x / 32;
        const u32 bits = p.bits[word], bit = u32(1) << (x % 32);
        if (!(bits & bit)) continue;
        index[k] = p.before[word] + __popc(bits & (bit - 1));
        weight[k] = (part[2][dz] * part[1][dy]) * part[0][dx];
    }
    float total = weight[0];
    for (int k = 1; k < 8; k++) total = total + weight[k];
    if (total > 0.0f)
        for (int k = 0; k < 8; k++) weight[k] = weight[k] / total;
}

// Grid: one thread per point and channel.
extern "C" __global__ void devoxelize(const Devoxelize p) {
    const i64 at = thread_number() / p.channels;
    const int c = int(thread_number() % p.channels);
    if (at >= p.n) return;
    float sum = 0.0f;
    for (int k = 0; k < 8; k++) {
        const int site = p.index[8 * at + k];
        if (site >= 0) sum = sum + p.weight[8 * at + k] * p.features[i64(site) * p.channels + c];
    }
    p.out[at * p.channels + c] = sum;
}
