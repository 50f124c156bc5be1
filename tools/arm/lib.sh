# Shared by the scripts in this folder: where things are kept and how Debian packages are fetched without
# root, into a private state, so that the machine's own package database is neither asked nor changed.
HERE=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
ROOT=$(realpath "$HERE/../..")
ARM_DIR=$(realpath -m "${1:-${EDGEKIT_ARM_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/edgekit/arm}}")
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}
PY_VERSION=3.11   # of the emulated Python: Debian 12's
UNREACHABLE=75    # exit code for: a package index cannot be reached (EX_TEMPFAIL)

say() { echo "arm: $*" >&2; }

require_debian12() { # the packages named here are Debian 12's; $OS_RELEASE stands for its name in tests
  [ "$(uname -m)" = x86_64 ] || { say "needs an x86_64 machine, this is $(uname -m): run the tests natively"; exit 1; }
  local name
  # shellcheck disable=SC1090
  name=$(. "${OS_RELEASE:-/etc/os-release}" 2>/dev/null && echo "${ID:-} ${VERSION_ID:-}" || true)
  [ "$name" = "debian 12" ] || { say "needs Debian 12, this is ${name:-unknown}: use a debian:12 container"; exit 1; }
}

# private_apt ARCH ARGUMENTS...: apt-get for that architecture with its state below $ARM_DIR
private_apt() {
  local arch=$1 state=$ARM_DIR/apt/$1; shift
  mkdir -p "$state"/{lists/partial,archives/partial,sources,preferences}
  : > "$state/status"
  cp -f /etc/apt/sources.list.d/debian.sources "$state/sources/" 2>/dev/null || true
  cp -f /etc/apt/sources.list "$state/sources.list" 2>/dev/null || : > "$state/sources.list"
  apt-get -q -y \
    -o APT::Architecture="$arch" -o APT::Architectures::="$arch" -o APT::Sandbox::User="$(id -un)" \
    -o Dir::State="$state" -o Dir::State::lists="$state/lists" -o Dir::State::status="$state/status" \
    -o Dir::Cache="$state" -o Dir::Cache::archives="$state/archives" \
    -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts="$state/sources" \
    -o Dir::Etc::PreferencesParts="$state/preferences" \
    -o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Update::Error-Mode=any "$@" >> "$ARM_DIR/log" 2>&1
}

# fetch_debs ARCH FOLDER PACKAGE...: download and unpack
fetch_debs() {
  local arch=$1 into=$2 debs=$ARM_DIR/debs/$1-$(basename "$2"); shift 2
  rm -rf "$debs"; mkdir -p "$debs" "$into"
  private_apt "$arch" update || { say "the Debian package index cannot be reached (see $ARM_DIR/log)"; exit "$UNREACHABLE"; }
  (cd "$debs" && private_apt "$arch" download "$@") || { tail -5 "$ARM_DIR/log" >&2; say "download failed: $*"; exit 1; }
  local deb; for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" "$into"; done
  rm -rf "$debs"
}
