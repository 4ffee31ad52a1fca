"""The wheels on empty Debian systems without the package: pipx, pip, and the pure one for programs that ask by name."""

import pytest

from graft import __version__
from graft.bench.lab import wait_for

OFFLINE = "--no-index --find-links /packages/wheels"
SERVER = """
import graft
with graft.create_server("ep-http") as server:
    while True:
        client, _ = server.accept()
        with client:
            client.recv(4096)
            client.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nby name\\n")
"""


@pytest.fixture
def equipped(empty):
    """What an administrator has who takes graft from a wheel."""
    empty.told("apt-get -y -q install --no-install-recommends pipx python3-venv iproute2 libbpf1 procps curl")
    return empty


def test_the_wheels(equipped):
    """`pipx install`, without systemd's units: `graft run` starts graftd. A program by name has graft-api alone."""
    empty = equipped
    offline = "PIP_NO_INDEX=1 PIP_FIND_LINKS=/packages/wheels"  # also for what pipx installs for itself
    empty.told(f"{offline} pipx install /packages/new/graft-*.whl")
    path = "PATH=/root/.local/bin:$PATH"
    assert empty.told(f"{path} graft --version") == f"graft {__version__}\n"
    assert "FAIL" not in empty.told(f"{path} graft doctor")
    assert empty.told(f"{path} graft run --name a echo works") == "works\n"
    assert "tcp-in" in empty.told(f"{path} graft bench --list")

    empty.told(f"python3 -m venv /root/venv; /root/venv/bin/pip install -q {OFFLINE} /packages/new/graft_api-*.whl")
    empty.told(f"{path} ip netns exec client ip-graft add ep-http type ipv4 addr 10.77.0.1 port 8080")
    empty.write("/root/server.py", SERVER)
    empty.start("named", "exec nsenter --net=/run/netns/client /root/venv/bin/python3 /root/server.py")
    wait_for(lambda: empty.run("curl -s http://10.77.0.1:8080/").stdout == "by name\n", "the server by name")
    assert not empty.told("find /root/venv -name 'graft-sup*' -o -name '*.bpf.o'")


def test_pip_into_an_environment(equipped):
    equipped.told(f"python3 -m venv /root/venv; /root/venv/bin/pip install -q {OFFLINE} /packages/new/graft-*.whl")
    assert equipped.told("/root/venv/bin/graft run python3 -c 'print(6 * 7)'") == "42\n"
