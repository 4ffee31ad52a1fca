"""What all tests share: where the machine cannot run one, it skips with the reason, or fails in CI."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.bench.lab import ROOT, SLOWNESS, Lab, laboratory, wait_for

# Files whose tests share what is costly to start, or one of which the machine has: they run in one process, in order.
TOGETHER = {
    "tests/attack/test_attacks.py": "attacks",
    "tests/attack/test_matrix.py": "matrix",
    "tests/system/test_cgroups.py": "docker",
    "tests/system/test_cri.py": "containerd",
    "tests/system/test_docker.py": "docker",  # /etc/docker, and dockerd's cgroups
    "tests/system/test_docker_stores.py": "docker",
    "tests/system/test_documents.py": "install",
    "tests/system/test_engine_attacks.py": "docker",
    "tests/system/test_joined.py": "docker",
    "tests/system/test_move_docker.py": "docker",
    "tests/system/test_direct_cri.py": "containerd",
    "tests/system/test_direct_docker.py": "docker",
    "tests/system/test_direct_podman.py": "podman",
    "tests/system/test_policy_learn.py": "nscd",  # /run/nscd
    "tests/system/test_install.py": "install",  # the wheel is built in the tree
    "tests/system/test_netavark.py": "podman",
    "tests/system/test_policy_engines.py": "docker",
    "tests/system/test_policy_podman.py": "podman",
    "tests/system/test_podman.py": "podman",  # /var/lib/containers, /run/netns, and Podman's cgroups
    "tests/system/test_runtimes.py": "runtimes",
    "tests/system/test_swarm.py": "docker",
}
# Files whose tests are done twice, in containers whose sockets are trapped and in direct ones.
BOTH_MODES = {
    "system/test_clients.py",
    "system/test_endpoint_names.py",
    "system/test_family.py",
    "system/test_ioctl.py",
    "system/test_late.py",
    "system/test_log.py",
    "system/test_loopback.py",
    "system/test_low_ports.py",
    "system/test_own_address.py",
    "system/test_peers.py",
    "system/test_policy.py",
    "system/test_policy_learn.py",
    "system/test_policy_names.py",
    "system/test_publish.py",
    "system/test_rate.py",
    "system/test_sockets.py",
    "system/test_stats.py",
}
MUST_WORK = os.environ.get("GRAFT_MUST_WORK") == "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of tests that run side by side, each goes to the next process that is free, those of TOGETHER to the same.

    pytest-xdist's own loadgroup does that by marks, and does not work with pytest 9.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(nodeid.partition("::")[0], nodeid)

    return Scheduling(config, log)


def lack(reason: str) -> None:
    """Skip on a laptop, fail where GRAFT_MUST_WORK=1."""
    if MUST_WORK:
        pytest.fail(f"GRAFT_MUST_WORK is set, and {reason}")
    pytest.skip(reason)


def need(*tools: str) -> None:
    """Programs that a test runs for real."""
    for tool in tools:
        if not shutil.which(tool):
            lack(f"'{tool}' is not installed (make setup-test)")


def need_root() -> None:
    """Namespaces, BPF and cgroups."""
    if os.geteuid() != 0:
        lack("this needs root")


LOG_LINES = 60  # of graftd's, shown with a failure
EMULATED = 10  # GRAFT_SLOWNESS from which on the kernel is taken to be emulated


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show with a failure what graftd has logged: the laboratory is gone when somebody reads of it."""
    report = yield
    if report.failed:
        for one in [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Lab)]:
            with contextlib.suppress(OSError):
                lines = (one.run_dir / "graftd.log").read_text(errors="replace").splitlines()
                report.sections.append(("the end of graftd's log", "\n".join(lines[-LOG_LINES:])))
    return report


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """One laboratory for all tests that leave its graftd alone; nothing may be left when it closes."""
    need_root()
    with laboratory("test") as one:
        if SLOWNESS >= EMULATED:  # a start takes half a minute, and the one that an order starts ends soon after its last
            one.start_daemon()
        yield one


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Do the tests of BOTH_MODES that have a laboratory in both modes."""
    if "/".join(metafunc.definition.path.parts[-2:]) in BOTH_MODES and {"lab", "own_lab"} & set(metafunc.fixturenames):
        metafunc.parametrize("mode", ("off", "on"), ids=("trap", "direct"), indirect=True)


@pytest.fixture(autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """What GRAFT_DIRECT says in the laboratory of a test of BOTH_MODES."""
    if not hasattr(request, "param"):
        yield
        return
    one: Lab = request.getfixturevalue("lab" if "lab" in request.fixturenames else "own_lab")
    before = one.env.get("GRAFT_DIRECT", "")
    one.env["GRAFT_DIRECT"] = request.param
    yield
    one.env["GRAFT_DIRECT"] = before


@pytest.fixture
def own_lab() -> Iterator[Lab]:
    """A laboratory of the test's own, for tests that kill or stop its graftd."""
    need_root()
    with laboratory("own") as one:
        yield one


# On a slow machine the time limits that tests and their programs give to sockets are as many times longer.
PATIENCE = """import socket as _socket
def _patient(sock, seconds, _set=_socket.socket.settimeout): _set(sock, seconds and seconds * {})
_socket.socket.settimeout = _patient
"""


def quick_calls(lab: Lab) -> int:
    """How many calls graft-sup has answered, of all containers."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom graft.client import call; print(call('status')['calls'])"
    return int(lab.host(sys.executable, "-I", "-c", code, check=True).stdout)


def python(code: str) -> tuple[str, ...]:
    """A command that runs @code in the system's Python, which any user may execute."""
    return ("/usr/bin/python3", "-I", "-c", code if SLOWNESS == 1 else PATIENCE.format(SLOWNESS) + code)


# A shell without job control ignores interrupts for what it runs in the background, and that is inherited.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_kill = os.kill


def in_cgroup(cgroup: Path, *argv: Any) -> tuple[str, ...]:
    """A command that enters @cgroup and then executes @argv."""
    return ("sh", "-c", 'echo $$ >"$0/cgroup.procs"; exec "$@"', str(cgroup), *map(str, argv))


def kill(*pids: int) -> None:
    """All at once: a keeper that sees its guard die starts another."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def kill_graftd(lab: Lab, *helpers: int) -> None:
    """Kill graftd, its guard and its keeper, and @helpers with them, so that none starts another."""
    kill(lab.guard_pid(), lab.keeper_pid(), lab.daemon_pid(), *helpers)
    wait_for(lambda: not lab.daemon_pid(), "graftd's end")


def _kill_one(pid: int, number: int) -> None:
    """A process that was looked for and not found is 0, which to kill(2) is this whole process group."""
    assert pid > 0, "there is no process to be killed"
    _kill(pid, number)


os.kill = _kill_one

if SLOWNESS != 1:
    _settimeout, _communicate = socket.socket.settimeout, subprocess.Popen.communicate

    def _patient(sock: socket.socket, seconds: float | None) -> None:
        _settimeout(sock, seconds and seconds * SLOWNESS)

    def _wait_longer(process: subprocess.Popen[Any], text: Any = None, timeout: float | None = None) -> Any:
        return _communicate(process, text, timeout and timeout * SLOWNESS)

    socket.socket.settimeout = _patient  # type: ignore[method-assign,assignment]
    subprocess.Popen.communicate = _wait_longer  # type: ignore[method-assign,assignment]
