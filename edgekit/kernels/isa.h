// Which instructions this machine has, for kernels that have code of their own for some of them. Nothing of Python
// here, nor in the headers that build on it: the C library (backends/native) is made of the same ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace edgekit {
namespace cpu {

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

// Who calls a kernel has checked shapes, types and strides before: what fails here is our own mistake.
inline void check(bool ok, const char* what) {
    if (!ok) throw std::logic_error(what);
}

}  // namespace cpu

using cpu::check;
using cpu::detect_isa;
using cpu::Isa;
using cpu::isa_name;

}  // namespace edgekit
