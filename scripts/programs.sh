#!/bin/bash
# programs.sh - compare named programs under graft with the same programs on the host: make test-programs
#
# The servers and clients are Debian 12's, in a system of their own below build/programs (debootstrap, the set "programs"
# of packages.txt): nothing is installed on this machine but debootstrap, and no service starts, neither now nor at boot.
# The system stays for the next time, until `make clean`; it is made again when the set has changed. Arguments are
# pytest's: scripts/programs.sh -k vsftpd
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(id -u)" = 0 ] || {
	echo "programs: needs root (debootstrap, network namespaces): sudo make test-programs" >&2
	exit 1
}
began=$SECONDS
system=build/programs
wanted=$(git show HEAD:scripts/packages.txt | sed -n '/^programs /p') # what fresh.sh installs is HEAD's
if [ "$(cat "$system/packages" 2>/dev/null)" != "$wanted" ]; then
	DIR=$system scripts/fresh.sh bookworm 'scripts/setup.sh programs'
	echo "$wanted" >"$system/packages"
fi

export GRAFT_PROGRAMS=$PWD/$system/root GRAFT_MUST_WORK=1 GRAFT_SLOWNESS=${GRAFT_SLOWNESS:-3}
if .venv/bin/python3 -m pytest -q tests/named "$@"; then
	echo "programs: OK, all are under graft as on the host ($((SECONDS - began)) s)"
else
	echo "programs: FAILED after $((SECONDS - began)) s" >&2
	exit 1
fi
