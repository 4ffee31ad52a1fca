"""The agent socket: a real OCI runtime hands its container's listener over; programs may for themselves."""

import json
import os
import shutil
import socket
import subprocess

import pytest

from graft.bench.lab import HOST4, ROOT, wait_for
from tests.conftest import need, python

NOTIFY = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [
        {
            "names": ["socket"],
            "action": "SCMP_ACT_NOTIFY",
            "args": [{"index": 0, "value": 0xFFFFFFFF, "valueTwo": family, "op": "SCMP_CMP_MASKED_EQ"}],
        }
        for family in (2, 10)
    ]
    + [{"names": ["listen"], "action": "SCMP_ACT_NOTIFY"}],
}


@pytest.fixture
def bundle(lab):
    """An OCI bundle of busybox."""
    need("runc", "busybox")
    directory = lab.work / "bundle"
    shutil.rmtree(directory, ignore_errors=True)
    for name in ("bin", "www", "proc", "dev", "sys", "tmp"):
        (directory / "rootfs" / name).mkdir(parents=True)
    shutil.copy(str(shutil.which("busybox")), directory / "rootfs/bin/busybox")
    subprocess.run(("chroot", directory / "rootfs", "/bin/busybox", "--install", "-s", "/bin"), check=True)
    (directory / "rootfs/www/index.html").write_text("from runc\n")
    subprocess.run(("runc", "spec"), cwd=directory, check=True)
    return directory


def configure(bundle, lab, args, metadata):
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    config["process"]["terminal"] = False
    config["process"]["args"] = args
    config["process"]["rlimits"] = []
    config["linux"]["seccomp"] = NOTIFY | {
        "listenerPath": str(lab.run_dir / "agent.sock"),
        "listenerMetadata": json.dumps(metadata),
    }
    path.write_text(json.dumps(config))


def test_runc(lab, bundle):
    lab.graft("endpoint", "show", check=True)
    configure(bundle, lab, ["httpd", "-f", "-p", "80", "-h", "/www"], {"name": "oci", "publish": ["8080:80"]})
    name = f"{lab.tag}-oci"
    process = lab.spawn("runc", "run", "-b", bundle, name)
    try:
        lab.wait_listening(8080)
        assert lab.client("curl", "-sS", f"http://{HOST4}:8080/").stdout == "from runc\n"
        assert lab.containers() == ["oci"]
        inside = lab.host("runc", "exec", name, "ip", "-o", "link")
        assert inside.stdout.count("\n") == 1
        assert "lo" in inside.stdout
        health = lab.host("runc", "exec", name, "wget", "-q", "-O-", "http://127.0.0.1:80/")
        assert health.stdout == "from runc\n", "exec has a listener of its own: " + health.stderr
    finally:
        lab.host("runc", "kill", name, "KILL")
        process.wait(10)
        lab.host("runc", "delete", "-f", name)
    wait_for(lambda: lab.containers() == [], "the end")


def test_runc_without_graftd(lab, bundle):
    """Fail closed: the runtime does not start the container."""
    configure(bundle, lab, ["true"], {})
    config = json.loads((bundle / "config.json").read_text())
    config["linux"]["seccomp"]["listenerPath"] = "/run/no-such-graftd/agent.sock"
    (bundle / "config.json").write_text(json.dumps(config))
    result = lab.host("runc", "run", "-b", bundle, f"{lab.tag}-none")
    assert result.returncode != 0
    assert "agent" in result.stderr


HAND_OVER = f"""
import json, os, socket, sys
sys.path.insert(0, {str(ROOT)!r})
from graft.kernel import linux
from graft.trap import filter
agent = socket.socket(socket.AF_UNIX); agent.connect(sys.argv[1])
linux.no_new_privs()
listener = linux.seccomp_listener(filter.program(), wait_killable=False)
state = dict(ociVersion='1', fds=['seccompFd'], pid=int(sys.argv[3]), metadata=sys.argv[2], state=dict(id='x', pid=int(sys.argv[3])))
socket.send_fds(agent, [json.dumps(state).encode()], [listener]); os.close(listener)
answer = json.loads(agent.recv(9999))
print(json.dumps(answer), flush=True)
if 'ok' in answer:
    exec(sys.argv[4])
"""


def hand_over(lab, ns, metadata, code, pid=0, template=HAND_OVER):
    script = lab.work / "handover.py"
    shutil.copytree(ROOT / "graft", lab.work / "graft", dirs_exist_ok=True)
    script.write_text(template.replace(str(ROOT), str(lab.work)))
    command = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-I", script)
    arguments = (lab.run_dir / "agent.sock", json.dumps(metadata), str(pid), code)
    result = subprocess.run(
        [str(a) for a in ("nsenter", f"--net=/run/netns/{ns}", *command, *arguments)], capture_output=True, text=True
    )
    lines = result.stdout.splitlines()
    assert lines, result.stderr
    return json.loads(lines[0]), lines[1:]


