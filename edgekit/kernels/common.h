// Shared by every kernel of edgekit._native. A kernel.cpp registers itself with EDGEKIT_KERNEL;
// nothing else has to be told about it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "isa.h"

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
