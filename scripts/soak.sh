#!/usr/bin/env bash
# What takes too long for `make test`: long random walks over real guests, each with a seed of its own; somebody killed at every
# step of every act, round after round; and every fuzz target for ten minutes where cargo-fuzz is installed. What was run and how
# it ended is printed and written, raw, to benches/results/soak-DATE.json and crash-DATE.json, and the end of each fuzz target to
# soak-DATE.fuzz.txt. Fails if anything did.
#
# SPINNEY_BIN:  the executable to test, with the feature `faults`: it is what can be killed at a step
# SOAK_WALKS:   how many walks (default 10; 0: none)      SOAK_STEPS: steps in each (default 100)
# SOAK_MINUTES: begin no walk later than this     SOAK_SEED:  what the walks' seeds are drawn from (default: the time)
# SOAK_CRASH_MINUTES: for how long somebody is killed (default 60; 0 leaves that out)
# SOAK_FUZZ:    seconds for each fuzz target (default 600; 0 leaves them out)
#
# One walk is repeated by the line that it prints:
#   SPINNEY_WALK_SEED=... SPINNEY_WALK_STEPS=... cargo test -p spinney-vm-tests --test walk -- --nocapture random_walk
set -eu -o pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

[ -x "${SPINNEY_BIN:-}" ] || die 5 "no executable to test at SPINNEY_BIN=${SPINNEY_BIN:-}: \`make soak\` builds one"
export SPINNEY_BIN
out=benches/results/soak-$(date -u +%F)
SOAK_COMMIT=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
# What the results themselves are is no change of the program.
[ -z "$(git status --porcelain -- . ':!benches/results' 2>/dev/null)" ] || SOAK_COMMIT+=-changed
export SOAK_COMMIT SOAK_FILE=$out.json

failed=0
if [ "${SOAK_WALKS:-10}" -gt 0 ]; then
    cargo run --locked -q -p spinney-vm-tests --bin soak || failed=1
fi

if [ "${SOAK_CRASH_MINUTES:-60}" -gt 0 ]; then
    SOAK_CRASH_FILE=${out/soak-/crash-}.json cargo run --locked -q -p spinney-vm-tests --bin crash || failed=1
fi

seconds=${SOAK_FUZZ:-600}
if [ "$seconds" -eq 0 ] || ! command -v cargo-fuzz >/dev/null; then
    say 'the fuzz targets are left out'
else
    scripts/fuzz.sh "$seconds" 2>&1 | grep -E '^==|Done|panicked|ERROR' | tee "$out.fuzz.txt" || failed=1
fi
[ "$failed" -eq 0 ] || die 1 "something failed: see $out.json"
