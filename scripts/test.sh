#!/bin/bash
# test.sh - run all tests on this kernel: lint, units, kernel, system, attacks, benchmarks, fuzzing
# (scripts/kernels.sh runs the core of them on Debian's kernels, scripts/programs.sh the named programs that take long, make test-swarm three nodes of a swarm)
set -euo pipefail
cd "$(dirname "$0")/.."

export GRAFT_SLOWNESS=${GRAFT_SLOWNESS:-3} # wait longer, as the machine may be busy; no measurement depends on it
jobs=$(($(nproc) + 1))                     # tests wait for processes half of their time
pytest=(.venv/bin/python3 -m pytest -q --durations=15)
steady=(.venv/bin/python3 scripts/steady.py --durations=15)
beside=(-n "$jobs" -m "not alone and not tree and not swarm")
failed=()
took=()
step() {
	local name=$1 began=$SECONDS
	shift
	echo "== $name"
	"$@" || failed+=("$name")
	took+=("$name $((SECONDS - began)) s")
}

step "lint and units" "${pytest[@]}" "${beside[@]}" tests/unit tests/test_lint.py tests/test_wings.py tests/test_site.py
if [ "$(id -u)" = 0 ]; then
	step "kernel assumptions, system, attacks" "${steady[@]}" "${beside[@]}" tests/kernel tests/system tests/attack tests/named
	step "what measures time" "${steady[@]}" -m alone tests/system tests/attack
	step "fuzz" .venv/bin/python3 scripts/fuzz.py 30s --seed 1
	step "random calls inside containers" .venv/bin/python3 -m tests.endurance.inside --seconds 20 --seed 1
elif [ "${GRAFT_MUST_WORK:-0}" = 1 ]; then
	failed+=("system: needs root")
else
	echo "== the rest needs root: sudo make test"
fi

told=$(printf ', %s' "${took[@]}")
if [ ${#failed[@]} -gt 0 ]; then
	printf 'test: FAILED: %s\n' "${failed[@]}" >&2
	echo "test: FAILED after $SECONDS s (${told:2})" >&2
	exit 1
fi
echo "test: OK, all passed in $SECONDS s (${told:2})"
