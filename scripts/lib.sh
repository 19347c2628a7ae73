# Shared by the scripts beside it: where things are kept, and how a Debian package is unpacked
# there without being installed. Sourced, not run.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # used by the scripts that source this
cache=${SPINNEY_CACHE:-$root/.cache}

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

# die STATUS TEXT: 5 means that something this machine should have is missing.
die() {
    local status=$1
    shift
    say "$*"
    exit "$status"
}

# One value of /etc/os-release, empty when the file does not have it.
os_release() {
    # shellcheck disable=SC1091
    (. /etc/os-release 2>/dev/null && eval "printf '%s' \"\${$1:-}\"") || true
}

is_debian() {
    case $(os_release VERSION_CODENAME) in
    bookworm | trixie) return 0 ;;
    *) return 1 ;;
    esac
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 "$@"
}

apt_update() {
    apt_get update >&2 || {
        say "updating the package lists failed, trying once more"
        sleep 3
        apt_get update >&2
    }
}

# The version of a package that apt would take, empty when it knows none.
candidate() {
    LC_ALL=C apt-cache policy "$1" | sed -n 's/^  Candidate: //p' | grep -v '^(none)$' || true
}

# unpack FOLDER PACKAGE[=VERSION]...: downloads packages and unpacks them into FOLDER, which is
# replaced as a whole once everything is there.
unpack() {
    local folder=$1 work
    shift
    mkdir -p "$(dirname "$folder")"
    work=$(mktemp -d "$folder.XXXXXX")
    mkdir "$work/debs" "$work/tree"
    # apt downloads as the user _apt where it can, which has to be able to write there.
    chmod 755 "$work"
    chmod 777 "$work/debs"
    (cd "$work/debs" && apt-get -q download "$@" >&2)
    local deb
    for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/tree"; done
    rm -rf "$folder"
    chmod 755 "$work/tree"
    mv "$work/tree" "$folder"
    rm -rf "$work"
}
