// Sparse convolution, output-stationary: a tile of output voxels keeps its sums in the cache while the pairs of
// every kernel position are multiplied into them straight from the features of the input, and bias, residual, ReLU
// and requantization are applied when it is stored. No gathered copy, no scattered write, and each output is
// summed by one thread in one order.
#include "sparse_conv/rows.h"
#include "sparse_conv/sites.h"

#include <pybind11/stl.h>

namespace edgekit {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<int8_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

Axes axes(const std::array<int32_t, 3>& v) { return {v[0], v[1], v[2]}; }

const Lanes& lanes_named(const std::string& name) {
    static const std::vector<Lanes> all = all_lanes();
    for (const Lanes& lanes : all)
        if (name == "auto" || name == lanes.name) return lanes;
    throw std::invalid_argument("no such lanes on this machine");
}

// Weights in the order in which the products read them: position, group of output channels, input channel, channel
// of the group (float), or with four input channels innermost (int8). Channels of a group that do not exist are 0.
template <class T>
class Weights {
public:
    Weights(const py::array_t<T, py::array::c_style>& weight, const Floats& bias, const std::string& isa)
        : lanes(lanes_named(isa)) {
        check(weight.ndim() == 3, "sparse weights");
        volume = int(weight.shape(0));
        channels = int(weight.shape(1));
        outputs = int(weight.shape(2));
        check(bias.size() == outputs, "sparse bias");
        constexpr bool floats = sizeof(T) == 4;
        check(floats || channels % 4 == 0, "sparse channels");
        const int vectors = (outputs + lanes.width - 1) / lanes.width;
        columns = std::min(vectors >= 3 ? 4 : vectors, lanes.columns);
        group = columns * lanes.width;
        groups = (vectors + columns - 1) / columns;
        stride = groups * group;
        bias_.assign(size_t(stride), 0.0f);
        std::copy_n(bias.data(), outputs, bias_.begin());
        packed_.assign(size_t(volume) * groups * channels * group, T(0));
        offset_.assign(size_t(volume) * stride, 0);
        for (int k = 0; k < volume; k++)
            for (int o = 0; o < outputs; o++) {
                int32_t sum = 0;
                for (int i = 0; i < channels; i++) {
                    const T w = weight.data()[(size_t(k) * channels + i) * outputs + o];
                    const size_t base = (size_t(k) * groups + o / group) * channels * group;
                    const size_t at = floats ? size_t(i) * group + o % group : size_t(i / 4 * group + o % group) * 4 + i % 4;
                    packed_[base + at] = w;
                    if (!floats) sum += int32_t(w);
                }
                if (lanes.unsigned_x) offset_[size_t(k) * stride + o] = -128 * sum;
            }
    }

    const T* packed(int k, int g) const { return &packed_[(size_t(k) * groups + g) * channels * group]; }
    const int32_t* offset(int k, int g) const { return &offset_[size_t(k) * stride + size_t(g) * group]; }
    const float* bias() const { return bias_.data(); }

