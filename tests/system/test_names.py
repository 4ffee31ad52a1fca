"""graftd, its keeper, its guard and each graft-sup are found by their names, however they were started."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graft.bench.lab import GRAFTD, wait_for
from tests.conftest import need


def ps(pid):
    """comm and arguments, as ps(1) shows them."""
    found = subprocess.run(("ps", "-ww", "-o", "comm=,args=", "-p", str(pid)), capture_output=True, text=True).stdout
    comm, _, args = found.rstrip("\n").partition(" ")
    return comm, args.strip()


def pgrep(*words):
    return {int(pid) for pid in subprocess.run(("pgrep", *words), capture_output=True, text=True).stdout.split()}


def looks_like(pid, comm, args):
    """Has it these names? The arguments begin with @args, in every tool."""
    shown = ps(pid)
    return shown[0] == comm and shown[1].startswith(args) and pid in pgrep("-x", comm) and pid in pgrep("-f", f"^{args}")


def helper_pid(lab):
    return next(iter(lab.helper_pids()), 0)


NAMES = {
    "graftd": ("graftd", "graftd"),
    "graft-keeper": ("graft-keeper", "graft-keeper"),
    "graft-guard": ("graft-guard", "graft-guard -c "),
    "graft-sup": ("graft-sup", "graft-sup web "),
}


def pids(lab):
    return {
        "graftd": lab.daemon_pid(),
        "graft-keeper": lab.keeper_pid(),
        "graft-guard": lab.guard_pid(),
        "graft-sup": helper_pid(lab),
    }


def wait_for_names(lab, *, but=None):
    """Until all four have their names, and the process @but is another."""

    def named():
        found = pids(lab)
        return found if but not in found.values() and all(looks_like(pid, *NAMES[name]) for name, pid in found.items()) else None

    try:
        return wait_for(named, "the names")
    except TimeoutError as error:
        raise TimeoutError({name: (pid, ps(pid)) for name, pid in pids(lab).items()}) from error


def threads(pid):
    """The names of a process's threads; one may end at any moment."""
    found = set()
    for entry in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            found.add(Path("/proc", str(pid), "task", entry, "comm").read_text())
    return found


def killed(pid):
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not ps(pid)[0] or "<defunct>" in ps(pid)[1], "its end")


def test_names(own_lab):
    lab = own_lab
    lab.spawn_graft("--name", "web", "sleep", "60")
    wait_for(lab.helper_pids, "graft-sup")
    found = wait_for_names(lab)
    assert ps(found["graftd"]) == ("graftd", "graftd")
    assert ps(found["graft-keeper"]) == ("graft-keeper", "graft-keeper")
    assert Path("/proc", str(found["graftd"]), "cmdline").read_bytes() == b"graftd\0"
    assert found["graftd"] in pgrep("-f", "-x", "graftd")
    for name in ("graftd", "graft-sup"):  # top -H, ps -L
        assert threads(found[name]) == {f"{name}\n"}
    lines = (lab.run_dir / "graftd.log").read_text().splitlines()
    assert any(line.startswith("graftd: container web: ") for line in lines), lines
    # the names are written over the arguments: what Python knows of itself, it knows still
    assert os.readlink(f"/proc/{found['graftd']}/exe") == os.path.realpath(sys.executable)


@pytest.mark.parametrize("name", list(NAMES))
def test_names_of_successors(own_lab, name):
    lab = own_lab
    lab.spawn_graft("--name", "web", "sleep", "60")
    wait_for(lab.helper_pids, "graft-sup")
    before = wait_for_names(lab)
    killed(before[name])
    after = wait_for_names(lab, but=before[name])
    assert after[name] != before[name]


def test_names_after_both_are_killed(own_lab):
    """The guard, a shell, becomes the keeper, which starts another guard."""
    lab = own_lab
    lab.spawn_graft("--name", "web", "sleep", "60")
    wait_for(lab.helper_pids, "graft-sup")
    before = wait_for_names(lab)
    for how in (signal.SIGSTOP, signal.SIGKILL):
        for name in ("graft-keeper", "graftd"):
            os.kill(before[name], how)
    after = wait_for_names(lab, but=before["graftd"])
    assert after["graft-keeper"] == before["graft-guard"]
    assert after["graft-guard"] != before["graft-guard"]


def test_names_after_a_replacement(own_lab):
    lab = own_lab
    lab.spawn_graft("--name", "web", "sleep", "60")
    wait_for(lab.helper_pids, "graft-sup")
    before = wait_for_names(lab)
    lab.host(GRAFTD, "--replace", check=True)
    assert wait_for_names(lab, but=before["graftd"])["graft-keeper"] != before["graft-keeper"]


def test_names_in_the_foreground(own_lab):
    lab = own_lab
    started = lab.spawn(GRAFTD, stderr=subprocess.PIPE)
    wait_for((lab.run_dir / "graftd.sock").exists, "its socket")
    container = lab.spawn_graft("--name", "web", "sleep", "60")
    wait_for(lab.helper_pids, "graft-sup")
    assert wait_for_names(lab)["graft-keeper"] == started.pid
    lab.end(container)
    wait_for(lambda: lab.containers() == [], "the container's end")
    lab.host(GRAFTD, "--stop", check=True)
    assert started.wait(10) == 0


def test_names_under_a_service_manager(own_lab):
    need("systemd-socket-activate")
    lab = own_lab
    lab.run_dir.mkdir()
    sockets = ("-l", lab.run_dir / "graftd.sock", "-l", lab.run_dir / "agent.sock", "--fdname=admin:agent")
    started = lab.spawn("systemd-socket-activate", f"--setenv=GRAFT_RUN_DIR={lab.run_dir}", *sockets, GRAFTD, stderr=-3)
    wait_for((lab.run_dir / "agent.sock").exists, "the sockets")
    lab.graft("run", "true", check=True)
    assert started.pid == lab.daemon_pid()
    assert looks_like(started.pid, "graftd", "graftd")


def test_the_name_of_a_hostile_program(own_lab):
    """A container is named after its program where it has no name: what ps shows of its graft-sup is printable and short."""
    lab = own_lab
    program = lab.work / ("\x1b[2J\n" + "x" * 100)
    program.symlink_to("/usr/bin/sleep")
    lab.spawn_graft(program, "60")
    wait_for(lab.helper_pids, "graft-sup")
    name = Path("/proc", str(helper_pid(lab)), "cmdline").read_bytes().split(b"\0")[1].decode()
    assert len(name) <= 64
    assert name.startswith("__2J_xxx")
    assert name in lab.containers()
