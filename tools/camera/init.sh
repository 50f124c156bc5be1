#!/bin/busybox sh
# First process of the guest that vm.sh boots: mounts the host's files read-only and runs the command in them.
b=/bin/busybox
off() { echo 0 > /proc/sys/kernel/printk; $b poweroff -f; } # without the kernel's farewell on the console
die() { echo "camera VM: $*"; off; }
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
$b stty -F /dev/console -onlcr # lines end as they do on the host
while read -r module; do $b insmod "/modules/$module.ko" || die "module $module does not load"; done < /modules/order
nine=trans=virtio,version=9p2000.L,msize=524288
$b mount -t 9p -o $nine,ro,cache=loose host /host || die "the host's files cannot be mounted"
$b mount -t devtmpfs dev /host/dev; $b mount -t proc proc /host/proc; $b mount -t sysfs sys /host/sys
$b mount -t tmpfs run /host/run; $b mount -t tmpfs mnt /host/mnt; $b mkdir /host/mnt/out /host/run/tmp
$b mkdir -p /host/dev/shm && $b mount -t tmpfs shm /host/dev/shm
$b mount -t 9p -o $nine out /host/mnt/out || die "the output folder cannot be mounted"
$b chroot /host /bin/bash /mnt/out/.guest.sh
off