    const Lanes& lanes;
    int volume, channels, outputs;
    int columns, group, groups, stride;

private:
    std::vector<T> packed_;
    std::vector<float> bias_;
    std::vector<int32_t> offset_;
};

// Scratch of a thread, on a cache line.
template <class S>
S* scratch(size_t n) {
    static thread_local std::vector<S> room;
    if (room.size() < n + 16) room.resize(n + 16);
    return room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64 / sizeof(S);
}

template <class T, class S>
void multiply(const Weights<T>& w, const Rulebook& book, int64_t tile, const T* features, S* sums) {
    for (int g = 0; g < w.groups; g++) {
        Operand<T> a{};
        a.features = features;
        a.sums = sums + g * w.group;
        a.channels = w.channels;
        a.stride = w.stride;
        for (int k = 0; k < w.volume; k++) {
            const int64_t begin = book.start[size_t(tile * w.volume + k)];
            const int count = int(book.start[size_t(tile * w.volume + k + 1)] - begin);
            if (count == 0) continue;
            a.weights = w.packed(k, g);
            if constexpr (sizeof(T) == 4) {
                w.lanes.floats(w.columns, a, &book.from[size_t(begin)], &book.to[size_t(begin)], count);
            } else {
                a.offset = w.offset(k, g);
                w.lanes.bytes(w.columns, a, &book.from[size_t(begin)], &book.to[size_t(begin)], count);
            }
        }
    }
}

template <class T>
void check_call(const Weights<T>& w, const Rulebook& book, const py::array& features) {
    check(w.volume == book.volume, "sparse kernel volume");
    check(features.ndim() == 2 && features.shape(0) == book.inputs && features.shape(1) == w.channels, "sparse features");
}

void convolve(const Weights<float>& w, const Rulebook& book, const Floats& features, const py::object& residual,
              bool relu, Floats out, int threads) {
    check_call(w, book, features);
    check(out.ndim() == 2 && out.shape(0) == book.outputs && out.shape(1) == w.outputs, "sparse out");
    const float *x = features.data(), *add = nullptr;
    Floats held;
    if (!residual.is_none()) {
        held = residual.cast<Floats>();
        check(held.size() == out.size(), "sparse residual");
        add = held.data();
    }
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    Finish f{};
    f.relu = relu;
    f.add = add;
    f.out = to;
    parallel_for(book.tiles(), 1, threads, [&](int64_t begin, int64_t) {
        const int64_t first = begin * Rulebook::kTile;
        const int n = int(std::min<int64_t>(Rulebook::kTile, book.outputs - first));
        float* sums = scratch<float>(size_t(Rulebook::kTile) * w.stride);
        for (int r = 0; r < n; r++) std::copy_n(w.bias(), w.stride, sums + size_t(r) * w.stride);
        multiply(w, book, begin, x, sums);
        if (w.stride != w.outputs)
            for (int r = 1; r < n; r++)
                std::memmove(sums + size_t(r) * w.outputs, sums + size_t(r) * w.stride, sizeof(float) * size_t(w.outputs));
        w.lanes.finish(f, sums, first * w.outputs, int64_t(n) * w.outputs);
    });
}

// y = sum * scale + bias (+ residual * residual_scale), then ReLU; out: float32, or int8 = round(y / out_scale).
void convolve8(const Weights<int8_t>& w, const Rulebook& book, const Bytes& features, const Floats& scale,
               const py::object& residual, float residual_scale, bool relu, py::array out, float out_scale,
               int threads) {
    check_call(w, book, features);
    check(out.ndim() == 2 && out.shape(0) == book.outputs && out.shape(1) == w.outputs, "sparse out");
    check(scale.size() == w.outputs, "sparse scale");
    const int8_t* x = features.data();
    Finish f{};
    f.relu = relu;
    f.scale = scale.data();
    f.bias = w.bias();
    f.add_scale = residual_scale;
    f.out_scale = out_scale;
    py::array held;
    if (!residual.is_none()) {
        held = py::reinterpret_borrow<py::array>(residual);
        check(held.size() == out.size(), "sparse residual");
        if (held.itemsize() == 1) f.add8 = static_cast<const int8_t*>(held.data());
        else f.add = static_cast<const float*>(held.data());
    }
    if (out.itemsize() == 1) f.out8 = static_cast<int8_t*>(out.mutable_data());
    else f.out = static_cast<float*>(out.mutable_data());
    py::gil_scoped_release release;
    parallel_for(book.tiles(), 1, threads, [&](int64_t begin, int64_t) {
        const int64_t first = begin * Rulebook::kTile;
        const int n = int(std::min<int64_t>(Rulebook::kTile, book.outputs - first));
        int32_t* sums = scratch<int32_t>(size_t(Rulebook::kTile) * w.stride);
        std::fill_n(sums, size_t(n) * w.stride, 0);
        multiply(w, book, begin, x, sums);
        float* y = scratch<float>(size_t(n) * w.outputs);
        for (int r = 0; r < n; r++) w.lanes.scaled(f, sums + size_t(r) * w.stride, y + size_t(r) * w.outputs, w.outputs);
        w.lanes.finish(f, y, first * w.outputs, int64_t(n) * w.outputs);
    });
}

// float [sites, channels] -> [batch, channels, z, y, x], zeros where there is no voxel.
void to_dense(const Sites& sites, const Floats& features, Floats out, int threads) {
    const int64_t channels = features.shape(1), n = sites.count();
    const int64_t plane = int64_t(sites.shape.z) * sites.shape.y * sites.shape.x;
    check(features.shape(0) == n && out.size() == sites.batch * channels * plane, "sparse dense");
    const float* from = features.data();
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    parallel_for(channels, 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = 0; b < sites.batch; b++)
            std::memset(to + (b * channels + begin) * plane, 0, sizeof(float) * size_t((end - begin) * plane));
        for (int64_t i = 0; i < n; i++) {
            const int32_t* c = &sites.coordinates[size_t(4 * i)];
            const int64_t cell = (int64_t(c[1]) * sites.shape.y + c[2]) * sites.shape.x + c[3];
            for (int64_t k = begin; k < end; k++) to[(c[0] * channels + k) * plane + cell] = from[i * channels + k];
        }
    });
}

template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
    py::array_t<T> out(py::ssize_t(values.size()));
    if (!values.empty()) std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(T));
    return out;
}

