#!/usr/bin/env bash
# Runs every fuzz target for a while (default: 60 s each; `scripts/fuzz.sh 600` for longer). Needs cargo-fuzz:
# `cargo install cargo-fuzz`. On a stable toolchain the sanitizer's flags have to be asked for.
set -eu -o pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
export RUSTC_BOOTSTRAP=1
for target in fuzz/fuzz_targets/*.rs; do
    name=$(basename "$target" .rs)
    echo "== $name, $seconds s"
    cargo fuzz run "$name" -- -max_total_time="$seconds" -rss_limit_mb=4096
done
