// What this CPU and its system have. Included before any `#pragma GCC target`.
#pragma once

#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace edgekit {
namespace {

// Linux's bits for /proc/self/auxv (arch/arm64/include/uapi/asm/hwcap.h)
[[maybe_unused]] constexpr unsigned long kHwcapDotProduct = 1ul << 20, kHwcapRdm = 1ul << 12, kHwcap2I8mm = 1ul << 13;

[[maybe_unused]] bool has_dot_products() {
#if defined(__linux__)
    constexpr unsigned long kAll = kHwcapDotProduct | kHwcapRdm;  // RDM: of Armv8.1, which the compiler may use too
    return (getauxval(AT_HWCAP) & kAll) == kAll;
#else
    return false;
#endif
}

[[maybe_unused]] bool has_i8mm() {
#if defined(__linux__)
    return has_dot_products() && (getauxval(AT_HWCAP2) & kHwcap2I8mm) != 0;
#else
    return false;
#endif
}

}  // namespace
}  // namespace edgekit
