#!/bin/bash
# kernels.sh - run tests on Debian's stock kernels with pure cgroup v2, in software emulation (virtme-ng, qemu)
#
#   scripts/kernels.sh [NAME...]     rows of kernels.txt; without one: all of this machine's architecture
#
# GRAFT_KERNEL_TESTS=all|core|attacks|probes|doctor instead of what the row says. Kernels are kept in GRAFT_KERNEL_CACHE. The
# guest sees this machine's root read-only, with temporary overlays, or that of a Debian of its own architecture
# (build/ARCHITECTURE, scripts/foreign.sh) with all of graft built for it; it can write to the result directory only.
# What came of it is in build/kernels/NAME.json, from which `scripts/kernels.py --write` makes docs/kernels.md; what
# the tests have printed is in NAME.log beside it.
set -euo pipefail
cd "$(dirname "$0")/.."

table=scripts/kernels.txt
cache=${GRAFT_KERNEL_CACHE:-/tmp/graft-kernels} # not below /run or /var, where the guest has a tmpfs
limit=${GRAFT_KERNEL_TIMEOUT:-900}
slowness=${GRAFT_KERNEL_SLOWNESS:-10} # emulation is that much slower, and more beside other work
must=${GRAFT_MUST_WORK:-0}
native=$(apt-config shell native APT::Architecture | cut -d"'" -f2)
declare -A emulators=([amd64]=qemu-system-x86_64 [arm64]=qemu-system-aarch64)
declare -A compilers=([amd64]=x86_64-linux-gnu-gcc [arm64]=aarch64-linux-gnu-gcc)

lack() {
	echo "kernels: $1" >&2
	[ "$must" = 1 ] && exit 1
	echo "kernels: SKIPPED"
	exit 0
}

# row NAME - sets architecture, suite, packages and tests
row() {
	local found
	found=$(awk -v name="$1" '$1 == name { print $2, $3, $4, $5 }' $table)
	[ -n "$found" ] || {
		echo "kernels: no kernel '$1' in $table; there are: $(awk '!/^#/ && NF { print $1 }' $table | tr '\n' ' ')" >&2
		exit 2
	}
	read -r architecture suite packages tests <<<"$found"
	tests=${GRAFT_KERNEL_TESTS:-$tests}
}

# private_apt ROOT - sets apt: options for a root of its own with the row's suite, so that this machine's sources stay
# as they are
private_apt() {
	local root=$1 mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	mirror=$(scripts/mirror.sh)
	mkdir -p "$root/lists/partial" "$root/archives/partial"
	echo "deb [signed-by=$keyring] $mirror ${suite%-*} main" >"$root/sources.list" # busybox-static is there alone
	case $suite in
	*-security) echo "deb [signed-by=$keyring] ${mirror%/debian}/debian-security $suite main" >>"$root/sources.list" ;;
	*-*) echo "deb [signed-by=$keyring] $mirror $suite main" >>"$root/sources.list" ;;
	esac
	apt=(-qq -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture"
		-o APT::Sandbox::User=root
		-o Dir::Etc::SourceList="$root/sources.list" -o Dir::Etc::SourceParts=/dev/null
		-o Dir::State::Lists="$root/lists" -o Dir::State::status=/dev/null
		-o Dir::Cache::Archives="$root/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
	apt-get "${apt[@]}" update 2>"$root/log" || lack "Debian's $suite is not to be read: $(tail -1 "$root/log")"
}

