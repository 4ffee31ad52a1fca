"""What is left behind when graftd is ended while containers run: a shell that takes their addresses away afterwards.

A container's own address belongs to it as long as it has a process, also when no graftd runs any more. Nobody but
graftd would remove it then, and programs of the host would go on to reach an address that nobody has. So the shell
looks every PERIOD seconds which network namespaces have processes, and which cgroups of direct containers, and
removes the addresses of those that have none.
It ends with the last address, and as soon as there is a graftd again, which knows them from state.json.

Under a service manager there is no such shell: it would be ended with graftd, and is there to start the next one.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from graft.log import log
from graft.process.title import SWEEPER

PERIOD = 2
NAME_IT = f"{{ printf {SWEEPER} >/proc/self/comm; }} 2>/dev/null"
# $1: the path of graftd's socket; then OWNER=ADDRESS/LENGTH each, OWNER a netns's inode or a cgroup's directory.
# find(1): GNU's
SCRIPT = f"""{NAME_IT}
socket=$1; shift
while [ $# -gt 0 ]; do
	sleep {PERIOD}
	[ ! -S "$socket" ] || exit 0
	seen=$(find /proc -maxdepth 3 -path '/proc/[0-9]*/ns/net' -printf '%l ' 2>/dev/null)
	left=
	for owned; do
		case $seen:${{owned%%=*}} in
		*:/*) if grep -q 'populated 1' "${{owned%%=*}}/cgroup.events" 2>/dev/null; then
			left="$left $owned"
		else
			ip address del "${{owned#*=}}" dev lo
		fi ;;
		*"net:[${{owned%%=*}}]"*) left="$left $owned" ;;
		*) ip address del "${{owned#*=}}" dev lo ;;
		esac
	done
	set -- $left
done
"""


def leave_sweeper(owned: Mapping[str, str], socket: Path) -> None:
    """Start the shell, and do not wait for it. @owned: addresses with their lengths, each with its netns's inode, or
    the directory of a direct container's cgroup.
    """
    pairs = [f"{netns}={address}" for address, netns in owned.items()]
    try:
        subprocess.Popen(
            (SWEEPER, "-c", SCRIPT, SWEEPER, str(socket), *pairs), executable="/bin/sh", stdin=subprocess.DEVNULL,
            cwd="/", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.error("addresses will be left on lo, the shell that removes them cannot start: %s", error.strerror)
