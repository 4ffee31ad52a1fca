"""graft bench --quick: every case starts, ends and yields its figures; no threshold on any of them."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from graft.bench import scale
from graft.bench.cases import CASES
from graft.bench.lab import GRAFT, wait_for
from graft.bench.result import FORMAT, Result
from tests.conftest import need


def bench(*words, timeout=60):
    return subprocess.run((GRAFT, "bench", *words), capture_output=True, text=True, timeout=timeout)


def test_quick(tmp_path):
    need("iperf3", "nginx", "wrk", "redis-benchmark", "memcslap", "sockperf", "dockerd", "pasta", "slirp4netns", "iptables", "chromium")
    found = bench("--quick", "--json", tmp_path / "r.json", "--out", tmp_path / "r.html", timeout=400)
    assert found.returncode == 0, found.stderr
    result = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Result, strict=True)
    assert (result.format, result.quick) == (FORMAT, True)
    assert result.skipped == []
    figures = {(row.case, row.figure): row for row in result.rows}
    assert set(figures) == {(case.name, figure) for case in CASES for figure in case.figures}
    for case in CASES:
        for figure in case.figures:
            row = figures[case.name, figure]
            assert {"host", "graft"} <= row.samples.keys()
            assert all(len(samples) == 1 and samples[0] > 0 for samples in row.samples.values()), row
            assert row.ratios("graft")
    assert set(figures["tcp-in", "rate"].samples) == {"host", "graft", "docker", "bridge", "macvlan", "pasta", "slirp4netns"}
    assert "graft-accel" in figures["short-out", "rate"].samples
    assert "graft-local" in figures["near-redis", "GET"].samples
    assert {entry.case for entry in result.growth} == set(scale.CASES)
    assert result.machine["kernel"] == os.uname().release
    opened = open_page(tmp_path / "r.html")
    assert opened.count("<svg") == len(result.rows)


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
    assert [(row.case, sorted(row.samples)) for row in rows] == [("short-in", ["bridge", "graft", "host"])]
    assert "connections in, 1 client, rate: host" in found.stdout


def test_a_wire_with_a_rate(tmp_path):
    found = bench("--quick", "--case", "tcp-in", "--against", "bridge", "--rate", "500mbit", "--json", tmp_path / "r.json")
    assert found.returncode == 0, found.stderr
    result = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Result)
    (row,) = (row for row in result.rows if row.figure == "rate")
    assert all(0.2 < samples[0] < 0.6 for samples in row.samples.values()), row
    assert "500mbit" in result.machine["wire"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(how):
    def left():
        names = subprocess.run(("ip", "netns", "list"), capture_output=True, text=True).stdout
        places = (*Path("/run").glob("graft-bench-*"), *Path("/sys/fs/bpf").glob("graft-bench-*"))
        return [line for line in names.split() if "graft-bench" in line] + [str(place) for place in places]

    process = subprocess.Popen((GRAFT, "bench", "--case", "short"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any("/run/graft-bench" in entry for entry in left()), "the laboratory", 20)
    time.sleep(3)
    process.send_signal(how)
    assert process.wait(60) == 130
    assert process.stderr is not None
    assert process.stderr.read().strip() == "graft: interrupted"
    assert left() == []


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
        (("--rate", "much"), 'illegal value for "rate"'),
    ],
)
def test_bad_choices(words, says):
    found = bench("--quick", *words)
    assert found.returncode in (1, 2)
    assert says in found.stderr
    assert "Traceback" not in found.stderr
