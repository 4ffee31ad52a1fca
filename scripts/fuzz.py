"""Fuzz all code that reads untrusted input: first the parsers, guided by coverage, then a live graftd.

usage: fuzz.py [TIME] [--seed N] [--only NAME]     TIME as 30s, 10m (default), 1h

Two thirds of the time are shared by the targets. Each runs in a process of its own under atheris (libFuzzer), and may
raise what its callers handle, nothing else. The last third goes to a laboratory: messages are sent to graftd's
sockets, while a container makes trapped calls with arbitrary arguments. graftd must not be restarted, must answer
afterwards, and must have no traceback in its log.
"""

import argparse
import contextlib
import copy
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["graft"]):
    from graft import __version__, protocol
    from graft.commands import ip_graft
    from graft.engines import container
    from graft.engines.bundle import edit, identify
    from graft.engines.messages import cut, parse_answer, upstream_query, written
    from graft.engines.names import AAAA, A, is_query, question, question_end
    from graft.engines.profile import merge
    from graft.errors import GraftError
    from graft.rules import address, endpoint, limits, own_address, policy, publication, tables
    from graft.tenants import state
    from graft.trap import listener
    from graft.trap.journal import SHARED_SIZE, SLOT_SIZE, SLOTS, described

from graft.bench.lab import Lab, laboratory, wait_for
from graft.bench.stop import seconds

Target = Callable[[atheris.FuzzedDataProvider], object]
TEXT = 200
ODD: tuple[Any, ...] = (None, True, -1, 0, 2**63, 1.5, "", "\0", "x" * 300, [], {}, [[]], [None], {"": None})
CALLER_HANDLES = (KeyError, TypeError, AttributeError, ValueError)  # for documents that an engine wrote

STATE = {
    "ociVersion": "1.0.2", "fds": ["seccompFd"], "pid": 1, "metadata": "{}",
    "state": {"ociVersion": "1.0.2", "id": "x", "status": "creating", "pid": 1, "bundle": "/"},
}  # fmt: skip
METADATA = {
    "name": "web", "publish": ["8080:80"], "ingress": ["0.0.0.0:80=a"], "egress": ["10.0.0.0/8=b"],
    "ip": ["10.1.2.3"], "egress_default": "none", "strict": True, "limits": ["udp=5"], "argv": ["x"],
    "container": "c", "seal": "0" * 64,
}  # fmt: skip
REQUESTS: list[dict[str, Any]] = [
    {"op": "hello", "ingress": ["0.0.0.0:80=a"], "egress": ["0.0.0.0/0=b"], "netns": "x"},
    {"op": "run", "name": "x", "publish": ["1:2"], "argv": ["y"], "limits": ["sockets=5"]},
    {"op": "endpoint-add", "endpoints": [{"name": "fz", "words": ["type", "ipv4", "addr", "::1", "port", "5"]}]},
    {"op": "endpoint-del", "names": ["fz"]},
    {"op": "endpoint-show", "name": "fz", "netns": "1"},
    {"op": "rule-add", "container": "x", "publish": ["8000:1"]},
    {"op": "rule-del", "container": "x", "egress": ["0.0.0.0/0=a"]},
    {"op": "rule-show", "container": "x"},
    {"op": "ps"},
    {"op": "inspect", "container": "x"},
    {"op": "stats"},
    {"op": "dashboard", "at": "nonsense"},
    {"op": "sockets", "name": "x"},
    {"op": "log", "name": "x", "follow": True, "every": True},
    {"op": "bundle", "bundle": "/nowhere", "id": "x"},
    {"op": "hook", "config": {"annotations": {"graft": "80:80"}, "linux": {"namespaces": []}}},
    {"op": "attached", "key": "x"},
    {"op": "detach", "key": "x"},
    {"op": "status"},
]
PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
    "syscalls": [
        {"names": ["socket", "ioctl", "read"], "action": "SCMP_ACT_ALLOW",
         "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"},
                  {"index": 1, "value": 7, "valueTwo": 3, "op": "SCMP_CMP_MASKED_EQ"}]},
        {"names": ["setsockopt", "bind"], "action": "SCMP_ACT_ALLOW"},
    ],
}  # fmt: skip
CONFIG = {
    "ociVersion": "1.0.2", "process": {"args": ["x"]}, "root": {"path": "rootfs"}, "hooks": {"prestart": []},
    "annotations": {"graft": "8080:80", "graft.egress": "none", "graft.ip": "10.1.2.3", "graft.limit": "udp=3"},
    "mounts": [{"destination": "/dev/shm", "source": "/x"}],
    "linux": {"namespaces": [{"type": "network", "path": "/proc/self/ns/net"}], "seccomp": PROFILE},
}  # fmt: skip
SAVED = {
    "version": state.VERSION, "next_id": 2, "next_slot": 3, "places": [], "networks": ["n"], "added": ["10.1.2.3"],
    "attachments": [],
    "tables": [{"netns": 1, "cookie": 2, "label": "l", "endpoints": [
        {"name": "e", "type": "ipv4", "addr": "10.0.0.1", "port": 80, "span": 1, "published": False, "place": 0,
         "imported": False}]}],
    "tenants": [{
        "id": 1, "kind": "container", "home": False, "verbose": False, "swap": False, "place": 0, "parent": 0,
        "scope": 0, "uid": 0, "followers": [], "paths": {}, "slot": 1, "name": "x", "netns": 1,
        "egress": ["0.0.0.0/0=e"],
        "ingress": [{"rule": "0.0.0.0:80=e", "protocols": ["tcp"]}], "publications": ["80:80"], "egress_host": True,
        "strict": False, "trusted": True, "resolvers": [], "given": [], "members": {}, "attached": [], "argv": [],
        "pid": 1, "started": 1.0, "limits": "sockets=1,udp=1"}],
}  # fmt: skip


