#!/usr/bin/env bash
# Installs what `make bench` needs beyond `setup.sh`: what Debian's guest is made with, and the tools that the page store
# is compared with. `make test` needs none of it. Exits 5 where it cannot install anything, after naming what is missing.
set -eu -o pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

missing=()
command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
[ -f /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
command -v restic >/dev/null || missing+=(restic)
command -v borg >/dev/null || missing+=(borgbackup)
command -v zstd >/dev/null || missing+=(zstd)
if [ ${#missing[@]} = 0 ]; then exit 0; fi

if ! is_debian; then
    die 5 "this is not Debian 12 or 13, so nothing is installed; what is missing, by Debian's names: ${missing[*]}"
fi
if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
    die 5 "neither root nor sudo; please install: ${missing[*]}"
fi
apt_update
apt_get install -y --no-install-recommends "${missing[@]}" >&2
say "installed ${missing[*]}"
