// Letterbox on a GPU: one thread per pixel of the network's input. reference.py defines the arithmetic; this
// follows it bit for bit: integers up to the 8-bit level, then a table of 256 values per channel that the host
// made (so floats are never computed here, and one source serves float32, float16 and 8-bit codes).
//
// Compiled by NVRTC without headers (edgekit/kernels/cuda.py). `Parameters` in cuda.py beside this has the same
// fields in the same order. Plain C++ but for CUDA's keywords: tests compile it for the CPU as well.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

enum Format { kPacked3 = 0, kPacked4 = 1, kGrey = 2, kYuyv = 3, kUyvy = 4, kNv12 = 5, kNv21 = 6, kI420 = 7 };

struct Letterbox {
    const u8* plane[3];   // device addresses of the picture's planes
    i64 pitch[3];         // bytes from row to row, negative for a picture upside down
    const int* x_index;   // [columns] first source column per output column, and the weight of the next one
    const int* x_weight;
    const int* y_index;   // [rows] likewise
    const int* y_weight;
    const u8* values;     // [3, 256] elements of the input
    u8* out;              // [3, height, width] or, where `nhwc`, [height, width, 3] elements
    int format;
    int in_width, in_height;
    int width, height;          // of the input
    int left, top;              // where the picture lies in it
    int columns, rows;          // the picture's size there
    int order[3];               // source channel of each input channel; YUV gives B, G, R
    int color[7];               // 128 * black, cy, cu of B, cu and cv of G, cv of R, 0
    int pad;                    // level of the padding
    int bytes;                  // per element: 1, 2 or 4
    int nhwc;
};

// (a b + 2^14) >> 15, as pmulhrsw and sqrdmulh give it
__device__ inline int scaled(int a, int b) { return (a * b + (1 << 14)) >> 15; }

__device__ inline int clamped(int v, int low, int high) { return v < low ? low : v > high ? high : v; }

// One of the two weighted steps of RGB: 11-bit weights.
__device__ inline int blend(int a, int b, int w) { return (2048 - w) * a + w * b; }

// A plane of YUV between four bytes: 7 fractional bits, 15-bit weights. `a`, `b`: the two rows.
__device__ inline int between(const u8* a, const u8* b, int x0, int x1, int wx, int wy) {
    const int a0 = a[x0] << 7, b0 = b[x0] << 7;
    const int above = a0 + scaled((a[x1] << 7) - a0, wx), below = b0 + scaled((b[x1] << 7) - b0, wx);
    return above + scaled(below - above, wy);
}

__device__ inline void levels_of_yuv(const Letterbox& p, int x0, int x1, int wx, int y0, int y1, int wy, int* level) {
    int y, u, v;
    if (p.format == kYuyv || p.format == kUyvy) {
        const u8 *a = p.plane[0] + y0 * p.pitch[0], *b = p.plane[0] + y1 * p.pitch[0];
        const int luma = p.format == kYuyv ? 0 : 1, chroma = 1 - luma;
        const int c0 = 4 * (x0 >> 1) + chroma, c1 = 4 * (x1 >> 1) + chroma;
        y = between(a, b, 2 * x0 + luma, 2 * x1 + luma, wx, wy);
        u = between(a, b, c0, c1, wx, wy);
        v = between(a, b, c0 + 2, c1 + 2, wx, wy);
    } else {
        y = between(p.plane[0] + y0 * p.pitch[0], p.plane[0] + y1 * p.pitch[0], x0, x1, wx, wy);
        const int c0 = x0 >> 1, c1 = x1 >> 1;
        const u8 *a = p.plane[1] + (y0 >> 1) * p.pitch[1], *b = p.plane[1] + (y1 >> 1) * p.pitch[1];
        if (p.format == kI420) {
            u = between(a, b, c0, c1, wx, wy);
            v = between(p.plane[2] + (y0 >> 1) * p.pitch[2], p.plane[2] + (y1 >> 1) * p.pitch[2], c0, c1, wx, wy);
        } else {
            const int first = p.format == kNv12 ? 0 : 1;
            u = between(a, b, 2 * c0 + first, 2 * c1 + first, wx, wy);
            v = between(a, b, 2 * c0 + 1 - first, 2 * c1 + 1 - first, wx, wy);
        }
    }
    y = scaled(y - p.color[0], p.color[1]) + 32;
    u = 2 * (u - (1 << 14)), v = 2 * (v - (1 << 14));
    const int sum[3] = {y + scaled(u, p.color[2]), y + scaled(u, p.color[3]) + scaled(v, p.color[4]),
                        y + scaled(v, p.color[5])};
    for (int c = 0; c < 3; c++) level[c] = clamped(clamped(sum[c], -32768, 32767) >> 6, 0, 255);
}

__device__ inline void levels_of_packed(const Letterbox& p, int x0, int x1, int wx, int y0, int y1, int wy, int* level) {
    const int step = p.format == kPacked3 ? 3 : p.format == kPacked4 ? 4 : 1, channels = p.format == kGrey ? 1 : 3;
    const u8 *a = p.plane[0] + y0 * p.pitch[0], *b = p.plane[0] + y1 * p.pitch[0];
    for (int c = 0; c < 3; c++) {
        if (c >= channels) {
            level[c] = level[0];
            continue;
        }
        const int above = (blend(a[x0 * step + c], a[x1 * step + c], wx) + 8) >> 4;
        const int below = (blend(b[x0 * step + c], b[x1 * step + c], wx) + 8) >> 4;
        level[c] = (blend(above, below, wy) + (1 << 17)) >> 18;
    }
}

// Grid: at least width x height threads. With `padded` the padding, which is still there, is left alone.
extern "C" __global__ void letterbox(const Letterbox p, const int padded) {
    const int x = int(blockIdx.x * blockDim.x + threadIdx.x), y = int(blockIdx.y * blockDim.y + threadIdx.y);
    if (x >= p.width || y >= p.height) return;
    const int column = x - p.left, row = y - p.top;
    const bool inside = column >= 0 && row >= 0 && column < p.columns && row < p.rows;
    if (!inside && padded) return;
    int level[3] = {p.pad, p.pad, p.pad};
    if (inside) {
        const int x0 = p.x_index[column], y0 = p.y_index[row];
        const int x1 = x0 + 1 < p.in_width ? x0 + 1 : x0, y1 = y0 + 1 < p.in_height ? y0 + 1 : y0;
        int found[3];
        if (p.format >= kYuyv) levels_of_yuv(p, x0, x1, p.x_weight[column], y0, y1, p.y_weight[row], found);
        else levels_of_packed(p, x0, x1, p.x_weight[column], y0, y1, p.y_weight[row], found);
        for (int c = 0; c < 3; c++) level[c] = found[p.order[c]];
    }
    for (int c = 0; c < 3; c++) {
        const i64 at = p.nhwc ? (i64(y) * p.width + x) * 3 + c : (i64(c) * p.height + y) * p.width + x;
        const int from = 256 * c + level[c];
        if (p.bytes == 1) p.out[at] = p.values[from];
        else if (p.bytes == 2) reinterpret_cast<u16*>(p.out)[at] = reinterpret_cast<const u16*>(p.values)[from];
        else reinterpret_cast<u32*>(p.out)[at] = reinterpret_cast<const u32*>(p.values)[from];
    }
}
