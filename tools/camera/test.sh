#!/usr/bin/env bash
# test.sh [PYTEST ARGUMENTS...]: the tests in tests/camera, on true /dev/video nodes in the guest that vm.sh boots.
#
#   PYTHON                  an environment with edgekit (default: .venv/bin/python, else python3)
#   CAMERA_REQUIRED=1       a machine that cannot have such a guest is a failure instead of a skip
#   CAMERA_TEST_FILES=DIR   prepared files for the guest, which the tests see as $VM_FILES; without it
#                           tools/camera/prepare.py, where there is one, is given an empty folder to fill
#   EDGEKIT_CAMERA_CYCLES   how often the leak test opens and closes a camera (default 1000)
# Prints "skipped: ..." and exits 0 only where the machine is not Debian on x86-64.
set -euo pipefail
here=$(dirname "$(realpath "$0")"); root=$(realpath "$here/../.."); cd "$root"
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
PYTHON=$(command -v "$PYTHON")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
started=$SECONDS
failed() { # with the exit status of vm.sh
  if [ "$1" = 69 ] && [ "${CAMERA_REQUIRED:-0}" != 1 ]; then
    echo "skipped: camera tests need Debian on x86-64"; exit 0
  fi
  echo "camera tests failed (exit status $1)" >&2; exit "$1"
}
"$here/vm.sh" --ready || failed $?
files=${CAMERA_TEST_FILES:-}
if [ -z "$files" ]; then
  files=$(mktemp -d); trap 'rm -rf "$files"' EXIT
  [ ! -e "$here/prepare.py" ] || "$PYTHON" "$here/prepare.py" "$files"
fi
# video0: like a USB camera; video1: its buffers are contiguous for DMA, as on an embedded board;
# video2: the multi-planar interface; video3: an HDMI grabber
export CAMERA_VM_VIVID="n_devs=4 node_types=0x1,0x1,0x1,0x1 num_inputs=1,1,1,1 input_types=0,0,0,3
  multiplanar=1,1,2,1 allocators=0,1,0,0"
CAMERA_VM_VIVID=$(echo $CAMERA_VM_VIVID) # one line
export CAMERA_VM_FILES=$files PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1
export CAMERA_VM_ENV="PYTHONPATH EDGEKIT_SHARED PYTEST_DISABLE_PLUGIN_AUTOLOAD OMP_NUM_THREADS EDGEKIT_CAMERA_CYCLES"
"$here/vm.sh" "$PYTHON" -m pytest -p no:cacheprovider --basetemp=/run/pytest tests/camera "$@" || failed $?
echo "camera tests passed in $((SECONDS - started)) s"
