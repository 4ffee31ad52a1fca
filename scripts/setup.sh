#!/bin/bash
# setup.sh - install the Debian or Ubuntu packages that are missing
# usage: setup.sh SET...       SET is run, install, bench or test: what graft, its installation, its benchmark, its tests need
set -euo pipefail

declare -A need=(
	[run]="make gcc clang libbpf-dev libbpf1 libc6-dev iproute2 util-linux python3-venv nginx-light wrk curl iperf3"
	[install]="go-md2man man-db"
	[bench]="redis-server redis-tools memcached libmemcached-tools sockperf iptables nftables docker.io passt slirp4netns"
	[test]="mandoc golang-go chromium|chromium-browser dnsmasq-base strace qemu-system-x86 kmod shellcheck
		bpftool|linux-tools-generic systemd runc crun containerd podman conmon containernetworking-plugins
		docker-compose libseccomp2 busybox-static file libpython3.11-testsuite|libpython3.12-testsuite
		openjdk-17-jdk-headless|openjdk-21-jdk-headless|default-jdk-headless"
)

installed() {
	dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed
}

missing=()
for set in "$@"; do
	for choice in ${need[$set]}; do
		IFS='|' read -ra names <<<"$choice"
		have=
		for name in "${names[@]}"; do
			installed "$name" && have=1 && break
		done
		[ "$choice" = nginx-light ] && command -v nginx >/dev/null && have=1
		[[ "$choice" = bpftool* ]] && command -v bpftool >/dev/null && have=1
		[ "$choice" = docker.io ] && command -v dockerd >/dev/null && have=1
		[[ "$choice" = openjdk* ]] && command -v java >/dev/null && have=1
		[ -n "$have" ] || missing+=("$choice")
	done
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
	echo "graft: as root, install: ${missing[*]}" >&2
	exit 1
fi
echo "graft: install ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
wanted=()
for choice in "${missing[@]}"; do
	IFS='|' read -ra names <<<"$choice"
	for name in "${names[@]}"; do
		candidate=$(apt-cache policy "$name" | sed -n 's/^ *Candidate: //p')
		if [ -n "$candidate" ] && [ "$candidate" != "(none)" ]; then
			wanted+=("$name")
			break
		fi
	done
done
# RUNLEVEL=1: install servers without starting them on the machine's ports
RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/tmp/graft-setup.log 2>&1 || {
	tail -20 /tmp/graft-setup.log >&2
	exit 1
}
