"""Addresses on lo end with who has them, however that ends, and whatever has become of graftd."""

import json
import os
import signal

import pytest

from graft.bench.lab import GRAFT, GRAFTD, wait_for
from graft.rules.address import parse_address
from graft.rules.slices import in_slices
from tests.conftest import kill_graftd
from tests.system.cri import cni

ADDRESSES = ("10.88.0.5", "fd00::5")


def on_lo(lab):
    """The addresses on lo, without its own and those of slices, of which a direct container has one."""
    told = json.loads(lab.host("ip", "-j", "address", "show", "dev", "lo").stdout)
    found = {entry["local"] for entry in told[0]["addr_info"]} - {"127.0.0.1", "::1"}
    return {address for address in found if not in_slices(parse_address(address))}


def container(lab, *addresses):
    """A container that has addresses of its own, and its process."""
    words = [word for address in addresses or ADDRESSES for word in ("--ip", address)]
    process = lab.spawn_graft("--name", "web", *words, "sleep", "100")
    wait_for(lambda: lab.containers() == ["web"], "the container")
    assert on_lo(lab) >= set(addresses or ADDRESSES)
    return process


def gone(lab, *kept):
    wait_for(lambda: on_lo(lab) == {KEPT, *kept}, "the end of the addresses")


def kill_all(lab):
    """All of graft's processes at once, so that nobody starts another."""
    kill_graftd(lab, *lab.helper_pids())
    wait_for(lambda: not lab.guard_pid(), "their end")


def sweepers(lab):
    told = lab.host("pgrep", "-af", "graft-sweep").stdout.splitlines()
    return [line for line in told if str(lab.run_dir) in line]


KEPT = "10.88.2.1"  # the administrator has put it there


@pytest.fixture
def host(own_lab):
    own_lab.host("ip", "address", "add", f"{KEPT}/32", "dev", "lo", check=True)
    yield own_lab
    own_lab.host("ip", "address", "del", f"{KEPT}/32", "dev", "lo", check=True)


def test_the_container_is_killed(host):
    container(host).kill()
    gone(host)


def test_a_start_that_fails_half_way(host):
    process = container(host, "10.88.0.5")
    host.refused((GRAFT, "run", "--ip", "fd00::7", "--ip", "10.88.0.5", "true"), 1, "10.88.0.5 is the address of container 'web'")
    host.refused((GRAFT, "run", "--ip", "fd00::7", "-p", "x", "true"), 2, "")
    assert on_lo(host) == {KEPT, "10.88.0.5"}
    host.end(process)
    gone(host)


@pytest.mark.parametrize("first", ["graftd", "the container"])
def test_graftd_is_killed(host, first):
    process, before = container(host), host.daemon_pid()
    if first == "graftd":
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: host.daemon_pid() not in (0, before) and host.containers() == ["web"], "the next graftd")
        assert on_lo(host) == {KEPT, *ADDRESSES}
        process.kill()
    else:
        os.kill(before, signal.SIGSTOP)
        process.kill()
        process.wait()
        os.kill(before, signal.SIGKILL)
    gone(host)


def test_graftd_is_replaced(host):
    process = container(host)
    host.host(GRAFTD, "--replace", check=True)
    wait_for(lambda: host.containers() == ["web"], "the next graftd")
    assert on_lo(host) == {KEPT, *ADDRESSES}
    process.kill()
    gone(host)
    assert not sweepers(host)


@pytest.mark.parametrize("state", ["kept", "lost", "unreadable"])
def test_all_of_graft_is_killed(host, state):
    """Nobody is left to remove them: the next graftd does, whatever it finds of the last one's state."""
    process = container(host)
    kill_all(host)
    process.kill()
    process.wait()
    assert on_lo(host) == {KEPT, *ADDRESSES}
    if state == "lost":
        (host.run_dir / "state.json").unlink()
    elif state == "unreadable":
        (host.run_dir / "state.json").write_text("{")
    host.graft("run", "true", check=True)
    gone(host)


