"""Docker's containers that are direct: --network none and graft's networks, healthchecks, exec, the end, refusals."""

import json
import subprocess

import pytest

from graft.bench.lab import wait_for
from tests.conftest import python
from tests.system.direct import PROBE, check, ended, view_of_host
from tests.system.engines import CURL, UNHOOKED, engine_version, nginx_conf, reach

pytestmark = pytest.mark.usefixtures("no_container_is_left")

DIRECT = ("--label", "graft.direct=on")


@pytest.fixture
def none(docker):
    """The options of a direct container without a network."""
    if engine_version("dockerd") < UNHOOKED:
        return ("--network", "none", *DIRECT)
    docker("run", "-d", "--name", "holder", "--network", "none", "host", "/busybox", "sleep", "1000")
    return ("--network", "container:holder", *DIRECT)


@pytest.fixture
def hooked():
    if engine_version("dockerd") >= UNHOOKED:
        pytest.skip("Docker 28 has no hook, and a direct container no network of its own")


def published(none, ports):
    """The option that publishes @ports: Docker takes no -p for who joins another's network."""
    return ("--label", f"graft.publish={ports}") if "none" not in none else ("-p", ports)


def test_a_server(docker, host, none):
    before = view_of_host(host)
    docker.run(
        *("-d", "--name", "web", *none, *published(none, "8721:80"), "--health-interval", "1s"),
        *("--health-cmd", "curl -sSf -o /dev/null http://127.0.0.1/", *nginx_conf(host)),
        argv=("nginx", "-c", "/nginx.conf"),
    )
    host.wait_listening(8721)
    assert reach(host, 8721) == "from nginx\n"
    wait_for(lambda: "10.77.0.2 - -" in docker("logs", "web").stdout, "the line of the log")
    state = ("inspect", "-f", "{{.State.Health.Status}}", "web")
    wait_for(lambda: docker(*state).stdout == "healthy\n", "a healthcheck, which is executed inside")
    assert host.host("curl", "-sS", "http://127.0.0.1:80/").returncode == 7, "its loopback is private"
    check(host, docker("exec", "web", *python(PROBE)).stdout)
    docker("restart", "-t", "1", "web")
    wait_for(lambda: reach(host, 8721) == "from nginx\n", "the restarted server")
    docker("stop", "-t", "1", "web")
    wait_for(lambda: not host.containers(), "its end")
    ended(host)
    assert view_of_host(host) == before
    docker("start", "web")
    wait_for(lambda: reach(host, 8721) == "from nginx\n", "the server")
    docker("rm", "-f", "web")
    wait_for(lambda: not host.containers(), "its end")
    ended(host)
    assert view_of_host(host) == before


def test_a_user_without_capabilities(docker, host, none):
    """Docker sets net.ipv4.ip_unprivileged_port_start to 0, which is to hold."""
    docker.run(
        *("-d", *none, *published(none, "8722:80"), "--user", "65534", "--cap-drop", "ALL"),
        argv=("/usr/bin/python3", "-m", "http.server", "80"),
    )
    host.wait_listening(8722)
    assert "Directory listing" in reach(host, 8722)


def test_a_network(docker, host, gnet, hooked):
    before = view_of_host(host)
    docker.run(
        *("-d", "--name", "web", "--network", gnet, *DIRECT, "-p", "8723:80", *nginx_conf(host)),
        argv=("nginx", "-c", "/nginx.conf"),
    )
    host.wait_listening(8723)
    assert reach(host, 8723) == "from nginx\n"
    ip = docker("inspect", "-f", "{{.NetworkSettings.Networks.gnet.IPAddress}}", "web").stdout.strip()
    script = f"for n in web {ip}; do curl -sS --max-time 5 -o /dev/null -w '%{{http_code}} %{{local_ip}}\\n' http://$n/; done"
    for options in (DIRECT, ()):
        asked = ("--rm", "--network", gnet, "--ip", "10.79.0.77", *options)
        done = docker.run(*asked, argv=("/busybox", "sh", "-c", script))
        assert done.stdout == "200 10.79.0.77\n" * 2, done.stderr
    joined = docker.run("--rm", "--network", "container:web", *DIRECT, argv=(*CURL, "http://127.0.0.1/"))
    assert joined.stdout == "from nginx\n"
    done = docker.run("--rm", "--network", "container:web", argv=("true",), check=False)
    assert "container 'web', whose network it joins, is direct" in done.stderr
    docker("rm", "-f", "web")
    wait_for(lambda: not host.containers(), "its end")
    ended(host)
    wait_for(lambda: view_of_host(host) == before, "the host as before")


