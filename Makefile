# make demo    the main job on a real guest, from nothing
# make test    set-up, checks, all tests; real guests included
# make bench   the figures, printed and written to benches/results/
# make soak    what takes too long for `make test`; raw results go to benches/results/

SHELL := /bin/bash
CARGO ?= cargo
export SPINNEY_CACHE ?= $(CURDIR)/.cache
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)

.PHONY: all setup guest old-qemu build demo test check unit instructions vm bench soak fuzz

all: build

setup:
	@scripts/setup.sh

guest: setup
	@scripts/guest.sh

old-qemu: setup
	@scripts/qemu-7.2.sh

build:
	$(CARGO) build --release --locked -p spinney

demo: guest build
	@$(TARGET)/release/spinney demo --guest $(SPINNEY_CACHE)/guest

test: guest old-qemu check unit instructions vm

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) clippy -p spinney-pages --all-targets --features schedules --locked -- -D warnings
	scripts/crates.sh
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny check bans licenses sources; \
	else echo 'cargo-deny is not installed: licences and bans are not checked'; fi

unit:
	$(CARGO) test --locked
	$(CARGO) test --locked -p spinney-pages --features schedules --lib schedules

# Instructions of the page store's hot paths against crates/pages/instructions.txt.
instructions: setup
	scripts/instructions.sh

# The executable under test has planted faults built in; they do nothing unless a test asks for one.
vm: guest old-qemu
	$(CARGO) build --locked -p spinney --features faults
	SPINNEY_BIN=$(TARGET)/debug/spinney $(CARGO) test --locked --no-fail-fast -p spinney-vm-tests -- --test-threads=1

# What only the comparisons and the figures of a guest with a disk need; where it cannot be had, those are left out.
bench: guest build
	@scripts/bench-setup.sh && scripts/debian-guest.sh || echo 'some figures will be left out' >&2
	SPINNEY_BIN=$(TARGET)/release/spinney $(CARGO) run --release --locked -p spinney-bench

soak: guest old-qemu
	$(CARGO) build --release --locked -p spinney --features faults
	SPINNEY_BIN=$(TARGET)/release/spinney scripts/soak.sh

fuzz:
	scripts/fuzz.sh
