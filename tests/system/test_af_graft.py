"""AF_GRAFT's talk, README and docker/README, line by line, as one would type them.

Only the path of iproute2 is another: `ip graft` is `ip-graft`. The commands run in a PID namespace whose first
process is the laboratory's host, so that `netns 1` means that host.
"""

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from graft.bench.lab import CLIENT4, HOST4, HOST6, ROOT, SECOND4, wait_for
from tests.conftest import need


class Shell:
    """The demonstrator's terminal: a shell on the host, PID 1 of its PID namespace."""

    def __init__(self, lab):
        self.lab = lab
        self.env = {**lab.env, "PATH": f"{ROOT / 'bin'}:{os.environ['PATH']}"}
        lab.spawn_graft("--name", "hold", "sleep", "300")  # or graftd ends when idle, and starts again in there
        wait_for(lambda: lab.containers() == ["hold"], "graftd")
        inside = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "300")
        self.init = lab.spawn(*inside)
        self.pid = wait_for(self._child, "its first process")
        self.background = []

    def _child(self):
        path = f"/proc/{self.init.pid}/task/{self.init.pid}/children"
        return open(path).read().split()[:1]

    def argv(self, line, *enter):
        return ("nsenter", "--target", self.pid[0], "--pid", "--mount", *enter, "bash", "-c", line)

    def __call__(self, line, **options):
        """Type a command and wait for it."""
        return self.lab.host(*self.argv(line), env=self.env, **options)

    def start(self, line):
        """Type a command that stays."""
        process = self.lab.spawn(*self.argv(line), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.background.append(process)
        return process

    def end(self, process):
        """^C."""
        for pid in self.lab.host("ip", "netns", "pids", self.lab.host_ns).stdout.split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"iperf3" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    subprocess.run(("kill", pid))
        process.wait(10)


@pytest.fixture
def shell(lab):
    need("iperf3", "unshare")
    made = Shell(lab)
    yield made
    lab.end(made.init, signal.SIGKILL)  # and with it every process of the namespace
    for process in made.background:
        lab.end(process)
    for line in made.lab.graft("endpoint", "show").stdout.splitlines():
        lab.graft("endpoint", "del", line.split()[0], check=True)


def connected(output):
    """local and remote of iperf3's first connection."""
    found = re.search(r"local (\S+) port (\d+) connected to (\S+) port (\d+)", output)
    assert found, output
    return found.groups()


def test_the_readme(shell, lab):
    assert shell("ip-graft add ep-test type ipv4 addr 127.0.0.1 port 8080").returncode == 0
    assert shell("ip-graft show").stdout == "ep-test type ipv4 addr 127.0.0.1 port 8080\n"

    # Server-side sockets
    server = shell.start("graft -i 0.0.0.0:5201=ep-test -- iperf3 -s -4")
    lab.wait_listening(8080)
    assert not lab.listening(5201)
    plain = shell("iperf3 -c 127.0.0.1 -p 8080 -n 1M")
    assert connected(plain.stdout)[2:] == ("127.0.0.1", "8080")
    assert "iperf Done." in plain.stdout

    # Client-side sockets
    assert shell("ip-graft add ep-out type ipv4 addr 127.0.0.1 port dynamic").returncode == 0
    assert shell("ip-graft show").stdout == (
        "ep-out type ipv4 addr 127.0.0.1 port dynamic\nep-test type ipv4 addr 127.0.0.1 port 8080\n"
    )
    client = shell("graft -e 0.0.0.0/0=ep-out -- iperf3 -c 127.0.0.1 -p 8080 -n 1M")
    local, _, remote, port = connected(client.stdout)
    assert (local, remote, port) == ("127.0.0.1", "127.0.0.1", "8080")
    assert "iperf Done." in client.stdout

    # Note 3: -v
    verbose = shell("graft -v -e 0.0.0.0/0=ep-out -- iperf3 -c 127.0.0.1 -p 8080 -n 1M")
    assert "iperf3: connect 127.0.0.1:8080 from ep-out (127.0.0.1:dynamic)" in verbose.stderr
    shell.end(server)

    # Note 1: a range
    server = shell.start("graft -i 0.0.0.0:0-65535=ep-test -- iperf3 -s -4")
    lab.wait_listening(8080)
    assert "iperf Done." in shell("iperf3 -c 127.0.0.1 -p 8080 -n 1M").stdout
    shell.end(server)
    assert shell("ip-graft del ep-test && ip-graft del ep-out && ip-graft show").stdout == ""


def test_the_readmes_many_rules(shell, lab):
    """Note 2, with addresses of two interfaces, both families, and the loopback."""
    shell(
        "ip-graft add lo-out4 type ipv4 addr 127.0.0.1 port dynamic;"
        f"ip-graft add ep-out4 type ipv4 addr {SECOND4} port dynamic;"
        f"ip-graft add ep-out6 type ipv6 addr {HOST6} port dynamic;"
        "ip-graft add lo-in4 type ipv4 addr 127.0.0.1 port 8501;"
        f"ip-graft add ep-in4 type ipv4 addr {HOST4} port 8502",
        check=True,
    )
    rules = (
        "-e 127.0.0.0/8=lo-out4 -e 0.0.0.0/0=ep-out4 -e 0::0/0=ep-out6 "
        "-i 127.0.0.1:0-65535=lo-in4 -i 0.0.0.0:0-65535=ep-in4"
    )
    lab.spawn("iperf3", "-s", "-B", CLIENT4, "-p", "8503", client=True, stdout=subprocess.DEVNULL)
    lab.spawn("iperf3", "-s", "-B", "2001:db8:77::2", "-p", "8503", client=True, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(lab.client("ss", "-tlnH", "sport = :8503").stdout.splitlines()) == 2, "the far servers")
    assert connected(shell(f"graft {rules} -- iperf3 -c {CLIENT4} -p 8503 -n 1M").stdout)[0] == SECOND4
    assert connected(shell(f"graft {rules} -- iperf3 -c 2001:db8:77::2 -p 8503 -n 1M").stdout)[0] == HOST6
    for bind, host, port in (("-B 127.0.0.1", "127.0.0.1", 8501), ("", HOST4, 8502)):
        server = shell.start(f"graft {rules} -- iperf3 -s -4 {bind}")
        lab.wait_listening(port)
        assert "iperf Done." in shell(f"iperf3 -c {host} -p {port} -n 1M").stdout
        if host == "127.0.0.1":
            inside = shell(f"graft {rules} -- iperf3 -c 127.0.0.1 -p {port} -n 1M")
            assert connected(inside.stdout)[0] == "127.0.0.1", "the loopback is the host's, by lo-out4"
        shell.end(server)


ENTRYPOINT = "graft -i 0.0.0.0:0-65535=ep-in4 -i :::0-65535=ep-in6 -e 0.0.0.0/0=ep-out4 -e ::/0=ep-out6"


@pytest.fixture
def net1(lab, shell):
    """The container net1 of docker/README: a namespace with nothing in it but endpoints."""
    name = f"{lab.tag}-net1"
    lab.ip("netns", "add", name)
    yield name
    lab.ip("netns", "del", name)


def in_net1(shell, net1, line):
    """docker-ns-exec net1 LINE, and docker run --net=container:net1 ... LINE."""
    return shell.argv(line, f"--net=/run/netns/{net1}")


def test_the_docker_readme(shell, lab, net1):
    """Endpoints with `netns 1` for a namespace that has no interface; the image's entry point, as it stands there."""
    need("nginx", "curl")

    def typed(line):
        return lab.host(*in_net1(shell, net1, line), env=shell.env)

    assert typed("ip-graft add ep-in4 type ipv4 addr 127.0.0.1 port 8080 netns 1").returncode == 0
    assert typed("ip-graft add ep-in6 type ipv6 addr ::1 port 8080 netns 1").returncode == 0
    assert typed("ip-graft show").stdout == (
        "ep-in4 type ipv4 addr 127.0.0.1 port 8080 netns 1\nep-in6 type ipv6 addr ::1 port 8080 netns 1\n"
    )
    missing = typed(f"{ENTRYPOINT} -- true")
    assert missing.returncode == 1
    assert "unknown endpoint 'ep-out4'" in missing.stderr, "upstream finds that out at connect()"
    typed("ip-graft add ep-out4 type ipv4 addr 0.0.0.0 port dynamic netns 1; ip-graft add ep-out6 type ipv6 addr :: port dynamic netns 1")

    # docker run -it --net=container:net1 upaa/graft-demo iperf3 -s -4
    server = lab.spawn(*in_net1(shell, net1, f"{ENTRYPOINT} iperf3 -s -4 -1"), env=shell.env, stdout=subprocess.DEVNULL)
    lab.wait_listening(8080)
    assert "iperf Done." in shell("iperf3 -c 127.0.0.1 -p 8080 -n 1M").stdout
    server.wait(10)

    # docker run -it --net=container:net1 upaa/graft-demo nginx -g "daemon off;"
    conf = lab.work / "demo.conf"
    conf.write_text(
        f"pid {lab.work}/demo.pid; error_log stderr; events {{}}\n"
        "http { access_log off; server { listen 80; listen [::]:80; location / { return 200 'Welcome to nginx!\\n'; } } }\n"
    )
    nginx = lab.spawn(*in_net1(shell, net1, f'exec {ENTRYPOINT} nginx -c {conf} -g "daemon off;"'), env=shell.env, stderr=subprocess.PIPE)
    wait_for(lambda: lab.host("ss", "-tlnH", "sport = :8080").stdout.count("\n") == 2, "both families")
    assert shell("curl -sS http://127.0.0.1:8080/").stdout == "Welcome to nginx!\n"
    assert shell("curl -sS http://[::1]:8080/").stdout == "Welcome to nginx!\n"
    shell(f"kill $(cat {lab.work}/demo.pid)", check=True)
    assert "emerg" not in nginx.communicate(timeout=20)[1]

    # a client in the same image
    lab.spawn("iperf3", "-s", "-B", CLIENT4, "-p", "8504", client=True, stdout=subprocess.DEVNULL)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :8504").stdout, "the far server")
    client = typed(f"{ENTRYPOINT} -- iperf3 -c {CLIENT4} -p 8504 -n 1M")
    assert connected(client.stdout)[0] == HOST4, client.stderr
    for name in ("ep-in4", "ep-in6", "ep-out4", "ep-out6"):
        assert typed(f"ip-graft del {name}").returncode == 0


def test_a_static_go_server_and_client_under_the_wrapper(lab, shell, httpgo):
    """What LD_PRELOAD could not reach."""
    shell(f"ip-graft add ep-in4 type ipv4 addr {HOST4} port 8505; ip-graft add ep-in6 type ipv6 addr {HOST6} port 8505; ip-graft add ep-out4 type ipv4 addr {SECOND4} port dynamic")
    lab.spawn(*shell.argv(f"exec graft -i 0.0.0.0:80=ep-in4 -i [::]:80=ep-in6 -- {httpgo} serve 0.0.0.0:80"), env=shell.env)
    lab.wait_listening(8505)
    outside = lab.client(httpgo, "get", f"http://{HOST4}:8505/", "50", "true")
    assert outside.returncode == 0, outside.stdout
    client = shell(f"graft -v -e 10.0.0.0/8=ep-out4 -- {httpgo} get http://{HOST4}:8505/ 20 false")
    assert client.returncode == 0, client.stdout
    assert client.stderr.count(f"connect {HOST4}:8505 from ep-out4 ({SECOND4}:dynamic)") == 20
    refused = shell(f"graft -e 192.0.2.0/24=ep-out4 -- {httpgo} get http://{HOST4}:8505/ 1 false")
    assert refused.returncode != 0
