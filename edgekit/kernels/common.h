// Shared by every kernel of edgekit._native. A kernel.cpp registers itself with EDGEKIT_KERNEL;
// nothing else has to be told about it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace edgekit {

using Binder = void (*)(py::module_&);

inline std::vector<Binder>& binders() {
    static std::vector<Binder> list;
    return list;
}

inline bool register_binder(Binder bind) {
    binders().push_back(bind);
    return true;
}

// Instruction sets that a kernel may have its own code for; all of them give the same bits.
enum class Isa { portable, avx2, neon };

// The best one this machine has.
inline Isa detect_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return Isa::avx2;
#elif defined(__aarch64__)
    return Isa::neon;
#endif
    return Isa::portable;
}

inline const char* isa_name(Isa isa) {
    return isa == Isa::avx2 ? "avx2" : isa == Isa::neon ? "neon" : "portable";
}

// Python has checked shapes, types and strides before it calls: what fails here is our own mistake.
inline void check(bool ok, const char* what) {
    if (!ok) throw std::logic_error(what);
}

template <class T>
std::vector<T> copy(const py::array_t<T, py::array::c_style>& a) {
    return std::vector<T>(a.data(), a.data() + a.size());
}

}  // namespace edgekit

#define EDGEKIT_KERNEL(name, module)                                                       \
    static void bind_##name(py::module_&);                                                 \
    [[maybe_unused]] static const bool registered_##name =                                 \
        edgekit::register_binder(&bind_##name);                                            \
    static void bind_##name(py::module_& module)
