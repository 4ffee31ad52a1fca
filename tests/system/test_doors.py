"""Every socket of graft's processes that somebody else can reach, and what a hostile peer is answered there.

A socket that DOORS does not know fails the test: whoever adds one says here who may use it, and which attack tries.
"""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from graft.bench.lab import GRAFT, GRAFTD, HOST4, wait_for
from tests.attack.programs import attacks  # noqa: F401 - every attack registers itself
from tests.attack.programs.common import ATTACKS
from tests.conftest import python

# (the process, the socket): what a program of a container gets there, and the attacks that show it
DOORS = {
    ("graftd", "unix RUN/graftd.sock"): (
        "EPERM, or EACCES for a user who is not root",
        {"admin_socket", "door_of_the_admin_by_a_passed_connection"},
    ),
    ("graftd", "unix RUN/agent.sock"): (
        "what its own netns has; no order about another process",
        {"agent_message_publishes", "agent_message_names_anothers_process", "forged_metadata"},
    ),
    ("graftd", "unix RUN/user.sock"): ("EPERM: orders come from outside of containers", {"user_socket"}),
    ("graftd", "unix RUN/helpers.sock"): ("closed unread", {"supervisors_socket", "door_of_the_supervisors"}),
    ("graftd", "unix PLUGIN"): (
        "closed unread",
        {"door_of_dockers_plugin", "door_of_dockers_plugin_by_a_child_that_ends"},
    ),
    ("graftd", "netlink"): ("nothing: the kernel alone sends there, as rtnetlink(7) takes others' messages by a port id", set()),
    ("graftd", "unix @graftd"): ("nothing: nobody listens; the name alone matters", {"name_of_graftd_taken"}),
    ("graftd", "udp 127.0.0.11:53"): ("names, within its budget; nobody else's", set()),
    ("graftd", "tcp 127.0.0.11:53"): ("names, within its budget; nobody else's", set()),
    ("inside", "tcp6 0000000000000000FFFF0000080000C0"): (  # ::ffff:192.0.0.8, at a port of the kernel's choice
        "the container's own servers, and nothing where it has none",
        {"flood_of_the_entrance", "connections_by_packets"},
    ),
    ("keeper", "unix RUN/graftd.sock"): ("graftd's, which inherits it", set()),
    ("keeper", "unix RUN/agent.sock"): ("graftd's, which inherits it", set()),
    ("keeper", "unix RUN/user.sock"): ("graftd's, which inherits it", set()),
    ("keeper", "unix PLUGIN"): ("kept for the next graftd", set()),
    ("keeper", "udp 127.0.0.11:53"): ("kept for the next graftd", set()),
    ("keeper", "tcp 127.0.0.11:53"): ("kept for the next graftd", set()),
}  # graft-sup and the guard have none: pairs of sockets, and pipes
TCP_LISTEN = "0A"
UNIX_LISTENS = 0x10000


def sockets_of(pid):
    """The inodes of a process's sockets."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(entry.path)
        except OSError:
            continue
        if link.startswith("socket:["):
            found.add(link[8:-1])
    return found


def reachable(pid):
    """Sockets of a process that others can send to, or connect to, by inode: "tcp 127.0.0.1:80", "unix /path"."""
    found = {}
    net = Path(f"/proc/{pid}/net")
    for line in (net / "unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) > 7 or int(words[3], 16) & UNIX_LISTENS:
            found[words[6]] = f"unix {' '.join(words[7:])}"
    for name in ("tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6"):
        path = net / name
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            words = line.split()
            if name.startswith("tcp") and words[3] != TCP_LISTEN:
                continue
            address, port = words[1].split(":")
            if len(address) == 8:
                address = socket.inet_ntoa(bytes.fromhex(address)[::-1])
            found[words[9]] = f"{name} {address}:{int(port, 16)}"
    for name, at in (("netlink", 9), ("packet", 8)):
        for line in (net / name).read_text().splitlines()[1:]:
            found[line.split()[at]] = name
    return found


def doors_of(lab, who, pid):
    def told(text):
        plugin = f"/run/docker/plugins/{lab.tag}.sock"
        return text.replace(plugin, "PLUGIN").replace(str(lab.run_dir), "RUN")

    others = reachable(pid)
    return {(who, told(others[inode])) for inode in sockets_of(pid) & others.keys()}


def doors_inside(container, pid):
    """What a process has in the netns of a container, without the ports."""
    others = reachable(container)
    return {("inside", others[inode].rpartition(":")[0]) for inode in sockets_of(pid) & others.keys()}


def ask_plugin(lab, method, request):
    """One request to the plugin's socket, as dockerd makes it; the answer."""
    path = f"/run/docker/plugins/{lab.tag}.sock"
    body = json.dumps(request)
    done = subprocess.run(
        ("curl", "-sS", "--unix-socket", path, "-d", body, f"http://x/{method}"), capture_output=True, text=True, timeout=20
    )
    return json.loads(done.stdout)


ENDPOINT = {"EndpointID": "e" * 64, "NetworkID": "n" * 64}


