"""graft bench --quick: every case starts, ends and yields its figures; no threshold on any of them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from graft.bench import scale
from graft.bench.cases import CASES
from graft.bench.lab import GRAFT, SLOWNESS, wait_for
from graft.bench.peers import PEERS
from graft.bench.result import FORMAT, Partial, Result
from graft.bench.rootless import ROOTLESS
from tests.conftest import need

UNBUFFERED = {**os.environ, "PYTHONUNBUFFERED": "1"}
pytestmark = pytest.mark.alone


def bench(*words, timeout=60):
    return subprocess.run((GRAFT, "bench", *words), capture_output=True, text=True, timeout=timeout)


@pytest.mark.timeout(420)  # a machine that is busy takes more than two minutes
def test_quick(tmp_path):
    need("iperf3", "nginx", "wrk", "redis-benchmark", "memcslap", "sockperf", "dockerd", "pasta", "slirp4netns", "iptables", "go", "chromium")
    found = bench("--quick", "--json", tmp_path / "r.json", "--out", tmp_path / "r.html", timeout=330)
    assert found.returncode == 0, found.stderr
    result = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Result, strict=True)
    assert (result.format, result.quick) == (FORMAT, True)
    assert result.partial is None
    absent = {kind.name: kind.reason() for kind in PEERS if kind.reason()}
    assert all(skip.case == "" and skip.reason == absent.get(skip.peer) for skip in result.skipped), result.skipped
    assert len({skip.peer for skip in result.skipped}) == len(result.skipped), "a peer that is absent is told once"
    figures = {(row.case, row.figure): row for row in result.rows}
    assert set(figures) == {(case.name, figure) for case in CASES for figure in case.figures}
    for case in CASES:
        for figure in case.figures:
            row = figures[case.name, figure]
            assert {"host", "graft"} <= row.samples.keys()
            assert all(len(samples) == 1 and samples[0] > 0 for samples in row.samples.values()), row
            assert row.ratios("graft")
    serving = {kind.name for kind in PEERS} - {"graft-accel", "graft-local", "passed"} - absent.keys()
    assert set(figures["tcp-in", "rate"].samples) == serving
    assert set(figures["short-out", "rate"].samples) == serving | {"graft-accel"}
    assert set(figures["crr-out-go-8", "rate"].samples) == {"host", "graft"}
    assert set(figures["bystander", "UDP"].samples) == {"host", "graft"}
    assert "graft-local" in figures["near-redis", "GET"].samples
    assert {entry.case for entry in result.growth} == set(scale.CASES)
    assert result.machine["kernel"] == os.uname().release
    opened = open_page(tmp_path / "r.html")
    assert opened.count("<svg") == len(result.rows)
    assert opened.count('<tr><th scope="row">') == len(CASES)
    assert all(found.stdout.count(f"\n{case.title}, {next(iter(case.figures))} ") == 1 for case in CASES), found.stdout


def open_page(path):
    """The page as a browser has it; AssertionError if the browser complains of anything."""
    command = ("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0")
    home = path.parent / "browser"
    shown = subprocess.run(
        (*command, f"--user-data-dir={home}", "--dump-dom", path.as_uri()), capture_output=True, text=True, timeout=90
    )
    shutil.rmtree(home, ignore_errors=True)
    assert shown.returncode == 0, shown.stderr
    assert not re.search(r"CONSOLE|Uncaught|ERR_FILE|Failed to load", shown.stderr), shown.stderr
    return shown.stdout


def test_one_case_against_one(tmp_path):
    found = bench("--quick", "--case", "short-in", "--against", "bridge", "--json", tmp_path / "r.json")
    assert found.returncode == 0, found.stderr
    rows = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Result).rows
    assert [(row.case, sorted(row.samples)) for row in rows] == [("short-in", ["bridge", "graft", "graft-direct", "host"])]
    assert "connections in, 1 client, rate: host" in found.stdout


def test_a_peer_is_measured_or_absent_for_a_reason(tmp_path):
    """What this machine's kernel and packages have of these; and the rows that servers with a passed socket have."""
    kinds = {kind.name: kind.reason() for kind in PEERS if kind.name in ("netkit", "ipvlan", "bypass4netns", "passed")}
    against = [word for name in kinds for word in ("--against", name)]
    cases = ("--case", "crr-in", "--case", "crr-out", "--case", "http-64b-close")
    found = bench("--quick", *cases, *against, "--json", tmp_path / "r.json")
    assert found.returncode == 0, found.stderr
    rows = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Result).rows
    assert {row.case for row in rows} == {"crr-in", "crr-out", "http-64b-close"}
    for name, reason in kinds.items():
        measured = [row.case for row in rows if name in row.samples]
        there = {"crr-in", "crr-out", "http-64b-close"} - ({"crr-out"} if name == "passed" else set())
        assert set(measured) == (set() if reason else there), found.stdout
        assert (f"not measured: {name}: {reason}" in found.stdout.splitlines()) == bool(reason), found.stdout


def test_a_wire_with_a_rate(tmp_path):
    found = bench("--quick", "--case", "tcp-in", "--against", "bridge", "--rate", "500mbit", "--json", tmp_path / "r.json")
    assert found.returncode == 0, found.stderr
    result = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Result)
    (row,) = (row for row in result.rows if row.figure == "rate")
    assert all(0.2 < samples[0] < 0.6 for samples in row.samples.values()), row
    assert "500mbit" in result.machine["wire"]


