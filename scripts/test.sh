#!/bin/bash
# test.sh - run all tests: lint, units, kernel, system, attacks, fuzzing, benchmarks, and the core on Debian's 6.1 kernel
set -euo pipefail
cd "$(dirname "$0")/.."

export GRAFT_SLOWNESS=${GRAFT_SLOWNESS:-3} # wait longer, as the machine may be busy; no measurement depends on it
started=$SECONDS
failed=()
step() {
	local name=$1
	shift
	echo "== $name"
	"$@" || failed+=("$name")
}

step "lint and units" .venv/bin/python3 -m pytest -q tests/unit tests/test_lint.py
if [ "$(id -u)" = 0 ]; then
	step "kernel assumptions" .venv/bin/python3 -m pytest -q tests/kernel
	step "system" .venv/bin/python3 -m pytest -q tests/system --ignore=tests/system/test_bench.py
	# The emulation occupies one processor most of the time; the steps below can run beside it
	log=$(mktemp /tmp/graft-test-XXXX)
	trap 'rm -f "$log"' EXIT
	scripts/kernel-6.1.sh >"$log" 2>&1 &
	emulated=$!
	step "attacks" .venv/bin/python3 -m pytest -q tests/attack
	step "fuzz" .venv/bin/python3 scripts/fuzz.py 30s --seed 1
	step "benchmarks" .venv/bin/python3 -m pytest -q tests/system/test_bench.py
	step "Linux 6.1, pure cgroup v2" wait "$emulated"
	cat "$log"
elif [ "${GRAFT_MUST_WORK:-0}" = 1 ]; then
	failed+=("system: needs root")
else
	echo "== the rest needs root: sudo make test"
fi

if [ ${#failed[@]} -gt 0 ]; then
	printf 'test: FAILED: %s\n' "${failed[@]}" >&2
	exit 1
fi
echo "test: OK, all passed in $((SECONDS - started)) s"
