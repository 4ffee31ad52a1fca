"""Direct containers of runc and crun, with cgroup v1 beside v2 and with cgroup2 alone: served, private, or not started."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from graft.bench.lab import GRAFTD, wait_for
from graft.kernel.cgroup import cgroup2_root
from tests.conftest import need, python
from tests.system.direct import PROBE, check, ended, view_of_host
from tests.system.engines import RUNTIME, UNIFIED, image
from tests.system.test_runtimes import configure, detached, podmans

CASES = [(runtime, unified) for runtime in ("runc", "crun") for unified in (False, True)]
GO_ON = "#!/bin/sh\n{before}\nexec {runtime} \"$@\"\n"
WITHOUT_HOOKS = """case "$*" in *run*) /usr/bin/python3 -c '
import json
config = json.load(open("config.json"))
del config["hooks"]
json.dump(config, open("config.json", "w"))';; esac"""


class Bundle:
    """A bundle for one runtime on one kind of machine; each command has a configuration of its own."""

    def __init__(self, lab, directory, runtime, unified):
        self.lab, self.directory, self.runtime, self.unified = lab, directory, runtime, unified
        self.program = runtime  # that graft-runtime becomes

    def words(self, *argv):
        own = [str(RUNTIME), f"--graft-runtime={self.program}", f"--graft-run-dir={self.lab.run_dir}", *argv]
        both = Path("/sys/fs/cgroup/unified").is_dir()
        if both and (self.unified or self.runtime == "crun"):  # crun refuses cgroup v1 beside v2
            change = UNIFIED if self.unified else "umount /sys/fs/cgroup/unified"
            return ["unshare", "-m", "sh", "-c", f'{change}; exec "$@"', "sh", *own]
        return own

    def configure(self, argv, edit=lambda config: None, **annotations):
        path = self.directory / "config.json"
        path.unlink(missing_ok=True)
        subprocess.run(("runc", "spec"), cwd=self.directory, check=True)
        configure(self.directory, podmans(), argv, **{k: v for k, v in {"graft_direct": "on", **annotations}.items() if v is not None})
        config = json.loads(path.read_text())
        config["linux"].pop("resources", None)  # a limit needs controllers
        if self.unified:
            config["linux"]["cgroupsPath"] = f"/direct-{self.lab.tag}/{self.runtime}"
        options = ["ro", "nosuid", "noexec", "nodev"]
        config["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options})
        edit(config)
        path.write_text(json.dumps(config))

    def run(self, *options, name="one"):
        words = self.words("run", *options, "--bundle", self.directory, f"{self.lab.tag}-{name}")
        return self.lab.host(*words, cwd=self.directory, timeout=60)

    def detached(self, name):
        detached(self.lab, *self.words("run", "-d", "--bundle", self.directory, f"{self.lab.tag}-{name}"))

    def exec(self, name, *argv):
        return self.lab.host(*self.words("exec", f"{self.lab.tag}-{name}", *argv), timeout=60)

    def delete(self, name):
        self.lab.host(*self.words("delete", "--force", f"{self.lab.tag}-{name}"), timeout=60)
        wait_for(lambda: f"{self.lab.tag}-{name}" not in self.lab.containers(), "its end")
        ended(self.lab)

    def instead(self, before):
        """What graft-runtime becomes does something first."""
        script = self.directory / "runtime"
        script.write_text(GO_ON.format(before=before, runtime=self.runtime))
        script.chmod(0o755)
        self.program = str(script)


@pytest.fixture(scope="module")
def rootfs(lab, tmp_path_factory):
    need("runc", "crun")
    directory = tmp_path_factory.mktemp("direct")
    (directory / "rootfs").mkdir()
    subprocess.run(("tar", "-C", directory / "rootfs", "-xf", image(directory / "image.tar")), check=True)
    lab.graft("endpoint", "show", check=True)
    yield directory
    for place in {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line}:
        for path in sorted(Path(place).glob(f"direct-{lab.tag}/**/"), reverse=True):
            path.rmdir()


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'v2' if case[1] else 'v1'}")
def bundle(request, lab, rootfs):
    return Bundle(lab, rootfs, *request.param)


@pytest.fixture
def runc(lab, rootfs):
    return Bundle(lab, rootfs, "runc", True)


