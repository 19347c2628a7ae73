#!/usr/bin/env bash
# Builds the test guest from what `setup.sh` brought: `vmlinuz`, `initrd.img`, `data.img` and the
# kernel's command line `cmdline`, in the folder `guest` of the cache; also `initrd-agent.img`, which
# is `initrd.img` with QEMU's guest agent. Needs neither root nor the network, and does nothing when
# no input has changed since. docs/decisions/0003-test-guest.md says why the guest is made as it is.
set -eu -o pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

guest=$cache/guest
busybox=$cache/busybox/bin/busybox
agent=$cache/guest-agent
if [ ! -f "$cache/linux/version" ] || [ ! -x "$busybox" ] || [ ! -f "$agent/version" ]; then
    die 5 "no kernel, busybox or guest agent in $cache: run scripts/setup.sh"
fi

# What the guest needs; their dependencies are found below. ext4 asks for crc32c by a name that only
# a full modprobe would resolve.
modules=(virtio_pci virtio_blk virtio_net virtio_console virtio_rng virtio_balloon crc32c_generic ext4 button evdev)
# The kernel's command line: no console output but the shell's, and nothing that costs an emulated
# guest time and tests nothing here.
cmdline='console=ttyS0 quiet mitigations=off tsc=reliable no_timer_check cryptomgr.notests random.trust_cpu=on apparmor=0 audit=0'
data_mib=256
known_mib=64

inputs() {
    cat "$cache/linux/version" "$busybox" "$agent/version" "$root"/scripts/{lib.sh,guest.sh,guest/*}
    cat "$root"/tests/guest/{Cargo.toml,src/*.rs}
    mkfs.ext4 -V 2>&1
    rustc --version
}

PATH=$PATH:/usr/sbin:/sbin
stamp=$(inputs | sha256sum)
if [ -f "$guest/stamp" ] && [ "$(cat "$guest/stamp")" = "$stamp" ]; then exit 0; fi

mkdir -p "$guest"
work=$(mktemp -d "$guest/build.XXXXXX")
trap 'rm -rf "$work"' EXIT

# The workload, linked statically: the guest has no C library.
target=x86_64-unknown-linux-gnu
(cd "$root" && cargo rustc --quiet --release -p spinney-guest-workload --target $target \
    --target-dir "$cache/target" -- -C target-feature=+crt-static -C strip=symbols)
workload=$cache/target/$target/release/workload

# The modules, in the order in which they need each other.
release=$(basename "$(find "$cache"/linux/{usr/,}lib/modules -mindepth 1 -maxdepth 1 2>/dev/null | head -n 1)")
tree=$(dirname "$(find "$cache/linux" -path "*/lib/modules/$release" | head -n 1)")
find "$tree/$release/kernel" -name '*.ko.xz' -exec xz -dk {} + 2>/dev/null || true
dependencies=$tree/$release/modules.dep
if [ ! -s "$dependencies" ]; then
    (cd "$(dirname "$(dirname "$tree")")" && "$busybox" depmod -b "$PWD" "$release")
fi

# with_dependencies NAME: prints the paths of a module and, before it, of all that it needs.
with_dependencies() {
    local path line needed
    path=$(find "$tree/$release/kernel" \( -name "$1.ko" -o -name "${1//_/-}.ko" \) -printf 'kernel/%P\n' | head -n 1)
    if [ -z "$path" ]; then
        grep -Eq "/${1//_/[-_]}\.ko$" "$tree/$release/modules.builtin" || die 1 "the kernel has no module $1"
        return
    fi
    line=$(grep -E "^(/?.*/)?${path}(\.xz)?:" "$dependencies" | head -n 1)
    for needed in ${line#*:}; do
        needed=$(basename "$needed")
        needed=${needed%.xz}
        with_dependencies "${needed%.ko}"
    done
    printf '%s\n' "$path"
}

# archive FOLDER: its files as an initrd, the same bytes each time.
archive() {
    find "$1" -exec touch -hd @0 {} +
    (cd "$1" && find . | LC_ALL=C sort | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null | gzip -n -1)
}

image=$work/image
mkdir -p "$image"/{bin,sbin,dev,proc,sys,data,tmp,etc,root,lib/modules}
for module in "${modules[@]}"; do with_dependencies "$module"; done | awk '!seen[$0]++' >"$work/modules"
while read -r path; do
    # Without its signature, which an emulated guest would take long to check, and debug sections.
    strip --strip-debug -o "$image/lib/modules/$(basename "$path")" "$tree/$release/$path"
    basename "$path"
done <"$work/modules" >"$image/lib/modules/list"

cp -L "$busybox" "$image/bin/busybox"
"$busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$image/bin/$applet"
done
ln -s bin/busybox "$image/init"
cp "$root"/scripts/guest/{inittab,rcS} "$image/etc/"
cp "$workload" "$image/bin/workload"
archive "$image" >"$work/initrd.img"

# with_libraries FILE: prints the paths of a program or library and of all libraries that it needs.
with_libraries() {
    local needed path
    printf '%s\n' "$1"
    for needed in $(objdump -p "$1" | sed -n 's/^ *NEEDED *//p'); do
        # Only there: elsewhere the loader's name is a link to the host's own.
        path=$(find "$agent" -path '*/x86_64-linux-gnu/*' -name "$needed" -print -quit)
        [ -n "$path" ] || die 1 "$(basename "$1") needs $needed, which none of the packages in $agent has"
        with_libraries "$path"
    done
}

# The guest agent: a second archive, which the kernel unpacks over the first.
extra=$work/extra
mkdir -p "$extra"/{bin,sbin,etc,lib}
with_libraries "$agent/usr/sbin/qemu-ga" | sort -u >"$work/libraries"
while read -r path; do
    case $path in
    */qemu-ga) strip -o "$extra/bin/qemu-ga" "$path" ;;
    *) strip --strip-unneeded -o "$extra/lib/$(basename "$path")" "$path" ;;
    esac
