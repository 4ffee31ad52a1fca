#!/bin/bash
# release.sh - make everything that a release has: make release, or scripts/release.sh [DIRECTORY]
#
# In DIRECTORY (dist/release): the wheel with what is compiled, the sdist, the wheel graft-api for containers, the Debian
# packages, CHANGELOG.md, a bill of materials (CycloneDX), and SHA256SUMS of all of them. Two runs on one system and one
# commit make equal files, whatever the directory of the tree is.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
	echo "release: $1" >&2
	exit 1
}

[ -z "$(git status --porcelain)" ] || fail "the tree has changes that are not committed: a release is made of a commit"
to=${1:-dist/release}
rm -rf "$to"
mkdir -p "$to" build
to=$(cd "$to" && pwd)
committed=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH=$committed

tools=${GRAFT_RELEASE_TOOLS:-$PWD/build/release-tools} # where they are kept for the next time
wanted=$(python3 scripts/requirements.py release)
if [ "$(cat "$tools/wanted" 2>/dev/null)" != "$wanted" ]; then
	python3 -m venv "$tools"
	echo "$wanted" | "$tools/bin/pip" install -q --disable-pip-version-check -r /dev/stdin
	echo "$wanted" >"$tools/wanted"
fi

# Without a copy from git, what lies about in a tree that git ignores could get in.
tree=build/release
rm -rf "$tree"
mkdir "$tree"
git archive HEAD | tar -C "$tree" -xf -
log=build/release.log
# build_in DIRECTORY OPTION... - make what is in DIRECTORY of the copy
build_in() {
	"$tools/bin/python3" -m build --outdir "$to" "${@:2}" "$tree/$1" >"$log" 2>&1 || {
		tail -30 "$log" >&2
		fail "the build failed (all of it: $log)"
	}
}
build_in .
build_in contrib/graft-api --wheel
scripts/deb.sh "" "$to"
python3 scripts/changelog.py keep >"$to/CHANGELOG.md"

# of an environment that has the wheel and nothing else
environment=build/release-environment
rm -rf "$environment"
python3 -m venv --without-pip "$environment"
"$tools/bin/pip" --python "$environment/bin/python3" install -q --disable-pip-version-check "$to"/graft-*.whl
"$tools/bin/cyclonedx-py" environment --pyproject "$tree/pyproject.toml" --mc-type application --output-reproducible \
	--output-format JSON --output-file "$to/graft.cdx.json" "$environment/bin/python3"
rm -rf "$tree" "$environment"

sums=$(cd "$to" && find . -type f -printf '%P\n' | LC_ALL=C sort | xargs sha256sum)
echo "$sums" >"$to/SHA256SUMS"
while read -r digest name; do echo "release: $digest $name"; done <<<"$sums"
