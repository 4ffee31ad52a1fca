"""The command lines of docs/docker.md and docs/podman.md, as they are typed and in their order, with real engines.

They run in a laboratory's host whose /usr, /etc, /opt, /run and /var are its own. What the machine cannot have is stood
in for: systemctl, by a script that starts and ends the same programs, and the registry, by a local image `nginx`.
"""

import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest

from graft.bench.lab import HOST4, ROOT, SLOWNESS, Lab, laboratory, wait_for
from graft.kernel.cgroup import cgroup2_root
from tests.conftest import lack, need, need_root
from tests.system.engines import CURL, NETAVARK, UNHOOKED, engine_version

BEGIN = """
set -e
mount -t tmpfs -o mode=755 none /mnt
for place in usr etc opt var; do
    mkdir -p "/mnt/$place/upper" "/mnt/$place/work"
    mount -t overlay overlay -o "lowerdir=/$place,upperdir=/mnt/$place/upper,workdir=/mnt/$place/work" "/$place"
done
# nothing is mounted below /var: who removes that directory elsewhere would take the mount away here
rm -rf /var/lib/docker /var/lib/containerd /var/lib/containers /var/lib/cni
mount -t tmpfs -o mode=755 none /run
mkdir -p /etc/systemd/system /run/lock /run/netns
mount -t proc proc /proc
mount --bind "$WORK/systemctl" "$(command -v systemctl)"
exec sleep 1000
"""
SYSTEMCTL = """#!/bin/sh
case "$*" in
"enable --now graftd"*) setsid graftd </dev/null >/run/graftd.log 2>&1 &
    until graft ps >/dev/null 2>&1; do sleep 0.1; done ;;
"enable graftd-docker.socket") ;;
"start graftd") graft ps >/dev/null ;;
"disable --now graftd"*) graftd --stop ;;
"reload docker") kill -HUP "$(cat /run/docker.pid)" ;;
*) echo "systemctl $*: nothing stands in for it" >&2; exit 1 ;;
esac
"""
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
NGINX = """
user root; worker_processes 1; pid /run/nginx.pid; error_log /dev/stderr; events {}
http { access_log /dev/stdout; server { listen 80; location / { return 200 "Welcome to nginx!\\n"; } } }
"""
IN_BETWEEN = re.compile(r"(?:remote: |graft: )(.+?)(?: Error: |$)")


def commands(page: str) -> list[tuple[str, str]]:
    """The lines after "# " in a page's indented blocks, each with the output that is shown below it, on one line."""
    found: list[tuple[str, list[str]]] = []
    for line in (ROOT / "docs" / page).read_text().splitlines():
        text = line.strip()
        if line.startswith("    ") and text.startswith("# "):
            found.append((text[2:], []))
        elif line.startswith("    ") and found and found[-1][1] is not None:
            found[-1][1].append(text)
        elif found:
            found.append(("", []))  # what follows is no output of the last one
    return [(command, " ".join(shown)) for command, shown in found if command]


def image(path: Path) -> Path:
    """What an image of nginx has that these pages use, of the host's own files; a tar at @path."""
    programs = [str(shutil.which(name)) for name in ("nginx", "hostname")]
    told = subprocess.run(("ldd", *programs), capture_output=True, text=True, check=True).stdout
    libraries = sorted(set(re.findall(r"(/\S+\.so\S*)", told)))
    busybox = Path("/bin/busybox").read_bytes()
    files = {f"{name}": Path(name).read_bytes() for name in (*programs, *libraries)}
    files |= {"/bin/sh": busybox, "/bin/sleep": busybox, "/etc/nginx/nginx.conf": NGINX.encode()}
    files |= {"/etc/passwd": b"root:x:0:0::/:/bin/sh\n", "/etc/group": b"root:x:0:\n"}
    with tarfile.open(path, "w") as archive:
        for name in ("run", "tmp", "proc", "sys", "dev", "var/lib/nginx", "var/log/nginx"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, BytesIO(content))
    return path