def test_what_a_program_sees(lab, bundle):
    before = view_of_host(lab)
    lab.spawn("python3", "-m", "http.server", "8741", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lab.wait_listening(8741)
    bundle.configure(python(PROBE), lambda config: config["process"]["env"].append("HOSTS_PORT=8741"))
    done = bundle.run()
    assert done.returncode == 0, done.stderr
    check(lab, done.stdout)
    ended(lab)
    wait_for(lambda: view_of_host(lab) == before, "the host as it was")  # an address goes when its container has ended


def test_a_server_and_exec(lab, bundle):
    bundle.configure(("/usr/bin/python3", "-m", "http.server", "80"), graft_publish="8742:80")
    bundle.detached("web")
    try:
        lab.wait_listening(8742)
        assert "Directory listing" in lab.client("curl", "-sS", "http://10.77.0.1:8742/").stdout
        assert lab.host("curl", "-sS", "http://127.0.0.1:80/").returncode == 7
        (told,) = json.loads(lab.graft("ps", "-j").stdout)
        assert told["publish"] == ["8742:80/tcp"]
        check(lab, bundle.exec("web", *python(PROBE)).stdout)
        done = bundle.exec("web", "/usr/bin/curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1/")
        assert done.stdout == "200", done.stderr
    finally:
        bundle.delete("web")
    assert not lab.listening(8742)


def test_without_the_hook_it_is_killed(lab, bundle):
    """The listener of a process whose cgroup has no policy comes to graftd: it does not go on."""
    bundle.configure(("/busybox", "sleep", "60"))
    bundle.instead(WITHOUT_HOOKS)
    begun = time.monotonic()
    assert bundle.run().returncode not in (0, 60)
    assert time.monotonic() - begun < 30
    lab.wait_logged("the process is in no cgroup with the policy")


def test_without_graftd_nothing_starts(lab, bundle):
    bundle.configure(("/busybox", "sh", "-c", "echo started"))
    bundle.instead(f"{GRAFTD} --stop --force >/dev/null 2>&1")
    done = bundle.run()
    assert done.returncode, done.stdout
    assert "started" not in done.stdout
    assert "hook" in done.stderr or "seccomp receiver" in done.stderr  # crun 1.28 looks for graftd before the hook
    lab.graft("endpoint", "show", check=True)
    ended(lab)


KILL_IN_BETWEEN = """case "$*" in *run*) /usr/bin/python3 -c '
import json
config = json.load(open("config.json"))
config["hooks"]["createRuntime"] = [{{"path": "/bin/kill", "args": ["kill", "-KILL", "{pid}"]}}]
json.dump(config, open("config.json", "w"))';; esac"""


def test_graftd_is_killed_between_the_hook_and_the_filter(lab, runc):
    """The start fails where graftd's end comes before the sysfs of the container's netns; else it goes on, and the
    next graftd has the container under the policy.
    """
    runc.configure(("/busybox", "true"))
    runc.run()  # there is a graftd
    for _ in range(4):
        runc.configure(python(PROBE))
        runc.instead(KILL_IN_BETWEEN.format(pid=wait_for(lab.daemon_pid, "graftd")))
        done = runc.run(name="between")
        if done.returncode:
            assert not done.stdout
        else:
            check(lab, done.stdout)
        runc.program = "runc"
        wait_for(lambda: not lab.containers(), "its end")
    runc.configure(python(PROBE))
    check(lab, runc.run(name="between").stdout)
    ended(lab)


def test_moved_out_of_its_cgroup(lab, bundle):
    """What the host moves elsewhere, where no policy is, makes no socket any more; also what was executed later."""
    name = f"{lab.tag}-moved"
    code = f"""import errno, socket, time
socket.socket().bind(('', 0))
print('ready', flush=True)  # graftd has its listener: the call was answered
while '{name}':  # it is looked for by its text, and this test runs elsewhere at the same time
    try:
        socket.socket().close()
        time.sleep(0.02)
    except OSError as error:
        print(errno.errorcode[error.errno])
        break"""
    bundle.configure(("/busybox", "sleep", "60"))
    bundle.detached("moved")
    try:
        with subprocess.Popen(lab.in_host(*bundle.words("exec", name, *python(code))), stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout
            assert run.stdout.readline() == "ready\n"
            inside = wait_for(lambda: pid_of(python(code)[-1]), "the program")
            (cgroup2_root() / "cgroup.procs").write_text(str(inside))
            assert run.communicate(timeout=30)[0] == "EPERM\n"
    finally:
        bundle.delete("moved")


def pid_of(code):
    """The PID of the process that runs @code and has a filter; 0 if there is none yet."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            filtered = "Seccomp:\t2" in Path("/proc", pid, "status").read_text()
            if filtered and Path("/proc", pid, "cmdline").read_bytes().split(b"\0")[-2:-1] == [code.encode()]:
                return int(pid)
    return 0


def test_who_may_begin(lab, runc):
    """Only metadata that graftd has sealed, of the container in the state; no process is touched otherwise."""
    runc.configure(("/busybox", "true"))
    runc.instead("""case "$*" in *run*) cp config.json kept.json;; esac""")
    assert runc.run().returncode == 0
    wait_for(lambda: not lab.containers(), "the container's end")
    runc.program = "runc"
    config = json.loads((runc.directory / "kept.json").read_text())
    sealed = config["linux"]["seccomp"]["listenerMetadata"]
    sleeper = lab.spawn("sleep", "60")
    for metadata, name in ((sealed.replace('"netadmin":false', '"netadmin":true'), "one"), (sealed, "other"), (sealed, "one")):
        state = json.dumps({"ociVersion": "1.0", "id": f"{lab.tag}-{name}", "pid": sleeper.pid, "bundle": "/"})
        words = ("env", f"GRAFT_METADATA={metadata}", "bash", "-c", f"exec -a graft-begin {RUNTIME} --graft-run-dir={lab.run_dir}")
        done = lab.host(*words, input=state)
        assert done.returncode == 1, (metadata, name)
        assert done.stderr.startswith("graft: ")
    assert not lab.containers()
    lab.end(sleeper)


def spaces(config, kind, **entry):
    """Replace a namespace of @config; without an entry it has none."""
    kept = [space for space in config["linux"]["namespaces"] if space["type"] != kind]
    config["linux"]["namespaces"] = [*kept, *([{"type": kind, **entry}] if entry else [])]


def grant(config, name):
    config["process"]["capabilities"]["bounding"].append(name)


def volume(config, source, *options):
    config["mounts"].append({"destination": "/there", "type": "bind", "source": source, "options": ["rbind", "ro"]})


TUN = {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200}
REFUSALS = {
    "user namespace": (lambda c: c["linux"]["namespaces"].append({"type": "user"}), "a user namespace is not"),
    "host's processes": (lambda c: spaces(c, "pid"), "with the host's processes"),
    "host's processes by a path": (lambda c: spaces(c, "pid", path="/proc/self/ns/pid"), "with the host's processes"),
    "cgroup namespace": (lambda c: spaces(c, "cgroup", path="/proc/self/ns/cgroup"), "joins a cgroup namespace"),
    "host's network": (lambda c: spaces(c, "network"), "shares the host's network namespace"),
    "host's network by a path": (
        lambda c: spaces(c, "network", path="/proc/self/ns/net"),
        "shares the host's network namespace",
    ),
    "writable /proc/sys": (lambda c: c["linux"]["readonlyPaths"].remove("/proc/sys"), "/proc/sys/net would be"),
    "CAP_NET_ADMIN": (lambda c: grant(c, "CAP_NET_ADMIN"), "CAP_NET_ADMIN"),
    "CAP_SYS_ADMIN": (lambda c: grant(c, "CAP_SYS_ADMIN"), "CAP_SYS_ADMIN would hold in the host's network"),
    "CAP_BPF": (lambda c: grant(c, "CAP_BPF"), "CAP_BPF would hold in the host's network"),
    "/dev/net/tun": (lambda c: c["linux"].update(devices=[TUN]), "/dev/net/tun makes devices"),
    "the host's root": (lambda c: volume(c, "/"), "the volume / at /there"),
    "the host's cgroups": (lambda c: volume(c, "/sys/fs/cgroup"), "the volume /sys/fs/cgroup at /there"),
    "above the host's cgroups": (lambda c: volume(c, "/sys/fs"), "the volume /sys/fs at /there"),
    "by a link": (lambda c: volume(c, "/proc/self/root"), "the volume /proc/self/root at /there"),
    "the host's processes' files": (lambda c: volume(c, "/proc"), "the volume /proc at /there"),
    "another hook": (lambda c: c.update(hooks={"createRuntime": [{"path": "/bin/true"}]}), "the hook /bin/true"),
    "a sysctl that no socket has": (
        lambda c: c["linux"].update(sysctl={"net.ipv4.tcp_sack": "0"}),
        "sysctl net.ipv4.tcp_sack=0: it acts on no socket",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_direct(lab, runc, name):
    edit, message = REFUSALS[name]
    runc.configure(("/busybox", "true"), edit)
    before = (runc.directory / "config.json").read_bytes()
    done = runc.run()
    assert done.returncode == 1
    assert done.stderr.startswith("graft: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert (runc.directory / "config.json").read_bytes() == before
    ended(lab)


def test_podmans_hook_without_cgroup2(lab, runc):
    """No runtime makes a cgroup2 there, and the hook sees no exec."""
    if not Path("/sys/fs/cgroup/unified").is_dir():
        pytest.skip("this machine has cgroup2 alone")
    runc.configure(("/busybox", "true"))
    hook = f"bash -c 'exec -a graft-hook {RUNTIME} --graft-run-dir={lab.run_dir}'"
    for change, refused in (("umount /sys/fs/cgroup/unified", True), ("true", False), (UNIFIED, False)):
        words = ("unshare", "-m", "sh", "-c", f"{change}; {hook} <{runc.directory}/config.json >/dev/null; exit $?")
        done = lab.host(*words)
        assert done.returncode == refused, done.stderr
        assert ("without cgroup2 no runtime puts a container into a cgroup" in done.stderr) is refused


def test_its_netns_is_where_its_sysctls_are(lab, runc):
    """An engine's netns stays the container's, and a port below 1024 needs no capability where its sysctl says so."""
    before = view_of_host(lab)
    code = """import errno, socket
sock = socket.socket()
try:
    sock.bind(("", 80))
    print("bound")
except OSError as error:
    print(errno.errorcode[error.errno])"""

    def by_nobody(config, **sysctls):
        config["process"].update(user={"uid": 65534, "gid": 65534}, capabilities={})
        config["linux"]["sysctl"] = {f"net.ipv4.{name}": value for name, value in sysctls.items()}

    runc.configure(python(code), lambda config: by_nobody(config, ip_unprivileged_port_start="0", ping_group_range="0 0"))
    done = runc.run()
    assert done.stdout == "bound\n", done.stderr
    runc.configure(python(code), by_nobody)
    done = runc.run()
    assert done.stdout == "EACCES\n", done.stderr
    wait_for(lambda: view_of_host(lab) == before, "the host as it was")  # an address goes when its container has ended


def test_sysctls_that_options_carry(lab, runc):
    code = "import socket; print({socket.socket(f).getsockopt(6, 4) for f in (2, 10) for _ in range(9)})"
    runc.configure(python(code), lambda c: c["linux"].update(sysctl={"net.ipv4.tcp_keepalive_time": "300"}))
    assert runc.run().stdout == "{300}\n"


def test_joining(lab, runc):
    """By the first process's PID, as engines do: both are direct, or neither."""
    runc.configure(("/usr/bin/python3", "-m", "http.server", "80"), graft_publish="8743:80")
    runc.detached("first")
    try:
        lab.wait_listening(8743)
        (told,) = json.loads(lab.graft("ps", "-j").stdout)
        path = f"/proc/{told['pid']}/ns/net"
        joins = lambda config: (  # noqa: E731
            spaces(config, "network", path=path),
            config["linux"].update(cgroupsPath=f"/direct-{lab.tag}/second"),
        )
        code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1/').status)"
        runc.configure(python(code), joins)
        assert runc.run(name="second").stdout == "200\n"
        (told,) = json.loads(lab.graft("ps", "-j").stdout)
        runc.configure(python(code), joins, graft_direct=None)
        done = runc.run(name="third")
        assert done.returncode == 1
        assert "whose network it joins, is direct" in done.stderr
    finally:
        runc.delete("first")


def test_not_direct_and_direct_are_not_joined(lab, runc):
    runc.configure(("/busybox", "sleep", "60"), graft_direct=None, graft="on")
    runc.detached("plain")
    try:
        wait_for(lab.containers, "it")
        (told,) = json.loads(lab.graft("ps", "-j").stdout)
        path = f"/proc/{told['pid']}/ns/net"
        runc.configure(("/busybox", "true"), lambda config: spaces(config, "network", path=path))
        done = runc.run(name="second")
        assert done.returncode == 1
        assert "whose network it joins, is not direct" in done.stderr
    finally:
        runc.delete("plain")


def test_graftd_is_killed(lab, runc):
    """What the container has goes on, and what is executed later is under the policy of the next graftd."""
    runc.configure(("/usr/bin/python3", "-m", "http.server", "80"), graft_publish="8744:80")
    runc.detached("kept")
    try:
        lab.wait_listening(8744)
        os.kill(lab.daemon_pid(), signal.SIGKILL)
        check(lab, runc.exec("kept", *python(PROBE)).stdout)
        assert "Directory listing" in lab.client("curl", "-sS", "http://10.77.0.1:8744/").stdout
    finally:
        runc.delete("kept")
