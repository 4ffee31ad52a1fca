"""Ratios, the report and the stop, from figures that are known."""

import os
import signal
import time

import msgspec
import pytest

from graft.bench import stop as stops
from graft.bench.report import page
from graft.bench.result import FORMAT, Growth, Partial, Result, Row, Skipped
from graft.bench.run import NAMES, Choice
from graft.bench.stop import Stop, Stopped, seconds
from graft.errors import UsageError


def row(better="more", **samples):
    return Row("a-case", "rate", "a <case>", "1/s", better, samples)


def test_ratios_are_of_pairs():
    found = row(host=[100.0, 200.0, 50.0], graft=[90.0, 220.0, 50.0])
    assert found.ratios("graft") == [0.9, 1.0, 1.1]
    assert found.median("graft") == 90.0
    assert found.ratios("docker") == []


def test_a_time_counts_the_other_way_round():
    assert row("less", host=[10.0], graft=[8.0]).ratios("graft") == [1.25]


def test_a_zero_makes_no_ratio():
    assert row(host=[0.0, 2.0], graft=[1.0, 1.0]).ratios("graft") == [0.5]


def test_the_page_escapes_what_it_shows():
    result = Result(
        FORMAT,
        "0",
        "2026-01-01",
        1.0,
        False,
        {"kernel": "<6>"},
        {"host": "the host", "graft": "graft"},
        [row(host=[1.0, 2.0], graft=[1.0, 1.0])],
        [Growth("g", "a & b", 1.5, "us", "<note>")],
        [Skipped("c", "docker", "<script>")],
    )
    text = page(result)
    assert "<script>" not in text
    assert "a &lt;case&gt;" in text
    assert "a &amp; b" in text
    assert text.count("<svg") == 1
    assert text.count("<rect") == 2
    assert '<a href="#a-case">a &lt;case&gt;, rate</a>' in text
    assert '<h2 id="a-case">' in text
    assert 'class="partial"' not in text
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result


def test_what_a_choice_means():
    assert Choice().wants("tcp-in")
    assert Choice(cases=("tcp-in",)).wants("tcp-in")
    assert not Choice(cases=("tcp-in",)).wants("tcp-in-8"), "a whole name is that case alone"
    assert Choice(cases=("http",)).wants("http-1kib-close")
    always = ["host", "graft", "graft-direct", "graft-accel", "graft-local"]
    assert [peer.name for peer in Choice(against=("docker",)).peers()] == [*always, "docker"]
    assert len(NAMES) == len(set(NAMES))


def test_a_partial_run_says_so_on_its_page():
    partial = Partial("<why>", 2, 10, 5)
    rows = [row(host=[1.0, 2.0], graft=[1.0, 1.0])]
    result = Result(FORMAT, "0", "2026-01-01", 1.0, False, {}, {}, rows, [], [], partial)
    text = page(result)
    assert '<p class="partial">partial: 2 of 10 rounds, &lt;why&gt;</p>' in text
    assert '<span class="soft">2 of 5 rounds</span>' in text
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result).partial == partial


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("1.5m", 90), ("1h", 3600)])
def test_seconds(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "s", "soon", "-1s", "0", "nan", "inf", "1d"])
def test_no_seconds(text):
    with pytest.raises(UsageError):
        seconds(text)


@pytest.fixture
def handlers():
    """The signals' handlers are put back."""
    before = {number: signal.getsignal(number) for number in (*stops.SIGNALS, signal.SIGALRM)}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def ending(stop):
    error = stop.error()
    assert error is not None
    return str(error), error.exit_status


def test_a_signal_stops_what_is_breakable(handlers):
    stop = Stop()
    assert (stop.why, stop.error()) == ("", None)
    reached = []

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        reached.append("the end")

    with pytest.raises(Stopped), stop.breakable():
        work()
    os.kill(os.getpid(), signal.SIGINT)  # one is enough
    time.sleep(0.01)
    assert reached == []
    assert stop.why == "interrupted by SIGTERM"
    assert ending(stop) == ("interrupted", 143)


def test_a_signal_is_kept_for_what_is_breakable(handlers):
    stop = Stop()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    assert stop.number == signal.SIGINT
    for _ in range(2):
        with pytest.raises(Stopped), stop.breakable():
            raise AssertionError
    assert ending(stop) == ("interrupted", 130)


def test_a_signal_waits_for_the_start_of_a_process(handlers, monkeypatch):
    done = []

    def start():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.05)
        done.append("started")

    monkeypatch.setattr(stops, "STARTS_PROCESSES", (start.__code__,))
    stop = Stop()

    def work():
        start()
        time.sleep(1)
        done.append("the end")

    with pytest.raises(Stopped), stop.breakable():
        work()
    assert done == ["started"]
    assert ending(stop) == ("interrupted", 129)


def test_the_time_is_up(handlers):
    stop = Stop(0.05)
    began = time.monotonic()
    with pytest.raises(Stopped), stop.breakable():
        time.sleep(5)
    assert time.monotonic() - began < 2
    assert stop.why == "its time was up after 0.05 s"
    assert ending(stop) == ("the time is up: 0.05 s", 124)
