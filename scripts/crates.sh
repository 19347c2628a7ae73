#!/usr/bin/env bash
# Holds the crates' arrows against the layout in ARCHITECTURE.md: they point down only.
set -eu -o pipefail

# Every crate of ours with the crates of ours that it may use.
allowed() {
    case $1 in
        spinney-pages | spinney-qemu | spinney-guest-workload) echo ;;
        spinney-warden) echo spinney-qemu ;;
        spinney-snapfs) echo spinney-pages ;;
        spinney-snapshots) echo spinney-pages spinney-qemu spinney-snapfs spinney-warden ;;
        spinney-server) echo spinney-snapshots ;;
        spinney) echo spinney-server spinney-snapfs spinney-warden ;;
        spinney-vm-tests) echo ;;
        spinney-bench) echo spinney-vm-tests spinney-pages spinney-qemu spinney-snapfs ;;
        *) return 1 ;;
    esac
}

bad=0
while read -r crate uses; do
    if ! may=$(allowed "$crate"); then
        echo "$crate is not in ARCHITECTURE.md's layout (scripts/crates.sh)" >&2
        bad=1
        continue
    fi
    for one in $uses; do
        if [[ " $may " != *" $one "* ]]; then
            echo "$crate must not use $one: arrows point down only" >&2
            bad=1
        fi
    done
done < <(cargo tree --workspace --depth 1 --edges normal --prefix depth --locked | awk '
    /^0/ { if (crate) print crate, uses; sub(/^0/, "", $1); crate = $1; uses = "" }
    /^1spinney/ { sub(/^1/, "", $1); uses = uses " " $1 }
    END { print crate, uses }')
exit $bad
