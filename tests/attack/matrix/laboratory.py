"""The matrix's laboratory: containers of all kinds, a plain namespace to compare with, and what the host is like."""

import ipaddress
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from graft.bench.lab import CLIENT4, CLIENT6, GRAFT, HOST4, HOST6, SECOND4, Lab, wait_for
from tests.attack.matrix import calls, rows
from tests.attack.test_attacks import PROFILES, World

HERE = Path(__file__).parent
PROGRAMS = HERE.parent / "programs"
BASE = 9500  # published ports, calls.NOTED of each container
SLICES = (ipaddress.ip_network("127.64.0.0/10"), ipaddress.ip_network("fd67:7261:6674::/64"))
EPHEMERAL = range(38000, 41000)
# Packets that no container may send. A counter of the firewall is part of what the host is like.
TRIPWIRES = """
table inet tripwires {
    chain local {
        type filter hook prerouting priority -400;
        iif != "lo" accept
        meta l4proto != { tcp, udp } accept
        meta mark != 0 counter
        ip saddr != { 10.77.0.1, 10.77.0.3, 10.88.0.1, 127.0.0.0/8 } counter
        ip6 saddr != { ::1, 2001:db8:77::1, fd67:7261:6674::/64, fe80::/10 } counter
        ip option rr exists counter
        ip option lsrr exists counter
        exthdr rt exists counter
        exthdr dst exists counter
        exthdr hbh exists counter
    }
}
table netdev tripwires {
    chain out {
        type filter hook egress devices = { veth0, spare0 } priority 0;
        meta protocol arp accept
        meta l4proto != { tcp, udp } accept
        oifname "spare0" counter
        meta mark != 0 counter
        meta priority > 6 counter
        ip saddr != { 10.77.0.1, 10.77.0.3 } counter
        ip6 saddr != { 2001:db8:77::1, fe80::/10 } counter
        ip option rr exists counter
        ip option lsrr exists counter
        exthdr rt exists counter
        exthdr dst exists counter
        exthdr hbh exists counter
    }
}
"""


class Who(NamedTuple):
    """A program that does cells: a profile of test_attacks.py and a container of rows.py, or "oracle"."""

    profile: str
    place: str


