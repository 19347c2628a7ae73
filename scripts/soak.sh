#!/usr/bin/env bash
# What takes too long for `make test`: long random walks over real guests, each with a seed of its own, and every fuzz target
# for ten minutes where cargo-fuzz is installed. Writes what was run and how it ended to benches/results/soak-DATE.txt.
#
# SOAK_WALKS: how many walks (default 10). SOAK_STEPS: steps in each (default 100).
set -eu -o pipefail
cd "$(dirname "$0")/.."
out=benches/results/soak-$(date -u +%F).txt
walks=${SOAK_WALKS:-10}
steps=${SOAK_STEPS:-100}
{
    echo "soak of $(git rev-parse --short HEAD), $(date -u +%FT%TZ), $(uname -sr), $(qemu-system-x86_64 --version | head -n 1)"
    failed=0
    for walk in $(seq "$walks"); do
        seed=$RANDOM$RANDOM
        begun=$(date +%s)
        if SPINNEY_WALK_SEED=$seed SPINNEY_WALK_STEPS=$steps \
            cargo test --release --locked -q -p spinney-vm-tests --test walk -- --test-threads=1 random_walk >/tmp/spinney-walk.$$ 2>&1
        then verdict=passed; else verdict=FAILED; failed=$((failed + 1)); fi
        echo "walk $walk of $walks: seed $seed, $steps steps, $verdict, $(($(date +%s) - begun)) s"
        [ $verdict = passed ] || tail -n 40 /tmp/spinney-walk.$$
    done
    rm -f /tmp/spinney-walk.$$
    echo "$walks walks, $failed failed"
} | tee "$out"
if command -v cargo-fuzz >/dev/null; then scripts/fuzz.sh 600 2>&1 | grep -E '^==|Done|panicked|ERROR' | tee -a "$out"; fi
! grep -q FAILED "$out"
