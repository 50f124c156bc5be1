#include "preprocess.h"

#include <cmath>
#include <cstring>
#include <numeric>

#pragma GCC push_options
#pragma GCC optimize("O3")  // it carries the time, whatever the rest is compiled with
#include "../../../kernels/letterbox/letterbox.h"
#pragma GCC pop_options
#include "status.h"

#pragma GCC optimize("Os")

namespace edgekit {
namespace {

constexpr int kMostSide = 65536, kMostInput = 16384;

// --- what reference.py of the kernel calls tables; the same arithmetic, so the same bits ---

struct Taps {
    std::vector<int32_t> index, weight;
};

// First source index and weight of the second, of `count` output pixels from `first` on.
Taps axis_taps(int source, int size, int first, int count, int bits) {
    Taps taps;
    for (int d = 0; d < count; d++) {
        const int64_t p = (2 * int64_t(first + d) + 1) * source - size, twice = 2 * int64_t(size);
        int64_t index = p >= 0 ? p / twice : -((-p + twice - 1) / twice);
        const int64_t rest = p - index * twice;
        int64_t weight = ((rest << bits) + size) / twice;
        index += weight >> bits;
        if (p < 0 || index >= source - 1 || weight >> bits != 0) weight = 0;
        taps.index.push_back(int32_t(std::min<int64_t>(std::max<int64_t>(index, 0), source - 1)));
        taps.weight.push_back(int32_t(weight));
    }
    return taps;
}

FilterTaps area_filter(int source, int size, int first, int count, int bits) {
    if (size > source) {
        const Taps taps = axis_taps(source, size, first, count, bits);
        FilterTaps f{taps.index, {}, 2, 1 << bits};
        for (const int32_t w : taps.weight) f.weight.insert(f.weight.end(), {(1 << bits) - w, w});
        return f;
    }
    const int64_t gcd = std::gcd(source, size), total = source / gcd, unit = size / gcd;
    const int most = int((total + unit - 1) / unit) + 1;
    FilterTaps f{{}, {}, most, int(total)};
    int used = 1;
    for (int d = 0; d < count; d++) {
        const int64_t begin = int64_t(first + d) * total, start = begin / unit;
        f.start.push_back(int32_t(start));
        for (int k = 0; k < most; k++) {
            const int64_t left = (start + k) * unit;
            const int64_t weight = std::max<int64_t>(std::min(left + unit, begin + total) - std::max(left, begin), 0);
            f.weight.push_back(int32_t(weight));
            if (weight > 0) used = std::max(used, k + 1);
        }
    }
    if (used < most) {  // the last is for those that begin within a pixel
        for (int d = 0; d < count; d++) std::copy_n(f.weight.begin() + size_t(d) * most, used, f.weight.begin() + size_t(d) * used);
        f.weight.resize(size_t(count) * used);
        f.most = used;
    }
    return f;
}

// The same over chroma, of which a pixel serves two of luma.
FilterTaps halved(const FilterTaps& f) {
    FilterTaps h{{}, {}, 1, f.total};
    for (const int32_t start : f.start) {
        h.start.push_back(start >> 1);
        h.most = std::max(h.most, ((start + f.most - 1) >> 1) - (start >> 1) + 1);
    }
    h.weight.resize(f.start.size() * size_t(h.most));
    for (size_t d = 0; d < f.start.size(); d++)
        for (int k = 0; k < f.most; k++)
            h.weight[d * h.most + ((f.start[d] + k) >> 1) - h.start[d]] += f.weight[d * f.most + k];
    return h;
}

// Gains of ITU-R BT.601-7 2.5 and BT.709-6 3 in 15 bits.
std::vector<int32_t> yuv_coefficients(bool bt709, bool full) {
    const double kr = bt709 ? 0.2126 : 0.299, kb = bt709 ? 0.0722 : 0.114, kg = 1 - kr - kb;
    const double black = full ? 0 : 16, luma = full ? 255 : 219, chroma = full ? 255 : 224;
    const double blue = 2 * (1 - kb) * 255 / chroma, red = 2 * (1 - kr) * 255 / chroma;
    const double gains[5] = {255 / luma / 2, blue / 4, -blue * kb / kg / 4, -red * kr / kg / 4, red / 4};
    std::vector<int32_t> out{int32_t(128 * black)};
    for (const double gain : gains) out.push_back(int32_t(std::nearbyint(32768 * gain)));
    out.push_back(0);
    return out;
}

// What an input channel gets for each 8-bit level: float32, or codes.
void add_values(const ImageRule& rule, const ek_port& port, int channel, std::vector<uint8_t>& table) {
    for (int level = 0; level < 256; level++) {
        const float x = (float(level) - rule.mean[channel]) / rule.std[channel];
        if (port.dtype == EK_F32) {
            uint8_t bytes[4];
            std::memcpy(bytes, &x, 4);
            table.insert(table.end(), bytes, bytes + 4);
        } else {
            table.push_back(input_code(x, port));
        }
    }
}

int plane_count(Pixel format) {
    const Kind kind = kind_of(format);
    return kind == Kind::yuv_pairs ? 2 : kind == Kind::yuv_planes ? 3 : 1;
}

// round() of Python: half to even.
int rounded(double x) { return int(std::nearbyint(x)); }
int floor_half(int x) { return x >= 0 ? x / 2 : -((1 - x) / 2); }

}  // namespace

uint8_t input_code(float x, const ek_port& port) {
    const float whole = std::nearbyint(x * float(1.0 / double(port.scale)));
    return whole == whole ? uint8_t(std::min(std::max(double(whole) + port.zero, 0.0), 255.0)) : uint8_t(port.zero);
}

ImageRule ImageRule::read(const Value& table) {
    table.keys({"width", "height"}, {"resize", "pad_value", "color", "mean", "std", "layout", "dtype", "shorter_side", "interpolation", "scaled_width"});
    ImageRule rule;
    rule.width = int(table["width"].integer(1, kMostInput));
    rule.height = int(table["height"].integer(1, kMostInput));
    if (table.has("resize"))
        rule.resize = Resize(table["resize"].choice({"letterbox", "letterbox-center", "stretch", "crop", "crop-bottom"}));
    if (table.has("pad_value")) rule.pad_value = int(table["pad_value"].integer(0, 255));
    if (table.has("color")) rule.rgb = table["color"].choice({"bgr", "rgb"}) == 1;
    for (const bool mean : {true, false}) {
        const char* key = mean ? "mean" : "std";
        if (!table.has(key)) continue;
        const std::vector<Value> items = table[key].items();
        if (items.size() != 3) table[key].refuse("3 values");
        for (int c = 0; c < 3; c++) {
            const double value = items[c].number();
            if (!(std::fabs(value) <= 3.4e38) || (!mean && !(std::fabs(value) >= 1e-37))) items[c].refuse("a number that fits float32, std not 0");
            (mean ? rule.mean : rule.std)[c] = float(value);
        }
    }
    if (table.has("layout")) rule.nhwc = table["layout"].choice({"NCHW", "NHWC"}) == 1;
    if (table.has("dtype")) table["dtype"].choice({"float32", "float16", "uint8"});
    if (table.has("interpolation")) rule.area = table["interpolation"].choice({"bilinear", "area"}) == 1;
    if (table.has("shorter_side")) {
        if (rule.resize != Resize::crop) table.refuse("shorter_side with resize 'crop' only");
        rule.shorter_side = int(table["shorter_side"].integer(std::max(rule.width, rule.height), kMostInput));
    }
    if (table.has("scaled_width")) {
        if (rule.resize != Resize::crop_bottom) table.refuse("scaled_width with resize 'crop-bottom' only");
        rule.scaled_width = int(table["scaled_width"].integer(rule.width, kMostInput));
    }
    return rule;
}

Placement place(const ImageRule& rule, int width, int height) {
    const double to_w = double(rule.width) / width, to_h = double(rule.height) / height;
    if (rule.resize == Resize::stretch) return {to_w, to_h, 0, 0, rule.width, rule.height};
    if (rule.resize == Resize::crop) {
        int w, h;
        if (rule.shorter_side == 0) {
            const double ratio = std::max(to_w, to_h);
            w = std::max(rule.width, int(width * ratio)), h = std::max(rule.height, int(height * ratio));
        } else {
            const int64_t shorter = std::min(width, height);
            w = int(int64_t(width) * rule.shorter_side / shorter), h = int(int64_t(height) * rule.shorter_side / shorter);
        }
        return {double(w) / width, double(h) / height, -rounded((w - rule.width) / 2.0), -rounded((h - rule.height) / 2.0), w, h};
    }
    if (rule.resize == Resize::crop_bottom) {
        const int w = rule.scaled_width ? rule.scaled_width : rule.width;
        const int h = int(std::max<int64_t>(1, int64_t(height) * w / width));
        return {double(w) / width, double(h) / height, -floor_half(w - rule.width), rule.height - h, w, h};
    }
    const double ratio = std::min(to_w, to_h);
    if (rule.resize == Resize::letterbox)
        return {ratio, ratio, 0, 0, std::max(1, int(width * ratio)), std::max(1, int(height * ratio))};
    const int w = std::max(1, rounded(width * ratio)), h = std::max(1, rounded(height * ratio));
    return {ratio, ratio, rounded((rule.width - w) / 2.0 - 0.1), rounded((rule.height - h) / 2.0 - 0.1), w, h};
}

struct PictureInput::Plan {
    uint32_t format, width, height, matrix, range;  // as the picture has them
    Placement placement;
    Letterbox kernel;

