#!/bin/bash
# deb.sh - make the Debian packages graft and graft-bench in dist/: make deb, or scripts/deb.sh [VERSION [DIRECTORY]]
#
# They are made from a copy of what git knows of this tree, as it stands, in build/deb. VERSION is that of the newest
# entry in NEWS.md, followed by ~devN, N the number of commits, while that is not released. The packages of a build on
# Debian 12 serve Debian 12 and 13. DEB_HOST_ARCH=arm64 builds for that, with its compiler and libbpf-dev:arm64.
#
# lintian has to find nothing; GRAFT_LINTIAN=no leaves it out.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
	echo "deb: $1" >&2
	exit 1
}

host=${DEB_HOST_ARCH:-$(dpkg --print-architecture)}
declare -A machines=([amd64]=x86_64 [arm64]=aarch64)
machine=${machines[$host]:-}
[ -n "$machine" ] || fail "graft is for amd64 and arm64, not for $host"
read -r told state < <(sed -nE 's/^## ([^ ]+) \((.*)\)$/\1 \2/p' NEWS.md) || true
[ -n "${state:-}" ] || fail "NEWS.md has no '## VERSION (DATE)'"
count=$(git rev-list --count HEAD)
[ "$state" != unreleased ] || told="$told~dev$count"
version=${1:-$told}
mkdir -p "${2:-dist}"
to=$(cd "${2:-dist}" && pwd)

export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
rm -rf build/deb
tree=build/deb/graft-$version
mkdir -p "$tree/build"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' name; do
	[ ! -e "$name" ] || printf '%s\0' "$name"
done | tar --null -T - -cf - | tar -C "$tree" -xf -
python3 scripts/changelog.py debian --version "$version" >"$tree/debian/changelog"

# the wheel that debian/vendored.txt names, by its hash; kept for the next time
wheels=build/vendored/$machine
if ! compgen -G "$wheels/*.whl" >/dev/null; then
	echo "deb: fetch $(sed -n 's/ \\$//p' debian/vendored.txt | head -1)"
	.venv/bin/python3 -m pip download -q --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
		--python-version 3.11 --implementation cp --abi cp311 --platform "manylinux2014_$machine" -d "$wheels" -r debian/vendored.txt
fi
cp -r "$wheels" "$tree/build/vendored"

echo "deb: build $version for $host"
log=build/deb/log
(cd "$tree" && dpkg-buildpackage --build=binary --host-arch "$host" --unsigned-changes --unsigned-buildinfo) >"$log" 2>&1 || {
	tail -30 "$log" >&2
	fail "the build failed (all of it: $log)"
}
changes=$(echo build/deb/*.changes)
if [ "${GRAFT_LINTIAN:-}" != no ]; then
	lintian --fail-on error,warning --tag-display-limit 0 --allow-root "$changes" || fail "lintian has found something in $changes"
fi
for package in graft graft-bench; do
	rm -f "$to/${package}"_*.deb
done
cp build/deb/*.deb "$to/"
rm -f "$to"/*-dbgsym_*.deb
for package in "$to"/graft_*.deb "$to"/graft-bench_*.deb; do
	echo "deb: $package"
done
