"""graftd's resolver: names of the outside, by the host's nameservers, over UDP and TCP."""

import os
import signal
import subprocess
import threading
from typing import Any

import pytest

from graft.bench.lab import GRAFTD, wait_for
from tests.conftest import need, python
from tests.system.cri import cni
from tests.system.nameservers import ASK, SERVERS

GATEWAY = "10.98.7.1"  # where a CNI network has the resolver


@pytest.mark.parametrize(
    ("servers", "answer", "at", "more"),
    [
        (["good@127.0.0.53"], "0 good", GATEWAY, ["2", "2", "0"]),
        (["good@127.0.0.53"], "0 good", "127.0.0.11", []),
        (["good@::1"], "0 good", GATEWAY, []),
        (["@127.0.0.54", "good@127.0.0.53"], "0 good", GATEWAY, []),
        (["silent@127.0.0.54", "good@::1"], "0 good", GATEWAY, []),
        (["refuses@127.0.0.54", "fails@::1", "good@127.0.0.53"], "0 good", GATEWAY, []),
        (["fails@127.0.0.54", "refuses@127.0.0.53"], "5 ", GATEWAY, []),
        (["@127.0.0.54"], "2 ", GATEWAY, []),
        (["bare@127.0.0.54"], "5 ", "127.0.0.11", []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_names_of_the_outside(own_lab, tmp_path, servers, answer, at, more):
    """The next nameserver is asked where one is not there, silent, refuses or fails; of both families; over TCP as well, whole."""
    name = f"{own_lab.tag}-at"
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("".join(f"nameserver {each.partition('@')[2]}\n" for each in servers))
    serving = [each for each in servers if not each.startswith("@")]
    upstream = own_lab.spawn(*python(SERVERS), *serving, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert upstream.stdout.readline() == "ready\n"
    daemon = own_lab.spawn("unshare", "-m", "sh", "-c", f"mount --bind {resolv} /etc/resolv.conf && exec {GRAFTD}")
    wait_for((own_lab.run_dir / "graftd.sock").exists, "graftd")
    own_lab.host("ip", "netns", "add", name, check=True)
    ipam = {"type": "host-local", "subnet": "10.98.7.0/24", "dataDir": str(tmp_path)}
    config: dict[str, Any] = {"cniVersion": "1.0.0", "name": "n", "type": "graft-cni", "ipam": ipam}
    if at == "127.0.0.11":  # as Docker has it
        config["resolver"] = False
    try:
        status, told = cni(own_lab, "ADD", config, CNI_NETNS=f"/run/netns/{name}")
        assert status == 0, told
        done = own_lab.graft("run", "--netns", name, *python(ASK), at, "more" if more else "")
        small, large = f"{answer} False".replace("  ", " "), f"{answer} {answer[0] == '0'}".replace("  ", " ")
        assert done.stdout.replace("  ", " ").splitlines() == [f"udp {small}", f"tcp 1 {small}", f"tcp 2 {large}", *more], done.stderr
        assert cni(own_lab, "DEL", config, CNI_NETNS="") == (0, None)
    finally:
        own_lab.host("ip", "netns", "del", name, check=True)
        upstream.stdin.close()
        wait_for(lambda: own_lab.containers() == [], "the container's end")
        own_lab.host(GRAFTD, "--stop", "--force")
        daemon.wait(20)


def test_one_container_after_the_other(own_lab):
    """The address that the first gave up is free for the second, though the keeper comes to its copy a moment later."""
    own_lab.start_daemon()
    first = own_lab.spawn_graft("--allow", "192.0.2.1", "cat", stdin=subprocess.PIPE)
    wait_for(own_lab.containers, "the first")
    keeper = own_lab.keeper_pid()
    os.kill(keeper, signal.SIGSTOP)
    threading.Timer(0.4, os.kill, (keeper, signal.SIGCONT)).start()
    first.stdin.close()
    wait_for(lambda: not own_lab.containers(), "its end")
    done = own_lab.graft("run", "--allow", "192.0.2.1", "echo", "second")
    assert (done.stdout, done.stderr) == ("second\n", "")


def test_the_next_nameserver_over_tcp(own_lab):
    """One that takes the connection and is silent costs two seconds, and the next query none."""
    need("dig")
    upstream = own_lab.spawn(*python(SERVERS), "silent@127.0.0.54", "good@127.0.0.53", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert upstream.stdout.readline() == "ready\n"
    dig = "dig +tcp +tries=1 +short +time={} @192.0.2.9 short TXT"
    servers = ("--resolver", "127.0.0.54", "--resolver", "127.0.0.53")
    done = own_lab.graft("run", "--names", *servers, "sh", "-c", f"{dig.format(4)} && {dig.format(1)}")
    assert [line[:5] for line in done.stdout.splitlines()] == ['"good', '"good'], done.stdout


HELD = """
import socket, struct
query = struct.pack('>7H', 29, 7, 256, 1, 0, 0, 0) + b'\\5short\\0' + struct.pack('>HH', 16, 1)
query = (len(query) - 2).to_bytes(2, 'big') + query[2:]
held = [socket.create_connection(('192.0.2.9', 53), 5) for _ in range(30)]
for each in held:
    each.sendall(query + query)
    f = each.makefile('rb')
    print(*[f.read(int.from_bytes(f.read(2), 'big'))[7] for _ in range(2)])
"""


def test_connections_that_stay_open(own_lab):
    """Thirty of one container, of which each asks and stays open: those that ask nothing more end for those that wait."""
    upstream = own_lab.spawn(*python(SERVERS), "good@127.0.0.53", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert upstream.stdout.readline() == "ready\n"
    done = own_lab.graft("run", "--names", "--resolver", "127.0.0.53", *python(HELD))
    assert (done.stdout, done.stderr) == ("1 1\n" * 30, "")