def test_without_the_hook(docker, host, gnet):
    """Docker 28 would take the host's network for the container's: refused, unless another container holds one."""
    if engine_version("dockerd") < UNHOOKED:
        pytest.skip("this Docker sets networks up by a hook")
    before = view_of_host(host)
    for network in (gnet, "none"):
        done = docker.run("--rm", "--network", network, *DIRECT, argv=("true",), check=False)
        assert done.returncode == 125
        assert "this Docker looks for the container's network at its first process, and would change the host's" in done.stderr
        assert "join another container's network" in done.stderr
    assert view_of_host(host) == before
    hold = ("-d", "--name", "net", "--network", gnet, "--ip", "10.79.0.78", "-p", "8723:80", "host", "/busybox", "sleep", "1000")
    docker("run", *hold)
    docker.run("-d", "--name", "web", "--network", "container:net", *DIRECT, *nginx_conf(host), argv=("nginx", "-c", "/nginx.conf"))
    host.wait_listening(8723)
    assert reach(host, 8723) == "from nginx\n"
    check(host, docker("exec", "web", *python(PROBE)).stdout, ["eth0", "graft-peer", "lo"])
    script = "for n in web 10.79.0.78; do curl -sS --max-time 5 -o /dev/null -w '%{http_code} %{local_ip}\n' http://$n/; done"
    done = docker.run("--rm", "--network", gnet, "--ip", "10.79.0.77", argv=("/busybox", "sh", "-c", script))
    assert done.stdout == "200 10.79.0.77\n" * 2, done.stderr
    done = docker("network", "connect", "bridge", "web", check=False)
    assert done.returncode, "the host's network would get a device"
    docker("rm", "-f", "web", "net")
    wait_for(lambda: not host.containers(), "its end")
    ended(host)
    wait_for(lambda: view_of_host(host) == before, "the host as before")


def test_refusals(docker, host, none):
    for options, message in (
        (("--privileged",), "CAP_NET_ADMIN"),
        (("--cap-add", "SYS_ADMIN"), "CAP_SYS_ADMIN would hold in the host's network"),
        (("--pid", "host"), "with the host's processes"),
        (("-v", "/:/host"), "the volume / at /host"),
        (("--device", "/dev/net/tun"), "/dev/net/tun makes devices in the host's network"),
        (("--label", "graft.netadmin=on"), "CAP_NET_ADMIN would be over the host's network"),
    ):
        done = docker.run("--rm", *none, *options, argv=("true",), check=False)
        assert done.returncode == 125, options
        assert message in done.stderr
    docker.run("-d", "--name", "able", *none, argv=("/busybox", "sleep", "60"))
    done = docker("exec", "--privileged", "able", "true", check=False)
    assert "would hold in the host's network" in done.stderr + done.stdout
    shown = json.loads(host.graft("inspect", "able").stdout)
    assert shown["asked"]["direct"] == "on"


def test_killed_at_once(docker, host, none):
    """What is killed with all of its processes leaves nothing, and the same name starts again."""
    before = view_of_host(host)
    for _ in range(3):
        docker.run("-d", "--name", "again", *none, *published(none, "8724:80"), argv=("/busybox", "sleep", "60"))
        pid = docker("inspect", "-f", "{{.State.Pid}}", "again").stdout.strip()
        subprocess.run(("kill", "-KILL", pid), check=True)
        docker("rm", "-f", "again")
    wait_for(lambda: not host.containers(), "its end")
    ended(host)
    assert view_of_host(host) == before


