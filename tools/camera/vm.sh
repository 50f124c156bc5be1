#!/usr/bin/env bash
# vm.sh COMMAND...: run a command on a kernel that has real V4L2 cameras.
# vm.sh --ready: only fetch what that needs.
#
# Boots Debian's stock kernel in qemu (emulated, no KVM needed, about 10 s) with `vivid`, the kernel's virtual
# camera: true /dev/video* nodes with MMAP, USERPTR and DMABUF buffers, raw formats, and faults to inject.
# The guest sees this machine's files read-only at the same paths, except /dev /proc /sys /run /mnt; $VM_OUT
# is a folder shared with the host, writable; TMPDIR lies in memory. Timings in there say nothing about real hardware.
#
#   CAMERA_VM_CACHE    where kernel and initramfs are kept   (default ~/.cache/edgekit/camera-vm)
#   CAMERA_VM_OUT      host folder seen as $VM_OUT            (default: a temporary one, removed afterwards)
#   CAMERA_VM_FILES    host folder of prepared files, seen as $VM_FILES, read-only
#   CAMERA_VM_ENV      names of variables handed on           (default "PYTHONPATH EDGEKIT_SHARED")
#   CAMERA_VM_MEM      guest memory in MiB                    (default 2048)
#   CAMERA_VM_TIMEOUT  seconds until the guest is ended       (default 900)
#   CAMERA_VM_VIVID    options of vivid                       (default: two cameras)
#
# Exit status: the command's; 69 where such a guest cannot be had on this kind of machine (not Debian on
# x86-64), 70 where something needed could not be installed, 124 after the timeout, 125 when the guest died.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
cache=${CAMERA_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgekit/camera-vm}
limit=${CAMERA_VM_TIMEOUT:-900}

