#!/bin/bash
# kubernetes.sh - run graft's pods under a real kubelet: make test-kubernetes
#
# Kubernetes is that of Debian 12's source package (1.20.2), of which Debian builds no servers: they are built here once,
# offline, by the system's Go, into ${XDG_CACHE_HOME:-~/.cache}/graft/kubernetes-1.20.2 (a quarter of an hour of
# processor time; 250 MB stay, 4 GB do meanwhile). A directory with other builds of kubelet, kube-apiserver,
# kube-controller-manager, kube-scheduler, kube-proxy and kubectl is GRAFT_KUBERNETES. The package comes from the mirror that apt
# uses, by lists of sources of its own: apt's are left alone. Arguments are pytest's: scripts/kubernetes.sh -k probes
set -euo pipefail
cd "$(dirname "$0")/.."
umask 022

fail() {
	printf 'kubernetes: %s\n' "$@" >&2
	exit 1
}

[ "$(id -u)" = 0 ] || fail "needs root (namespaces, containerd): sudo make test-kubernetes"
version=1.20.2
programs=("kubelet" kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubectl)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/graft
place=${GRAFT_KUBERNETES:-$cache/kubernetes-$version}

# complete - are all programs there?
complete() {
	local program
	for program in "${programs[@]}"; do
		[ -x "$place/$program" ] || return 1
	done
}

# download DIR - the source package, unpacked in DIR/src
download() {
	local dir=$1 keys=/usr/share/keyrings/debian-archive-keyring.gpg options
	mkdir -p "$dir/lists/partial" "$dir/archives/partial"
	echo "deb-src [signed-by=$keys] $(scripts/mirror.sh) bookworm main" >"$dir/sources.list"
	options=(-o "Dir::Etc::SourceList=$dir/sources.list" -o Dir::Etc::SourceParts=/dev/null)
	options+=(-o "Dir::State::Lists=$dir/lists" -o "Dir::Cache=$dir" -o APT::Sandbox::User=root)
	(
		cd "$dir"
		apt-get -qq "${options[@]}" update
		apt-get -qq "${options[@]}" source --download-only kubernetes
		dpkg-source --no-check -x kubernetes_*.dsc src >/dev/null # apt has checked it by the archive's key
	)
}

# build DIR - the programs of the source in DIR/src; generated code needs the source below a GOPATH
build() {
	local source=$1/src
	printf "KUBE_GIT_%s='%s'\n" VERSION "v$version" MAJOR 1 MINOR 20 TREE_STATE archive COMMIT debian >"$1/version"
	mkdir -p "$source/.go/src/k8s.io"
	ln -s ../../.. "$source/.go/src/k8s.io/kubernetes"
	env -C "$source" HOME="$1/home" GOPATH="$source/.go" GOPROXY=off GOFLAGS= GO111MODULE=off CGO_ENABLED=0 \
		KUBE_GIT_VERSION_FILE="$1/version" nice make WHAT="$(printf 'cmd/%s ' "${programs[@]}")"
}

if ! complete; then
	[ -z "${GRAFT_KUBERNETES:-}" ] || fail "not all of ${programs[*]} are in $place"
	echo "kubernetes: build $version, once, in $place (the log: $place.log)"
	mkdir -p "$cache"
	work=$(mktemp -d "$cache/build-XXXXXX")
	trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
	if ! { download "$work" && build "$work"; } >"$place.log" 2>&1; then
		tail -20 "$place.log" >&2
		fail "the build failed (all of it: $place.log)"
	fi
	mkdir -p "$place"
	cp "${programs[@]/#/$work/src/_output/bin/}" "$place"
	complete || fail "the build made not all of ${programs[*]} (its output: $place.log)"
	rm -f "$place.log"
fi

began=$SECONDS
export GRAFT_KUBERNETES=$place GRAFT_MUST_WORK=1 GRAFT_SLOWNESS=${GRAFT_SLOWNESS:-3}
if .venv/bin/python3 -m pytest -q --timeout 900 tests/kubernetes "$@"; then
	echo "kubernetes: OK ($((SECONDS - began)) s)"
else
	echo "kubernetes: FAILED after $((SECONDS - began)) s" >&2
	exit 1
fi
