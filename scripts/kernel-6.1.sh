#!/bin/bash
# kernel-6.1.sh - run the kernel tests and the core of the system tests on Debian's stock 6.1 kernel with pure
# cgroup v2, in software emulation (virtme-ng, qemu). The kernel package is kept in a cache directory. The guest sees
# this machine's root read-only, with temporary overlays; it can write to the result directory only.
set -euo pipefail
cd "$(dirname "$0")/.."

cache=${GRAFT_KERNEL_CACHE:-/tmp/graft-kernel-6.1} # not below /run or /var, where the guest has a tmpfs
limit=${GRAFT_KERNEL_TIMEOUT:-900}
slowness=${GRAFT_KERNEL_SLOWNESS:-10} # emulation is that much slower, and more beside other work
must=${GRAFT_MUST_WORK:-0}

lack() {
	echo "kernel-6.1: $1" >&2
	[ "$must" = 1 ] && exit 1
	echo "kernel-6.1: SKIPPED"
	exit 0
}

[ "$(id -u)" = 0 ] || lack "needs root"
case $PWD in
/var/* | /run/*) lack "$PWD is not to be seen in the guest, which has a tmpfs there: clone elsewhere" ;;
esac
command -v qemu-system-x86_64 >/dev/null || lack "qemu-system-x86_64 is not installed (make setup-test)"
[ -x .venv/bin/vng ] || lack "virtme-ng is not installed (make build)"

if ! compgen -G "$cache/tree/boot/vmlinuz-*" >/dev/null; then
	apt=(apt-get -qq)
	find_release() {
		apt-cache "${apt[@]:2}" search --names-only '^linux-image-6\.1\.0-[0-9]+-amd64$' |
			sed -E 's/^linux-image-(\S+).*/\1/' | sort -V | tail -1
	}
	release=$(find_release)
	if [ -z "$release" ]; then # sources that were never read, or another system than Debian 12: read Debian 12's, apart
		lists=$(mktemp -d /tmp/graft-lists-XXXX)
		mkdir "$lists/lists"
		keyring=/usr/share/keyrings/debian-archive-keyring.gpg
		echo "deb [signed-by=$keyring] ${MIRROR:-http://deb.debian.org/debian} bookworm main" >"$lists/sources.list"
		apt+=(-o Dir::Etc::SourceList="$lists/sources.list" -o Dir::Etc::SourceParts=/dev/null
			-o Dir::State::Lists="$lists/lists" -o Dir::State::status=/dev/null
			-o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
		"${apt[@]}" update 2>/dev/null || lack "neither this machine's package sources nor Debian 12's are to be read"
		release=$(find_release)
	fi
	[ -n "$release" ] || lack "this machine's package sources have no Debian 6.1 kernel, nor has Debian 12's"
	echo "kernel-6.1: fetch linux-image-$release"
	rm -rf "$cache"
	mkdir -p "$cache/tree"
	(cd "$cache" && "${apt[@]}" download "linux-image-$release" busybox-static) || lack "download failed"
	rm -rf "${lists:-}"
	for package in "$cache"/*.deb; do
		dpkg-deb -x "$package" "$cache/tree"
		rm "$package"
	done
fi
kernel=$(compgen -G "$cache/tree/boot/vmlinuz-*" | head -1)

out=$(mktemp -d /tmp/graft-kernel-out-XXXX)
trap 'rm -rf "$out"' EXIT
tests=(tests/kernel tests/system -m "core or kernel" --durations=12 -n 2) # each waits for the verifier, on one processor
modules=$(compgen -G "$cache/tree/lib/modules/*/kernel" | head -1)
command="cd $PWD; export GRAFT_MODULES=$modules GRAFT_INSMOD='$cache/tree/bin/busybox insmod';"
command+=" GRAFT_MUST_WORK=1 GRAFT_SLOWNESS=$slowness PYTHONDONTWRITEBYTECODE=1 .venv/bin/python3 -m pytest -q"
command+=" -p no:cacheprovider -o timeout=$((30 * slowness)) $(printf '%q ' "${tests[@]}")"
echo "kernel-6.1: boot ${kernel##*/vmlinuz-} and run the core of the tests"
PATH="$PWD/.venv/bin:$PATH" timeout "$limit" .venv/bin/vng --disable-kvm --run "$kernel" \
	--busybox "$cache/tree/bin/busybox" --rwdir="$out" --cwd / --user root --memory 3G --cpus 2 \
	-- "( $command ) >$out/log 2>&1; echo \$? >$out/rc" </dev/null >"$out/console" 2>&1 || true
if [ ! -f "$out/rc" ]; then
	tail -30 "$out/console" "$out/log" 2>/dev/null || true
	echo "kernel-6.1: FAILED: the guest did not end within $limit s" >&2
	exit 1
fi
tail -40 "$out/log"
exit "$(cat "$out/rc")"
