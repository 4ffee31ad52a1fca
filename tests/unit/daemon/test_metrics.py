"""The page of metrics: its names by promtool, its two formats by a client's parser, a thousand containers, Grafana's page."""

import json
import re
import subprocess
import time
import tracemalloc
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain

from graft.daemon.metrics import Own, page
from graft.daemon.stats import Stats
from graft.errors import UsageError
from graft.kernel.traffic import Datagrams, Traffic
from graft.rules.where import parse_where
from graft.trap.spent import BOUNDS, Spent
from tests.conftest import need

DASHBOARD = Path(__file__).parents[3] / "contrib/grafana/graft.json"
ODD = 'o"d\\d\n'


def stats(name, number=1):
    spent = Spent()
    for ns in (5_000, 15_000, 15_000, 10**9):
        spent.note(ns)
    refused = {("connect", "outside the egress rules"): 7, ("bind", "no ingress rule"): 1}
    return Stats(name, number, 5, 2, 3, 4, Traffic(10, 20, 3000, 4000, 50, 60), refused, 9, spent, Datagrams(1, 2, 3, 4), 1 << 20, 0)


def text(*found, openmetrics=False):
    return page(list(found), Own(1, 2, 3), openmetrics=openmetrics).decode()


def test_promtool_finds_nothing():
    need("promtool")
    done = subprocess.run(["promtool", "check", "metrics"], input=text(stats("web"), stats("db", 2)), capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_promtool_finds_what_is_wrong():
    need("promtool")
    done = subprocess.run(["promtool", "check", "metrics"], input=text(stats("web")).replace("_total", ""), capture_output=True, text=True)
    assert done.returncode != 0


@pytest.mark.parametrize("openmetrics", [False, True])
def test_it_is_read_again(openmetrics):
    read = read_openmetrics if openmetrics else read_plain
    families = {family.name: family for family in read(text(stats("web"), stats(ODD, 2), openmetrics=openmetrics))}
    received = {sample.labels["container"]: sample.value for sample in families["graft_received_bytes"].samples}
    assert received == {"web": 3000, ODD: 3000}
    connections = {(s.labels["container"], s.labels["direction"]): s.value for s in families["graft_connections"].samples}
    assert connections["web", "in"] == 10
    assert connections["web", "out"] == 20
    spent = [s for s in families["graft_trapped_call_seconds"].samples if s.labels["container"] == "web"]
    buckets = {s.labels["le"]: s.value for s in spent if s.name.endswith("_bucket")}
    assert list(buckets.values()) == [1, 3, 3, 3, 3, 3, 3, 3, 4]
    assert len(buckets) == len(BOUNDS) + 1
    assert next(s.value for s in spent if s.name.endswith("_sum")) == pytest.approx(1.000035)
    assert families["graft_refusals"].type == "counter"


def test_nobody_runs():
    assert "graft_containers 0\n" in text()


def test_a_thousand_containers():
    """The time that is spent on the text; what is read for it, test_stats.py has."""
    found = [stats(f"container-{n}", n) for n in range(1000)]
    best = min(_seconds(lambda: text(*found)) for _ in range(3))
    print(f"1,000 containers: {best * 1000:.0f} ms, {len(text(*found)) / 1e6:.1f} MB")
    assert best < 1
    tracemalloc.start()
    page(found, Own(0, 0, 0), openmetrics=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"memory for the page: {peak / 1e6:.1f} MB")
    assert peak < 5e6


def _seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_the_page_of_grafana_asks_for_what_there_is():
    """Each name in its queries is one of the page's. What Grafana wants of a page is in test_grafana.py."""
    document = json.loads(DASHBOARD.read_text())
    names = {sample.name for family in read_plain(text(stats("web"))) for sample in family.samples}
    asked = set()
    for panel in document["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel["targets"]:
            asked |= set(re.findall(r"\b(?:graft|process)_\w+", target["expr"]))
    asked |= {re.findall(r"graft_\w+", one["query"]["query"])[0] for one in document["templating"]["list"] if "refId" in one["query"]}
    assert asked <= names
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    assert document["schemaVersion"] >= 36


@pytest.mark.parametrize(
    ("where", "public", "error"),
    [
        ("127.0.0.1", False, "is no address"),
        ("127.0.0.1:0", False, "is not a port"),
        ("localhost:9435", False, "is not an IP address"),
        ("0.0.0.0:9435", False, "not on the loopback"),
        ("[::]:9435", False, "not on the loopback"),
        ("192.0.2.1:9435", True, None),
        ("[::1]:9435", False, None),
        ("/run/x.sock", False, None),
    ],
)
def test_where(where, public, error):
    if error is None:
        assert str(parse_where(where, public=public, option="--metrics")) == where
        return
    with pytest.raises(UsageError, match=error):
        parse_where(where, public=public, option="--metrics")
