#!/usr/bin/env bash
# Counts the processor's instructions that the page store's hot paths take, and compares them with
# `crates/pages/instructions.txt`. A count hardly depends on what else the machine does, so a
# slow-down shows where a time would drown in noise. (What it does not show: waiting for locks, for
# memory, for the kernel. `make bench` measures those.)
#
#     scripts/instructions.sh            fails if a path takes over TOLERANCE % more or less
#     scripts/instructions.sh --renew    writes the file
#
# The program `paths` (crates/pages/examples/paths.rs) does each path once and three times; half of
# the difference is the path, without start and preparation. Of a path that hashes all of its pages
# the count of `hash` is taken off: it is nine tenths of it, and the rest is what changes. valgrind
# counts; it knows AVX2 at most, so hashing takes its way for AVX2 here. Exits 1 if a count is off, 5 if it cannot count at all.
set -eu -o pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

cd "$(dirname "$0")/.."
TOLERANCE=10
file=crates/pages/instructions.txt
cargo=${CARGO:-cargo}

if ! command -v valgrind >/dev/null; then
    say "valgrind is not installed (scripts/setup.sh does it): instructions are not counted"
    exit 5
fi
if [ "$(uname -m)" != x86_64 ] || ! grep -qw avx2 /proc/cpuinfo; then
    say "the counts are those of a processor with AVX2, which this one is not: instructions are not counted"
    exit 0
fi

"$cargo" build --quiet --release --locked -p spinney-pages --example paths
program=${CARGO_TARGET_DIR:-target}/release/examples/paths
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# count PATH TIMES: instructions of a whole run. The zero page's test, memcpy and the like come from
# libc in one of several kinds; that for AVX2 is the one that valgrind has.
count() {
    rm -rf "$folder/store"
    # Numbers drawn for hash tables and packs make some difference, which is below a percent.
    if ! valgrind --tool=cachegrind --cache-sim=no --cachegrind-out-file=/dev/null \
        --log-file="$folder/log" "$program" "$folder/store" "$1" "$2" >&2; then
        cat "$folder/log" >&2
        die 5 "cannot count the instructions of $1"
    fi
    sed -n 's/.*I *refs: *//p' "$folder/log" | tr -d ,
}

hash=0
"$program" >"$folder/paths"
while read -r path hashed; do
    once=$(count "$path" 1 </dev/null)
    thrice=$(count "$path" 3 </dev/null)
    counted=$(((thrice - once) / 2))
    [ "$path" != hash ] || hash=$counted
    [ "$hashed" != hashed ] || counted=$((counted - hash))
    printf '%s %s\n' "$path" "$counted"
done <"$folder/paths" >"$folder/counts"

compiler=$(rustc --version | cut -d' ' -f2)
if [ "${1-}" = --renew ]; then
    {
        echo "# Instructions that a hot path of the page store takes once (scripts/instructions.sh)."
        echo "# Those that hash their pages (put, read, fsck): without what \`hash\` takes for the same pages."
        echo "# Written by scripts/instructions.sh --renew with rustc $compiler"
        cat "$folder/counts"
    } >"$file"
    cat "$file"
    exit
fi

written=$(sed -n 's/.*with rustc //p' "$file")
if [ "$written" != "$compiler" ]; then
    say "not compared: the file is from rustc $written, this is $compiler. To renew it: scripts/instructions.sh --renew"
    cat "$folder/counts"
    exit
fi

bad=0
while read -r path counted; do
    wanted=$(sed -n "s/^$path //p" "$file")
    if [ -z "$wanted" ]; then
        say "$path is not in $file"
        bad=1
        continue
    fi
    change=$(awk -v a="$counted" -v b="$wanted" 'BEGIN { printf "%+.1f", (a / b - 1) * 100 }')
    printf '  %-10s %12d instructions, %s %%\n' "$path" "$counted" "$change"
    # Two threads of a check take a buffer each or share one, as they come.
    allowed=$TOLERANCE
    [ "$path" != fsck ] || allowed=30
    if awk -v c="$change" -v t="$allowed" 'BEGIN { exit !(c > t || c < -t) }'; then
        say "$path takes $counted instructions; $file says $wanted ($change %, allowed are $allowed)"
        bad=1
    fi
done <"$folder/counts"
if [ $bad != 0 ]; then
    say "if that is meant: scripts/instructions.sh --renew"
    exit 1
fi
