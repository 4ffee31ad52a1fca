#!/bin/bash
# setup.sh - install the Debian or Ubuntu packages that are missing: setup.sh SET..., the sets of packages.txt
#
# A row of packages.txt is there if one of its packages is installed and all of its programs are found; where its names
# end with '*', the programs may come from anywhere (Docker's own packages, another nginx). Where they end with '?', it
# is missing only if the package sources have it. What is still missing after the installation is an error that names it.
set -euo pipefail
table=$(dirname "$0")/packages.txt
PATH=$PATH:/usr/sbin:/sbin:/snap/bin # where a user who is not root has none of them

fail() {
	printf 'setup: %s\n' "$@" >&2
	exit 1
}

# installed NAMES - is one of the packages "a|b|*" installed? "*": it may have come from anywhere
installed() {
	local name names
	IFS='|' read -ra names <<<"$1"
	for name in "${names[@]}"; do
		[ "$name" != "*" ] && [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] && return
	done
	return 1
}

# found PROGRAM...
found() {
	local program
	for program in "$@"; do
		command -v "$program" >/dev/null || return
	done
}

# candidate NAMES - the first of the packages that the package sources have
candidate() {
	local name names found
	IFS='|' read -ra names <<<"$1"
	for name in "${names[@]}"; do
		[[ "$name" == [*?] ]] && continue
		found=$(apt-cache policy "$name" 2>/dev/null | sed -n 's/^ *Candidate: //p')
		[ -n "$found" ] && [ "$found" != "(none)" ] && echo "$name" && return
	done
	return 1
}

# missing SET... - the rows of the sets that are not there, one a line: "a|b|c" alone
missing() {
	local row
	while read -ra row; do
		[[ " $* " == *" ${row[0]:-#} "* ]] || continue
		if [[ "${row[1]}" == *"|*" ]] && found "${row[@]:2}"; then continue; fi
		if installed "${row[1]}" && found "${row[@]:2}"; then continue; fi
		if [[ "${row[1]}" == *"|?" ]] && ! candidate "${row[1]}" >/dev/null; then continue; fi
		echo "${row[1]}"
	done <"$table"
}

known=$(awk '!/^#/ && NF { print $1 }' "$table" | sort -u | tr '\n' ' ')
[ $# -gt 0 ] || fail "which sets? $known"
for set in "$@"; do
	[[ " $known" == *" $set "* ]] || fail "no set '$set' in $table; there are: $known"
done
mapfile -t wanted < <(missing "$@")
if [ ${#wanted[@]} -eq 0 ]; then
	echo "setup: $*: nothing to install"
	exit 0
fi
command -v apt-get >/dev/null || fail "missing: ${wanted[*]}" "this is neither Debian nor Ubuntu: install them by hand"
[ "$(id -u)" = 0 ] || fail "missing: ${wanted[*]}" "run the same command as root, or: sudo $0 $*"

echo "setup: $*: install ${wanted[*]}"
log=$(mktemp -t graft-setup-XXXXXX)
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >"$log" 2>&1 || {
	tail -20 "$log" >&2
	fail "apt-get update failed (all of it: $log); check the sources of apt and the network"
}
mapfile -t wanted < <(missing "$@") # once more: what the new lists have
packages=()
unknown=()
for names in "${wanted[@]}"; do
	choice=$(candidate "$names" || true)
	if [ -n "$choice" ]; then packages+=("$choice"); else unknown+=("$names"); fi
done
if [ ${#unknown[@]} -gt 0 ]; then
	system=$(sed -n 's/^PRETTY_NAME="\(.*\)"/\1/p' /etc/os-release)
	fail "the package sources of ${system:-this system} have no package for: ${unknown[*]}" \
		"add the source that has it (Ubuntu: the component 'universe'), or name its package in $table"
fi
# RUNLEVEL=1: install servers without starting them on the machine's ports
RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${packages[@]}" >>"$log" 2>&1 || {
	tail -20 "$log" >&2
	fail "apt-get install failed (all of it: $log) with: ${packages[*]}"
}
for name in "${packages[@]}"; do
	installed "$name" || fail "apt-get succeeded and did not install $name (its output: $log)"
done
rm -f "$log"
echo "setup: $*: installed ${#packages[@]} packages"
