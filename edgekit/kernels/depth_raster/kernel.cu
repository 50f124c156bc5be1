// Depth images of a point cloud on a GPU: one thread per (point, camera), the nearest depth by an integer minimum, which
// no order of threads changes. reference.py defines the arithmetic; this follows it bit for bit.
//
// Three launches: depth_raster_clear, depth_raster, depth_raster_finish. Compiled by NVRTC without headers
// (edgekit/kernels/cuda.py). `Parameters` in cuda.py beside this has the same fields in the same order.

typedef unsigned int u32;
typedef long long i64;

struct DepthRaster {
    const float* points;    // [n, step], x y z first
    const float* matrices;  // [cam, 3, 4]
    u32* image;             // [cam, height, width], bits of float32
    i64 n;
    int step, cameras, height, width;
    float near, far;
};

enum : u32 { kInfinity = 0x7f800000u };  // bits of floats above 0 are ordered as the floats are

__device__ inline i64 pixel_of_thread(const DepthRaster& p) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    return at < i64(p.cameras) * p.height * p.width ? at : -1;
}

// Grid: at least cameras x height x width threads.
extern "C" __global__ void depth_raster_clear(const DepthRaster p) {
    const i64 at = pixel_of_thread(p);
    if (at >= 0) p.image[at] = kInfinity;
}

// Grid: at least n threads in x, `cameras` blocks of one thread in y.
extern "C" __global__ void depth_raster(const DepthRaster p) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const int camera = int(blockIdx.y);
    if (at >= p.n || camera >= p.cameras) return;
    const float *point = p.points + at * p.step, *m = p.matrices + 12 * camera;
    const float x = point[0], y = point[1], z = point[2];
    float q[3];
    for (int k = 0; k < 3; k++) q[k] = ((m[4 * k] * x + m[4 * k + 1] * y) + m[4 * k + 2] * z) + m[4 * k + 3];
    if (!(q[2] > p.near && q[2] <= p.far)) return;
    const float u = q[0] / q[2], v = q[1] / q[2];
    if (!(u >= 0 && u < float(p.width) && v >= 0 && v < float(p.height))) return;
    union { float value; u32 bits; } depth;
    depth.value = q[2];
    atomicMin(p.image + (i64(camera) * p.height + int(v)) * p.width + int(u), depth.bits);
}

// Grid: as depth_raster_clear.
extern "C" __global__ void depth_raster_finish(const DepthRaster p) {
    const i64 at = pixel_of_thread(p);
    if (at >= 0 && p.image[at] == kInfinity) p.image[at] = 0;
}