class Program:
    """One agent, and its answers in order."""

    def __init__(self, process: subprocess.Popen[str], who: Who) -> None:
        self.process, self.who = process, who

    def up(self) -> None:
        """Wait until it runs. Raises AssertionError."""
        assert self.process.stdout
        assert self.process.stdout.readline() == "up\n", self.who

    def ask(self, row: str, group: str, first: int, last: int) -> None:
        """Begin with cells; answer() has what came of them."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([row, group, first, last]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The outcomes. Raises AssertionError if the program has ended."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"{self.who} has ended"
        return json.loads(line)  # type: ignore[no-any-return]


class Matrix:
    """The laboratory, its programs, and the host."""

    state_of: Any = World.state
    visitors: Any = World.visitors

    module = "agent"

    def __init__(self, lab: Lab, profiles: tuple[str, ...] = tuple(PROFILES), mode: str = "trap") -> None:
        self.lab, self.mode = lab, mode
        lab.env["GRAFT_DIRECT"] = "on" if mode == "direct" else "off"
        lab.host("sysctl", "-q", "net.ipv4.ip_local_port_range=38000 40999", check=True)
        self.repair()
        lab.host("nft", "-f", "-", input=TRIPWIRES, check=True)
        for source in (HERE, PROGRAMS):
            shutil.copytree(source, lab.work / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        (lab.work / "run").mkdir(mode=0o777)
        (lab.work / "run").chmod(0o777)
        self._servers()
        self.programs: dict[Who, Program] = {}
        self.where = calls.Places(HOST4, CLIENT4, SECOND4, HOST6, CLIENT6, self._other(), 0, CLIENT4, "10.9.8.1")
        self._endpoints()
        self._start(profiles)
        wait_for(lambda: "tentative" not in lab.host("ip", "address").stdout, "the link's own addresses")
        self.last, self.served = self.state()
        self.visitors()

    def _servers(self) -> None:
        lab = self.lab
        witness = ("/usr/bin/python3", "-I", lab.work / "programs" / "witness.py")
        self.witness = lab.spawn(*witness, HOST4, stdin=-1, stdout=-1)
        self.onlooker = lab.spawn("/usr/bin/python3", "-I", lab.work / "programs" / "onlooker.py", stdin=-1, stdout=-1)
        away = lab.spawn(*witness, CLIENT4, client=True, stdin=-1, stdout=-1)
        code = (
            "import os, socket, sys\ns = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); os.chmod(sys.argv[1], 0o777); s.listen(4096)\n"
            "print('up', flush=True)\nkept = []\nwhile True: kept.append(s.accept()[0]); kept[:-64] = []"
        )
        unix = lab.spawn("/usr/bin/python3", "-I", "-c", code, lab.work / "run" / "unix", stdout=-1)
        for process in (self.witness, away, unix):
            assert process.stdout
            assert process.stdout.readline() == "up\n"

    def _other(self) -> str:
        code = (
            "import socket; l = [socket.socket() for _ in range(2)]\n"
            "[s.setsockopt(1, 15, 1) for s in l]; l[0].bind(('0.0.0.0', 80)); l[1].bind(('127.0.0.1', 5000))\n"
            "[s.listen() for s in l]; print('up', flush=True); input()"
        )
        other = self.lab.spawn_graft("--name", "other", "-p", "9300:80", sys.executable, "-c", code, stdin=-1, stdout=-1)
        assert other.stdout
        other.stdout.readline()
        told = self.lab.host("ss", "-tlnH").stdout.split()
        return next(w for w in told if w.startswith("127.") and not w.startswith("127.0.0.1:")).split(":")[0]

    def _endpoints(self) -> None:
        self.lab.add_endpoints({
            "ep-in": f"type ipv4 addr {SECOND4} port dynamic", "ep-out": f"type ipv4 addr {HOST4} port dynamic", "ep-host": f"type ipv4 addr {HOST4} port 9100",
            "ep-lo": "type ipv4 addr 127.0.0.1 port 9101", "ep-unix": f"type unix path {self.lab.work / 'run' / 'unix'}",
            "away-out": f"type ipv4 addr {CLIENT4} port dynamic netns {self.lab.client_ns}",
        })  # fmt: skip

    def needles(self) -> dict[str, str]:
        """What no answer may have: the host's devices, hardware addresses and namespace."""
        cookie = "import socket; print(socket.socket().getsockopt(1, 71, 8).hex())"
        links = json.loads(self.lab.host("ip", "-j", "link").stdout)
        hardware = {link["address"].replace(":", "") for link in links if link["ifname"] != "lo"}
        return {
            "an address": socket.inet_aton(HOST4).hex(), "an IPv6 address": socket.inet_pton(socket.AF_INET6, HOST6).hex(),
            "a device": b"veth0".hex(), "another device": b"spare0".hex(),
            "the host's cookie": self.lab.host("/usr/bin/python3", "-I", "-c", cookie, check=True).stdout.strip(),
            **{f"hardware address {n}": text for n, text in enumerate(sorted(hardware)) if int(text, 16)},
        }  # fmt: skip

    def _start(self, profiles: tuple[str, ...]) -> None:
        needles = self.needles()
        self._program(Who("root", "the host"), (), needles, oracle=True, gives="run/host")
        neighbour = (GRAFT, "run", "--name", "giver", "--egress", "none")
        self._program(Who("root", "neighbour"), neighbour, needles, gives="run/neighbour")
        # with the address that a container without a way out has there
        plain = ("unshare", "--net", "sh", "-c", 'ip link set lo up; ip address add 127.0.0.2/32 dev lo; exec "$@"', "sh")
        for place, profile in enumerate(profiles):
            who = PROFILES[profile]
            self._program(Who(profile, "oracle"), (*plain, *who), needles, oracle=True)
            for number, container in enumerate(rows.CONTAINERS):
                if container == "outside" or (self.mode == "direct" and container in rows.TRAP_ONLY):
                    continue
                base = BASE + calls.NOTED * (8 * place + number)
                graft, gives = self._graft(profile, container, base), f"run/{profile}" if container == "none" else ""
                self._program(Who(profile, container), (*graft, *who), needles, gives=gives, published=base)
        for program in self.programs.values():
            program.up()
        for place, profile in enumerate(profiles):
            who = Who(profile, "outside")
            base = BASE + calls.NOTED * 8 * place
            self._program(who, (*plain, *PROFILES[profile]), needles, gives="", passed=f"run/{profile}", published=base)
            self.programs[who].up()

    def settings(self, who: Who) -> dict[str, Any]:
        """What a program's configuration has besides."""
        return {}

    def _graft(self, profile: str, container: str, base: int) -> tuple[Any, ...]:
        ports = f"[::]:{base}-{base + calls.NOTED - 1}:{base}-{base + calls.NOTED - 1}"
        run = (GRAFT, "run", "--name", f"{profile}-{container}", "-p", ports, "-p", f"{ports}/udp")
        if container == "host":
            return (*run, "--egress", "host")
        if container == "accel":
            return (*run, "--egress", "none", "--accel")
        if container == "away":
            return (*run, "--egress", "none", "-e", f"{CLIENT4}/32=away-out", "-e", "10.9.8.0/24=ep-unix", "-e", "10.9.7.0/24=ep-out", "-i", "0.0.0.0:81=ep-in")
        if container == "graftd":
            return (*run, "--egress", "none", "sh", "-c", f"{GRAFT} -- tail --pid=$$ -f /dev/null & exec \"$@\"", "sh")
        return (*run, "--egress", "none")

    def _program(
        self, who: Who, argv: tuple[Any, ...], needles: dict[str, str], *, oracle: bool = False, gives: str = "",
        passed: str = "", published: int = BASE,
    ) -> None:  # fmt: skip
        where = {**self.where._asdict(), "published": published}
        where["givers"] = {"host": "run/host", "neighbour": "run/neighbour", "passed": passed}
        config = {"where": where, "oracle": oracle, "needles": needles, "gives": gives, **self.settings(who)}
        start = f"import sys; sys.path.insert(0, {str(self.lab.work)!r}); from matrix.{self.module} import main; main()"
        argv = (*argv, "env", f"MATRIX={self.lab.work}", "/usr/bin/python3", "-I", "-c", start, json.dumps(config))
        process = self.lab.spawn(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.programs[who] = Program(process, who)

    def repair(self) -> None:
        """Give the host its devices and addresses, whatever a cell has done to them."""
        wanted = {f"{HOST4}/24": "veth0", f"{SECOND4}/24": "veth0", f"{HOST6}/64": "veth0", "10.88.0.1/24": "spare0"}
        look = (
            "ip link add spare0 type dummy 2>/dev/null; ip link set lo up; ip link set spare0 up;"
            "ip link set veth0 up mtu 1500 arp on multicast on promisc off allmulticast off;"
        )
        for link in json.loads(self.lab.host("ip", "-j", "address", "show", "dev", "veth0").stdout):
            found = [f"{one['local']}/{one['prefixlen']}" for one in link["addr_info"] if one["scope"] == "global"]
            look += "".join(f"ip address del {one} dev veth0;" for one in found if one not in wanted)
        look += "".join(f"ip address replace {one} dev {device} nodad;" for one, device in wanted.items())
        self.lab.host("sh", "-c", look)

    def state(self) -> tuple[list[str], list[str]]:
        """The host as it is without its listeners, and the listeners that nothing explains."""
        told = self.state_of()
        heard = [line for line in told if re.match("(tcp|udp) ", line)]
        calm = [re.sub(r"expires \d+sec", "", line) for line in told if line not in heard]
        return calm, sorted(line for line in heard if not explained(line))

    def changes(self) -> list[str]:
        """What has become of the host since the last look; it is as before afterwards."""
        calm, heard = self.state()
        before = self.last
        found = [f"new: {line}" for line in calm if line not in before]
        found += [f"gone: {line}" for line in before if line not in calm]
        found += [f"listens: {line}" for line in heard if line not in self.served]
        if any("counter" not in line and "listens" not in line for line in found):
            self.repair()
            self.last = []  # an address of IPv6 takes a moment
            wait_for(self._settled, "the host as it was")
        elif found:
            self.last = calm
        return found

    def _settled(self) -> bool:
        before, (self.last, _) = self.last, self.state()
        return before == self.last


FIXED = {"0.0.0.0:9100", "127.0.0.1:9101", "[::1]:9101", "0.0.0.0:9102", "[::1]:9102", "0.0.0.0:40000", "0.0.0.0:9300", "[::]:9300", "*:9300"}


def explained(line: str) -> bool:
    """May this line of `ss -tulnH` be there? @line: kind, state, queues, address:port, peer."""
    kind, _, _, _, local, *_ = line.split()
    text, _, port = local.rpartition(":")
    if local in FIXED:
        return True
    text, _, device = text.replace("[", "").replace("]", "").partition("%")
    address = ipaddress.ip_address(text.replace("*", "::") or "::")
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if any(address in net for net in SLICES):  # below 61440: a private number at a direct container's address of IPv6
        return int(port) >= (32768 if address.version == 6 else 61440) or int(port) in EPHEMERAL
    if device.startswith("if"):  # out of reach, bound to a device that is not there (sockops)
        return True
    if text == "::" and local.startswith("[::]") and int(port) in range(BASE, BASE + calls.NOTED * 8 * len(PROFILES)):
        return True
    if text == SECOND4:  # the endpoint ep-in, whose port is the kernel's choice
        return int(port) in EPHEMERAL
    # docs/security.md, "UDP from an ephemeral port": the kernel's choice, from which it sends
    return kind == "udp" and int(port) in EPHEMERAL

