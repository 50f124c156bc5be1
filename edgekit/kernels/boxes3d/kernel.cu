// IoU of rotated boxes on a GPU: one thread per pair. reference.py defines the arithmetic; this follows it bit for bit.
//
// Two launches: boxes3d_prepare, then boxes3d. Compiled by NVRTC without headers and without fused multiply-add
// (edgekit/kernels/cuda.py). `Parameters` in cuda.py beside this has the same fields in the same order.

typedef unsigned int u32;
typedef long long i64;

struct Box {
    double x, y, c, s, half_l, half_w, radius, area, z, h;  // radius < 0: overlaps nothing
};
static_assert(sizeof(Box) == 80, "BOX_BYTES in cuda.py");

struct Boxes3d {
    const float* a;  // [n, 7]
    const float* b;  // [m, 7]
    Box* prepared;   // [n + m]
    float* out;      // [n, m]
    int n, m, three_d;
};

__device__ inline bool is_finite(float v) {
    union { float value; u32 bits; } u;
    u.value = v;
    return (u.bits & 0x7f800000u) != 0x7f800000u;
}

__device__ inline Box prepare(const float* v) {
    Box b = {0, 0, 1, 0, 0, 0, -1, 0, 0, 0};
    for (int i = 0; i < 7; i++)
        if (!is_finite(v[i])) return b;
    if (v[6] < -1e6f || v[6] > 1e6f) return b;
    constexpr double f3 = 6, f5 = f3 * 4 * 5, f7 = f5 * 6 * 7, f9 = f7 * 8 * 9, f11 = f9 * 10 * 11, f13 = f11 * 12 * 13,
                     f15 = f13 * 14 * 15, f17 = f15 * 16 * 17;
    constexpr double f2 = 2, f4 = f2 * 3 * 4, f6 = f4 * 5 * 6, f8 = f6 * 7 * 8, f10 = f8 * 9 * 10, f12 = f10 * 11 * 12,
                     f14 = f12 * 13 * 14, f16 = f14 * 15 * 16;
    const double sines[9] = {1 / f17, -1 / f15, 1 / f13, -1 / f11, 1 / f9, -1 / f7, 1 / f5, -1 / f3, 1};
    const double cosines[9] = {1 / f16, -1 / f14, 1 / f12, -1 / f10, 1 / f8, -1 / f6, 1 / f4, -1 / f2, 1};
    // adding 1.5 * 2^52 rounds to the nearest whole number, ties to even
    const double yaw = v[6], n = (yaw * 0.6366197723675814 + 6755399441055744.0) - 6755399441055744.0;
    const double r = (yaw - n * 1.57079632673412561417e+00) - n * 6.07710050650619224932e-11, t = r * r;
    double p = sines[0], q = cosines[0];
    for (int i = 1; i < 9; i++) p = p * t + sines[i], q = q * t + cosines[i];
    p = p * r;
    const int quadrant = int(n) & 3;
    const double sine = quadrant & 1 ? q : p, cosine = quadrant & 1 ? p : q;
    b.s = quadrant >= 2 ? -sine : sine;
    b.c = quadrant == 1 || quadrant == 2 ? -cosine : cosine;
    b.x = v[0], b.y = v[1], b.z = v[2], b.h = v[5] > 0 ? v[5] : 0;
    const double l = v[3] > 0 ? v[3] : 0, w = v[4] > 0 ? v[4] : 0;
    b.half_l = 0.5 * l, b.half_w = 0.5 * w, b.area = l * w;
    b.radius = sqrt(b.half_l * b.half_l + b.half_w * b.half_w);
    return b;
}

__device__ inline double clamp(double v, double limit) {
    v = v < -limit ? -limit : v;
    return v > limit ? limit : v;
}

__device__ inline double share(double v) {
    v = v > 0 ? v : 0;
    return v < 1 ? v : 1;
}

__device__ inline double inverse(double v) { return v != 0 ? 1 / v : 0; }

