// How many int8 products a second one core of this machine can do: independent vpdpbusd on registers, nothing else.
// Prints the best and the median of nine runs, in 1e9 a second, and the width; "none" where the CPU has no VNNI.
#include <algorithm>
#include <chrono>
#include <cstdio>

#if defined(__x86_64__)
constexpr long kTurns = 1 << 20;
// sixteen sums, enough to hide the instruction's latency; what is in the registers does not matter
#define SIXTEEN(ONE) ONE(0) ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) ONE(11) ONE(12) ONE(13) ONE(14) ONE(15)
#define WIDE(n) "vpdpbusd %%zmm31, %%zmm31, %%zmm" #n "\n"
#define NARROW(n) "%{vex%} vpdpbusd %%ymm15, %%ymm15, %%ymm" #n "\n"
#define USED                                                                                                       \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
        "xmm14", "xmm15"

// products per instruction, and what runs sixteen of them
template <typename Sixteen>
static double rate(int products, Sixteen sixteen) {
    const auto start = std::chrono::steady_clock::now();
    for (long i = 0; i < kTurns; i++) sixteen();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return 16.0 * products * kTurns / seconds / 1e9;
}
#endif

int main() {
#if defined(__x86_64__)
    const bool wide = __builtin_cpu_supports("avx512vnni");
    if (wide || __builtin_cpu_supports("avxvnni")) {
        double found[9];
        for (double& f : found)
            f = wide ? rate(64, [] { asm volatile(SIXTEEN(WIDE) : : : USED); }) : rate(32, [] { asm volatile(SIXTEEN(NARROW) : : : USED); });
        std::sort(found, found + 9);
        std::printf("%.1f %.1f %d\n", found[8], found[4], wide ? 512 : 256);
        return 0;
    }
#endif
    std::puts("none");
}
