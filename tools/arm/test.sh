#!/usr/bin/env bash
# test.sh [MODEL [BUILD OPTIONS...]]: build bundles for the Raspberry Pis here, run them on emulated ones.
#
# Without arguments it takes the detector that ships with edgekit. A MODEL of your own needs pictures to be
# quantized with (--calibration) among its options. Prints "skipped: ..." and exits 0 only when
# a package index cannot be reached; everything else that goes wrong is a failure.
set -euo pipefail
ARGUMENTS=("$@"); set --
# shellcheck source=tools/arm/lib.sh
source "$(dirname "$(realpath "$0")")/lib.sh"
export PYTHON EDGEKIT_ARM_DIR=$ARM_DIR
export PYTHONPATH=$ROOT OMP_NUM_THREADS=1
started=$SECONDS

reachable() { # run a step; its exit code 75 ends the test as skipped
  local code=0; "$@" || code=$?
  if [ "$code" = "$UNREACHABLE" ]; then echo "skipped: ARM tests need a package index that cannot be reached"; exit 0; fi
  [ "$code" = 0 ] || { say "$(basename "$2") failed"; exit "$code"; }
}
reachable bash "$HERE/setup.sh"
reachable bash "$HERE/cross.sh"

work=$ARM_DIR/work
rm -rf "$work"; mkdir -p "$work"
if [ "${#ARGUMENTS[@]}" -eq 0 ]; then
  # the accuracy of the shipped detector is proved elsewhere; here a few pictures calibrate and are judged
  cp -r "$ROOT/apps/detect" "$work/app"
  sed -e 's/^count = 128$/count = 32/' -e 's/^count = 64$/count = 8/' -e 's/^max_drop = .*/max_drop = 0.05/' \
    "$ROOT/apps/detect/edgekit.toml" > "$work/app/edgekit.toml"
  [ "$(diff "$ROOT/apps/detect/edgekit.toml" "$work/app/edgekit.toml" | grep -c '^>')" = 3 ] \
    || { say "apps/detect/edgekit.toml has changed: fewer pictures cannot be asked for"; exit 1; }
  ARGUMENTS=("$work/app")
fi
say "building bundles for rpi4 and rpi5, and in int8 for rpi5"
"$PYTHON" -m edgekit build "${ARGUMENTS[@]}" --target rpi4,rpi5 --precision float32 --out "$work/bundles" >&2
"$PYTHON" -m edgekit build "${ARGUMENTS[@]}" --target rpi5 --precision int8 --out "$work/int8" >&2
int8=$(ls "$work"/int8/*.edge)
"$PYTHON" "$HERE/expect.py" "$work/expected" "$work"/bundles/*.edge "int8.edge=$int8"
"$PYTHON" "$HERE/expect_video.py" "$work/expected/video"
"$PYTHON" "$HERE/expect_native.py" "$work/expected"

# none of these looks at a clock: beside each other
counts() {
  cd "$ROOT" && EDGEKIT_ARM_COUNT=1 "$PYTHON" -m pytest -m arm -p no:cacheprovider tests/test_tune_arm.py
}
board() {
  cd "$ARM_DIR/stage"
  export PYTHONPATH=$ARM_DIR/stage EDGEKIT_ARM_EXPECTED=$work/expected EDGEKIT_CACHE=$work/cache-$1 ARM_DEVICE=$1
  ARM_COUNT=$work/tests-$1.jsonl "$ARM_DIR/armpython" -m pytest -m arm -p no:cacheprovider tests/arm
  ARM_COUNT=$work/counts-$1.jsonl "$ARM_DIR/armpython" "$HERE/stages.py" "$(ls "$work"/expected/*."r$1".edge)" "$work/expected/frames.npz"
}
names=("instruction counts by edgekit tune" "tests on the emulated pi4" "tests on the emulated pi5")
say "${names[0]}, ${names[1]} and pi5"
counts > "$work/0.log" 2>&1 & running=($!)
board pi4 > "$work/1.log" 2>&1 & running+=($!)
board pi5 > "$work/2.log" 2>&1 & running+=($!)
trap 'kill "${running[@]}" 2> /dev/null || true' EXIT
failed=0
for i in 0 1 2; do
  wait "${running[i]}" || failed=$?
  say "${names[i]}"; cat "$work/$i.log"
done
[ "$failed" = 0 ] || exit "$failed"
echo "ARM tests passed on pi4 and pi5 in $((SECONDS - started)) s"
