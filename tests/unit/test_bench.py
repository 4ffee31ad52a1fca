"""Ratios and the report, from figures that are known."""

import msgspec

from graft.bench.report import page
from graft.bench.result import FORMAT, Growth, Result, Row, Skipped
from graft.bench.run import NAMES, Choice


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
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result


def test_what_a_choice_means():
    assert Choice().wants("tcp-in")
    assert Choice(cases=("tcp-in",)).wants("tcp-in")
    assert not Choice(cases=("tcp-in",)).wants("tcp-in-8"), "a whole name is that case alone"
    assert Choice(cases=("http",)).wants("http-1kib-close")
    assert [peer.name for peer in Choice(against=("docker",)).peers()] == ["host", "graft", "graft-accel", "graft-local", "docker"]
    assert len(NAMES) == len(set(NAMES))