class Machine:
    """A laboratory's host with files and processes of its own."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        script = lab.work / "systemctl"
        script.write_text(SYSTEMCTL)
        script.chmod(0o755)
        image(lab.work / "nginx.tar")
        inside = ("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--propagation", "private")
        environment = {**os.environ, "WORK": str(lab.work)}
        self.first = lab.spawn(*inside, "bash", "-c", BEGIN, env=environment)
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children")
        self.pid = int(wait_for(lambda: children.read_text().split(), "its first process")[0])
        wait_for(lambda: Path(f"/proc/{self.pid}/comm").read_text() == "sleep\n", "its files", 20)

    def run(self, command: str, *, network: bool = True, timeout: float = 200) -> "subprocess.CompletedProcess[str]":
        """A line of a shell. @network: in the laboratory's; else in the machine's, which has registries."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-r", f"-w{ROOT}"]
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
        words = [*enter, "bash", "-o", "pipefail", "-c", command]
        words = self.lab.in_host(*words) if network else words
        return subprocess.run(
            words, env=environment, cwd="/", capture_output=True, text=True, timeout=timeout * SLOWNESS, stdin=subprocess.DEVNULL
        )

    def check(self, command: str) -> None:
        """As run(); asserts success."""
        done = self.run(command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    def type(self, command: str, shown: str) -> None:
        """One line of a page: it succeeds, or fails with the words that the page @shown below it."""
        if command.startswith(("graft install ", "graft uninstall ")):
            command += " --yes"  # the page says that it asks
        done = self.run(command, network=not command.startswith("make "))
        told = f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        if "Error" not in shown:
            assert done.returncode == 0, told
            heading = re.match(r"[A-Z]+ .*?[A-Z]+(?= [^A-Z])", shown)
            assert not heading or heading[0].split()[0] == done.stdout.split()[0], told
        else:
            assert done.returncode, told
            reason = IN_BETWEEN.search(shown)
            assert reason, shown
            pattern = re.escape(reason[1]).replace(r"\.\.\.", ".*")
            assert re.search(pattern, " ".join((done.stderr + done.stdout).split())), told
        for port in re.findall(r"(?:-p |[=,])(\d+):80", command) if " -d " in command and not done.returncode else ():
            if "--entrypoint" not in command:
                wait_for(partial(self.answers, port), f"{command}: port {port}", 10)

    def answers(self, port: str) -> bool:
        """Does another machine get the page there?"""
        return "Welcome" in self.lab.client(*CURL, f"http://{HOST4}:{port}/").stdout


@pytest.fixture
def machine() -> Iterator[Machine]:
    need_root()
    need("nginx", "busybox", "hostname", "ldd", "go-md2man", "man", "systemctl")
    if (cgroup2_root() / "graft").exists():  # as typed, graftd has its own directory, and that cgroup
        lack("a graftd runs on this machine already")
    with laboratory("documents") as lab:
        one = Machine(lab)
        try:
            yield one
        finally:
            one.run("graftd --stop --force")
            lab.end(one.first, signal.SIGKILL)  # a first process takes no other


@pytest.mark.timeout(500)
def test_docker(machine):
    need("dockerd", "docker", "containerd", "runc")
    options = "--ip6tables=false --userland-proxy=false --storage-driver=vfs"
    machine.check(f"setsid dockerd {options} </dev/null >/run/dockerd.log 2>&1 & until docker version >/run/null 2>&1; do sleep 0.2; done")
    machine.check(f"""docker import -c 'CMD ["nginx","-g","daemon off;"]' {machine.lab.work}/nginx.tar nginx""")
    late = engine_version("dockerd") >= UNHOOKED
    lines = commands("docker.md")
    assert len(lines) >= 18
    for command, shown in lines:
        if late and "--network none --label graft.direct=on" in command:  # so the page says
            shown = "Error remote: this Docker looks for the container's network at its first process"
        if command.startswith("docker ps -aq"):
            used = machine.run("graft uninstall docker --yes")
            assert re.search("of docker's use graft: .*web.* .end them first, or give --force", used.stderr), used
        machine.type(command, shown)
    assert "graft" not in machine.run("cat /etc/docker/daemon.json").stdout


@pytest.mark.timeout(500)
def test_podman(machine):
    need("podman", "runc", "conmon")
    machine.check(f"mkdir -p /etc/containers/containers.conf.d; printf '%s' '{CONTAINERS_CONF}' >/etc/containers/containers.conf.d/00-machine.conf")
    machine.check("mkdir -p /etc/containers; printf '[storage]\\ndriver = \"vfs\"\\nrunroot = \"/run/c\"\\ngraphroot = \"/var/lib/containers/s\"\\n' >/etc/containers/storage.conf")
    machine.check(f"""podman import -c 'CMD ["nginx","-g","daemon off;"]' {machine.lab.work}/nginx.tar docker.io/library/nginx""")
    lines = commands("podman.md")
    assert len(lines) >= 12
    for command, shown in lines:
        if command.startswith("podman network create") and engine_version("podman") < NETAVARK:
            shown = "Error graft: unsupported driver graft"  # "with netavark", says the page
        machine.type(command, shown)
    assert not machine.run("ls /usr/share/containers/oci/hooks.d/graft.json").stdout
