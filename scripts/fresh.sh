#!/bin/bash
# fresh.sh - run commands of this project as on a machine that has nothing
#
#   make fresh [SUITE=bookworm|trixie|forky] [COMMANDS="'make demo' 'make test'"] [DIR=/path] [KEEP=1] [MIRROR=URL]
#   scripts/fresh.sh SUITE COMMAND...                                            with DIR, KEEP, MIRROR in the environment
#
# Makes a minimal Debian (debootstrap) in a directory, clones HEAD into it, and runs each command there as root, in mount,
# pid, uts and ipc namespaces of its own. Packages, users, files and processes are the new system's. The kernel, cgroups,
# bpffs and the network are this machine's; so are the ways to mirrors and registries: what apt and pip are told about
# proxies, certificates and local packages. Variables named GRAFT_* are passed on.
#
# DIR is where the system stands; one that is there already is used again as it was left, with a new clone. It is removed
# at the end unless DIR is given or KEEP=1. The output of the Nth command is in DIR/N.log, which stays where one failed.
# Ends with a line for each command, and with status 1 if one of them failed.
set -euo pipefail

die() {
	echo "fresh: $1" >&2
	exit 1
}

[ $# -ge 2 ] || die "usage: scripts/fresh.sh SUITE COMMAND..."
suite=$1
shift
[ "$(id -u)" = 0 ] || die "needs root (debootstrap, mounts, namespaces): sudo make fresh"
project=$(cd "$(dirname "$0")/.." && pwd)
"$project/scripts/setup.sh" fresh

keep=${KEEP:-0}
if [ -n "${DIR:-}" ]; then
	keep=1
	mkdir -p "$DIR"
	dir=$(cd "$DIR" && pwd)
else
	dir=$(mktemp -d /var/tmp/graft-fresh-XXXXXX)
fi
root=$dir/root

# Every mount is in a namespace that ends with its command, so that there is nothing to unmount; --one-file-system
# guards what is bound in case one lives on.
failed=1
# shellcheck disable=SC2317 # it is called, by the trap
finish() {
	if [ "$keep" = 1 ]; then
		echo "fresh: the system stays in $dir"
	else
		rm -rf --one-file-system "$root"
		[ "$failed" = 1 ] || rm -rf "$dir"
	fi
}
trap finish EXIT

bootstrap() {
	local mirror=$1 script=
	echo "fresh: debootstrap $suite from $mirror into $root"
	mkdir -p "$root"
	# a suite that is newer than this machine's debootstrap is made as unstable is
	[ -e "/usr/share/debootstrap/scripts/$suite" ] || script=/usr/share/debootstrap/scripts/sid
	debootstrap --variant=minbase --include=ca-certificates,git,make "$suite" "$root" "$mirror" ${script:+"$script"} \
		>"$dir/debootstrap.log" 2>&1 || {
		tail -5 "$dir/debootstrap.log" >&2
		die "debootstrap failed (all of it: $dir/debootstrap.log); MIRROR=URL names another mirror"
	}
	cat >"$root/etc/apt/sources.list" <<-END
		deb $mirror $suite main
		deb $mirror $suite-updates main
		deb ${mirror%/debian}/debian-security $suite-security main
	END
	echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/unsafe-io" # faster; the system does not outlive the machine
	touch "$dir/complete"
}

# settings - what this machine's apt, pip and TLS libraries are told about reaching mirrors and registries, one a line
settings() {
	apt-config dump | grep -E "$options" || true
	cat /etc/pip.conf /etc/xdg/pip/pip.conf ~/.config/pip/pip.conf ~/.pip/pip.conf 2>/dev/null || true
	env | grep -E "$variables" || true
}
options='^Acquire::((http|https|ftp)::|Check-Valid-Until )' # the second one: of a mirror that was kept as it was one day
variables='^(PIP_[A-Z_]*|(http|https|ftp|no)_proxy|(HTTP|HTTPS|FTP|NO)_PROXY|(SSL|CURL|REQUESTS|GIT_SSL)_[A-Z_]*)='

# connect - the same settings in the new system; the files that they name are copied, the directories bound (see inside)
connect() {
	local file path
	cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
	apt-config dump | grep -E "$options" >"$root/etc/apt/apt.conf.d/90machine" || true
	for file in /etc/pip.conf /etc/xdg/pip/pip.conf; do
		[ ! -e "$file" ] || install -m 644 -D "$file" "$root$file"
	done
	for file in .config/pip/pip.conf .pip/pip.conf; do
		[ ! -e ~/"$file" ] || install -m 644 -D ~/"$file" "$root/root/$file"
	done
	if [ -d /usr/local/share/ca-certificates ]; then
		mkdir -p "$root/usr/local/share/ca-certificates"
		cp -a /usr/local/share/ca-certificates/. "$root/usr/local/share/ca-certificates/"
		chroot "$root" update-ca-certificates >/dev/null 2>&1
	fi
	bound=()
	for path in $(settings | sed 's|file://||g' | grep -oE '/[A-Za-z0-9._/-]+' | sort -u); do
		case $path in //* | /etc/ssl/*) continue ;; esac # an address; what ca-certificates brings
		[ "${path##*/}" != simple ] || path=${path%/simple} # an index of pip's: the files may lie beside it
		if [ -d "$path" ]; then
			bound+=("$path")
		elif [ -f "$path" ]; then
			install -m 644 -D "$path" "$root$path"
		fi
	done
	mapfile -t environment < <(env | grep -E "$variables" || true)
	mapfile -t -O ${#environment[@]} environment < <(env | grep -E '^GRAFT_' || true)
}

# inside COMMAND - run in the new system; its root is pivoted, because a chroot may not make user namespaces
inside() {
	# shellcheck disable=SC2016 # the inner shell expands it
	root=$root bound=${bound[*]} command=$1 unshare --mount --pid --uts --ipc --fork --kill-child --propagation private \
		bash -c '
			set -euo pipefail
			mount --bind "$root" "$root"
			cd "$root"
			mount -t proc proc proc
			mount --rbind /dev dev
			mount --rbind /sys sys
			mount -t tmpfs -o mode=755 run run
			mount -t tmpfs -o mode=1777 tmp tmp
			mkdir -p run/lock .old
			for path in $bound; do
				mkdir -p ".$path"
				mount --bind -o ro "$path" ".$path"
			done
			pivot_root . .old
			cd /src
			umount --lazy /.old
			hostname fresh
			exec env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@" bash -c "$command"
		' inside "${environment[@]}" </dev/null
}

if [ ! -e "$dir/complete" ]; then
	[ ! -e "$root" ] || die "$root is there, and is not a system that this script has finished"
	bootstrap "$("$project/scripts/mirror.sh")"
fi
connect
rm -rf "$root/src"
git clone -q "$project" "$root/src"

count=0
failed=0
verdicts=()
for command in "$@"; do
	count=$((count + 1))
	started=$SECONDS
	echo "fresh: $suite: $command (output: $dir/$count.log)"
	if inside "$command" >"$dir/$count.log" 2>&1; then
		verdict="ok    "
	else
		verdict=FAILED
		failed=1
		tail -40 "$dir/$count.log"
	fi
	verdicts+=("$verdict $((SECONDS - started)) s  $command")
done
printf "fresh: $suite: %s\n" "${verdicts[@]}"
exit $failed
