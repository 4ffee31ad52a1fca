"""Containers on networks of this host alone, without an engine: programs that do what they are told, in namespaces that are attached."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, GRAFT, HOST4, HOST6, Lab
from tests.conftest import python

# Each line is an expression, and the answer is its value, or the name of the error
AGENT = """
import errno, select, socket, struct, sys
held = {}
A, P = socket.SO_REUSEADDR, socket.SO_REUSEPORT
def opened(name, at=None, *options, six=False):
    shut(name)
    s = held[name] = socket.socket(socket.AF_INET6 if six or (at and ':' in at[0]) else socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(5)
    for option in options: s.setsockopt(socket.SOL_SOCKET, option, 1)
    if at: s.bind(at)
    return s.getsockname()[:2]
def shut(name):
    if name in held: held.pop(name).close()
def sent(name, what, to): return held[name].sendto(what.encode(), to)
def sent_from(name, what, to, source):
    return held[name].sendmsg([what.encode()], [(0, 8, struct.pack('=I4s4s', 0, socket.inet_aton(source), bytes(4)))], 0, to)
def joined(name, to):
    held[name].connect(to)
    return held[name].getsockname()[:2], held[name].getpeername()[:2]
def said(name, what): return held[name].send(what.encode())
def heard(name):
    data, peer = held[name].recvfrom(999)
    return data.decode(), peer[:2]
def waiting(names):
    ready = [name for name in names if select.select([held[name]], [], [], 0)[0]]
    for name in ready: held[name].recv(99)
    return ready
def called(name): return held[name].getsockname()[:2]
def many(count, port, to):
    for n in range(count):
        opened('m', ('', port + n % 9)); sent('m', 'x', to)
    shut('m')
print('ready', flush=True)
for line in sys.stdin:
    try: told = eval(line)
    except OSError as error: told = errno.errorcode.get(error.errno, repr(error))
    print(repr(told), flush=True)
"""
ATTACH = f"""
import os, sys
sys.path.insert(0, {str(GRAFT.parents[1])!r})
from graft import client
if sys.argv[1] == 'detach': sys.exit(client.call('detach', start=True, key=sys.argv[2]) or 0)
client.call('attach', start=True, fds=(os.open(sys.argv[1], os.O_RDONLY),), key=sys.argv[2], network=sys.argv[3], addresses=sys.argv[4:])
"""
OWN = {4: "10.88.0.5", 6: "fd88::5"}
NEIGHBOUR = {4: "10.88.0.6", 6: "fd88::6"}
FAR = {4: CLIENT4, 6: CLIENT6}
HOST = {4: HOST4, 6: HOST6}
ANY = {4: "0.0.0.0", 6: "::"}
STRANGER = {4: "10.77.0.9", 6: "2001:db8:77::9"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
FAMILIES = pytest.mark.parametrize("family", [4, 6])
FORMS = pytest.mark.parametrize("form", [ANY, OWN], ids=["wildcard", "address"])


class Agent:
    """A program that does what the words of a call say: see AGENT."""

    def __init__(self, lab: Lab, process: "subprocess.Popen[str]") -> None:
        assert process.stdin
        assert process.stdout
        self.lab, self.process, self._to, self._from = lab, process, process.stdin, process.stdout
        assert self._from.readline() == "ready\n"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def does(*words: Any, **named: Any) -> Any:
            text = ", ".join(
                [*(w if w in ("A", "P") else repr(w) for w in words), *(f"{k}={v!r}" for k, v in named.items())]
            )
            self._to.write(f"{name}({text})\n")
            self._to.flush()
            return ast.literal_eval(self._from.readline())

        return does

    def end(self) -> None:
        self._to.close()
        assert self.process.wait(20) == 0


class Network:
    """Namespaces with addresses on networks of this host alone, as engines attach them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.agents: list[Agent] = []
        self.members: list[str] = []
        self.keys: list[str] = []

    def attach(self, network: str, *addresses: str, into: str = "") -> str:
        netns = into
        if not netns:
            ns = f"{self.lab.tag}-n{len(self.members)}"
            self.lab.ip("netns", "add", ns)
            self.members.append(ns)
            netns = f"/run/netns/{ns}"
        key = f"cni/{self.lab.tag}-{len(self.keys)}/e"
        done = self.lab.host(sys.executable, "-c", ATTACH, netns, key, network, *addresses)
        assert not done.returncode, done.stderr
        self.keys.append(key)
        return netns

    def container(self, netns: str | None, *options: str) -> Agent:
        words = [] if netns is None else ["--netns", netns]
        return self._started(self.lab.spawn_graft(*words, *options, *python(AGENT), stdin=-1, stdout=-1))

    def elsewhere(self, *, client: bool) -> Agent:
        return self._started(self.lab.spawn(*python(AGENT), client=client, stdin=-1, stdout=-1))

    def _started(self, process: "subprocess.Popen[str]") -> Agent:
        agent = Agent(self.lab, process)
        self.agents.append(agent)
        return agent

    def close(self) -> None:
        for agent in self.agents:
            if agent.process.poll() is None:
                agent.end()
        for key in self.keys:
            self.lab.host(sys.executable, "-c", ATTACH, "detach", key)
        for ns in self.members:
            self.lab.ip("netns", "del", ns)


def refusals(lab: Lab, name: str) -> dict[tuple[str, str], int]:
    told = json.loads(lab.graft("inspect", name).stdout)
    return {(r["op"], r["reason"]): r["count"] for r in told["refused"]}