say() { echo "camera VM: $*" >&2; }
fail() { local code=$1; shift; say "$*"; exit "$code"; }
[ $# -gt 0 ] || fail 64 "no command. Usage: vm.sh COMMAND..."
[ "$(uname -sm)" = "Linux x86_64" ] || fail 69 "needs Linux on x86-64, this is $(uname -sm)"
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
  fail 69 "needs Debian's packages (apt-get), this system has none"
fi

updated=
apt() { # apt-get, quietly; where that fails once more with fresh lists
  apt-get -qq "$@" >/dev/null 2>"$cache/apt.log" && return
  if [ -z "$updated" ] && [ "$(id -u)" = 0 ]; then
    updated=1; apt-get -qq update >/dev/null 2>>"$cache/apt.log" || return
    apt-get -qq "$@" >/dev/null 2>"$cache/apt.log" && return
  fi
  return 1
}
why() { grep -m1 '^E:' "$cache/apt.log" || tail -n 1 "$cache/apt.log"; }

tools() { # what boots the guest and builds its initramfs
  local missing=() pair
  for pair in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio depmod:kmod; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
  done
  [ "${#missing[@]}" = 0 ] && return
  [ "$(id -u)" = 0 ] || fail 70 "needs ${missing[*]}. Run as root: apt-get install ${missing[*]} seabios"
  say "installing ${missing[*]}"
  apt install -y --no-install-recommends "${missing[@]}" seabios || fail 70 "cannot install ${missing[*]}: $(why)"
}

build() { # Debian's kernel and an initramfs, into $1
  local work=$1 package version file name
  package=$(apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}')
  if [ -z "$package" ]; then
    apt update || fail 70 "no kernel package known to apt: $(why)"
    package=$(apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}')
  fi
  [ -n "$package" ] || fail 69 "apt offers no linux-image-amd64: needs Debian"
  say "fetching $package"
  mkdir -p "$work/download" "$work/ram"/{bin,modules,proc,sys,dev,host}
  chmod 777 "$work/download" # apt downloads as a user of its own
  (cd "$work/download" && apt download "$package") || fail 70 "cannot download $package: $(why)"
  dpkg-deb -x "$work"/download/*.deb "$work/root"; rm -r "$work/download"
  [ -e "$work/root/lib" ] || ln -s usr/lib "$work/root/lib" # where the package has only /usr/lib
  version=$(ls "$work/root/lib/modules")
  (
    PATH=$PATH:/usr/sbin:/sbin
    depmod -b "$work/root" "$version"
    # what the guest loads before it sees the host's files, each after what it needs
    for name in virtio_pci 9pnet_virtio 9p; do
      modprobe -d "$work/root" -S "$version" --show-depends "$name"
    done
  ) | awk '$1 == "insmod" && !seen[$2]++ {print $2}' > "$work/modules"
  while read -r file; do
    name=$(basename "$file"); name=${name%%.ko*}
    case $file in
      *.ko) cat "$file" ;;
      *.xz) xz -dc "$file" ;;
      *.zst) zstd -qdc "$file" ;;
    esac > "$work/ram/modules/$name.ko"
    echo "$name" >> "$work/ram/modules/order"
  done < "$work/modules"
  cp "$(PATH=$PATH:/usr/sbin:/sbin command -v busybox)" "$work/ram/bin/busybox"
  install -m 755 "$here/init.sh" "$work/ram/init"
  (cd "$work/ram" && find . | cpio -o -H newc 2>/dev/null | gzip) > "$work/initramfs.gz"
  ln "$work/root/boot/vmlinuz-$version" "$work/vmlinuz"
}

mkdir -p "$cache"
exec 9>"$cache/lock"; flock 9 # two runs at once build it once
tools
machine=$cache/$({ declare -f build; cat "$here/init.sh"; } | sha256sum | cut -c1-16)
if [ ! -e "$machine" ]; then
  work=$(mktemp -d "$cache/build.XXXXXX"); chmod 755 "$work"
  trap 'rm -rf "$work"' EXIT
  (build "$work")
  mv "$work" "$machine"; trap - EXIT
  find "$cache" -mindepth 1 -maxdepth 1 -type d ! -path "$machine" -mmin +60 -exec rm -rf {} +
fi
flock -u 9
[ "$1" != --ready ] || exit 0

files=${CAMERA_VM_FILES:+$(realpath "$CAMERA_VM_FILES")}
for path in "$PWD" "$machine" $files; do
  case $path/ in /dev/* | /proc/* | /sys/* | /run/* | /mnt/*) fail 70 "$path cannot be seen by the guest. Move it" ;; esac
done
out=${CAMERA_VM_OUT:-}
if [ -n "$out" ]; then mkdir -p "$out"; out=$(realpath "$out"); else out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; fi
rm -f "$out/.status"
{
  printf 'export PATH=%q HOME=%q TMPDIR=/run/tmp VM_OUT=/mnt/out VM_FILES=%q PYTHONDONTWRITEBYTECODE=1\n' "$PATH" "$HOME" "$files"
  for name in ${CAMERA_VM_ENV-PYTHONPATH EDGEKIT_SHARED}; do
    [ -z "${!name+x}" ] || printf 'export %s=%q\n' "$name" "${!name}"
  done
  printf 'PATH=$PATH:/usr/sbin:/sbin modprobe -d %q vivid %s || { echo "camera VM: vivid does not load"; exit; }\n' \
    "$machine/root" "${CAMERA_VM_VIVID:-n_devs=2 node_types=0x1,0x1}"
  printf 'cd %q\n' "$PWD"
  printf '%q ' "$@"; printf '\necho $? > /mnt/out/.status; sync\n'
} > "$out/.guest.sh"

code=0
timeout -k 5 "$limit" qemu-system-x86_64 -accel tcg -cpu max -m "${CAMERA_VM_MEM:-2048}" -smp 1 \
  -display none -monitor none -serial stdio -no-reboot -net none \
  -kernel "$machine/vmlinuz" -initrd "$machine/initramfs.gz" -append "console=ttyS0 quiet panic=-1" \
  -virtfs "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap" \
  -virtfs "local,path=$out,mount_tag=out,security_model=none,multidevs=remap" </dev/null &
guest=$!
trap 'kill "$guest" 2>/dev/null || true' INT TERM HUP # in the foreground it would outlive us
wait "$guest" || code=$?
[ "$code" != 124 ] || fail 124 "ended after $limit s (CAMERA_VM_TIMEOUT)"
[ "$code" -le 128 ] || fail "$code" "interrupted"
[ -s "$out/.status" ] || fail 125 "the guest died before the command ended (qemu: $code)"
status=$(cat "$out/.status"); rm -f "$out/.status" "$out/.guest.sh"
exit "$status"