// Whether a comes before b in the order of reference.precedes.
__device__ inline bool precedes(const Box& a, const Box& b) {
    if (a.area != b.area) return a.area < b.area;
    if (a.x != b.x) return a.x < b.x;
    if (a.y != b.y) return a.y < b.y;
    if (a.half_l != b.half_l) return a.half_l < b.half_l;
    if (a.c != b.c) return a.c < b.c;
    return a.s < b.s;
}

__device__ inline double edge(double x0, double y0, double y1, double step, double inverse_y, double limit_x,
                              double limit_y) {
    const double ya = clamp(y0, limit_y), yb = clamp(y1, limit_y);
    const double xa = x0 + share((ya - y0) * inverse_y) * step, xb = x0 + share((yb - y0) * inverse_y) * step;
    const double ca = clamp(xa, limit_x), cb = clamp(xb, limit_x);
    const double cut = (ca - xa) - (xb - cb), way = xb - xa;
    const double part = way != 0 ? cut / way : 0;
    return (yb - ya) * ((ca + cb) + part * (ca - cb));
}

__device__ inline double intersection(const Box& p, const Box& q) {
    const double dx = q.x - p.x, dy = q.y - p.y;
    const double ox = p.c * dx + p.s * dy, oy = p.c * dy - p.s * dx;
    const double c = p.c * q.c + p.s * q.s, s = p.c * q.s - p.s * q.c;
    const double ux = q.half_l * c, uy = q.half_l * s, vx = q.half_w * s, vy = q.half_w * c;
    const double x0 = (ox + ux) - vx, x1 = (ox - ux) - vx, x2 = (ox - ux) + vx, x3 = (ox + ux) + vx;
    const double y0 = (oy + uy) + vy, y1 = (oy - uy) + vy, y2 = (oy - uy) - vy, y3 = (oy + uy) - vy;
    const double iu = inverse(2 * uy), iv = inverse(2 * vy);
    double total = edge(x0, y0, y1, -2 * ux, -iu, p.half_l, p.half_w);
    total = total + edge(x1, y1, y2, 2 * vx, -iv, p.half_l, p.half_w);
    total = total + edge(x2, y2, y3, 2 * ux, iu, p.half_l, p.half_w);
    total = total + edge(x3, y3, y0, -2 * vx, iv, p.half_l, p.half_w);
    total = 0.5 * total;
    const double most = p.area < q.area ? p.area : q.area;
    total = total > 0 ? total : 0;
    return total < most ? total : most;
}

__device__ inline double shared_height(const Box& a, const Box& b) {
    const double top_a = a.z + 0.5 * a.h, top_b = b.z + 0.5 * b.h, low_a = a.z - 0.5 * a.h, low_b = b.z - 0.5 * b.h;
    const double most = a.h < b.h ? a.h : b.h;
    double shared = (top_a < top_b ? top_a : top_b) - (low_a > low_b ? low_a : low_b);
    shared = shared > 0 ? shared : 0;
    return shared < most ? shared : most;
}

// Grid: at least n + m threads.
extern "C" __global__ void boxes3d_prepare(const Boxes3d p) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < i64(p.n) + p.m) p.prepared[at] = prepare(at < p.n ? p.a + 7 * at : p.b + 7 * (at - p.n));
}

// Grid: at least n x m threads.
extern "C" __global__ void boxes3d(const Boxes3d p) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= i64(p.n) * p.m) return;
    const Box &a = p.prepared[at / p.m], &b = p.prepared[p.n + at % p.m];
    const double dx = b.x - a.x, dy = b.y - a.y, reach = a.radius + b.radius;
    double iou = 0;
    if (a.radius >= 0 && b.radius >= 0 && dx * dx + dy * dy < reach * reach) {
        double shared = precedes(b, a) ? intersection(b, a) : intersection(a, b), size_a = a.area, size_b = b.area;
        if (p.three_d) shared = shared * shared_height(a, b), size_a = size_a * a.h, size_b = size_b * b.h;
        const double whole = (size_a + size_b) - shared;
        iou = whole > 0 ? shared / whole : 0;
    }
    p.out[at] = float(iou);
}