def text(data: atheris.FuzzedDataProvider) -> str:
    """Return any text that JSON or a command line can carry."""
    return str(data.ConsumeUnicodeNoSurrogates(TEXT))


def bent(document: Any, data: atheris.FuzzedDataProvider) -> Any:
    """Return a copy of @document in which up to four values, at any depth, are replaced or deleted."""
    whole = [copy.deepcopy(document)]
    for _ in range(data.ConsumeIntInRange(0, 4)):
        here, key = whole, 0
        while isinstance(here[key], dict | list) and here[key] and data.ConsumeProbability() < 0.8:
            here = here[key]
            key = data.PickValueInList(list(here) if isinstance(here, dict) else list(range(len(here))))
        choice = data.ConsumeIntInRange(0, 3)
        if choice == 0 and isinstance(here, dict):
            del here[key]
        elif choice == 1:
            here[key] = text(data)
        elif choice == 2:
            here[key] = data.ConsumeInt(8)
        else:
            here[key] = copy.deepcopy(data.PickValueInList(list(ODD)))
    return whole[0]


def rules(data: atheris.FuzzedDataProvider) -> None:
    """Rules: one that parses is equal to itself after printing and parsing, and can be compiled."""
    given = text(data)
    for parse in (
        endpoint.parse_ingress, endpoint.parse_egress, publication.parse_publication, policy.parse_allow,
    ):  # fmt: skip
        with contextlib.suppress(GraftError):
            rule = parse(given)
            assert parse(str(rule)) == rule, (given, str(rule))
    with contextlib.suppress(GraftError):
        tables.compile_tables(
            1, {}, [endpoint.parse_ingress(given)], [], slice_number=1, egress_host=True, strict=False, home=False,
            verbose=False, resolvers=[], owned=[],
        )  # fmt: skip


def words(data: atheris.FuzzedDataProvider) -> None:
    """The words of endpoints, limits, addresses, and commands of ip-graft."""
    given = text(data)
    for parse in (
        lambda: endpoint.parse_endpoint_words(given.split(" ")),
        lambda: endpoint.parse_name(given),
        lambda: address.parse_address(given),
        lambda: own_address.parse_own(given),
        lambda: own_address.network_of(given, 1),
        lambda: limits.parse_limits([given], limits.Limits()),
        lambda: ip_graft.check(1, given.split()) if given.split() else None,
    ):
        with contextlib.suppress(GraftError):
            parse()


def batch(data: atheris.FuzzedDataProvider) -> None:
    """A batch file of ip-graft."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data.ConsumeBytes(TEXT))
        file.flush()
        for number, line in ip_graft.read_batch(file.name):
            ip_graft.check(number, line)


def admin(data: atheris.FuzzedDataProvider) -> None:
    """Requests on the admin socket."""
    request = {**data.PickValueInList(REQUESTS), "version": __version__}
    protocol.decode_request(json.dumps(bent(request, data)).encode())


def raw(data: atheris.FuzzedDataProvider) -> None:
    """Arbitrary bytes in the place of a JSON document."""
    given = data.ConsumeBytes(400)
    protocol.complete(given)
    protocol.is_agent_request(given)
    for decode in (protocol.decode_request, protocol.decode_state, protocol.decode_agent_request):
        with contextlib.suppress(GraftError):
            decode(given)


def agent(data: atheris.FuzzedDataProvider) -> None:
    """The container process state that runtimes send to the agent socket, and its metadata."""
    told = protocol.decode_state(json.dumps(bent(STATE, data)).encode())
    protocol.decode_metadata(told.metadata)
    protocol.decode_metadata(json.dumps(bent(METADATA, data)))


def bundle(data: atheris.FuzzedDataProvider) -> None:
    """A bundle's config.json, written by an engine."""
    with contextlib.suppress(*CALLER_HANDLES):
        config = bent(CONFIG, data)
        edit(config, container.metadata_of(identify(config, "x")), Path("/run/graft"))


