#!/usr/bin/env bash
# Makes this machine ready to build Spinney and to test it on real guests. Run it as often as you
# like: it does only what is missing, and nothing takes well under a second.
#
# Installs QEMU, the tools that make disk images, and valgrind, which counts instructions. The test
# guest's kernel, busybox and guest agent are unpacked into the cache (`.cache`, or $SPINNEY_CACHE)
# and not installed; `guest.sh` builds the guest from them. Exits 5 where it cannot install anything,
# after naming what is missing.
set -eu -o pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# The packages that provide what is not there yet, in words.
missing=()
command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
command -v qemu-img >/dev/null || missing+=(qemu-utils)
PATH=$PATH:/usr/sbin:/sbin command -v mkfs.ext4 >/dev/null || missing+=(e2fsprogs)
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v strip >/dev/null || missing+=(binutils)
command -v xz >/dev/null || missing+=(xz-utils)
command -v valgrind >/dev/null || missing+=(valgrind)
# The second reader of page stores (crates/pages/tests/reader.py).
command -v python3 >/dev/null || missing+=(python3)
command -v zstd >/dev/null || missing+=(zstd)
[ -f /usr/share/OVMF/OVMF_CODE_4M.fd ] || missing+=(ovmf)

need_kernel=false
need_busybox=false
need_agent=false
[ -f "$cache/linux/version" ] || need_kernel=true
[ -x "$cache/busybox/bin/busybox" ] || need_busybox=true
[ -f "$cache/guest-agent/version" ] || need_agent=true

if [ ${#missing[@]} = 0 ] && ! $need_kernel && ! $need_busybox && ! $need_agent; then exit 0; fi

if ! is_debian; then
    say "this is not Debian 12 or 13, so nothing is installed; what is missing, by Debian's names:"
    [ ${#missing[@]} = 0 ] || say "  to install: ${missing[*]}"
    $need_kernel && say "  to unpack into $cache/linux, with its name in the file 'version' there: linux-image-amd64's kernel"
    $need_busybox && say "  to unpack into $cache/busybox: busybox-static"
    $need_agent && say "  to unpack into $cache/guest-agent, with their names in the file 'version' there: qemu-guest-agent and its libraries"
    exit 5
fi
if [ "$(id -u)" != 0 ] && [ ${#missing[@]} != 0 ] && ! command -v sudo >/dev/null; then
    die 5 "neither root nor sudo; please install: ${missing[*]}"
fi

# Debian 12 has QEMU 7.2; its backports suite has a newer one, with mapped-ram and rom=off. The
# address of the mirror is the one that this machine takes Debian 12 itself from.
add_backports() {
    local mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    local file=/etc/apt/sources.list.d/spinney-backports.sources
    # shellcheck disable=SC2016 # these are apt's variables
    mirror=$(apt-get indextargets --format '$(CODENAME) $(LABEL) $(REPO_URI)' 'Identifier: Packages' |
        sed -n 's/^bookworm Debian //p' | head -n 1)
    [ -n "$mirror" ] || return 1
    {
        printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\n' "$mirror"
        if [ -f "$keyring" ]; then printf 'Signed-By: %s\n' "$keyring"; fi
    } | as_root tee "$file" >/dev/null
    apt_update && [ -n "$(backport)" ] && return
    as_root rm -f "$file"
    return 1
}

# The version of QEMU in backports, if apt knows that suite.
backport() { LC_ALL=C apt-cache madison qemu-system-x86 | awk -F' *[|] *' '/bookworm-backports/ { print $2; exit }'; }

qemu_wanted() { [[ " ${missing[*]} " == *" qemu-"* ]]; }

if [ ${#missing[@]} = 0 ]; then
    # apt-get update needs root; without it, the lists that are there have to do.
    if [ "$(id -u)" = 0 ]; then apt_update; fi
else
    apt_update
fi

if [ ${#missing[@]} != 0 ]; then
    suite=()
    if qemu_wanted; then
        # The network card's boot ROM is only recommended, yet without it no virtio-net starts.
        missing+=(qemu-system-data seabios ipxe-qemu)
        if [ "$(os_release VERSION_CODENAME)" = bookworm ]; then
            if [ -n "$(backport)" ] || add_backports; then
                suite=(-t bookworm-backports)
            else
                say "no backports suite to be had: installing Debian 12's own QEMU 7.2"
            fi
        fi
    fi
    apt_get install -y --no-install-recommends ${suite[@]+"${suite[@]}"} "${missing[@]}" >&2
fi

if $need_busybox; then
    unpack "$cache/busybox" busybox-static
    # Where /bin is part of /usr, the package puts it there.
    if [ ! -e "$cache/busybox/bin/busybox" ]; then
        mkdir -p "$cache/busybox/bin"
        ln -s ../usr/bin/busybox "$cache/busybox/bin/busybox"
    fi
fi

if $need_kernel; then
    # The generic kernel: the cloud one is built without the VM generation id.
    kernel=$(LC_ALL=C apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: //p' | head -n 1)
    [ -n "$kernel" ] || die 5 "apt knows no package linux-image-amd64"
    unpack "$cache/linux" "$kernel"
    printf '%s %s\n' "$kernel" "$(candidate "$kernel")" >"$cache/linux/version"
fi

if $need_agent; then
    # With its libraries and theirs, as the packages name them: the guest has none.
    packages=(qemu-guest-agent)
    for ((at = 0; at < ${#packages[@]}; at++)); do
        while read -r library; do
            [[ " ${packages[*]} " == *" $library "* ]] || packages+=("$library")
        done < <(LC_ALL=C apt-cache depends --important "${packages[at]}" | sed -n 's/^ *Depends: \(z\?lib[^ ]*\)$/\1/p')
    done
    unpack "$cache/guest-agent" "${packages[@]}"
    for package in "${packages[@]}"; do printf '%s %s\n' "$package" "$(candidate "$package")"; done >"$cache/guest-agent/version"
fi

say "ready: $(qemu-system-x86_64 -version | head -n 1), kernel $(cat "$cache/linux/version")"