@pytest.fixture
def all_open(own_lab):
    """A graftd with a container, and with each of its sockets open."""
    lab = own_lab
    plugins = Path("/run/docker/plugins")
    made = not plugins.is_dir()
    plugins.mkdir(parents=True, exist_ok=True)
    lab.spawn_graft("--name", "any", "-p", "8080:80", *python("input()"), stdin=-1)
    wait_for(lab.helper_pids, "graft-sup")
    told = ask_plugin(lab, "NetworkDriver.CreateEndpoint", {**ENDPOINT, "Interface": {"Address": "10.99.0.9/24"}})
    assert told == {"Interface": {}}
    joined = ask_plugin(lab, "NetworkDriver.Join", {**ENDPOINT, "SandboxKey": f"/run/netns/{lab.client_ns}"})
    assert joined == {"DisableGatewayService": True}
    yield lab
    ask_plugin(lab, "NetworkDriver.DeleteEndpoint", ENDPOINT)
    if made and not any(plugins.iterdir()):
        plugins.rmdir()


def test_every_door_is_known(all_open):
    lab = all_open
    found = doors_of(lab, "graftd", lab.daemon_pid()) | doors_of(lab, "keeper", lab.keeper_pid())
    found |= doors_of(lab, "guard", lab.guard_pid())
    (container,) = [row["pid"] for row in json.loads(lab.graft("ps", "-j", check=True).stdout) if row["name"] == "any"]
    wait_for(lambda: doors_inside(container, lab.daemon_pid()), "the entrance")
    found |= doors_inside(container, lab.daemon_pid()) | doors_inside(container, lab.keeper_pid())
    for pid in lab.helper_pids():
        found |= doors_of(lab, "graft-sup", pid)
    assert found == set(DOORS)
    named = set().union(*(attempts for _, attempts in DOORS.values()))
    assert named <= set(ATTACKS), "an attack that there is not"


def test_root_of_the_host_is_heard_at_dockers_socket(all_open):
    """Also in another network namespace than the host's, as long as that is no container's program."""
    lab = all_open
    assert "Implements" in ask_plugin(lab, "Plugin.Activate", {})
    path = f"/run/docker/plugins/{lab.tag}.sock"
    curl = ("curl", "-sS", "-m", "5", "--unix-socket", path, "-d", "{}", "http://x/Plugin.Activate")
    assert "Implements" in lab.host(*curl).stdout
    pid = next(row["pid"] for row in json.loads(lab.graft("ps", "-j").stdout) if row["name"] == "any")
    inside = ("nsenter", f"--net=/proc/{pid}/ns/net")
    assert "Implements" in lab.host(*inside, *curl).stdout, "whoever enters from the host is the host's"
    plain = ("setpriv", "--bounding-set=-all,+net_bind_service", "--inh-caps=-all", "--no-new-privs")
    assert lab.host(*inside, *plain, *curl).stdout == "", "root without the host's powers in a container's netns"


def test_a_container_that_nobody_supervises_gives_no_orders(own_lab):
    """Its processes are known by netns and filter, whether or not they have a listener."""
    lab = own_lab
    code = "import os, subprocess, sys; print('up', flush=True); input(); sys.exit(subprocess.call(sys.argv[1:]))"
    left = lab.spawn_graft("--name", "left", *python(code), GRAFT, "ps", stdin=-1, stdout=-1, stderr=subprocess.PIPE)
    assert left.stdout.readline() == "up\n"
    wait_for(lab.helper_pids, "graft-sup")
    pids = (lab.guard_pid(), lab.keeper_pid(), *lab.helper_pids(), lab.daemon_pid())
    for number in (19, 9):
        for pid in pids:
            os.kill(pid, number)
    lab.graft("run", "true", check=True)
    _, errors = left.communicate("\n", timeout=20)
    assert "inside a graft container" in errors


def test_two_instances_with_two_run_directories_of_one_name(own_lab):
    """Each has its own /run, so that no file tells them apart: the second is refused, and doctor says why."""
    lab = own_lab
    lab.graft("endpoint", "add", "x", "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
    first = lab.daemon_pid()
    apart = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh")
    lab.refused((*apart, GRAFT, "run", "true"), 125, f"another graftd (pid {first}) supervises this network namespace")
    told = lab.host(*apart, GRAFT, "doctor")
    assert told.returncode == 1
    assert f"pid {first} supervises this namespace, and is not at {lab.run_dir}" in told.stdout
    assert lab.daemon_pid() == first
    lab.graft("run", "true", check=True)


def test_two_instances_with_one_cgroup(own_lab):
    """In another network namespace, with another /run and the same name: cgroup and pins would be shared."""
    lab = own_lab
    lab.graft("endpoint", "add", "x", "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
    first = lab.daemon_pid()
    apart = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh")
    told = lab.client(*apart, GRAFTD)
    assert told.returncode == 1
    assert f"the graftd with pid {first} has the cgroup" in told.stderr
    lab.graft("run", "true", check=True)


def test_a_name_that_a_user_has_taken(own_lab):
    """Anybody may bind an abstract name: that keeps no graftd from its work."""
    lab = own_lab
    code = "import socket; s = socket.socket(socket.AF_UNIX); s.bind('\\0graftd'); print('up', flush=True); input()"
    squatter = lab.spawn("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", *python(code), stdin=-1, stdout=-1)
    assert squatter.stdout.readline() == "up\n"
    assert lab.graft("run", "echo", "works").stdout == "works\n"
    lab.wait_logged("has taken the abstract name")
