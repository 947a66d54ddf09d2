# Makes the root file system of a Debian guest. Runs as `sh -c` in namespaces that mmdebstrap has
# made, where it is root over nothing but its own files, and may not read the caller's.
#
# Standard input: ends when the caller does. Standard output: a tar of the kernel and initramfs.
# Standard error: what happens. Environment, beside what mmdebstrap uses:
#   SUITE, SOURCES         the release, and one-line apt sources, one a line
#   GUEST_SOURCES          the same for the guest's /etc/apt/sources.list
#   PACKAGES               separated by commas
#   FILES, FSTAB           a tar of files for the guest in base64; its fstab
#   COMMANDS               a shell script for the guest's chroot, or nothing
#   DISK_FD, OFFSET, SIZE  an open disk image; where its root partition lies, in bytes and KiB
#   ROOT_UUID              of the file system
set -eu

# However the caller ends, everything here ends with it: the group now, the rest since this is
# the life of a pid namespace.
exec 4<&0 </dev/null
(read -r _ <&4 || kill -KILL 0) &

# In memory, twice as fast as on a disk, and gone with this namespace. As real root, a mount
# would otherwise appear in the host's namespace as well.
mount --make-rprivate /
mount -t tmpfs -o mode=1777 lumed /tmp
mkdir /tmp/files
printf %s "$FILES" | base64 -d | tar -x -C /tmp/files --no-same-owner
printf '%s' "$FSTAB" > /tmp/files/etc/fstab
printf '%s' "$COMMANDS" > /tmp/commands
unset FILES COMMANDS FSTAB

# The files come before the kernel, whose initramfs they shape.
printf '%s\n' "$SOURCES" | mmdebstrap --mode=unshare --variant=minbase --verbose --format=directory \
    --skip=check/empty --include="$PACKAGES" \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='force-confdef' --dpkgopt='force-confold' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --essential-hook='cp -dR --no-preserve=ownership /tmp/files/. "$1"' \
    --customize-hook='test ! -s /tmp/commands || { echo "I: running commands" >&2; chroot "$1" /bin/sh -eu < /tmp/commands >&2; }' \
    "$SUITE" /tmp/root - >&2
cd /tmp/root

echo "I: writing the disk" >&2
printf '%s\n' "$GUEST_SOURCES" > etc/apt/sources.list
rm -f etc/apt/sources.list.d/0000* etc/apt/apt.conf.d/99mmdebstrap etc/dpkg/dpkg.cfg.d/99mmdebstrap
# Made anew by every machine.
rm -f etc/ssh/ssh_host_* var/lib/dbus/machine-id var/lib/systemd/random-seed etc/hostname
: > etc/machine-id
mkdir -p var/log/journal boot/efi
ln -sf ../run/systemd/resolve/stub-resolv.conf etc/resolv.conf
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service; do
    ln -sf /dev/null "etc/systemd/system/$unit"
done
ln -sf /lib/systemd/system/systemd-networkd.service etc/systemd/system/multi-user.target.wants/

# The guest's own mke2fs: one of a newer host makes what the guest's e2fsck does not know.
lib=$(echo /tmp/root/lib/*-linux-gnu)
MKE2FS_CONFIG=/tmp/root/etc/mke2fs.conf "$lib"/ld-linux-*.so.2 --library-path "$lib" \
    /tmp/root/sbin/mke2fs -q -F -t ext4 -U "$ROOT_UUID" -L root -E "offset=$OFFSET,lazy_itable_init=1,nodiscard" \
    -d /tmp/root "/proc/self/fd/$DISK_FD" "${SIZE}k" >&2
tar -c -h vmlinuz initrd.img
