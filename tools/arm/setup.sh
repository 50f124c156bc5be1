#!/usr/bin/env bash
# setup.sh [DIR]: an aarch64 userland with Python and the ARM wheels of requirements.txt, run by qemu-user.
#
#   ARM_DEVICE=pi4|pi5|orin|v9 DIR/armpython script.py     as that board (default pi5)
#   ARM_COUNT=counts.jsonl DIR/armpython script.py         count instructions (count.c)
#
# DIR defaults to $EDGEKIT_ARM_DIR, else ~/.cache/edgekit/arm. Needs apt-get, dpkg-deb, pip and a C compiler;
# no root, no binfmt_misc, no chroot; nothing outside DIR changes. Does nothing when DIR is up to date.
# Exit code 75: a package index cannot be reached.
set -euo pipefail
# shellcheck source=tools/arm/lib.sh
source "$(dirname "$(realpath "$0")")/lib.sh"

SYSTEM="libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libbz2-1.0 liblzma5 libffi8 libssl3 libexpat1 libsqlite3-0
  libuuid1 libcrypt1 python$PY_VERSION-minimal libpython$PY_VERSION-minimal libpython$PY_VERSION-stdlib"
# Debian 12's dynamic qemu-user is the one build with plugin support; its libraries come along
EMULATOR="qemu-user libcapstone4 liburing2 libglib2.0-0 libnuma1 libgnutls30"
FILES="lib.sh setup.sh requirements.txt devices.py count.c"

require_debian12
mkdir -p "$ARM_DIR"
exec 9> "$ARM_DIR/lock"; flock 9
stamp=$(cd "$HERE" && { echo "$ARM_DIR"; cat $FILES; } | sha256sum | cut -d' ' -f1)
[ "$(cat "$ARM_DIR/stamp" 2>/dev/null)" != "$stamp" ] || exit 0
rm -rf "$ARM_DIR"/{stamp,sysroot*,host,site,devices,armpython,libcount.so}
: > "$ARM_DIR/log"

say "fetching the aarch64 system and qemu into $ARM_DIR"
# shellcheck disable=SC2086
fetch_debs arm64 "$ARM_DIR/sysroot" $SYSTEM
# shellcheck disable=SC2086
fetch_debs amd64 "$ARM_DIR/host" $EMULATOR
libraries=$ARM_DIR/host/usr/lib/x86_64-linux-gnu
qemu=$ARM_DIR/host/usr/bin/qemu-aarch64
find "$ARM_DIR/host/usr/bin" -type f ! -name qemu-aarch64 -delete
if LD_LIBRARY_PATH=$libraries ldd "$qemu" | grep 'not found' >&2; then
  say "qemu-aarch64 lacks the libraries above"; exit 1
fi

say "fetching the ARM wheels"
platforms=(--platform manylinux2014_aarch64)
for glibc in 17 24 26 27 28 31 34 35 36; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
rm -rf "$ARM_DIR/wheels"
if ! "$PYTHON" -m pip download -q --retries 2 --no-deps --only-binary=:all: "${platforms[@]}" --python-version "$PY_VERSION" \
  --implementation cp --abi cp311 --abi abi3 --abi none -r "$HERE/requirements.txt" -d "$ARM_DIR/wheels" \
  > "$ARM_DIR/pip.log" 2>&1
then
  tail -5 "$ARM_DIR/pip.log" >&2
  unreachable='NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Connection (refused|reset)|Max retries'
  if grep -qE "$unreachable" "$ARM_DIR/pip.log"; then say "the Python package index cannot be reached"; exit "$UNREACHABLE"; fi
  exit 1
fi
"$PYTHON" - "$ARM_DIR" <<'PY'
import sys, zipfile, pathlib
root = pathlib.Path(sys.argv[1])
for wheel in sorted((root / "wheels").glob("*.whl")):
    zipfile.ZipFile(wheel).extractall(root / "site")
PY
rm -rf "$ARM_DIR/wheels"

"${CC:-cc}" -O2 -Wall -Wextra -Werror -shared -fPIC -fvisibility=hidden -o "$ARM_DIR/libcount.so" "$HERE/count.c"

# each board: the same system (hard links) with the board's own /proc and /sys
"$PYTHON" "$HERE/devices.py" "$ARM_DIR/devices"
cat > "$ARM_DIR/sysroot/usr/bin/armpython" <<W
#!/bin/sh
# Written by tools/arm/setup.sh. qemu gets this file as argv[0], so that sys.executable starts it again.
system="$ARM_DIR/sysroot-\${ARM_DEVICE:-pi5}"
[ -f "\$system/qemu-cpu" ] || { echo "armpython: ARM_DEVICE=\$ARM_DEVICE is not one of: $(ls "$ARM_DIR/devices" | tr '\n' ' ')" >&2; exit 2; }
[ -z "\$ARM_COUNT" ] || plugin="-plugin $ARM_DIR/libcount.so,out=\$ARM_COUNT"
export PYTHONPATH="$ARM_DIR/site\${PYTHONPATH:+:\$PYTHONPATH}" PYTHONHASHSEED="\${PYTHONHASHSEED:-0}"
export PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
exec env LD_LIBRARY_PATH="$libraries" "$qemu" -U LD_LIBRARY_PATH -L "\$system" -cpu "\$(cat "\$system/qemu-cpu")" \\
  -0 "$ARM_DIR/sysroot/usr/bin/armpython" \$plugin "$ARM_DIR/sysroot/usr/bin/python$PY_VERSION" "\$@"
W
chmod +x "$ARM_DIR/sysroot/usr/bin/armpython"
for device in "$ARM_DIR"/devices/*; do
  cp -al "$ARM_DIR/sysroot" "$ARM_DIR/sysroot-$(basename "$device")"
  cp -r "$device"/* "$ARM_DIR/sysroot-$(basename "$device")/"
done
ln -s sysroot/usr/bin/armpython "$ARM_DIR/armpython"

"$ARM_DIR/armpython" -c 'import platform, numpy, cv2, onnxruntime
from importlib.metadata import version
from ai_edge_litert.interpreter import Interpreter
print("arm:", platform.machine(), *(f"{n} {version(n)}" for n in ("numpy", "onnxruntime", "ai-edge-litert")))' >&2
echo "$stamp" > "$ARM_DIR/stamp"
