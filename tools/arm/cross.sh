#!/usr/bin/env bash
# cross.sh [DIR]: stages edgekit for the emulated boards in DIR/stage: what a device gets (package and targets),
# the native kernels and the native engine compiled for aarch64, and the tests. Run setup.sh before.
# The engine's library lies in DIR/libedgekit.so, too, and in DIR/stage/examples the C example with it.
#
# Takes aarch64-linux-gnu-g++ if it is installed, else fetches Debian's own into DIR (EDGEKIT_ARM_OWN_CC=1
# always does). Nothing is written into the source tree. Exit code 75: the package index cannot be reached.
set -euo pipefail
# shellcheck source=tools/arm/lib.sh
source "$(dirname "$(realpath "$0")")/lib.sh"

COMPILER="g++-12-aarch64-linux-gnu gcc-12-aarch64-linux-gnu cpp-12-aarch64-linux-gnu binutils-aarch64-linux-gnu
  libgcc-12-dev-arm64-cross libstdc++-12-dev-arm64-cross libc6-dev-arm64-cross linux-libc-dev-arm64-cross
  libc6-arm64-cross libstdc++6-arm64-cross libgcc-s1-arm64-cross"
COMPILER_LIBRARIES="libisl23 libmpc3 libmpfr6 libgmp10 libzstd1 zlib1g"
# the flags of setup.py; the architecture is the oldest board's (tests/test_arm_tools.py compares)
FLAGS="-std=c++17 -O3 -fvisibility=hidden -ffp-contract=off -pthread"
LINKED="-pthread -s -static-libstdc++ -static-libgcc -Wl,--exclude-libs,ALL -Wl,--gc-sections"  # of the engine

require_debian12
[ -x "$ARM_DIR/armpython" ] || { say "no armpython in $ARM_DIR: run tools/arm/setup.sh first"; exit 1; }
exec 9> "$ARM_DIR/lock"; flock 9
[ -d "$ARM_DIR/headers/usr/include/python$PY_VERSION" ] \
  || fetch_debs arm64 "$ARM_DIR/headers" "libpython$PY_VERSION-dev"

if [ "${EDGEKIT_ARM_OWN_CC:-0}" = 0 ] && command -v aarch64-linux-gnu-g++ > /dev/null; then
  compiler=(aarch64-linux-gnu-g++)
else
  own=$ARM_DIR/compiler
  if [ ! -e "$own/complete" ]; then
    say "fetching the cross compiler"
    # shellcheck disable=SC2086
    fetch_debs amd64 "$own" $COMPILER $COMPILER_LIBRARIES
    touch "$own/complete"
  fi
  libraries=$own/usr/lib/x86_64-linux-gnu:$own/lib/x86_64-linux-gnu
  compiler=(env "LD_LIBRARY_PATH=$libraries" "$own/usr/bin/aarch64-linux-gnu-g++-12" "--sysroot=$own")
fi

# as an installed wheel: the content folders lie inside the package (setup.py)
stage=$ARM_DIR/stage
rm -rf "$stage"; mkdir -p "$stage"
cp -r "$ROOT/edgekit" "$ROOT/tests" "$ROOT/pyproject.toml" "$stage/"
mkdir -p "$stage/edgekit/_content"
cp -r "$ROOT/targets" "$stage/edgekit/_content/"
find "$stage" \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +

mapfile -t sources < <(find "$ROOT/edgekit/kernels" -name '*.cpp' | sort)
if [ "${#sources[@]}" -gt 0 ]; then
  pybind=$("$PYTHON" -c 'import pybind11; print(pybind11.get_include())' 2>/dev/null) \
    || { say "$PYTHON has no pybind11: run make setup first"; exit 1; }
  headers=$ARM_DIR/headers/usr/include
  includes=(-I "$ROOT/edgekit/kernels" -I "$pybind" -I "$headers/python$PY_VERSION" -I "$headers")
  key=$({ echo "$FLAGS" "${compiler[@]}"; "${compiler[@]}" --version; cat "${sources[@]}"
    find "$ROOT/edgekit/kernels" -name '*.h' | sort | xargs cat; } | sha256sum | cut -c1-32)
  module=$ARM_DIR/native/$key.so
  if [ ! -e "$module" ]; then
    say "compiling ${#sources[@]} kernel files for aarch64"
    rm -rf "$ARM_DIR/native"; mkdir -p "$ARM_DIR/native"
    # shellcheck disable=SC2086
    "${compiler[@]}" $FLAGS -march=armv8-a -shared -fPIC "${includes[@]}" "${sources[@]}" -o "$module.part"
    mv "$module.part" "$module"
  fi
  cp "$module" "$stage/edgekit/_native.cpython-${PY_VERSION/./}-aarch64-linux-gnu.so"
fi

# the engine: a C library, its instruction sets in files of their own, at -O2 as in setup.py
src=$ROOT/edgekit/backends/native/src
library=$ARM_DIR/engine/$({ echo "$FLAGS $LINKED" "${compiler[@]}"; "${compiler[@]}" --version
  find "$ROOT/edgekit/backends/native" "$ROOT/edgekit/kernels" -name '*.cpp' -o -name '*.h' | sort | xargs cat; } | sha256sum | cut -c1-32)
if [ ! -e "$library/libedgekit.so" ]; then
  say "compiling the native engine for aarch64"
  rm -rf "$ARM_DIR/engine"; mkdir -p "$library/objects"
  # shellcheck disable=SC2086
  find "$src" -name '*.cpp' -printf '%f\0' | xargs -0 -P "$(nproc)" -I{} \
    "${compiler[@]}" $FLAGS -O2 -march=armv8-a -fPIC -c "$src/{}" -o "$library/objects/{}.o"
  "${compiler[@]}" $LINKED -shared "$library"/objects/*.o -o "$library/libedgekit.so.part"
  mv "$library/libedgekit.so.part" "$library/libedgekit.so"
fi
ln -sf "$library/libedgekit.so" "$ARM_DIR/libedgekit.so"
cp "$library/libedgekit.so" "$stage/edgekit/"

# the C example beside it; `detect` starts it under the emulation that armpython has, as the board of ARM_DEVICE
mkdir -p "$stage/examples"
"${compiler[@]}" -O2 -Wall -Wextra -I "$ROOT/edgekit/backends/native/include" -x c -std=c11 "$ROOT/examples/c/detect.c" -x none \
  -Wl,--as-needed -L "$library" -ledgekit "-Wl,-rpath,$stage/edgekit" -o "$stage/examples/detect.aarch64"
sed "s|^  -0 .*|  \$plugin \"$stage/examples/detect.aarch64\" \"\$@\"|" "$ARM_DIR/armpython" > "$stage/examples/detect"
chmod +x "$stage/examples/detect"
