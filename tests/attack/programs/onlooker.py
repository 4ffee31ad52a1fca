"""What the host is like, as a list of lines in JSON, whenever a line is read from stdin. Arguments: names in xt_recent.

It is asked after every attack, so that it starts four processes and no more: in emulation each takes a third of a second.
"""

import json
import subprocess
import sys
from pathlib import Path

LOOKS = (  # a command, and what it reads
    (("ip", "-o", "-batch", "-"), "address\nlink\nroute show table all\nrule\nmaddress\nneighbour show nud permanent\n"),
    (("ip", "-6", "-o", "-batch", "-"), "route show table all\nrule\n"),
    (("nft", "list", "ruleset"), ""),
)
FILES = (
    "/proc/net/ip6_flowlabel", *(f"/proc/net/xt_recent/{name}" for name in sys.argv[1:]),
    "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/ip_local_port_range",
)  # fmt: skip


def told(argv: tuple[str, ...], stdin: str = "") -> list[str]:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout.splitlines()


def state() -> list[str]:
    lines = [line for argv, stdin in LOOKS for line in told(argv, stdin)]
    lines += sorted(told(("ss", "-tulnH")))
    lines += [line for file in FILES for line in Path(file).read_text().splitlines()]
    names = Path("/proc/net/unix").read_text().splitlines()
    lines += sorted(line.partition(":")[2] for line in names if "graft-attack" in line)
    return [" ".join(line.split()) for line in lines]


for _ in sys.stdin:
    print(json.dumps(state()), flush=True)