# fetch NAME - the row's packages, unpacked in the cache
fetch() {
	local lists at=$cache/$1 first rest package version wanted
	lists=$(mktemp -d /tmp/graft-lists-XXXX)
	private_apt "$lists"
	IFS=, read -r first rest <<<"$packages"
	package=$(apt-cache "${apt[@]:1}" search --names-only "^$first\$" | cut -d' ' -f1 | sort -V | tail -1)
	[ -n "$package" ] || lack "Debian's $suite has no package $first"
	version=$(sed -E 's/^linux-(image|binary)-//' <<<"$package")
	wanted=("$package")
	for rest in ${rest//,/ }; do wanted+=("${rest//VERSION/$version}"); done
	echo "kernels: fetch ${wanted[*]} of $suite"
	rm -rf "$at"
	mkdir -p "$at/debs" "$at/tree"
	(cd "$at/debs" && apt-get "${apt[@]}" download "${wanted[@]}" busybox-static) || lack "download failed"
	for package in "$at"/debs/*.deb; do
		dpkg-deb -x "$package" "$at/tree"
	done
	rm -rf "$lists" "$at/debs"
	printf '%s\n' "$version" "$suite" "${wanted[*]}" >"$at/fetched"
}

# populate TREE - sets root: of the row's architecture, with this checkout built for it in /graft, and the modules
populate() {
	local compiler=${compilers[$architecture]}
	root=$PWD/build/$architecture/root
	[ -e "build/$architecture/complete" ] ||
		scripts/foreign.sh "$architecture" trixie "$architecture" "build/$architecture" || return 1
	command -v "$compiler" >/dev/null || lack "$compiler is not installed (make setup-$architecture)"
	rm -rf "$root/graft" "$root/usr/lib/modules"
	mkdir -p "$root/graft/.venv/bin"
	git ls-files -z | xargs -0 cp --parents -t "$root/graft"
	make -s -C "$root/graft" CC="$compiler" compiled || return 1
	ln -s /usr/bin/python3 "$root/graft/.venv/bin/python3"
	printf 'home = /usr/bin\ninclude-system-site-packages = true\n' >"$root/graft/.venv/pyvenv.cfg"
	cp -a "$(compgen -G "$1/usr/lib/modules" || echo "$1/lib/modules")" "$root/usr/lib/modules"
}

# commands - what the guest does in the checkout; what came of it goes to $results
commands() {
	# it is interrupted before the guest is, so that what failed until then is told
	local pytest="GRAFT_MUST_WORK=1 GRAFT_SLOWNESS=$slowness timeout -k 100 -s INT \$(($limit - 120 - SECONDS))"
	pytest+=" .venv/bin/python3 -m pytest -q -p no:cacheprovider"
	pytest+=" -o timeout=$((30 * slowness)) --durations=12 -n 2" # each waits for the verifier, on one processor
	# what takes grpc is not collected where it is not: engines' tests, and none of them is core
	[ "$architecture" = "$native" ] || pytest+=$(grep -l 'tests\.system\.cri ' tests/system/test_*.py | sed 's/^/ --ignore=/' | tr -d '\n')
	local ended="|| { [ \$? = 1 ] || touch $results/interrupted; rc=1; }"
	echo "cd $place; export GRAFT_MODULES=$modules GRAFT_INSMOD='$insmod'; rc=0"
	echo "mount -t bpf bpf /sys/fs/bpf" # or two tests that begin at once mount one each, over the other's
	echo "uname -r >$results/release; uname -m >$results/machine"
	echo "GRAFT_RUN_DIR=/run/graft-kernels bin/graft doctor -j >$results/doctor.json"
	[ "$tests" != probes ] || echo "$pytest --junitxml=$results/core.xml tests/kernel -m kernel $ended"
	[[ $tests != all && $tests != core ]] || echo "$pytest --junitxml=$results/core.xml tests/kernel tests/system -m 'core or kernel' $ended"
	[[ $tests != all && $tests != attacks ]] || echo "$pytest --junitxml=$results/attacks.xml tests/attack/test_attacks.py -k root $ended"
	echo "(exit \$rc)"
}

# test_on NAME - boot the row's kernel, run the tests; status 1 if one of them failed
test_on() {
	local tree=$cache/$1/tree out=$made/$1 kernel modules busybox insmod place=$PWD root
	local results=$out guest=(--disable-kvm --user root --memory 3G --cpus 2)
	row "$1"
	command -v "${emulators[$architecture]}" >/dev/null ||
		lack "${emulators[$architecture]} is not installed (make setup-test, setup-arm64)"
	[ -e "$cache/$1/fetched" ] || fetch "$1"
	kernel=$(compgen -G "$tree/boot/vmlinuz-*" || compgen -G "$tree/usr/lib/modules/*/vmlinuz")
	modules=$(compgen -G "$tree/usr/lib/modules/*/kernel" || compgen -G "$tree/lib/modules/*/kernel")
	busybox=$(compgen -G "$tree/usr/bin/busybox" || echo "$tree/bin/busybox")
	insmod="$busybox insmod"
	mkdir "$out"
	if [ "$architecture" != "$native" ]; then
		populate "$tree" || return 1
		# what Python compiles stays until the guest ends: Debian's scripts would have done it, and none has run
		guest+=(--arch "$architecture" --root "$root" --cwd "$root" --rwdir="/results=$out" --overlay-rwdir=/graft)
		place=/graft results=/results modules=/usr/lib/modules/$(head -1 "$cache/$1/fetched")/kernel insmod=insmod
	else
		guest+=(--cwd / --rwdir="$out")
	fi
	echo "kernels: boot $(head -1 "$cache/$1/fetched") and run: $tests"
	commands >"$out/run"
	for _ in 1 2; do # now and then a guest ends before its first command
		PATH="$PWD/.venv/bin:$PATH" timeout "$limit" .venv/bin/vng --run "$kernel" --busybox "$busybox" "${guest[@]}" -- \
			"bash $results/run >$results/log 2>&1; echo \$? >$results/rc" </dev/null >"$out/console" 2>&1 || true
		[ ! -f "$out/release" ] || break
	done
	if [ ! -f "$out/rc" ]; then
		tail -30 "$out/console" "$out/log" 2>/dev/null || true
		echo "kernels: FAILED: the guest did not end within $limit s" >&2
		return 1
	fi
	tail -40 "$out/log"
	.venv/bin/python3 scripts/kernels.py --result "$1" "$out" "$cache/$1/fetched"
	cp "$out/log" "build/kernels/$1.log"
	return "$(cat "$out/rc")"
}

[ "$(id -u)" = 0 ] || lack "needs root"
case $PWD in
/var/* | /run/*) lack "$PWD is not to be seen in the guest, which has a tmpfs there: clone elsewhere" ;;
esac
[ -x .venv/bin/vng ] || lack "virtme-ng is not installed (make build)"
names=("$@")
[ $# -gt 0 ] || mapfile -t names < <(awk -v here="$native" '!/^#/ && $2 == here { print $1 }' $table)
made=$(mktemp -d /tmp/graft-kernel-out-XXXX)
trap 'rm -rf "$made"' EXIT
failed=()
for name in "${names[@]}"; do
	test_on "$name" || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] || {
	echo "kernels: FAILED: ${failed[*]}" >&2
	exit 1
}