@pytest.mark.parametrize("how", ["--stop --force", "SIGTERM"])
def test_graftd_is_ended_while_the_container_runs(host, how):
    """The container goes on at its address; a shell waits for its end."""
    process = container(host)
    if how == "SIGTERM":
        os.kill(host.daemon_pid(), signal.SIGTERM)
    else:
        host.host(GRAFTD, *how.split(), check=True)
    wait_for(lambda: not (host.run_dir / "graftd.sock").exists(), "graftd's end")
    assert on_lo(host) == {KEPT, *ADDRESSES}
    assert len(sweepers(host)) == 1
    process.kill()
    process.wait()
    gone(host)
    wait_for(lambda: not sweepers(host), "the shell's end")
    host.graft("run", "true", check=True)  # what is left of the container in state.json is taken away


def test_the_next_graftd_knows_them(host):
    process = container(host)
    host.host(GRAFTD, "--stop", "--force", check=True)
    wait_for(lambda: not (host.run_dir / "graftd.sock").exists(), "graftd's end")
    host.graft("run", "true", check=True)
    wait_for(lambda: not sweepers(host), "the shell's end")
    assert on_lo(host) == {KEPT, *ADDRESSES}
    process.kill()
    gone(host)


def test_members_of_networks(host, tmp_path):
    """An attachment without a container: graftd does not end for it, and takes its address along if it has to."""
    name = f"{host.tag}-at"
    host.graft("endpoint", "add", "keeps", "type", "local", check=True)  # graftd, that is
    host.host("ip", "netns", "add", name, check=True)
    ipam = {"type": "host-local", "subnet": "10.98.7.0/24", "dataDir": str(tmp_path)}
    config = {"cniVersion": "1.0.0", "name": "n", "type": "graft-cni", "ipam": ipam}
    try:
        status, told = cni(host, "ADD", config, CNI_NETNS=f"/run/netns/{name}", CNI_ARGS="IgnoreUnknown=1;K8S_POD_NAME=db")
        assert status == 0, told
        assert on_lo(host) == {KEPT, "10.98.7.2", "10.98.7.1"}  # its own, and the resolver's
        host.graft("endpoint", "del", "keeps", check=True)
        host.refused((GRAFTD, "--stop"), 1, "1 members of engines' networks: db (n) (end their containers first, or")
        code = "from graft.commands.engine import check_unused; check_unused('containerd')"
        python = (GRAFT.parent.parent / ".venv/bin/python3", "-c", code)
        assert "1 of containerd's use graft: db (n)" in host.host(*python, cwd=GRAFT.parent.parent).stderr
        host.host(GRAFTD, "--stop", "--force", check=True)
        gone(host)
        wait_for(lambda: not host.pins().exists(), "graftd's end")
        assert not host.host(*python, cwd=GRAFT.parent.parent).stderr
    finally:
        host.host("ip", "netns", "del", name, check=True)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_container_on_a_network(host, tmp_path, how):
    """The resolver's address ends as well: with graftd, or by the next one."""
    name = f"{host.tag}-at"
    host.graft("endpoint", "add", "keeps", "type", "local", check=True)
    host.host("ip", "netns", "add", name, check=True)
    ipam = {"type": "host-local", "subnet": "10.98.7.0/24", "dataDir": str(tmp_path)}
    config = {"cniVersion": "1.0.0", "name": "n", "type": "graft-cni", "ipam": ipam}
    try:
        status, told = cni(host, "ADD", config, CNI_NETNS=f"/run/netns/{name}")
        assert status == 0, told
        process = host.spawn_graft("--netns", name, "--name", "web", "sleep", "100")
        wait_for(lambda: host.containers() == ["web"], "the container")
        if how == "killed":
            kill_all(host)
        else:
            host.host(GRAFTD, "--stop", "--force", check=True)
            wait_for(lambda: not (host.run_dir / "graftd.sock").exists(), "graftd's end")
            assert on_lo(host) == {KEPT, "10.98.7.2"}
            process.kill()
            process.wait()
            gone(host)
        host.graft("endpoint", "show", check=True)
        wait_for(lambda: on_lo(host) == {KEPT, "10.98.7.2", "10.98.7.1"} or how == "stopped", "the next graftd")
        process.kill()
        process.wait()
        host.graft("endpoint", "del", "keeps", check=True)
        assert cni(host, "DEL", config, CNI_NETNS="") == (0, None)
        gone(host)
    finally:
        host.host("ip", "netns", "del", name, check=True)