done <"$work/libraries"
# Programs name their loader in this folder; the libraries are looked for in /lib.
ln -s lib "$extra/lib64"
# The agent sets the hardware's clock by this name.
ln -s ../bin/busybox "$extra/sbin/hwclock"
cp "$root/scripts/guest/agent" "$extra/bin/agent"
cat "$root"/scripts/guest/inittab{,.agent} >"$extra/etc/inittab"
cat "$work/initrd.img" <(archive "$extra") >"$work/initrd-agent.img"

# The kernel, unpacked: an emulated guest takes seconds to do that itself at each boot. QEMU starts
# the ELF file inside through its PVH entry. Where it is not packed with xz, it stays as it is.
packed=$cache/linux/boot/vmlinuz-$release
# u8 or u32 of the boot header (Documentation/arch/x86/boot.rst in Linux).
header() { od -An -v -t "u$1" -j "$2" -N "$1" "$packed" | tr -d ' '; }
start=$((($(header 1 0x1f1) + 1) * 512 + $(header 4 0x248)))
# The last four bytes are the unpacked size.
length=$(($(header 4 0x24c) - 4))
if ! head -c $((start + length)) "$packed" | tail -c "$length" | xz -dc >"$work/vmlinuz" 2>/dev/null; then
    cp "$packed" "$work/vmlinuz"
fi

# The disk. Blocks of 4 KiB, as the pages of memory; everything written now, so that the guest's
# kernel has nothing to initialise in the background; the same bytes each time.
mkdir "$work/data"
"$workload" known "$work/data/known" "$known_mib"
find "$work/data" -exec touch -d @0 {} +
truncate -s "${data_mib}M" "$work/data.img"
E2FSPROGS_FAKE_TIME=1 mkfs.ext4 -q -F -b 4096 -m 0 -J size=8 -U 5914e700-0000-4000-8000-000000000001 \
    -E hash_seed=5914e700-0000-4000-8000-000000000002,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 \
    -d "$work/data" "$work/data.img"
e2fsck -fn "$work/data.img" >/dev/null 2>&1 || die 1 "the new data.img is not clean"

# Renamed into place: a machine that runs keeps the disk that it has open.
printf '%s\n' "$cmdline" >"$work/cmdline"
mv "$work"/{vmlinuz,initrd.img,initrd-agent.img,data.img,cmdline} "$guest/"
printf '%s\n' "$stamp" >"$guest/stamp"
say "built the test guest, kernel $release, in $guest"