def present():
    """What laboratories of the benchmark's have on this machine."""
    names = subprocess.run(("ip", "netns", "list"), capture_output=True, text=True).stdout
    places = (*Path("/run").glob("graft-bench-*"), *Path("/sys/fs/bpf").glob("graft-bench-*"))
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"GRAFT_RUN_DIR=/run/graft-bench" in (process / "environ").read_bytes():
                processes.append((process / "cmdline").read_bytes().decode())
    return {line for line in names.split() if "graft-bench" in line} | {str(place) for place in places} | set(processes)


@pytest.fixture
def left():
    """What laboratories have on this machine that was not there before the test: another's remains say nothing of it."""
    before = present()
    return lambda: present() - before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(left, how):
    def clients(ns):
        return subprocess.run(("ip", "netns", "pids", ns), capture_output=True, text=True).stdout.split()

    process = subprocess.Popen((GRAFT, "bench", "--case", "short"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any("/run/graft-bench" in entry for entry in left()), "the laboratory", 20)
    wait_for(lambda: any(clients(entry) for entry in left() if entry.endswith("-c")), "its load", 20)
    process.send_signal(how)
    assert process.wait(60) == 128 + how
    assert process.stderr is not None
    assert process.stderr.read().strip() == "graft: interrupted"
    assert left() == set()


def partial_result(directory):
    """What a stopped run has written: every case has as many samples in every peer, and the page says what it lacks."""
    result = msgspec.json.decode((directory / "r.json").read_bytes(), type=Result, strict=True)
    assert result.partial is not None
    for row in result.rows:
        assert {len(samples) for samples in row.samples.values()} == {row.rounds()}, row
        assert {"host", "graft", "bridge"} <= row.samples.keys()
    figures = {(row.case, row.rounds()) for row in result.rows}
    assert result.partial.rounds == sum(rounds for _, rounds in figures) < result.partial.of
    opened = open_page(directory / "r.html")
    assert opened.count("<svg") == len(result.rows)
    assert opened.count(f'<p class="partial">{result.partial}</p>') == 1
    return result


TWO_CASES = ("--quick", "--case", "short-in", "--case", "short-out", "--rounds", "3", "--against", "bridge")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_measured(left, tmp_path, how):
    need("iptables", "chromium")
    files = ("--json", tmp_path / "r.json", "--out", tmp_path / "r.html")
    process = subprocess.Popen(
        (GRAFT, "bench", *TWO_CASES, *files), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=UNBUFFERED
    )
    assert process.stdout is not None
    assert "connections in, 1 client, rate: host" in process.stdout.readline()
    process.send_signal(how)
    told, complained = process.communicate(timeout=60)
    assert (process.returncode, complained) == (128 + how, "graft: interrupted\n")
    result = partial_result(tmp_path)
    assert result.partial == Partial(f"interrupted by {how.name}", result.partial.rounds, 6, 3)
    assert result.partial.rounds >= 3
    assert told.splitlines()[-1] == f"partial: {result.partial.rounds} of 6 rounds, interrupted by {how.name}"
    assert left() == set()


def test_time_that_is_up_keeps_what_is_measured(left, tmp_path):
    need("iptables", "chromium")
    files = ("--json", tmp_path / "r.json", "--out", tmp_path / "r.html")
    seconds = f"{10 * SLOWNESS:g}"  # enough for the first rounds, also on a busy machine
    one = ("--quick", "--case", "short-in", "--rounds", "1000", "--against", "bridge", "--time", f"{seconds}s")
    found = bench(*one, *files, timeout=60 * SLOWNESS)
    assert (found.returncode, found.stderr) == (124, f"graft: the time is up: {seconds} s\n")
    result = partial_result(tmp_path)
    assert result.partial.why == f"its time was up after {seconds} s"
    assert (result.partial.of, result.partial.of_a_case) == (1000, 1000)
    assert f"{result.partial.rounds} of 1000 rounds" in (tmp_path / "r.html").read_text().partition("<h2>")[2]
    assert str(result.partial) in found.stdout.splitlines()
    assert left() == set()


def test_list():
    listed = bench("--list").stdout
    for name in (*(case.name for case in CASES), *scale.CASES, "docker", "slirp4netns"):
        assert name in listed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--case", "nope"), "no case is named 'nope'"),
        (("--against", "nope"), "no peer is named 'nope'"),
        (("--json", "/nowhere/r.json"), "there is no directory /nowhere"),
        (("--rounds", "0"), "0 is not in the range"),
        (("--time", "soon"), "'soon' is no time (as 90s, 10m or 1h)"),
        (("--rate", "much"), 'illegal value for "rate"'),
    ],
)
def test_bad_choices(words, says):
    found = bench("--quick", *words)
    assert found.returncode in (1, 2)
    assert says in found.stderr
    assert "Traceback" not in found.stderr


def test_what_an_ordinary_user_can_have(tmp_path):
    need("pasta", "slirp4netns", "nginx", "wrk")
    found = bench("--rootless", "--quick", "--case", "http-1kib-close", "--json", tmp_path / "r.json", timeout=120)
    assert found.returncode == 0, found.stderr
    result = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Result)
    absent = {skip.peer: skip.reason for skip in result.skipped}
    assert absent == {kind.name: kind.reason() for kind in ROOTLESS if kind.reason()}
    assert result.rows[0].samples.keys() == {kind.name for kind in ROOTLESS} - absent.keys()
    assert not [path for path in Path("/sys/fs/cgroup").rglob("graft-bench-*") if path.is_dir()]
