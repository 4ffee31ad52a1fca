"""Which peers there are, which are absent for which reason, and in which cases each takes part."""

import subprocess

import pytest

from graft.bench import networks, peer
from graft.bench.cases import CASES
from graft.bench.peers import PEERS
from graft.bench.result import Skipped
from graft.bench.rootless import ROOTLESS
from graft.bench.run import Choice, Field, Run, case_rows
from graft.rules.request import SETTINGS

KINDS = {kind.name: kind for kind in PEERS}
OUT = {case.name for case in CASES if "-out" in case.name and not case.name.startswith("tcp-")}
GO = {name for name in OUT if "-go" in name}


def test_names_are_unique():
    assert len(KINDS) == len(PEERS)
    assert {"graft-direct", "bypass4netns", "ipvlan", "netkit", "passed"} <= KINDS.keys()


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.needs])
def test_a_peer_without_its_programs_says_which(name, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert KINDS[name].reason() == f"not installed: {', '.join(KINDS[name].needs)}"


def test_direct_is_there_where_graft_run_has_it(monkeypatch):
    without = tuple(setting for setting in SETTINGS if "--direct" not in setting.options)
    monkeypatch.setattr(peer, "SETTINGS", without)
    assert peer.Direct.reason() == "this graft has no --direct"
    monkeypatch.setattr(peer, "SETTINGS", (*without, SETTINGS[0]._replace(options=("--direct",))))
    assert peer.Direct.reason() == ""


@pytest.fixture
def system(tmp_path, monkeypatch):
    """ip(8) and unshare(1) of another system; reason() is asked anew."""

    def become(kinds, said):
        for name, text in (("ip", f"TYPE := {{ {kinds} }}"), ("unshare", said), ("iptables", "")):
            (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}' >&2\n")
            (tmp_path / name).chmod(0o755)
        networks._lacks_device.cache_clear()

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    yield become
    networks._lacks_device.cache_clear()


@pytest.mark.parametrize("kind", ["macvlan", "ipvlan", "netkit"])
def test_a_device_is_lacking_in_ip_or_in_the_kernel(kind, system):
    system("bridge | veth", "")
    assert KINDS[kind].reason() == f"ip(8) of this system knows no {kind}"
    for said in ("Error: Unknown device type.", "RTNETLINK answers: Operation not supported"):
        system(f"bridge | {kind} | veth", said)
        assert KINDS[kind].reason() == f"this kernel has no {kind}"
    for said in ("", "RTNETLINK answers: Invalid argument", "unshare failed: Operation not permitted"):
        system(f"bridge | {kind} | veth", said)
        assert KINDS[kind].reason() == ""


def taking_part(name, **choice):
    """The cases in which the peer @name takes part."""
    run = Run(Choice(**choice), None, None)  # type: ignore[arg-type] # neither is asked
    return {case.name for case in CASES if Field(None, run)._takes_part(case, name)}  # type: ignore[arg-type]


def test_in_which_cases_a_peer_takes_part():
    everywhere = {case.name for case in CASES if not case.peers}
    near = {case.name for case in CASES if case.name.startswith("near-")}
    assert taking_part("host") == taking_part("graft") == taking_part("graft-direct") == everywhere | near
    assert taking_part("bypass4netns") == taking_part("ipvlan") == taking_part("netkit") == everywhere
    assert taking_part("graft-local") == near
    assert taking_part("graft-accel") == OUT - GO, "it is for sockets that a dynamic program makes"
    passed = taking_part("passed")
    assert {"short-in", "short-in-8", "crr-in", "crr-in-8", "http-1kib-close"} <= passed
    assert not passed & OUT, "it has no network to dial out by"
    three = {"tcp-in", "http-1kib-close", "short-out"}
    assert taking_part("bypass4netns", quick=True) == taking_part("graft-direct", quick=True) == three
    assert taking_part("graft", quick=True) == everywhere | near
    assert taking_part("ipvlan", quick=True, cases=("crr",)) == everywhere


def test_connections_have_a_row_for_each_client_and_program():
    names = {case.name for case in CASES}
    for kind in ("short-out", "crr-out"):
        assert {kind, f"{kind}-8", f"{kind}-go", f"{kind}-go-8"} <= names
    tools = {case.name: case.tools for case in CASES}
    assert all(tools[name] == (("go",) if name in GO else ("cc",)) for name in OUT)
    assert len(GO) == 4


def test_a_row_without_its_program_is_absent_for_that_reason(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    run = Run(Choice(), None, None)  # type: ignore[arg-type] # neither is asked
    field = Field(None, run)  # type: ignore[arg-type]
    for case in CASES:
        rows = case_rows(case)
        field.measure(case, rows)
        assert not any(row.samples for row in rows)
    assert field.skipped == [Skipped(case.name, "", f"not installed: {', '.join(case.tools)}") for case in CASES]
    assert Skipped("crr-out-go", "", "not installed: go") in field.skipped


def test_every_case_can_be_set_up_or_is_measured_at_once():
    for case in CASES:
        assert (case.setup is None) != (case.abreast is None), case.name
        assert set(case.peers) | set(case.also) <= KINDS.keys(), case.name


def test_a_passed_socket_is_the_third_descriptor_of_the_process_itself():
    code = "import os, socket; s = socket.socket(fileno=3); print(s.getsockname()[1], s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN), os.environ['LISTEN_PID'] == str(os.getpid()), os.environ['LISTEN_FDS'])"
    command = ("/usr/bin/python3", "-I", "-c", networks.Passed.code, "0", "/usr/bin/python3", "-I", "-c", code)
    told = subprocess.run(command, capture_output=True, text=True)
    assert (told.stdout.split()[1:], told.stderr) == (["1", "True", "1"], "")


def test_an_ordinary_user_has_the_same_rows_with_other_peers():
    assert [kind.name for kind in Choice(rootless=True).peers()] == ["host", "graft", "pasta", "slirp4netns", "bypass4netns"]
    assert [kind.name for kind in Choice(rootless=True, against=("pasta",)).peers()] == ["host", "graft", "pasta"]
    run = Run(Choice(rootless=True), None, None)  # type: ignore[arg-type] # neither is asked
    assert {case.name for case in run.cases} == {case.name for case in CASES if case.setup}
    assert not run.growing
    by_root = {kind.name for kind in PEERS}
    assert all(kind.name in by_root and kind.__name__.startswith("Rootless") for kind in ROOTLESS)