    bool fits(const ek_picture& p) const {
        return format == p.format && width == p.width && height == p.height && matrix == p.matrix && range == p.range;
    }

    static LetterboxTables tables(const ImageRule& rule, const ek_port& port, bool nhwc, const ek_picture& picture, const Placement& at) {
        LetterboxTables t;
        t.format = Pixel(picture.format);
        const bool yuv = kind_of(t.format) != Kind::packed, square = kind_of(t.format) == Kind::yuv_pairs || kind_of(t.format) == Kind::yuv_planes;
        const int bits = yuv ? 15 : 11;
        t.in_w = int(picture.width), t.in_h = int(picture.height), t.out_w = rule.width, t.out_h = rule.height;
        t.left = std::max(0, at.left), t.top = std::max(0, at.top);
        t.nhwc = nhwc;
        t.type = port.dtype == EK_F32 ? Out::f32 : Out::u8;
        // a crop lies outside of the input on both sides: only what falls inside is computed
        const int x = std::max(0, -at.left), y = std::max(0, -at.top), w = std::min(rule.width, at.width), h = std::min(rule.height, at.height);
        Taps columns = axis_taps(t.in_w, at.width, x, w, bits), rows = axis_taps(t.in_h, at.height, y, h, bits);
        t.x_index = std::move(columns.index), t.x_weight = std::move(columns.weight);
        t.y_index = std::move(rows.index), t.y_weight = std::move(rows.weight);
        const bool same = (t.format == Pixel::rgb || t.format == Pixel::rgba) == rule.rgb;
        for (int c = 0; c < 3; c++) t.order[c] = t.format == Pixel::grey ? 0 : same ? c : 2 - c;
        t.color = yuv_coefficients(picture.matrix == EK_BT709, picture.range == EK_FULL);
        if (rule.area) {
            FilterTaps fx = area_filter(t.in_w, at.width, x, w, bits), fy = area_filter(t.in_h, at.height, y, h, bits);
            FilterTaps cx = halved(fx), cy = square ? halved(fy) : fy;
            t.filters = {std::move(fx), std::move(fy), std::move(cx), std::move(cy)};
        }
        const size_t item = port.dtype == EK_F32 ? 4 : 1;
        for (int c = 0; c < 3; c++) {
            t.mean[c] = rule.mean[c], t.std[c] = rule.std[c];
            add_values(rule, port, c, t.values);
            const uint8_t* pad = t.values.data() + (size_t(256) * c + rule.pad_value) * item;
            t.pad.insert(t.pad.end(), pad, pad + item);
        }
        return t;
    }

