#!/usr/bin/env bash
# host.sh [PYTEST ARGUMENTS...]: the tests that need GStreamer with a real RTSP server, and a real browser for the live page.
# On Debian as root it installs what is missing (packages.txt, chromium). A machine that cannot have it fails.
#   PYTHON   an environment with edgekit (default: .venv/bin/python, else python3)
set -euo pipefail
here=$(dirname "$(realpath "$0")"); cd "$here/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mapfile -t wanted < <(grep -v '^ *#' "$here/packages.txt"; command -v chromium >/dev/null || echo chromium)
missing=()
for package in "${wanted[@]}"; do
  [ -z "$package" ] || [[ $(dpkg-query -W -f='${Status}' "$package" 2>/dev/null) == *'ok installed'* ]] || missing+=("$package")
done
if ((${#missing[@]})); then
  echo "installing ${missing[*]}"
  log=$(mktemp)
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 ||
    { tail -n 5 "$log"; echo "could not install ${missing[*]}: run this as root on Debian" >&2; exit 70; }
fi
export EDGEKIT_REQUIRE_GST=1 EDGEKIT_REQUIRE_CHROMIUM=1
"$PYTHON" -m pytest tests/camera_host tests/test_gst*.py "$@"
