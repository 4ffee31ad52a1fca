"""The summary: one line a case, one figure a peer, the best marked, also where nothing has a colour."""

import io
import re

from rich.console import Console

from graft.bench import summary
from graft.bench.result import Row

PEERS = ["host", "graft", "docker", "slirp4netns", "passed"]


def row(case, figure, better="more", **samples):
    return Row(case, figure, f"the {case}", "1/s", better, {"host": [10.0, 10.0, 10.0], **samples})


def told(rows, width=120):
    """The summary as a terminal without colours has it."""
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(summary.table(rows, PEERS))
    return out.getvalue()


def test_a_case_has_one_line_of_its_first_figure():
    rows = [row("a", "rate", graft=[9.0, 11.0, 20.0]), row("a", "CPU", "less", graft=[1.0] * 3), row("b", "p50", "less", graft=[20.0] * 3)]
    assert [(line.case, line.title, line.ratios) for line in summary.lines(rows)] == [
        ("a", "the a, rate", {"graft": 1.1}),
        ("b", "the b, p50", {"graft": 0.5}),
    ]


def test_the_best_is_who_has_the_greatest_figure_that_is_shown():
    (line,) = summary.lines([row("a", "rate", graft=[9.01], docker=[9.04], slirp4netns=[3.0])])
    assert line.best == {"graft", "docker"}, "0.90 and 0.90 are equal to who reads them"


def test_a_bound_is_shown_and_not_the_best():
    (line,) = summary.lines([row("a", "rate", graft=[9.0], docker=[8.0], passed=[12.0])])
    assert line.ratios["passed"] == 1.2
    assert line.best == {"graft"}


def test_who_is_alone_wins_nothing():
    lines = summary.lines([row("a", "rate", graft=[9.0]), row("b", "rate", graft=[9.0], passed=[9.0]), row("c", "rate")])
    assert [line.best for line in lines] == [frozenset(), frozenset()]


def test_no_pair_is_no_figure():
    (line,) = summary.lines([row("a", "rate", graft=[0.0], docker=[5.0])])
    assert line.ratios == {"docker": 0.5}


def test_grades():
    assert [summary.grade(ratio) for ratio in (1.2, 0.95, 0.94, 0.7, 0.69, 0.0)] == ["good", "good", "fair", "fair", "poor", "poor"]


def test_a_terminal_without_colours_says_who_is_best():
    text = told([row("a", "rate", graft=[9.8], docker=[7.0]), row("b", "rate", slirp4netns=[4.0], docker=[6.0])])
    assert re.search(r"the a, rate +\*0\.98 +0\.70 *$", text, re.M), text
    assert re.search(r"the b, rate +\*0\.60 +0\.40 *$", text, re.M), text
    assert "passed" not in text, "a peer without a figure has no column"


def test_colours_repeat_the_grades():
    out = io.StringIO()
    table = summary.table([row("a", "rate", graft=[9.8], docker=[7.5], slirp4netns=[1.0])], PEERS)
    Console(file=out, width=120, force_terminal=True, color_system="standard").print(table)
    for colour, ratio in (("1;32", r"\*0\.98"), ("33", "0\\.75"), ("31", "0\\.10")):
        assert re.search(rf"\x1b\[{colour}m *{ratio}", out.getvalue()), repr(out.getvalue())


def test_all_peers_fit_a_line_where_no_terminal_says_how_wide_it_is():
    from graft.bench.cases import CASES
    from graft.bench.peers import PEERS as KINDS
    from graft.commands.bench import WIDTH

    names = [kind.name for kind in KINDS]
    rows = [
        Row(case.name, next(iter(case.figures)), case.title, "1/s", "more", {name: [1.0] for name in names}) for case in CASES
    ]
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(summary.table(rows, names))
    ends = [line.rstrip() for line in out.getvalue().splitlines()]
    assert sum(line.endswith("1.00") for line in ends) == len(CASES), out.getvalue()
    assert all(any(line.startswith(case.title) for line in ends) for case in CASES)


def test_the_page_has_the_same():
    page = "\n".join(summary.section([row("a", "rate", graft=[9.8], docker=[7.0], passed=[10.0])], PEERS))
    assert '<td class="good best">★ 0.98</td>' in page
    assert '<td class="fair">0.70</td>' in page
    assert '<td class="good">1.00</td>' in page
    assert list(summary.section([row("a", "rate")], PEERS)) == []