def profile(data: atheris.FuzzedDataProvider) -> None:
    """A seccomp profile: merge() either refuses it, or returns one that can be written as JSON."""
    with contextlib.suppress(*CALLER_HANDLES):
        merged = merge(bent(PROFILE, data), listener="/x", metadata="{}")
        json.dumps(merged)


class NoKernel:
    """Takes the place of Kernel, which restore() does not use."""

    maps: ClassVar[dict[str, None]] = {}


def saved(data: atheris.FuzzedDataProvider) -> None:
    """state.json, as Registry.load() reads it."""
    from graft.tenants.registry import Registry

    registry = Registry(NoKernel(), Path("/nowhere"))  # type: ignore[arg-type]
    with contextlib.suppress(OSError, IndexError, *CALLER_HANDLES):
        state.restore(registry, bent(SAVED, data))
        json.dumps(state.dump(registry))


def queries(data: atheris.FuzzedDataProvider) -> None:
    """Datagrams for the resolver."""
    given = data.ConsumeBytes(300)
    if is_query(given):
        question_end(given)


ASKED = b"\0\7\1\0\0\1\0\0\0\0\0\0\1a\0\0\1\0\1"  # a query for the address of "a"
OF_NAME = b"\xc0\x0c\0"  # how a record of it begins


def answers(data: atheris.FuzzedDataProvider) -> None:
    """What a nameserver answers: what is handed on is read again as what it was written from."""
    query, given = ASKED, data.ConsumeBytes(500)
    if data.ConsumeBool():
        query = data.ConsumeBytes(100)
        if not is_query(query) or question(query)[1] not in (A, AAAA):
            return
        assert is_query(upstream_query(query))
    body = given.replace(b"~", OF_NAME)
    reply = query[:2] + b"\x81\x80\0\1\0" + body[:1] + b"\0" + body[1:2] + b"\0\0" + query[12 : question_end(query)]
    with contextlib.suppress(ValueError):
        answer = parse_answer(reply + body[2:], query)
        made = written(query, answer)
        assert parse_answer(made, query)._replace(signatures=[]) == answer._replace(signatures=[])
        assert len(cut(query, made)) <= 1232 or query[11]


def journal(data: atheris.FuzzedDataProvider) -> None:
    """Shared memory that claims to be a journal, and bytes that claim to be a notification."""
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data.ConsumeBytes(200))
        if data.ConsumeBool():
            os.truncate(fd, SHARED_SIZE + SLOT_SIZE * SLOTS)
        described(fd)
        listener.parse(data.ConsumeBytes(listener.NOTIFICATION.size).ljust(listener.NOTIFICATION.size, b"\0"))
    finally:
        os.close(fd)


TARGETS: dict[str, Target] = {
    function.__name__: function
    for function in (rules, words, batch, admin, raw, agent, bundle, profile, saved, queries, answers, journal)
}


def run_target(name: str, share: float, seed: int) -> None:
    """Fuzz one target for @share seconds. Does not return: libFuzzer ends the process."""

    def once(given: bytes) -> None:
        with contextlib.suppress(GraftError):
            TARGETS[name](atheris.FuzzedDataProvider(given))

    options = (f"-max_total_time={max(1, int(share))}", f"-seed={seed}", "-max_len=600", "-timeout=10")
    atheris.Setup([name, "-artifact_prefix=/tmp/graft-fuzz-", *options], once)
    atheris.Fuzz()


# ---- against graftd ----

CALLS = """
import ctypes, random, signal, sys, time
signal.signal(signal.SIGALRM, lambda *_: None)  # a connect() may wait; a call that graft has received may not
signal.setitimer(signal.ITIMER_REAL, 1, 1)
chance, libc, end = random.Random(SEED), ctypes.CDLL(None), time.monotonic() + SECONDS
numbers = (41, 50, 16, 54, 55, 49, 42, 44, 51, 52)
values = (0, 1, 2, 3, 4, 10, 18, 254, 977, 1000, 0x8912, 0x8927, 0x8B01, 0x894C, 0x7FFFFFFF, -1, -2, 1 << 40, 1 << 63)
buffer = ctypes.create_string_buffer(4096)
n = 0
while time.monotonic() < end:
    arguments = [
        chance.choice((chance.choice(values), chance.getrandbits(64), ctypes.addressof(buffer))) for _ in range(6)
    ]
    number = chance.choice(numbers)
    if number != 41 and arguments[0] in (0, 1, 2): arguments[0] = 977
    if number in (42, 44) or chance.random() < 0.5: buffer.raw = chance.randbytes(4096)
    result = libc.syscall(number, *map(ctypes.c_uint64, arguments))
    if result > 3 and number == 41 and chance.random() < 0.9: libc.close(result)
    n += 1
print(n)
"""


