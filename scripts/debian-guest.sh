#!/usr/bin/env bash
# Builds a Debian 12 guest as people run them: systemd, Debian's cloud kernel, a Redis with data, and all of /usr in the page
# cache by the time it says "debian-guest: ready" on its serial port. The figures about guests that use a disk are taken
# on it. Writes `disk.img` (one ext4 file system without partitions, blocks of 4 KiB as the pages of memory), `vmlinuz`,
# `initrd.img` and the kernel's command line `cmdline` into the folder `debian` of the cache, and does nothing while this
# script and what lies in `debian-guest/` stay the same; `--force` builds it anew, from today's packages.
#
# Needs root (or sudo), as the files of the image belong to several users, and the packages of the mirror that this machine
# takes Debian itself from. Needs no loop device and no mount.
set -eu -o pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

guest=$cache/debian
here=$root/scripts/debian-guest
suite=bookworm
# What is there beyond Debian's own choice for a system without a task.
packages=(linux-image-cloud-amd64 initramfs-tools systemd-sysv dbus redis-server redis-tools openssh-server
    ca-certificates curl python3 git rsync)
disk_mib=1536
# The kernel's command line: as the test guest's, but that this kernel has a disk to find.
cmdline='console=ttyS0 root=/dev/vda rw quiet mitigations=off tsc=reliable no_timer_check cryptomgr.notests random.trust_cpu=on apparmor=0 audit=0'
# When everything in the image was written, so that the next build differs only where packages do.
epoch=1700000000

PATH=$PATH:/usr/sbin:/sbin
stamp=$(cat "$root"/scripts/{lib.sh,debian-guest.sh,debian-guest/*} | sha256sum)
if [ "${1:-}" != --force ] && [ -f "$guest/stamp" ] && [ "$(cat "$guest/stamp")" = "$stamp" ]; then exit 0; fi
command -v mmdebstrap >/dev/null || "$root/scripts/bench-setup.sh"

# The address of the mirror is the one that this machine takes Debian itself from.
# shellcheck disable=SC2016 # these are apt's variables
mirror=$(apt-get indextargets --format '$(CODENAME) $(LABEL) $(REPO_URI)' 'Identifier: Packages' |
    sed -n "s/^$(os_release VERSION_CODENAME) Debian //p" | head -n 1)
[ -n "$mirror" ] || die 5 "this machine's package sources name no Debian mirror"

mkdir -p "$guest"
# Read by mmdebstrap's apt, which gives up its rights; and belonging to root, so that root has to remove it.
work=$(mktemp -d "$guest/build.XXXXXX")
chmod 755 "$work"
trap 'as_root rm -rf --one-file-system "$work"' EXIT
tree=$work/tree

# mmdebstrap's apt reads none of this machine's settings; it has to go to the network the same way.
network=$work/apt.conf
apt-config dump | grep -E '^Acquire::(https?|ftp|Retries)(::| )' >"$network" || true

files=$work/files
mkdir -p "$files"/{etc/systemd/system/multi-user.target.wants,etc/redis,usr/local/sbin}
install -m 644 "$here/warm.service" "$files/etc/systemd/system/"
ln -s ../warm.service "$files/etc/systemd/system/multi-user.target.wants/"
install -m 755 "$here/warm" "$files/usr/local/sbin/"
install -m 644 "$here/redis-data.lua" "$files/usr/local/sbin/"
printf '%s\n' debian-guest >"$files/etc/hostname"
printf '127.0.0.1 localhost debian-guest\n' >"$files/etc/hosts"
printf '/dev/vda / ext4 errors=remount-ro 0 1\n' >"$files/etc/fstab"
printf '5914e700000040008000000000000dbe\n' >"$files/etc/machine-id"
# Nothing that starts by the clock: what a take finds is not to depend on when it comes.
for timer in apt-daily apt-daily-upgrade man-db dpkg-db-backup e2scrub_all fstrim logrotate systemd-tmpfiles-clean; do
    ln -s /dev/null "$files/etc/systemd/system/$timer.timer"
done

say "building Debian's guest in $guest (some minutes)"
export SOURCE_DATE_EPOCH=$epoch
# As root of a container that may not mount, mmdebstrap does without.
as_root env SOURCE_DATE_EPOCH=$epoch mmdebstrap --quiet --mode=root --format=directory --variant=important \
    --architectures=amd64 --aptopt="$network" --include="$(IFS=, && echo "${packages[*]}")" \
    --customize-hook="tar -C '$files' --owner=0 --group=0 -cf - . | tar -C \"\$1\" -xf -" \
    --customize-hook='printf "save \"\"\n" >>"$1/etc/redis/redis.conf"' \
    "$suite" "$tree" "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >&2

# Debian packs this kernel with LZ4, which even an emulated guest unpacks in no time.
as_root cp "$tree"/boot/vmlinuz-* "$work/vmlinuz"
as_root cp "$tree"/boot/initrd.img-* "$work/initrd.img"
as_root chown "$(id -u):$(id -g)" "$work/vmlinuz" "$work/initrd.img"

as_root find "$tree" -newermt "@$epoch" -exec touch -hd "@$epoch" {} +
truncate -s "${disk_mib}M" "$work/disk.img"
as_root env E2FSPROGS_FAKE_TIME=$epoch mkfs.ext4 -q -F -b 4096 -m 0 -J size=16 -U 5914e700-0000-4000-8000-000000000db1 \
    -E hash_seed=5914e700-0000-4000-8000-000000000db2,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 \
    -d "$tree" "$work/disk.img"
e2fsck -fn "$work/disk.img" >/dev/null 2>&1 || die 1 "the new disk.img is not clean"

# Renamed into place: a machine that runs keeps the disk that it has open.
printf '%s\n' "$cmdline" >"$work/cmdline"
chmod 644 "$work"/{vmlinuz,initrd.img,disk.img,cmdline}
mv "$work"/{vmlinuz,initrd.img,disk.img,cmdline} "$guest/"
printf '%s\n' "$stamp" >"$guest/stamp"
kernel=$(basename "$tree"/boot/vmlinuz-*)
say "built Debian's guest, kernel ${kernel#vmlinuz-}, $(du -BM "$guest/disk.img" | cut -f1) in $guest"
