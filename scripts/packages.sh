#!/bin/bash
# packages.sh - install the packages on empty Debian systems with a real systemd, and the wheels: make test-packages
#
# Each suite has a system of its own in build/packages (debootstrap; systemd, and what the packages depend on, downloaded
# but not installed). It is made once, stays until `make clean`, and nothing writes to it: each test boots it with an
# overlay in memory (tests/packages/system.py). Arguments are pytest's: scripts/packages.sh -k upgrade
#
# The version before is this tree, or the one that PREVIOUS names (a tag, a commit), whose number is made an earlier one
# where it is the same.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
	echo "packages: $1" >&2
	exit 1
}

[ "$(id -u)" = 0 ] || fail "needs root (debootstrap, namespaces): sudo make test-packages"
began=$SECONDS
place=$PWD/build/packages
new=$place/new old=$place/old
mkdir -p "$place"

# tree NAME - a copy of HEAD below $place, with what the builds may share
tree() {
	rm -rf "${place:?}/$1"
	git clone -q . "$place/$1"
	mkdir -p build/vendored "$place/$1/build"
	ln -s "$PWD/.venv" "$place/$1/.venv"
	ln -s "$PWD/build/vendored" "$place/$1/build/"
}

export GRAFT_RELEASE_TOOLS=$PWD/build/release-tools
# Twice, in directories of different depth: tests/packages/test_release.py compares
tree tree
"$place/tree/scripts/release.sh" "$new"
tree again/below/tree
GRAFT_LINTIAN=no "$place/again/below/tree/scripts/release.sh" "$place/again/new"

tree earlier
[ -z "${PREVIOUS:-}" ] || git -C "$place/earlier" checkout -q "$PREVIOUS"
number=
if grep -qxF "$(grep ^__version__ graft/__init__.py)" "$place/earlier/graft/__init__.py"; then
	number=0.0.9
	sed -i -E "s/^(__version__ = \")[^\"]*/\1$number/" "$place/earlier/graft/__init__.py"
fi
GRAFT_LINTIAN=no "$place/earlier/scripts/deb.sh" "$number" "$old"

# system SUITE - the empty Debian, with systemd; what the tests install there is downloaded, because it has no network
system() {
	local system=$place/$1 wanted
	wanted="$first $later $(dpkg-deb -f "$new"/graft_*.deb Depends)"
	[ "$(cat "$system/wanted" 2>/dev/null)" != "$wanted" ] || return 0
	DIR=$system scripts/fresh.sh "$1" "apt-get -qq update && apt-get -y install --no-install-recommends $first"
	cp "$new"/graft_*.deb "$system/root/graft.deb"
	DIR=$system scripts/fresh.sh "$1" "apt-get -y install --download-only /graft.deb && apt-get -y install --no-install-recommends --download-only $later"
	rm "$system/root/graft.deb"
	rm -rf "$system/root/src"
	echo "$wanted" >"$system/wanted"
}
# what "empty" is, and what tests install beside graft
first="systemd-sysv dbus"
later="nginx-light curl pipx python3-venv man-db"
for suite in bookworm trixie; do
	system "$suite"
done

# what the wheels need, for either Python: the systems have no network
for python in 3.11 3.13; do
	.venv/bin/python3 scripts/requirements.py wheel | .venv/bin/python3 -m pip download -q --disable-pip-version-check --only-binary :all: \
		--python-version "$python" --platform manylinux2014_x86_64 -d "$place/wheels" -r /dev/stdin
done

export GRAFT_PACKAGES=$place GRAFT_MUST_WORK=1 GRAFT_SLOWNESS=${GRAFT_SLOWNESS:-3}
if .venv/bin/python3 -m pytest -q --timeout 600 tests/packages "$@"; then
	echo "packages: OK ($((SECONDS - began)) s)"
else
	echo "packages: FAILED after $((SECONDS - began)) s" >&2
	exit 1
fi