// The sites in order, and which row of `coordinates` each is; or what is wrong with them.
py::object make_sites(const Ints& coordinates, const std::array<int32_t, 3>& shape, int batch) {
    check(coordinates.ndim() == 2 && coordinates.shape(1) == 4, "sparse coordinates");
    auto sites = std::make_shared<Sites>(axes(shape), batch);
    std::vector<int32_t> order;
    std::string wrong;
    {
        py::gil_scoped_release release;
        wrong = sites->assign(coordinates.data(), coordinates.shape(0), order);
    }
    if (!wrong.empty()) return py::str(wrong);
    return py::make_tuple(sites, array_of(order));
}

Ints coordinates_of(const std::shared_ptr<Sites>& sites) {
    // a view: the sites live as long as it does
    return Ints({py::ssize_t(sites->count()), py::ssize_t(4)}, sites->coordinates.data(), py::cast(sites));
}

std::shared_ptr<Sites> strided(const Sites& in, const std::array<int32_t, 3>& shape, const std::array<int32_t, 3>& kernel,
                               const std::array<int32_t, 3>& stride, const std::array<int32_t, 3>& padding) {
    py::gil_scoped_release release;
    auto out = std::make_shared<Sites>(axes(shape), in.batch);
    strided_sites(in, {axes(kernel), axes(stride), axes(padding)}, *out);
    return out;
}

std::shared_ptr<Rulebook> make_book(const Sites& in, const Sites& out, const std::array<int32_t, 3>& kernel,
                                    const std::array<int32_t, 3>& stride, const std::array<int32_t, 3>& padding,
                                    int threads) {
    py::gil_scoped_release release;
    auto book = std::make_shared<Rulebook>();
    book->build(in, out, {axes(kernel), axes(stride), axes(padding)}, threads);
    return book;
}

// All pairs by kernel position, then output: (position, input, output), int32 each.
py::tuple pairs_of(const Rulebook& book) {
    std::vector<int32_t> position, from, to;
    for (int k = 0; k < book.volume; k++)
        for (int64_t t = 0; t < book.tiles(); t++)
            for (int64_t i = book.start[size_t(t * book.volume + k)]; i < book.start[size_t(t * book.volume + k + 1)]; i++) {
                position.push_back(k);
                from.push_back(book.from[size_t(i)]);
                to.push_back(int32_t(t * Rulebook::kTile + book.to[size_t(i)]));
            }
    return py::make_tuple(array_of(position), array_of(from), array_of(to));
}

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(sparse_conv, m) {
    using namespace edgekit;
    py::class_<Sites, std::shared_ptr<Sites>>(m, "SparseSites")
        .def_property_readonly("coordinates", &coordinates_of);
    py::class_<Rulebook, std::shared_ptr<Rulebook>>(m, "SparseRulebook")
        .def("pairs", &pairs_of)
        .def("inverse",
             [](const Rulebook& book) {
                 py::gil_scoped_release release;
                 auto inverse = std::make_shared<Rulebook>();
                 inverse->build_inverse(book);
                 return inverse;
             })
        .def_property_readonly("count", [](const Rulebook& book) { return book.from.size(); });
    py::class_<Weights<float>>(m, "SparseWeights")
        .def(py::init<const Floats&, const Floats&, const std::string&>(), py::arg("weight").noconvert(),
             py::arg("bias").noconvert(), py::arg("isa"));
    py::class_<Weights<int8_t>>(m, "SparseWeights8")
        .def(py::init<const Bytes&, const Floats&, const std::string&>(), py::arg("weight").noconvert(),
             py::arg("bias").noconvert(), py::arg("isa"));
    m.def("sparse_isas", [] {
        std::vector<std::string> names;
        for (const Lanes& lanes : all_lanes()) names.push_back(lanes.name);
        py::list list;
        for (const std::string& name : names) list.append(name);
        return list;
    });
    m.def("sparse_sites", &make_sites, py::arg("coordinates").noconvert(), py::arg("shape"), py::arg("batch"));
    m.def("sparse_strided", &strided);
    m.def("sparse_rulebook", &make_book);
    m.def("sparse_convolve", &convolve, py::arg("weights"), py::arg("book"), py::arg("features").noconvert(),
          py::arg("residual"), py::arg("relu"), py::arg("out").noconvert(), py::arg("threads"));
    m.def("sparse_convolve8", &convolve8, py::arg("weights"), py::arg("book"), py::arg("features").noconvert(),
          py::arg("scale").noconvert(), py::arg("residual"), py::arg("residual_scale"), py::arg("relu"),
          py::arg("out").noconvert(), py::arg("out_scale"), py::arg("threads"));
    m.def("sparse_to_dense", &to_dense, py::arg("sites"), py::arg("features").noconvert(), py::arg("out").noconvert(),
          py::arg("threads"));
}
