#!/bin/bash
# install.sh - put graft on this machine, or take it away again: 'install.sh' and 'install.sh remove'.
#
# PREFIX      (/opt/graft)            a virtual environment with graft and what it needs
# BINDIR      (/usr/local/bin)        links to graft (csrc/front.c), graftd, ip-graft, graft-cni, graft-netavark
# INCLUDEDIR  (/usr/local/include)    graft.h
# DATADIR     (/usr/local/share)      manual pages, completion of bash, zsh and fish
# UNITDIR     (/etc/systemd/system)   units; only where that directory is, or with DESTDIR
# DESTDIR                             put before all of them, for packages
#
# PREFIX/installed lists the files and directories that were made outside of PREFIX. Removing goes by that list.
set -euo pipefail
cd "$(dirname "$0")/.."

root=${DESTDIR:-}
prefix=${PREFIX:-/opt/graft}
bindir=${BINDIR:-/usr/local/bin}
includedir=${INCLUDEDIR:-/usr/local/include}
datadir=${DATADIR:-/usr/local/share}
unitdir=${UNITDIR:-/etc/systemd/system}
list=$root$prefix/installed

fail() {
	echo "install: $1" >&2
	exit 1
}

[ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "needs root"

# Is this directory an environment that this script has made? Nothing else is overwritten, or removed.
is_ours() {
	[ -f "$1/pyvenv.cfg" ] && [ -e "$1/bin/graftd" ]
}

# Addresses that containers had: of a graftd that was killed, there is nobody else to remove them (kernel/addresses.py).
sweep() {
	"$prefix/bin/python3" -I - <<-END || echo "install: addresses of containers that have ended may be left on lo"
from graft.client import call
from graft.kernel.addresses import marked_addresses, remove_address
try:
    call('status', start=False)
except Exception:
    for address in marked_addresses():
        remove_address(address)
	END
}

remove() {
	is_ours "$root$prefix" || fail "there is no graft in $root$prefix"
	if [ -z "$root" ]; then
		local config
		for config in /etc/docker/daemon.json /etc/containerd/config.toml /usr/share/containers/oci/hooks.d/graft.json; do
			! grep -qsF "$prefix/" "$config" || fail "$config names $prefix: 'graft uninstall docker|podman|containerd' first"
		done
	fi
	[ -n "$root" ] || sweep
	[ ! -f "$list" ] || tac "$list" | while read -r path; do
		if [ -d "$root$path" ] && [ ! -L "$root$path" ]; then
			rmdir --ignore-fail-on-non-empty "$root$path"
		else
			rm -f "$root$path"
		fi
	done
	rm -rf "$root${prefix:?}"
	[ -z "$root" ] || (cd "$root" && rmdir -p --ignore-fail-on-non-empty "$(dirname "${prefix#/}")")
	echo "install: removed"
}

# Make a directory and those above it, and list the ones that were not there.
directory() {
	[ ! -d "$root$1" ] || return 0
	directory "$(dirname "$1")"
	mkdir "$root$1"
	echo "$1" >>"$list"
}

# Put standard input at a path.
file() {
	directory "$(dirname "$1")"
	cat >"$root$1"
	chmod 644 "$root$1"
	grep -qxF "$1" "$list" || echo "$1" >>"$list"
}

install_all() {
	[ ! -e "$root$prefix" ] || is_ours "$root$prefix" || fail "$root$prefix is there, and no graft: PREFIX names another place"
	rm -f dist/graft-*.whl
	make --no-print-directory wheel manual
	python3 -m venv "$root$prefix"
	"$root$prefix/bin/python3" -m pip install -q --disable-pip-version-check --force-reinstall dist/graft-*.whl
	touch "$list"

	local name page unit front group
	directory "$bindir"
	for name in graft graftd ip-graft graft-cni graft-netavark; do
		ln -sf "$prefix/bin/$name" "$root$bindir/$name"
		grep -qxF "$bindir/$name" "$list" || echo "$bindir/$name" >>"$list"
	done
	# `graft` is the program in C, which leaves to the one in Python what it does not do
	front=$(cd "$root$prefix" && echo lib/python3*/site-packages/graft/graft-front)
	ln -sf "$prefix/$front" "$root$bindir/graft"
	file "$includedir/graft.h" <include/graft.h
	for page in build/man/*.[158]; do
		file "$datadir/man/man${page##*.}/${page##*/}" <"$page"
	done
	for name in graft graftd; do
		"$root$prefix/bin/graft" completion bash $name | file "$datadir/bash-completion/completions/$name"
		"$root$prefix/bin/graft" completion zsh $name | file "$datadir/zsh/site-functions/_$name"
		"$root$prefix/bin/graft" completion fish $name | file "$datadir/fish/vendor_completions.d/$name.fish"
	done
	group= # whose members may give orders, if somebody has made it here
	[ -n "$root" ] || group=$(getent group graft || true)
	if [ -n "$root" ] || [ -d "$unitdir" ]; then
		for unit in contrib/systemd/*; do
			sed "s|@BINDIR@|$bindir|; ${group:+/^SocketMode=0660\$/a SocketGroup=graft}" "$unit" | file "$unitdir/${unit##*/}"
		done
	fi
	echo "install: $("$root$prefix/bin/graft" --version) in $root$bindir"
	if [ -n "$root" ]; then # the programs begin with the path of their interpreter; compiled modules have their own
		"$root$prefix/bin/python3" -m compileall -qf -s "$root" "$root$prefix/lib"
		grep -rlIF "$root$prefix" "$root$prefix/bin" "$root$prefix/pyvenv.cfg" | xargs sed -i "s|$root$prefix|$prefix|g"
	elif [ -d /run/systemd/system ]; then
		echo "install: systemctl enable --now graftd.socket graftd-agent.socket; for Docker: systemctl enable graftd-docker.socket; systemctl start graftd"
	fi
}

case ${1:-} in
remove) remove ;;
'') install_all ;;
*) fail "unknown word '$1'" ;;
esac
