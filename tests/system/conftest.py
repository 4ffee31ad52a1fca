"""System tests end what they started, each. What several files share stands here: programs, laboratories, engines."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.bench.lab import HOST4, ROOT, Lab, laboratory, wait_for
from tests.conftest import need, need_root
from tests.system.engines import Dockerd
from tests.system.networks import NEIGHBOUR, OWN, STRANGER, Agent, Network


@pytest.fixture(autouse=True)
def _end_what_was_started(request: pytest.FixtureRequest) -> Iterator[None]:
    need_root()
    yield
    lab: Lab | None = next((request.getfixturevalue(n) for n in ("lab",) if n in request.fixturenames), None)
    if lab:
        for process in lab.started:
            lab.end(process)
        lab.started.clear()
        wait_for(lambda: not lab.containers(), "containers to end")


@pytest.fixture(scope="session")
def httpgo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static Go binary, built once for all processes of the test run: it takes the compiler half a minute."""
    need("go")
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "go"
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "httpgo").exists():
            build_httpgo(directory)
    return directory / "httpgo"


def build_httpgo(directory: Path) -> None:
    """Build tests/programs/httpgo.go in @directory."""
    shutil.copy(ROOT / "tests/programs/httpgo.go", directory / "main.go")
    (directory / "go.mod").write_text("module httpgo\n\ngo 1.19\n")
    path = "/usr/bin:/bin:/usr/local/go/bin"
    env = {"PATH": path, "CGO_ENABLED": "0", "HOME": str(directory), "GOFLAGS": "-mod=mod"}
    subprocess.run(
        ("go", "build", "-o", directory / "httpgo", "."), cwd=directory, check=True, timeout=110, env=env
    )
    directory.chmod(0o755)
    directory.parent.chmod(0o755)
    assert "statically linked" in subprocess.run(
        ("file", "-b", directory / "httpgo"), capture_output=True, text=True
    ).stdout or not shutil.which("file")


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A laboratory for the engine of one file."""
    need_root()
    with laboratory(request.module.__name__.rpartition("_")[2]) as one:
        yield one


@pytest.fixture(scope="module")
def docker(host: Lab) -> Iterator[Dockerd]:
    """dockerd in the file's laboratory, with an endpoint ep-keep on the host."""
    need("dockerd", "docker", "containerd", "runc", "busybox")
    host.config.write_text('addresses = ["10.99.1.0/24"]\n')
    host.graft("endpoint", "add", "ep-keep", "type", "ipv4", "addr", HOST4, "port", "8710", check=True)
    engine = Dockerd(host, host.work / "docker")
    try:
        yield engine
    finally:
        engine.stop()
        host.graft("endpoint", "del", "ep-keep")


@pytest.fixture
def gnet(docker: Dockerd) -> Iterator[str]:
    """A network of graft's."""
    docker("network", "create", "-d", docker.driver, "--subnet", "10.79.0.0/24", "gnet")
    yield "gnet"
    running = docker("ps", "-aq").stdout.split()
    if running:
        docker("rm", "-f", *running)
    docker("network", "rm", "gnet")


@pytest.fixture
def no_container_is_left(docker: Dockerd, host: Lab) -> Iterator[None]:
    """Remove Docker's containers after each test."""
    yield
    running = docker("ps", "-aq").stdout.split()
    if running:
        docker("rm", "-f", *running)
    wait_for(lambda: not host.containers(), "the end of all containers")


@pytest.fixture
def network(lab: Lab) -> Iterator[Network]:
    one = Network(lab)
    yield one
    one.close()


@pytest.fixture
def mine(network: Network) -> str:
    """Where the container is that this is about."""
    return network.attach("own", f"{OWN[4]}/24", f"{OWN[6]}/64")


@pytest.fixture
def neighbour(network: Network) -> Agent:
    return network.container(network.attach("own", f"{NEIGHBOUR[4]}/24", f"{NEIGHBOUR[6]}/64"))


@pytest.fixture
def far(lab: Lab, network: Network) -> Iterator[Agent]:
    """Another machine, which has two addresses: one that is sent to, and a stranger's."""
    for family, bits in ((4, 24), (6, 64)):
        lab.client(
            "ip",
            "address",
            "add",
            f"{STRANGER[family]}/{bits}",
            "dev",
            "veth0",
            *(["nodad"] if family == 6 else []),
            check=True,
        )
    yield network.elsewhere(client=True)
    for family, bits in ((4, 24), (6, 64)):
        lab.client("ip", "address", "del", f"{STRANGER[family]}/{bits}", "dev", "veth0", check=True)
