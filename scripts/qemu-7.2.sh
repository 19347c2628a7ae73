#!/usr/bin/env bash
# Unpacks Debian 12's own QEMU 7.2, the oldest that Spinney supports, beside the installed one, in the
# folder `qemu-7.2` of the cache. Run it as `qemu-7.2/qemu-system-x86_64` there. Nothing is installed,
# and no root is needed. Where apt knows no QEMU 7.2 it says "skipped" and that is no error.
set -eu -o pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

folder=$cache/qemu-7.2
program=$folder/qemu-system-x86_64
if [ -x "$program" ]; then exit 0; fi

# version_of PACKAGE: the newest 7.2 of a package that QEMU is split into.
version_of() {
    LC_ALL=C apt-cache madison "$1" 2>/dev/null | awk -F' *[|] *' '$2 ~ /^1:7\.2\+/ { print $2; exit }'
}

if ! command -v apt-cache >/dev/null || [ -z "$(version_of qemu-system-x86)" ]; then
    say "skipped: no QEMU 7.2 to be had from this machine's package sources"
    exit 0
fi

# seabios and ipxe-qemu: the firmware that 7.2 was released with, where it can be had.
packages=(qemu-system-x86="$(version_of qemu-system-x86)")
packages+=(qemu-system-common="$(version_of qemu-system-common)")
packages+=(qemu-system-data="$(version_of qemu-system-data)")
packages+=(seabios ipxe-qemu)
own_seabios=$(LC_ALL=C apt-cache madison seabios | awk -F' *[|] *' '$2 !~ /bpo/ { print $2; exit }')
if [ -n "$own_seabios" ]; then packages[3]=seabios=$own_seabios; fi
unpack "$folder.new" "${packages[@]}"
binary=$folder.new/usr/bin/qemu-system-x86_64
libraries=$folder.new/usr/lib/x86_64-linux-gnu:$folder.new/lib/x86_64-linux-gnu

# The shared libraries that the machine does not have: what apt would install for this version.
lacking() { LD_LIBRARY_PATH=$libraries ldd "$binary" | sed -n 's/^[[:space:]]*\([^ ]*\) => not found$/\1/p'; }

if [ -n "$(lacking)" ]; then
    mapfile -t needed < <(LC_ALL=C apt-get -s -y --allow-downgrades --no-install-recommends install "${packages[@]}" |
        sed -n 's/^Inst \(lib[^ :]*\) .*/\1/p')
    [ ${#needed[@]} != 0 ] || die 1 "apt names no packages for $(lacking)"
    unpack "$folder.libraries" "${needed[@]}"
    cp -a "$folder.libraries/." "$folder.new/"
    rm -rf "$folder.libraries"
fi
[ -z "$(lacking)" ] || die 1 "still missing: $(lacking)"

cat >"$folder.new/qemu-system-x86_64" <<'WRAPPER'
#!/bin/sh
# QEMU 7.2 with its own libraries and firmware.
here=$(cd "$(dirname "$0")" && pwd)
export LD_LIBRARY_PATH="$here/usr/lib/x86_64-linux-gnu:$here/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export QEMU_MODULE_DIR="$here/usr/lib/x86_64-linux-gnu/qemu"
exec "$here/usr/bin/qemu-system-x86_64" -L "$here/usr/share/seabios" -L "$here/usr/share/qemu" \
    -L "$here/usr/lib/ipxe/qemu" "$@"
WRAPPER
chmod +x "$folder.new/qemu-system-x86_64"
"$folder.new/qemu-system-x86_64" -version >&2
rm -rf "$folder"
mv "$folder.new" "$folder"