ATTACK = r"""
import ctypes, errno, json, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(call):
    try:
        result = call()
    except OSError as error:
        return errno.errorcode[error.errno]
    if isinstance(result, int) and result < 0:
        return errno.errorcode[ctypes.get_errno()]
    return "done"
def abstract():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0graft-hosts-own")
def packet():
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sock:
        sock.bind(("veth0", 0))
def raw():
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 1) as sock:
        sock.sendto(struct.pack("!BBHHH", 8, 0, 0xf7ff, 0, 0), ("10.77.0.2", 0))
def device():
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, 25, b"veth0")
def serve(address):
    with socket.socket() as sock:
        sock.bind((address, 4321))
def tunnel():
    fd = os.open("/tmp/tun", os.O_RDWR)
    return libc.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"graft-tun", 1))
def link(kind):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.sendall(struct.pack("=IHHIIBxHiII", 32, kind, 5, 1, 0, 0, 0, 1, 0, 1))
        code = struct.unpack_from("=i", sock.recv(4096), 16)[0]
        if code:
            raise OSError(-code, "")
def cgroups():
    found = []
    for line in open("/proc/self/mountinfo"):
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            found += [os.path.join(at, name) for at, names, _ in os.walk(fields[4]) for name in names]
    for place in (*found, "/proc/1/root/sys/fs/cgroup/unified", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/.."):
        with open(f"{place}/cgroup.procs", "w") as file:
            file.write("0")
os.system("/busybox mknod /tmp/tun c 10 200")
print(json.dumps({
    "abstract": attempt(abstract), "packet": attempt(packet), "raw": attempt(raw), "device": attempt(device),
    "any": attempt(lambda: serve("10.77.0.1")), "tunnel": attempt(tunnel), "link": attempt(lambda: link(16)),
    "mount": attempt(lambda: libc.mount(b"x", b"/tmp", b"cgroup2", 0, None)),
    "unshare": attempt(lambda: libc.unshare(0x40000000)),
    "setns": attempt(lambda: libc.setns(os.open("/proc/1/ns/net", 0), 0)),
    "remount": attempt(lambda: libc.mount(b"", b"/proc/sys", None, 4096 | 32, None)),
    "cgroups": attempt(cgroups), "io_uring": attempt(lambda: libc.syscall(425, 8, ctypes.create_string_buffer(120))),
    "bpf": attempt(lambda: libc.syscall(321, 5, ctypes.create_string_buffer(120), 120)),
}))
"""


def test_attacks(docker, host, none):
    """By root with Docker's capabilities: by being in the host's netns nothing more than in another one is reached."""
    code = "import socket, time; s = socket.socket(socket.AF_UNIX); s.bind('\\0graft-hosts-own'); s.listen(); time.sleep(60)"
    owner = host.spawn("python3", "-c", code)
    wait_for(lambda: "@graft-hosts-own" in host.host("cat", "/proc/net/unix").stdout, "the host's server")
    before = view_of_host(host)
    seen = json.loads(docker.run("--rm", *none, argv=python(ATTACK)).stdout)
    assert seen == {
        "abstract": "ECONNREFUSED", "packet": "ENODEV", "raw": "ENETUNREACH", "device": "EPERM", "any": "done",
        "tunnel": "EPERM", "link": "EPERM", "mount": "EPERM", "unshare": "EPERM", "setns": "EPERM", "remount": "EPERM",
        "cgroups": "ENOENT", "io_uring": "EACCES", "bpf": "EPERM",
    }  # fmt: skip
    assert view_of_host(host) == before
    assert not host.listening(4321)
    host.end(owner)
