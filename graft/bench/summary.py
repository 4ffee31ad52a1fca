"""The summary of a result: one line a case, one figure a peer, and which peer is the best.

The figure is the ratio to the host's own stack, of the first figure that the case has. A passed descriptor is no
network: it is shown, and is never the best, as the host is not. Colours only repeat what the figures and marks say.
"""

import html
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from graft.bench.result import Row

BOUNDS = ("host", "passed")
GOOD, FAIR = 0.95, 0.7  # the least ratios that are shown as good, and as fair
STYLES = {"good": "green", "fair": "yellow", "poor": "red"}
LEGEND = "ratio to the host's own stack: 1.00 is equal, more is better"


class Line(NamedTuple):
    """One case. @best: the peers whose ratio, rounded as it is shown, no other exceeds; none without a rival."""

    case: str
    title: str
    ratios: dict[str, float]
    best: frozenset[str]


def lines(rows: Sequence[Row]) -> list[Line]:
    """The line of each case that has a ratio."""
    found = []
    for row in {row.case: row for row in reversed(rows)}.values():
        pairs = {peer: row.ratios(peer) for peer in row.samples if peer != "host"}
        ratios = {peer: round(statistics.median(each), 2) for peer, each in pairs.items() if each}
        if ratios:
            rivals = {peer: ratio for peer, ratio in ratios.items() if peer not in BOUNDS}
            best = [peer for peer, ratio in rivals.items() if len(rivals) > 1 and ratio == max(rivals.values())]
            found.append(Line(row.case, f"{row.title}, {row.figure}", ratios, frozenset(best)))
    return found[::-1]


def grade(ratio: float) -> str:
    """Return good, fair or poor."""
    return "good" if ratio >= GOOD else "fair" if ratio >= FAIR else "poor"


def _columns(summary: Sequence[Line], peers: Sequence[str]) -> list[str]:
    """The peers that have a figure somewhere, in the order of @peers."""
    return [peer for peer in peers if any(peer in line.ratios for line in summary)]


def table(rows: Sequence[Row], peers: Sequence[str]) -> Table:
    """Return the summary for a terminal, without LEGEND. The best of a line has a star."""
    summary = lines(rows)
    names = _columns(summary, peers)
    found = Table(box=None, padding=(0, 1, 0, 0))
    found.add_column("case")
    for name in names:
        found.add_column(name.replace("-", "-\n").replace("4netns", "4\nnetns"), justify="right", min_width=5)
    for line in summary:
        found.add_row(line.title, *(_cell(line, name) for name in names))
    return found


def _cell(line: Line, peer: str) -> Text:
    if peer not in line.ratios:
        return Text("")
    ratio, best = line.ratios[peer], peer in line.best
    style = STYLES[grade(ratio)]
    return Text(f"{'*' if best else ''}{ratio:.2f}", f"bold {style}" if best else style)


def section(rows: Sequence[Row], peers: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the summary in HTML; a case leads to its bars, the element with its name as id."""
    summary = lines(rows)
    names = _columns(summary, peers)
    if not names:
        return
    yield f'<h2>Summary</h2><p class="soft">The {html.escape(LEGEND)}; ★ the best of a line. The first figure of '
    yield "each case, the median of its pairs.</p>"
    yield '<div class="wide"><table class="summary"><thead><tr><th>case</th>'
    for name in names:
        yield f"<th>{html.escape(name).replace('-', '-<wbr>').replace('4netns', '4<wbr>netns')}</th>"
    yield "</tr></thead><tbody>"
    for line in summary:
        title = html.escape(line.title)
        yield f'<tr><th scope="row"><a href="#{html.escape(line.case)}">{title}</a></th>'
        for name in names:
            yield _html_cell(line, name)
        yield "</tr>"
    yield "</tbody></table></div>"


def _html_cell(line: Line, peer: str) -> str:
    if peer not in line.ratios:
        return "<td></td>"
    ratio = line.ratios[peer]
    if peer in line.best:
        return f'<td class="{grade(ratio)} best">★ {ratio:.2f}</td>'
    return f'<td class="{grade(ratio)}">{ratio:.2f}</td>'
