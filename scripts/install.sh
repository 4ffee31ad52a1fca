#!/bin/bash
# install.sh - install graft into a virtual environment at PREFIX (default /opt/graft), with links in BINDIR
# (/usr/local/bin), graft.h in INCLUDEDIR (/usr/local/include) and systemd's units. 'install.sh remove' removes all.
set -euo pipefail
cd "$(dirname "$0")/.."

prefix=${PREFIX:-/opt/graft}
bindir=${BINDIR:-/usr/local/bin}
includedir=${INCLUDEDIR:-/usr/local/include}
units=/etc/systemd/system

if [ "$(id -u)" != 0 ]; then
	echo "install: needs root" >&2
	exit 1
fi

if [ "${1:-}" = remove ]; then
	rm -f "$bindir/graft" "$bindir/graftd" "$bindir/ip-graft" "$bindir/graft-cni" "$includedir/graft.h" "$units"/graftd.service "$units"/graftd.socket "$units"/graftd-agent.socket "$units"/graftd-docker.socket
	rm -f /usr/local/share/man/man1/graft.1 /usr/local/share/man/man8/graftd.8
	rm -rf "$prefix"
	echo "install: removed"
	exit 0
fi

make --no-print-directory wheel
python3 -m venv "$prefix"
"$prefix/bin/python3" -m pip install -q --disable-pip-version-check --force-reinstall dist/graft-*.whl
ln -sf "$prefix/bin/graft" "$prefix/bin/graftd" "$prefix/bin/ip-graft" "$prefix/bin/graft-cni" "$bindir/"
install -m 644 -D include/graft.h "$includedir/graft.h"
if [ -d "$units" ]; then
	for unit in graftd.service graftd.socket graftd-agent.socket graftd-docker.socket; do
		sed "s|@BINDIR@|$bindir|" "contrib/systemd/$unit" >"$units/$unit"
	done
	[ ! -d /run/systemd/system ] || echo "install: systemctl enable --now graftd.socket graftd-agent.socket (graftd-docker.socket for Docker)"
fi
echo "install: $("$bindir/graft" --version) in $bindir"
