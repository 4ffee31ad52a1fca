"""Where a rootless engine's plugin finds graftd, and what it says where there is none."""

import os
import subprocess
import sys

import pytest

from graft.bench.lab import ROOT
from graft.engines import rootless
from graft.errors import Failure, Refused
from tests.conftest import need_root


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_RUN_DIR", str(tmp_path))
    return tmp_path


def test_here(run):
    (run / "user.sock").touch()
    assert rootless.reach_graftd() == ""
    assert os.environ["GRAFT_RUN_DIR"] == str(run)
    rootless.check_graftd()


def test_none(run):
    assert rootless.reach_graftd() == ""
    with pytest.raises(Failure, match="graftd is not running"):
        rootless.check_graftd()
    (run / "agent.sock").touch()
    with pytest.raises(Refused, match="the graftd that runs serves root alone"):
        rootless.check_graftd()


def test_where_the_parent_is(run):
    """As Podman calls a plugin: in a mount namespace in which that directory is empty."""
    need_root()
    (run / "user.sock").touch()
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from graft.engines import rootless; print(rootless.reach_graftd(), os.path.exists(os.environ['GRAFT_RUN_DIR'] + '/user.sock'))"
    script = 'mount -t tmpfs none "$0"; "$@"; true'
    command = ("unshare", "--mount", "sh", "-c", script, run, sys.executable, "-I", "-c", code)
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert told[0].startswith(f"/proc/{os.getpid()}/task/")
    assert told[1] == "True"


def test_nameservers(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").write_text("# none\nsearch example.org\nnameserver 192.0.2.53\nnameserver 2001:db8::53 #\n")
    assert rootless.nameservers(str(tmp_path)) == ["192.0.2.53", "2001:db8::53"]
    assert rootless.nameservers(str(tmp_path / "nowhere")) == []


def test_a_thread_of_the_parent_alone(run):
    """Podman's first thread may be the one that has entered the other mount namespace."""
    need_root()
    (run / "user.sock").touch()
    find = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from graft.engines import rootless; print(rootless.root_of_engine())"
    code = f"""
import subprocess, sys, threading
from graft.kernel import linux
print(threading.get_native_id(), flush=True)
later, done = threading.Event(), threading.Event()
other = threading.Thread(target=lambda: (print(threading.get_native_id(), flush=True), later.set(), done.wait()))
other.start(); later.wait()
linux.unshare(linux.CLONE_NEWNS)
linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
linux.mount("none", {str(run)!r}, "tmpfs", 0)
subprocess.run([sys.executable, "-I", "-c", {find!r}])
done.set()
"""
    command = (sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){code}")
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert told[2] == f"/proc/{told[0]}/task/{told[1]}/root"