    Plan(const ImageRule& rule, const ek_port& port, bool nhwc, const ek_picture& p)
        : format(p.format), width(p.width), height(p.height), matrix(p.matrix), range(p.range),
          placement(place(rule, int(p.width), int(p.height))),
          kernel(tables(rule, port, nhwc, p, placement), Letterbox::best_isa()) {}
};

PictureInput::PictureInput(const ImageRule& rule, const ek_port& port, void* memory)
    : rule_(rule), port_(port), memory_(static_cast<uint8_t*>(memory)) {
    const uint32_t h = uint32_t(rule.height), w = uint32_t(rule.width);
    const uint32_t first[4] = {1, 3, h, w}, last[4] = {1, h, w, 3};
    const uint32_t* wanted = rule.nhwc ? last : first;
    const bool fits = port.rank == 4 && std::memcmp(port.shape, wanted, sizeof first) == 0 && !(rule.nhwc && port.channels_last) &&
                      port.bytes == size_t(3) * h * w * (port.dtype == EK_F32 ? 4 : 1);
    if (!fits) fail(EK_BAD_FILE, "its pipeline does not fit its network: expected an input [%u, %u, %u, %u]", wanted[0], wanted[1], wanted[2], wanted[3]);
    if (port.dtype == EK_U8 && !(port.scale > 0)) fail(EK_BAD_FILE, "input '%s': scale %g", port.name, double(port.scale));
    nhwc_ = rule.nhwc || port.channels_last;
}

PictureInput::~PictureInput() = default;

const Placement& PictureInput::write(const ek_picture& given) {
    ek_picture p = {};
    if (given.size < offsetof(ek_picture, matrix) || given.size > 4096) fail(EK_BAD_ARGUMENT, "picture: size %u, expected sizeof(ek_picture)", given.size);
    std::memcpy(&p, &given, std::min<size_t>(given.size, sizeof p));
    if (p.format > EK_I420) fail(EK_BAD_ARGUMENT, "picture: unknown format %u", p.format);
    if (p.width < 1 || p.height < 1 || p.width > kMostSide || p.height > kMostSide)
        fail(EK_BAD_ARGUMENT, "picture %ux%u: expected sides of 1..%d pixels", p.width, p.height, kMostSide);
    const Pixel format = Pixel(p.format);
    const Kind kind = kind_of(format);
    if (kind == Kind::yuv_packed && p.width % 2) fail(EK_BAD_ARGUMENT, "picture %ux%u: YUYV and UYVY need an even width", p.width, p.height);
    if (kind == Kind::packed) p.matrix = p.range = 0;  // without meaning
    if (p.matrix > EK_BT709 || p.range > EK_FULL) fail(EK_BAD_ARGUMENT, "picture: unknown matrix %u or range %u", p.matrix, p.range);

    Source source{};
    const uint8_t* next = nullptr;  // where a plane lies that is not told
    for (int i = 0; i < plane_count(format); i++) {
        const ptrdiff_t w = i == 0 ? p.width : (p.width + 1) / 2, h = i == 0 ? p.height : (p.height + 1) / 2;
        const ptrdiff_t row = w * (i > 0 ? (kind == Kind::yuv_pairs ? 2 : 1) : channels_of(format));
        const ptrdiff_t stride = p.stride[i] ? p.stride[i] : row;
        if (std::abs(stride) < row) fail(EK_BAD_ARGUMENT, "picture: rows of plane %d lie %td bytes apart, expected at least %td", i, stride, row);
        if (!p.plane[i] && (i == 0 || stride < 0 || !next)) fail(EK_BAD_ARGUMENT, "picture: plane %d is null", i);
        source.plane[i] = p.plane[i] ? p.plane[i] : next;
        source.stride[i] = stride;
        next = stride > 0 ? source.plane[i] + stride * h : nullptr;
    }
    if (!plan_ || !plan_->fits(p)) {
        padded_ = false;
        plan_.reset();
        plan_ = std::make_unique<Plan>(rule_, port_, nhwc_, p);
    }
    const bool padded = padded_;
    padded_ = false;
    plan_->kernel.run(source, memory_, padded);
    padded_ = true;
    return plan_->placement;
}

}  // namespace edgekit