def message(chance: random.Random) -> tuple[str, bytes]:
    """Return a random message: the name of the socket it is for, and its bytes."""
    data = atheris.FuzzedDataProvider(chance.randbytes(200))
    kind = chance.choice(("graftd.sock", "agent.sock", "agent.sock", "docker"))
    if kind == "graftd.sock":
        document = bent({**chance.choice(REQUESTS), "version": __version__}, data)
        return kind, json.dumps(document).encode() + b"\n"
    if kind == "agent.sock":
        document = bent({**STATE, "metadata": json.dumps(bent(METADATA, data))}, data)
        whole = json.dumps(document).encode()
        return kind, whole[: chance.choice((len(whole), len(whole), chance.randrange(len(whole))))]
    methods = ("Activate", "NetworkDriver.CreateEndpoint", "NetworkDriver.Join", "IpamDriver.RequestPool")
    method = chance.choice(methods)
    options: dict[str, Any] = {"NetworkID": "n", "EndpointID": "e", "Options": {}, "Pool": "10.9.0.0/24"}
    options |= {"Interface": {"Address": "10.9.0.2/24"}}
    body = json.dumps(bent(options, data)).encode()
    return kind, f"POST /{method} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def send(lab: Lab, chance: random.Random) -> None:
    """Send one message, with descriptors or without, and read the reply to its end or not."""
    where, whole = message(chance)
    path = Path("/run/docker/plugins", f"{lab.tag}.sock") if where == "docker" else lab.run_dir / where
    fds = [chance.choice((0, lab_pipe[0]))] * chance.choice((0, 0, 0, 1, 3))
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(10)
        sock.connect(str(path))
        socket.send_fds(sock, [whole], fds)
        if chance.random() < 0.8:
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass


lab_pipe = os.pipe()


def live(share: float, seed: int) -> int:
    """Fuzz a live graftd for @share seconds; returns the number of messages and calls. Raises AssertionError."""
    chance = random.Random(seed)  # noqa: S311 - nothing is protected by it
    with laboratory("fuzz") as lab:
        lab.graft("run", "true", check=True)
        code = CALLS.replace("SEED", str(seed)).replace("SECONDS", str(share))
        caller = lab.spawn_graft("--name", "x", sys.executable, "-c", code, stdout=subprocess.PIPE)
        wait_for(lambda: lab.containers() == ["x"], "the container")
        before, sent, deadline = lab.daemon_pid(), 0, time.monotonic() + share
        while time.monotonic() < deadline:
            send(lab, chance)
            sent += 1
        told, _ = caller.communicate(timeout=60)
        assert told.strip(), f"the caller ended with {caller.returncode}"
        assert lab.daemon_pid() == before, "graftd has died"
        assert lab.graft("run", "echo", "works").stdout == "works\n"
        log = (lab.run_dir / "graftd.log").read_text()
        at = log.find("Traceback")
        assert at < 0, log[max(0, at - 500) : at + 3000]
        for name in [e["name"] for e in json.loads(lab.graft("endpoint", "show", "-j").stdout)]:
            lab.graft("endpoint", "del", "--", name)
        for attachment in json.loads((lab.run_dir / "state.json").read_text())["attachments"]:
            order = {"op": "detach", "key": attachment["key"], "version": __version__}
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(lab.run_dir / "graftd.sock"))
                sock.sendall(json.dumps(order).encode() + b"\n")
                sock.recv(65536)
        return sent + int(told)


def main() -> int:
    """Run from the command line; returns 1 if a target failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("time", nargs="?", default="10m")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=(*TARGETS, "live"))
    parser.add_argument("--target", choices=TARGETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    whole = seconds(arguments.time)
    if arguments.target:
        run_target(arguments.target, whole, arguments.seed)
    names = [arguments.only] if arguments.only else [*TARGETS, "live"]
    total, failed = 0, []
    for name in names:
        share = whole if arguments.only else whole / 3 if name == "live" else whole * 2 / 3 / len(TARGETS)
        if name == "live":
            count = live(share, arguments.seed)
        else:
            command = (sys.executable, __file__, str(share), "--seed", str(arguments.seed), "--target", name)
            done = subprocess.run(command, capture_output=True, text=True, timeout=share + 120)
            found = re.search(r"Done (\d+) runs", done.stderr)
            count = int(found[1]) if found else 0
            if done.returncode or not found:
                failed.append(name)
                print(done.stdout[-1500:], done.stderr[-3000:], sep="\n")
        total += count
        print(f"fuzz: {name}: {count} executions", flush=True)
    print(f"fuzz: {'FAILED: ' + ', '.join(failed) if failed else 'OK'}, {total} executions, seed {arguments.seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
