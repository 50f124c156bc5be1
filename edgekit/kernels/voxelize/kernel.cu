// Voxelization on a GPU with the numbers of the CPU: voxels in the order of their first point, points of a voxel in
// their own order, sums in that order. reference.py defines the arithmetic; this follows it bit for bit, because
// whatever threads race for is a minimum (first point of a cell) or is put in order afterwards (points of a voxel).
//
// Launches in turn, `launches` of cuda.py: clear, voxelize (points into the table), count, scan, number, link, mean.
// Compiled by NVRTC without headers (edgekit/kernels/cuda.py). `Parameters` in cuda.py has the same fields.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Voxelize {
    const float* points;  // [n, channels]
    u32* keys;            // [table]: cell, or kNone
    u32* first;           // [table]: its first point
    int* number;          // [table]: its voxel, -1 beyond max_voxels
    int* place;           // [n]: where in the table a point's cell is, -1 outside
    int* partial;         // [pieces + 1]: first points of each piece of points, then how many came before; last: all
    int* head;            // [most voxels]: a point of the voxel, -1 none
    int* next;            // [n]: the next one of its voxel, in any order
    int* coordinates;     // [most voxels, 4]
    float* features;      // [most voxels, channels]
    int* counts;          // [most voxels]
    int* voxel;           // [n]
    int* slot;            // [n]
    int* total;           // voxels that there are
    float low[3], size[3];
    int grid[3];
    int n, channels, table, most, max_points, batch;  // table: a power of two >= 2 n
};

enum : u32 { kNone = 0xffffffffu };
enum : int { kPiece = 256 };

__device__ inline int thread_number() { return int(blockIdx.x * blockDim.x + threadIdx.x); }

// Grid: at least max(table, most, n) threads.
extern "C" __global__ void voxelize_clear(const Voxelize p) {
    const int at = thread_number();
    if (at < p.table) p.keys[at] = p.first[at] = kNone;
    if (at < p.most) p.head[at] = -1;
    if (at < p.n) p.voxel[at] = p.slot[at] = -1;
}

// Grid: at least n threads.
extern "C" __global__ void voxelize(const Voxelize p) {
    const int at = thread_number();
    if (at >= p.n) return;
    p.place[at] = -1;
    const float* point = p.points + i64(at) * p.channels;
    int cell[3];
    for (int a = 0; a < 3; a++) {
        const float q = (point[a] - p.low[a]) / p.size[a];
        // in range by its floor: -0.5 is not, and -0.0 is
        if (!(q >= 0.0f && q < float(p.grid[a]))) return;
        cell[a] = int(q);
    }
    const u32 key = u32((cell[2] * p.grid[1] + cell[1]) * p.grid[0] + cell[0]);
    u32 i = u32((u64(key) * 0x9E3779B97F4A7C15ull) >> 32) & u32(p.table - 1);
    for (;; i = (i + 1) & u32(p.table - 1)) {
        const u32 there = atomicCAS(p.keys + i, u32(kNone), key);
        if (there == kNone || there == key) break;
    }
    atomicMin(p.first + i, u32(at));
    p.place[at] = int(i);
}

__device__ inline bool opens(const Voxelize& p, int at) {
    return p.place[at] >= 0 && p.first[p.place[at]] == u32(at);
}

// Grid: one thread per kPiece points.
extern "C" __global__ void voxelize_count(const Voxelize p) {
    const int piece = thread_number(), begin = piece * kPiece;
    if (begin >= p.n) return;
    int count = 0;
    for (int at = begin; at < p.n && at < begin + kPiece; at++) count += opens(p, at);
    p.partial[piece] = count;
}

// Grid: one thread.
extern "C" __global__ void voxelize_scan(const Voxelize p) {
    if (thread_number() != 0) return;
    const int pieces = (p.n + kPiece - 1) / kPiece;
    int sum = 0;
    for (int piece = 0; piece < pieces; piece++) {
        const int count = p.partial[piece];
        p.partial[piece] = sum;
        sum += count;
    }
    *p.total = sum < p.most ? sum : p.most;
}

// Grid: as voxelize_count.
extern "C" __global__ void voxelize_number(const Voxelize p) {
    const int piece = thread_number(), begin = piece * kPiece;
    if (begin >= p.n) return;
    int v = p.partial[piece];
    for (int at = begin; at < p.n && at < begin + kPiece; at++) {
        if (!opens(p, at)) continue;
        const int i = p.place[at];
        p.number[i] = v < p.most ? v : -1;
        if (v < p.most) {
            const u32 key = p.keys[i], row = key / u32(p.grid[0]);
            int* c = p.coordinates + 4 * i64(v);
            c[0] = p.batch;
            c[1] = int(row / u32(p.grid[1]));
            c[2] = int(row % u32(p.grid[1]));
            c[3] = int(key % u32(p.grid[0]));
        }
        v++;
    }
}

// Grid: at least n threads.
extern "C" __global__ void voxelize_link(const Voxelize p) {
    const int at = thread_number();
    if (at >= p.n || p.place[at] < 0) return;
    const int v = p.number[p.place[at]];
    if (v >= 0) p.next[at] = atomicExch(p.head + v, at);
}

// Grid: at least `most` threads, one per voxel. It looks for the next point in order once per point that it keeps:
// meant for the few points of a LiDAR's voxel, and slow where thousands share one and max_points is 0.
extern "C" __global__ void voxelize_mean(const Voxelize p) {
    const int v = thread_number();
    if (v >= *p.total) return;
    float* sum = p.features + i64(v) * p.channels;
    for (int k = 0; k < p.channels; k++) sum[k] = 0.0f;
    int count = 0;
    for (int last = -1; p.max_points == 0 || count < p.max_points; count++) {
        int found = 0x7fffffff;
        for (int at = p.head[v]; at >= 0; at = p.next[at])
            if (at > last && at < found) found = at;
        if (found == 0x7fffffff) break;
        last = found;
        p.voxel[found] = v;
        p.slot[found] = count;
        const float* point = p.points + i64(found) * p.channels;
        for (int k = 0; k < p.channels; k++) sum[k] = sum[k] + point[k];
    }
    p.counts[v] = count;
    for (int k = 0; k < p.channels; k++) sum[k] = sum[k] / float(count);
}
