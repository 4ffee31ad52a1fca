"""The report of `graft bench`: one HTML page with bars drawn in SVG, which loads nothing from elsewhere."""

import html
import statistics
from collections.abc import Iterator, Sequence

from graft.bench.result import Result, Row
from graft.bench.summary import section

COLOURS = {
    "host": "#8a8f98",
    "graft": "#0b7a4b",
    "graft-accel": "#3fae6f",
    "graft-local": "#86c441",
    "graft-direct": "#12b886",
    "docker": "#1d63ed",
    "bridge": "#6b9bf5",
    "netkit": "#22a5c9",
    "macvlan": "#b07cd8",
    "ipvlan": "#7d4fb0",
    "pasta": "#e0862c",
    "slirp4netns": "#d1495b",
    "bypass4netns": "#a8323e",
    "passed": "#c9a227",
}
WIDTH, LEFT, BAR, GAP = 900, 120, 14, 4
FULL = 2.0  # the ratio whose bar fills the width

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #6a737d; --line: #d0d7de; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #8b949e; --line: #30363d; --paper: #0d1117; }
}
body {
  font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 1160px; padding: 0 1rem;
}
h1 { font-size: 1.5rem; }
.partial { font-weight: 600; border-left: 4px solid #d1495b; padding-left: .6rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
h3 { font-size: .95rem; margin: 1rem 0 .1rem; font-weight: 600; }
.soft { color: var(--soft); font-weight: 400; }
table { border-collapse: collapse; width: 100%; }
td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); }
.wide { overflow-x: auto; }
.summary { font-size: 13px; white-space: nowrap; }
.summary th { font-weight: 400; text-align: left; padding: .15rem .3rem .15rem 0; }
.summary th, .summary td { border-bottom: 1px solid var(--line); }
.summary thead th { white-space: normal; vertical-align: bottom; text-align: right; font-weight: 600; }
.summary thead th:first-child { text-align: left; }
.summary a { color: inherit; text-decoration: none; }
.summary td { text-align: right; padding: .15rem .3rem; font-variant-numeric: tabular-nums; }
.good { background: #1a7f3733; }
.fair { background: #bf870033; }
.poor { background: #cf222e33; }
.best { font-weight: 700; }
.key span { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
"""


def page(result: Result) -> str:
    """Return the whole page as HTML."""
    return "\n".join(_page(result)) + "\n"


def _page(result: Result) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    yield f"<title>graft bench, {html.escape(result.started)}</title><style>{STYLE}</style></head><body>"
    yield "<h1>graft bench</h1>"
    if result.partial:
        yield f'<p class="partial">{html.escape(str(result.partial))}</p>'
    kind = "quick look, one round" if result.quick else "interleaved rounds"
    yield (
        f"<p>{html.escape(result.started)}, {result.seconds:.0f} s, {kind}. Bars: the ratio to the host's own stack, "
        "pair by pair, its median; the thin line spans the least and the greatest pair. 1.00 is the host; longer is "
        "better, also for times and costs.</p>"
    )
    yield from section(result.rows, list(result.peers))
    yield '<p class="key">'
    for name, title in result.peers.items():
        colour = COLOURS.get(name, "#888")
        mark = f'<i style="background:{colour}"></i>'
        yield f'<span>{mark}{html.escape(name)} <span class="soft">{html.escape(title)}</span></span>'
    yield "</p>"
    for case in dict.fromkeys(row.case for row in result.rows):
        rows = [row for row in result.rows if row.case == case]
        yield f'<h2 id="{html.escape(case)}">{html.escape(rows[0].title)}{_rounds(rows, result)}</h2>'
        for row in rows:
            yield from _chart(row)
    if result.growth:
        yield "<h2>Growth</h2><table>"
        for entry in result.growth:
            yield (
                f"<tr><td>{html.escape(entry.title)}</td><td>{entry.value:.4g} {html.escape(entry.unit)}</td>"
                f'<td class="soft">{html.escape(entry.note)}</td></tr>'
            )
        yield "</table>"
    yield "<h2>Machine</h2><table>"
    for key, value in result.machine.items():
        yield f"<tr><td>{html.escape(key)}</td><td>{html.escape(value or 'not installed')}</td></tr>"
    yield "</table>"
    if result.skipped:
        yield "<h2>Not measured</h2><table>"
        for skip in result.skipped:
            cells = (skip.case, skip.peer, skip.reason)
            yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        yield "</table>"
    yield "</body></html>"


def _rounds(rows: Sequence[Row], result: Result) -> str:
    """How many rounds a case has, where it was stopped before its last."""
    done = max(row.rounds() for row in rows)
    if result.partial is None or done == result.partial.of_a_case:
        return ""
    return f' <span class="soft">{done} of {result.partial.of_a_case} rounds</span>'


def _chart(row: Row) -> Iterator[str]:
    """Yield the lines of one figure's bars."""
    peers = list(row.samples)
    height = len(peers) * (BAR + GAP) + 6
    room = WIDTH - LEFT - 210
    at_one = LEFT + room / FULL
    unit = f'<span class="soft">{html.escape(row.unit)}, {row.better} is better</span>'
    yield f"<h3>{html.escape(row.figure)} {unit}</h3>"
    label = f"{html.escape(row.title)}, {html.escape(row.figure)}"
    yield f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
    for n, peer in enumerate(peers):
        top = n * (BAR + GAP) + 3
        middle = top + BAR / 2
        ratios = row.ratios(peer)
        ratio = statistics.median(ratios) if ratios else 0.0
        length = room * min(ratio, FULL) / FULL
        yield f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{html.escape(peer)}</text>'
        colour = COLOURS.get(peer, "#888")
        yield f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2" fill="{colour}"/>'
        if len(ratios) > 1:
            low, high = (LEFT + room * min(r, FULL) / FULL for r in (ratios[0], ratios[-1]))
            yield f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="currentColor" stroke-width="1.5"/>'
        told = f"{ratio:.2f}" if ratios else "no pair"
        yield f'<text x="{LEFT + room + 12}" y="{middle + 4}">{told}</text>'
        yield f'<text class="soft" x="{LEFT + room + 60}" y="{middle + 4}">{row.median(peer):.5g}</text>'
    yield f'<path d="M{at_one:.1f} 0V{height}" stroke="currentColor" stroke-dasharray="3 3" opacity=".6"/></svg>'
