// The module edgekit._native: every kernel.cpp linked into it registers itself (common.h).
#include "common.h"

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of edgekit; each has a numpy reference beside it (edgekit/kernels).";
    m.attr("isa") = edgekit::isa_name(edgekit::detect_isa());
    for (edgekit::Binder bind : edgekit::binders()) bind(m);
}