def test_an_unprivileged_program_uses_its_namespaces_endpoints(lab):
    """The client namespace's own table, filled by the admin: strict, nothing but what is listed."""
    lab.graft("endpoint", "add", "ep", "type", "ipv4", "addr", HOST4, "port", "8088", "--netns", lab.client_ns, check=True)
    code = """
import errno
def told(call):
    try: call(); print('done')
    except OSError as e: print(errno.errorcode[e.errno])
s = socket.socket(); told(lambda: s.bind(('0.0.0.0', 80))); told(s.listen)
told(lambda: socket.socket().bind(('0.0.0.0', 81))); told(lambda: socket.socket().bind(('127.0.0.1', 82)))
told(lambda: socket.socket().connect(('10.77.0.2', 83)))
"""
    answer, lines = hand_over(lab, lab.client_ns, {"ingress": ["0.0.0.0:80=ep"]}, code)
    assert "ok" in answer, answer
    assert lines == ["done", "done", "EADDRNOTAVAIL", "EADDRNOTAVAIL", "ENETUNREACH"]
    lab.graft("endpoint", "del", "ep", "--netns", lab.client_ns, check=True)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"publish": ["8080:80"]}, "only root may publish"),
        ({"egress_default": "host"}, "only root may publish ports, give addresses or open egress"),
        ({"ingress": ["0.0.0.0:80=nope"]}, "unknown endpoint"),
        ({"surprise": 1}, "unknown field"),
        ({"ingress": ["nonsense"]}, "lacks '='"),
    ],
)
def test_what_an_unprivileged_program_may_not(lab, metadata, says):
    lab.graft("endpoint", "show", check=True)
    answer, _ = hand_over(lab, lab.client_ns, metadata, "")
    assert says in answer["error"]["message"]
    assert lab.containers() == []


def test_the_hosts_endpoints_are_the_admins(lab):
    lab.graft("endpoint", "add", "ep-host", "type", "ipv4", "addr", HOST4, "port", "8089", check=True)
    answer, _ = hand_over(lab, lab.client_ns, {"ingress": ["0.0.0.0:80=ep-host"]}, "")
    assert "unknown endpoint" in answer["error"]["message"]
    lab.graft("endpoint", "del", "ep-host", check=True)


def test_a_filter_of_ones_own_makes_no_other_sockets(lab):
    """A listener whose filter traps every socket(): packet sockets come from the program's own netns and powers."""
    code = """
import errno
for family, kind in ((17, 3), (16, 3), (1, 1), (2, 3)):
    try: socket.socket(family, kind, 1 if family == 2 else 0); print('made')
    except OSError as e: print(errno.errorcode[e.errno])
"""
    script = HAND_OVER.replace("linux.seccomp_listener(filter.program()", "linux.seccomp_listener(WIDE")
    wide = "import struct\nWIDE = struct.pack('=HBBIHBBIHBBIHBBI', 0x20, 0, 0, 0, 0x15, 0, 1, 41, 6, 0, 0, 0x7fc00000, 6, 0, 0, 0x7fff0000)\n"
    answer, lines = hand_over(lab, lab.client_ns, {}, code, template=wide + script)
    assert "ok" in answer, answer
    assert lines == ["EPERM", "made", "made", "EPERM"], "packet and raw sockets need its own powers"


def test_messages_that_once_crashed_it(lab):
    lab.graft("endpoint", "show", check=True)
    pid = lab.daemon_pid()
    state = {"fds": ["seccompFd"], "state": {"id": "x"}, "metadata": json.dumps({"publish": ["1" * 5000 + ":80"]})}
    for message in (b"1" * 5000, b"[" * 5000, json.dumps(state).encode()):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(lab.run_dir / "agent.sock"))
            sock.sendall(message)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(9999)
    assert lab.daemon_pid() == pid


def test_an_unprivileged_program_speaks_for_itself_alone(lab):
    """The pid in its message is not believed: its own namespace counts."""
    process = lab.spawn_graft("--name", "victim", *python("input()"), stdin=-1)
    wait_for(lambda: lab.containers() == ["victim"], "the victim")
    answer, _ = hand_over(lab, lab.client_ns, {}, "", pid=process.pid)
    assert answer["ok"]["name"] != "victim"


def test_an_aborted_create_is_normal(lab):
    lab.graft("endpoint", "show", check=True)
    pid = lab.daemon_pid()
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(lab.run_dir / "agent.sock"))
    assert lab.daemon_pid() == pid
    assert os.path.exists(f"/proc/{pid}")
