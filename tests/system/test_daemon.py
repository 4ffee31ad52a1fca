"""graftd dies, is stopped, gets nonsense: nothing hangs, nothing is lost, nothing is left."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest

from graft import __version__
from graft.bench.lab import GRAFT, GRAFTD, HOST4, ROOT, wait_for
from graft.kernel.architecture import HERE
from graft.kernel.cgroup import cgroup2_root
from tests.conftest import in_cgroup, python


@pytest.mark.core
def test_limits_of_the_environment_that_are_wrong(own_lab):
    refused = own_lab.host("env", "GRAFT_LIMITS=foo", GRAFTD)
    assert refused.returncode != 0
    assert refused.stderr == "graftd: GRAFT_LIMITS: limit 'foo': unknown (sockets=N, udp=N, ports=N, rate=N{k,m,g}bit)\n"


def test_limits_that_are_wrong_replace_nothing(own_lab):
    own_lab.spawn_graft("--name", "web", "sleep", "60")
    wait_for(lambda: own_lab.containers() == ["web"], "the container")
    before = own_lab.daemon_pid()
    refused = own_lab.host("env", "GRAFT_LIMITS=foo", GRAFTD, "--replace")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "GRAFT_LIMITS: limit 'foo': unknown" in refused.stderr
    assert own_lab.daemon_pid() == before


def test_a_configuration_that_is_wrong(own_lab):
    """graftd does not start with it, --replace leaves the running one alone, and a crash costs no container."""
    says = f"{own_lab.config}, line 1: unknown key 'networks' (limits, log, "
    own_lab.config.write_text("networks = []\n")
    assert f"graftd: {says}" in own_lab.host(GRAFTD).stderr
    own_lab.refused((GRAFT, "run", "true"), 125, f"graft: graftd ends at once: {says}")
    own_lab.refused((GRAFT, "doctor"), 1, "")
    own_lab.config.write_text('addresses = ["10.9.0.0/16"]\n[pods]\nannotations = ["graft.ip"]\n')
    process = own_lab.spawn_graft("--name", "web", "sleep", "60")
    wait_for(lambda: own_lab.containers() == ["web"], "the container")

    def doctor():
        found = {f["name"]: f for f in json.loads(own_lab.graft("doctor", "-j").stdout)}
        return found["configuration"], found["in force"]

    file, force = doctor()
    assert (file["good"], file["found"], force["good"]) == (True, str(own_lab.config), True)
    assert force["found"].startswith("pods: graft.ip; addresses: 10.9.0.0/16")
    own_lab.config.write_text("# nothing\n")
    with own_lab.config.open("a"):  # graftd does not take it meanwhile, however long doctor takes
        assert "says something else now: graftd takes it in 2 seconds" in doctor()[1]["remedy"]
    own_lab.host(GRAFTD, "--replace", check=True)
    assert doctor()[1]["found"].startswith("pods: nothing that takes; addresses: none")
    own_lab.config.write_text("networks = []\n")
    file, force = doctor()
    assert (file["good"], force["good"]) == (False, False)
    assert file["found"].startswith(says.partition(" (")[0])
    assert force["found"].startswith("pods: nothing that takes")
    assert force["remedy"].startswith(says.partition(" (")[0])
    before = own_lab.daemon_pid()
    own_lab.refused((GRAFTD, "--replace"), 125, f"graftd: {says}")
    assert own_lab.daemon_pid() == before
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: own_lab.daemon_pid() not in (0, before) and own_lab.containers() == ["web"], "the next graftd")
    own_lab.wait_logged(says)
    own_lab.end(process)


def test_state_survives_graftd(own_lab):
    code = (
        "import socket; s = socket.socket(); s.setsockopt(1,2,1); s.bind(('0.0.0.0', 80)); s.listen(); print(flush=True)\n"
        "while True: c = s.accept()[0]; c.sendall(b'hi'); c.close()"
    )
    own_lab.graft("endpoint", "add", "kept", "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
    process = own_lab.spawn_graft("--name", "web", "-p", "8080:80", "--egress", "none", *python(code), stdout=-1)
    process.stdout.readline()
    before = [
        own_lab.graft(*words).stdout
        for words in (("rule", "show", "web", "-j"), ("endpoint", "show", "--netns", "web"))
    ]
    pid = own_lab.daemon_pid()
    os.kill(pid, signal.SIGKILL)
    ask = f"import socket; print(socket.create_connection(({HOST4!r}, 8080), 3).recv(9))"
    assert own_lab.client(*python(ask)).stdout == "b'hi'\n", "the data path does not pass graftd"
    wait_for(lambda: own_lab.containers() == ["web"], "the next graftd")
    assert own_lab.daemon_pid() != pid
    after = [
        own_lab.graft(*words).stdout
        for words in (("rule", "show", "web", "-j"), ("endpoint", "show", "--netns", "web"))
    ]
    assert before == after
    assert "kept type ipv4" in own_lab.graft("endpoint", "show").stdout
    assert own_lab.graft("run", "-p", "8080:81", "true").returncode == 1
    own_lab.graft("endpoint", "del", "kept", check=True)


def test_kill_the_command(own_lab):
    for name in ("a", "b", "c"):
        own_lab.end(own_lab.spawn_graft("--name", name, "-p", "8080:80", "sleep", "60"), signal.SIGKILL)
        assert own_lab.graft("run", "--name", name, "-p", "8080:80", "true").returncode == 0


def test_stop_and_idle_exit(own_lab):
    process = own_lab.spawn_graft("--name", "busy", "sleep", "60")
    wait_for(lambda: own_lab.containers() == ["busy"], "the container")
    own_lab.refused((GRAFTD, "--stop"), 1, "1 containers run: busy")
    assert "graftd is running already" in own_lab.host(GRAFTD).stderr
    own_lab.end(process)
    wait_for(lambda: not own_lab.pins().exists(), "the idle exit", 15)
    wait_for(lambda: not own_lab.cgroup().exists(), "the cgroup's end")
    assert not own_lab.host("ip", "-6", "rule", "list", "pref", "26470").stdout
    again = own_lab.host(GRAFTD, "--stop")
    assert (again.returncode, again.stderr) == (1, "graftd: graftd is not running\n")


def test_graftd_leaves_the_cgroup_of_the_command_that_has_started_it(own_lab):
    """Else a service or a session would not end before all of its containers and those of others."""
    session = cgroup2_root() / f"{own_lab.tag}-session"
    session.mkdir()
    try:
        process = own_lab.spawn(*in_cgroup(session, GRAFT, "run", "--name", "web", "sleep", "60"))
        wait_for(lambda: "web" in own_lab.containers(), "the container")
        own_lab.end(process)
        wait_for(lambda: not (session / "cgroup.procs").read_text(), "the end of all in the session")
        assert own_lab.keeper_pid()
        assert own_lab.guard_pid()
    finally:
        session.rmdir()


def test_ps_without_graftd_says_what_was_running(own_lab):
    left = own_lab.spawn_graft("--name", "left", "sleep", "30")
    wait_for(lambda: own_lab.containers() == ["left"], "the container")
    own_lab.host(GRAFTD, "--stop", "--force", check=True)
    wait_for(lambda: own_lab.graft("ps").returncode, "its end")
    assert own_lab.graft("ps").stderr == "graft: graftd is not running; it was supervising 1: left (start it: graftd)\n"
    own_lab.end(left)
    own_lab.graft("endpoint", "show", check=True)  # starts one, which cleans up
    wait_for(lambda: own_lab.containers() == [], "the clean-up")


def test_a_start_that_fails_leaves_nothing(own_lab, tmp_path):
    """The programs are damaged, or its configuration is wrong: no cgroup, pins or lock, and the next start works."""
    tree = tmp_path / "graft"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", "build", "dist", "__pycache__", ".*cache"))
    (tree / ".venv").symlink_to(ROOT / ".venv")
    damaged = tree / "graft/graft.bpf.o"
    damaged.write_bytes(damaged.read_bytes()[:20000])
    cookie = own_lab.host(*python("import socket; print(int.from_bytes(socket.socket().getsockopt(1, 71, 8), 'little'))")).stdout
    failed = own_lab.host(tree / "bin/graft", "run", "true")
    assert (failed.returncode, failed.stderr.count("\n")) == (125, 1)
    assert f"{damaged} is not a BPF object" in failed.stderr
    left = wait_for(lambda: not own_lab.cgroup().exists() and not own_lab.pins().exists(), "the end of what it had made")
    assert left
    assert not Path(f"/run/graftd-netns-{int(cookie)}.lock").exists()
    assert own_lab.graft("run", "echo", "works").stdout == "works\n"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("umount -R -l /sys/fs/cgroup", "no cgroup2 is mounted"),
        ("mount -t cgroup2 none /mnt; umount -R -l /sys/fs/cgroup; mount -o remount,bind,ro /mnt", "enter the cgroup /mnt/"),
        ("mount -t cgroup2 none /sys/fs/cgroup", ""),  # over the others, which mountinfo lists first
    ],
)
def test_cgroup2_is_where_it_is_found(own_lab, change, told):
    done = own_lab.host("unshare", "-m", "sh", "-c", f"{change}; exec {GRAFT} run echo works")
    if told:
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (125, "", 1), done.stderr
        assert told in done.stderr
        assert not own_lab.pins().exists()
    else:
        assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr


def test_a_level_that_is_none_is_told(own_lab):
    own_lab.env["GRAFT_LOG"] = "loud"
    assert own_lab.graft("run", "true").returncode == 0
    told = (own_lab.run_dir / "graftd.log").read_text()
    assert told.startswith("graftd: GRAFT_LOG=loud is no level: debug, info, warning or error; it is as if it were not there\n")


def test_many_starts_at_once(own_lab):
    processes = [own_lab.spawn_graft("true") for _ in range(8)]
    assert [p.wait(30) for p in processes] == [0] * 8
    pid = own_lab.daemon_pid()
    alone = wait_for(partial(members_are, own_lab.cgroup(), {pid}), "the end of what is not graftd")
    assert alone


def members_are(cgroup: Path, pids: set[int]) -> bool:
    """True when nothing else is a member; a graft-sup may take a moment to end."""
    return {int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()} == pids


def send(path: Path, data: bytes, fds=(), *, shut=True) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(path))
        try:
            if fds:
                socket.send_fds(sock, [data], fds)
            else:
                sock.sendall(data)
            if shut:
                sock.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        return answer


HELLO = json.dumps({"op": "hello", "version": __version__}).encode() + b"\n"


@pytest.mark.parametrize(
    "message",
    [
        b"\n",
        b"nonsense\n",
        b"{}\n",
        b'{"op": "run"}\n',
        b"[1, 2]\n",
        b"\xff\xfe\0\n",
        b'{"op": "ps", "version": "' + __version__.encode() + b'", "x": 1}\n',
        b'{"op": "run", "version": "' + __version__.encode() + b'"}\n',
        b"{" * 100000 + b"\n",
        b"x" * (1 << 21),
        b'"unfinished',
    ],
)
def test_malformed_messages(lab, message):
    lab.graft("endpoint", "show", check=True)
    pid = lab.daemon_pid()
    admin = send(lab.run_dir / "graftd.sock", message)
    agent = send(lab.run_dir / "agent.sock", message)
    for answer in (admin, agent):
        assert not answer or "error" in json.loads(answer)
    if len(message) < 1 << 20:
        assert admin
    assert lab.daemon_pid() == pid
    assert lab.graft("run", "true").returncode == 0


def test_descriptors_that_nobody_asked_for(lab):
    lab.graft("endpoint", "show", check=True)
    pid = lab.daemon_pid()
    before = len(os.listdir(f"/proc/{pid}/fd"))
    with open("/dev/null") as null:
        many = [null.fileno()] * 20
        assert b"descriptors" in send(lab.run_dir / "graftd.sock", HELLO, many)
        state = {
            "ociVersion": "1",
            "fds": ["seccompFd"],
            "pid": os.getpid(),
            "state": {"id": "x", "pid": os.getpid()},
        }
        answer = send(lab.run_dir / "agent.sock", json.dumps(state).encode(), [null.fileno()])
        assert b"not a seccomp listener" in answer
        run = HELLO.replace(b"hello", b"run")
        assert b"error" in send(lab.run_dir / "graftd.sock", run, [null.fileno()])
    wait_for(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before, "descriptors to be closed")


def test_idle_connections_do_not_block_others(lab):
    lab.graft("endpoint", "show", check=True)
    with contextlib.ExitStack() as held:
        for _ in range(100):
            sock = held.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(lab.run_dir / "agent.sock"))
            with contextlib.suppress(BrokenPipeError):  # one more than a namespace may have: it is closed
                sock.send(b"{")
        assert lab.graft("run", "true").returncode == 0


def test_another_version(lab):
    lab.graft("endpoint", "show", check=True)
    answer = json.loads(send(lab.run_dir / "graftd.sock", b'{"op": "hello", "version": "0.0.0"}\n'))
    assert f"graftd {__version__} is running, this is graft 0.0.0" in answer["error"]["message"]
    assert "graftd --replace" in answer["error"]["hint"]


def test_a_container_gives_no_orders(lab):
    """Root inside shares the file system here; its processes are known by their namespace and filter."""
    for words in (("ps",), ("endpoint", "add", "x", "type", "ipv4", "addr", HOST4, "port", "1"), ("run", "true")):
        result = lab.graft("run", str(GRAFTD.parent / "graft"), *words)
        assert result.returncode == 1
        assert "may not use the admin socket" in result.stderr


USERFAULT = f"""
import ctypes, fcntl, mmap, os, socket, struct, threading, time
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall({HERE.numbers["userfaultfd"]}, os.O_CLOEXEC)
fcntl.ioctl(fd, 0xc018aa3f, bytearray(struct.pack('QQQ', 0xaa, 0, 0)))
page = mmap.mmap(-1, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
fcntl.ioctl(fd, 0xc020aa00, bytearray(struct.pack('QQQQ', address, 4096, 1, 0)))
def ask():
    libc.ioctl(socket.socket().detach(), 0x8913, ctypes.c_void_p(address))
for _ in range(20): threading.Thread(target=ask, daemon=True).start()
print('asked', flush=True); time.sleep(60)
"""


def test_memory_that_never_comes_stalls_only_its_own_container(lab):
    """An ioctl whose argument lies on a page that its owner never serves: graftd and the others go on."""
    hostile = lab.spawn_graft("--name", "hostile", *python(USERFAULT), stdout=-1)
    assert hostile.stdout.readline() == "asked\n"
    for _ in range(3):
        code = "import fcntl, socket; socket.socket(); fcntl.ioctl(socket.socket(), 0x8913, b'lo' + bytes(38)); print('ok')"
        assert lab.graft("run", *python(code), timeout=10).stdout == "ok\n"
    lab.end(hostile, signal.SIGKILL)
    wait_for(lambda: lab.containers() == [], "its end")
    pid = lab.daemon_pid()
    wait_for(lambda: len(os.listdir(f"/proc/{pid}/task")) == 1, "the stalled threads to end")


def collect(process, outputs):
    outputs.append(process.communicate(timeout=60)[0])


def test_a_thousand_calls_from_many_containers(lab):
    code = "import socket\nfor _ in range(50): socket.socket().close()\nprint('ok')"
    processes = [lab.spawn_graft(*python(code), stdout=-1) for _ in range(20)]
    outputs: list[str] = []
    threads = [threading.Thread(target=collect, args=(p, outputs)) for p in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == ["ok\n"] * 20


def test_no_descriptor_or_memory_growth(lab):
    lab.graft("run", "true", check=True)
    pid = lab.daemon_pid()
    before = len(os.listdir(f"/proc/{pid}/fd"))
    for _ in range(10):
        lab.graft("run", "-p", "8080:80", "true", check=True)
    wait_for(lambda: lab.containers() == [], "the end")
    wait_for(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before + 1, "the end of what the containers had")
    keeper = lab.keeper_pid()
    assert len([fd for fd in os.listdir(f"/proc/{keeper}/fd") if "seccomp" in _link(keeper, fd)]) == 0


def _link(pid, fd):
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return ""


def test_programs_are_attached_and_go(own_lab):
    own_lab.graft("run", "true", check=True)
    tree = subprocess.run(("bpftool", "cgroup", "list", own_lab.cgroup()), capture_output=True, text=True).stdout
    assert tree.count("graft_") == 20, tree
    root = subprocess.run(("bpftool", "cgroup", "list", own_lab.cgroup().parent), capture_output=True, text=True).stdout
    assert {"guard_connect4", "guard_connect6", "guard_sendmsg4", "guard_sendmsg6"} <= set(root.split())
    assert own_lab.close() == []
    assert not own_lab.pins().exists()


def test_the_end_goes_on_after_a_step_that_fails(own_lab):
    """What cannot be removed is told in the log; everything else goes nevertheless."""
    lab = own_lab
    lab.graft("run", "true", check=True)
    pid = lab.daemon_pid()
    links = {_link(pid, fd) for fd in os.listdir(f"/proc/{pid}/fd")}
    (claim,) = (Path(link) for link in links if link.startswith("/run/graftd-netns-"))
    claim.unlink()
    claim.mkdir()  # which unlink(2) refuses
    try:
        lab.host(GRAFTD, "--stop", check=True)
        wait_for(lambda: not lab.run_dir.joinpath("graftd.sock").exists(), "the keeper's end")
        assert not lab.pins().exists()
        assert not lab.cgroup().exists()
        assert not (lab.run_dir / "helpers.sock").exists()
        assert "26470" not in lab.host("ip", "-6", "rule", "show", check=True).stdout
        lab.wait_logged(f"graftd: left behind: {claim}: [Errno 21] Is a directory")
    finally:
        claim.rmdir()


def test_a_full_run_directory(own_lab):
    """State cannot be written: graftd says so and goes on; nothing loses its supervisor."""
    own_lab.run_dir.mkdir()
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", own_lab.run_dir), check=True)
    try:
        code = "import socket, sys\nfor line in sys.stdin: socket.socket().close(); print('ok', flush=True)"
        long = own_lab.spawn_graft("--name", "long", *python(code), stdin=-1, stdout=-1)
        short = own_lab.spawn_graft("--name", "short", *python("input()"), stdin=-1)
        wait_for(lambda: sorted(own_lab.containers()) == ["long", "short"], "both")
        with open(own_lab.run_dir / "filler", "wb") as filler:
            subprocess.run(("dd", "if=/dev/zero", "bs=1k"), stdout=filler, stderr=subprocess.DEVNULL)
        pid = own_lab.daemon_pid()
        short.stdin.close()
        wait_for(lambda: own_lab.containers() == ["long"], "the short one's end")
        long.stdin.write("\n")
        long.stdin.flush()
        assert long.stdout.readline() == "ok\n"
        assert own_lab.daemon_pid() == pid
        os.unlink(own_lab.run_dir / "filler")
        wait_for(lambda: "short" not in (own_lab.run_dir / "state.json").read_text(), "the state to be written")
        long.stdin.close()
        long.wait(10)
        wait_for(lambda: not own_lab.pins().exists(), "the idle exit", 15)
    finally:
        subprocess.run(("umount", "-l", own_lab.run_dir), check=True)


def test_a_second_graftd_in_one_namespace_is_refused(lab):
    container = lab.spawn_graft("--name", "web", "sleep", "600")  # the first graftd does not end meanwhile
    wait_for(lambda: lab.containers() == ["web"], "the container")
    env = {**lab.env, "GRAFT_RUN_DIR": f"{lab.run_dir}-two"}
    who = f"another graftd supervises this network namespace, pid {lab.daemon_pid()} (GRAFT_RUN_DIR={lab.run_dir})"
    lab.refused((GRAFT, "run", "true"), 125, who, env=env)
    subprocess.run(("rm", "-r", f"{lab.run_dir}-two"), check=True)
    lab.end(container)
