"""`graft top`: what containers do now, by rate, on a screen that goes on."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from graft.client import call
from graft.commands.options import CONTEXT, Seconds
from graft.commands.sockets import amount
from graft.text import plain

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "CONTAINER",
    "OPEN IN",
    "OUT",
    "NEW IN/s",
    "OUT/s",
    "RECEIVED/s",
    "SENT/s",
    "REFUSED/s",
    "CALLS/s",
    "PER CALL",
    "LIMIT",
)
GAP = 2  # columns between two
NAME_LEAST = 20  # characters of a container's name, before a column goes
DISPENSABLE = ((10,), (9,), (8,), (3, 4), (1, 2), (7,))  # of COLUMNS: what goes first where a terminal is narrow
WIDTH = 200  # columns of a table where there is no terminal: every column is there in full
SORTS = {"traffic": 5, "connections": 3, "refused": 7, "calls": 8, "name": 0}


@click.command(context_settings=CONTEXT)
@click.option("-d", "--delay", default=1.0, type=Seconds(0.2, 3600), help="Seconds between two looks.")
@click.option("-n", "--rounds", default=0, type=click.IntRange(0), help="End after so many; 0: on an interrupt.")
@click.option("-s", "--sort", default="traffic", type=click.Choice(list(SORTS)), help="Which first.")
def command(delay: float, rounds: int, sort: str) -> int:
    """Show what containers do, by rate: connections, bytes, refusals, and the calls that graft answers for them.

    \b
    graft top
    graft top -s refused -d 5
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    try:
        if not console.is_terminal:
            wide = Console(highlight=False, width=max(console.width, WIDTH))
            for rows in _looks(delay, rounds, sort):
                wide.print(_table(rows, delay, wide.width, sort))
            return 0
        with Live(_table([], delay, console.width, sort), console=console, screen=True, auto_refresh=False) as live:
            for rows in _looks(delay, rounds, sort):
                shown = rows[: max(console.height - 4, 3)]
                live.update(_table(shown, delay, console.width, sort), refresh=True)
    except KeyboardInterrupt:
        return 0
    return 0


def _looks(delay: float, rounds: int, sort: str) -> Iterator[list[tuple[Any, ...]]]:
    """The rows of each look, @delay seconds after the one before; @rounds of them, 0: without end."""
    before, then = _look()
    done = 0
    while not rounds or done < rounds:
        time.sleep(delay)
        now, at = _look()
        yield rates(before, now, at - then, sort)
        before, then, done = now, at, done + 1


def _look() -> tuple[dict[int, dict[str, Any]], float]:
    found: list[dict[str, Any]] = call("stats", start=False)
    return {one["id"]: one for one in found}, time.monotonic()


def rates(
    before: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]], seconds: float, sort: str
) -> list[tuple[Any, ...]]:
    """A row of numbers in the order of COLUMNS for each container, the greatest by @sort first.

    @before and @now: what `graft stats` has, by the container's number, @seconds apart. The last but one is the mean
    of a call in seconds, None where there was none; the last is the bound of each socket, bytes a second.
    """
    rows: list[tuple[Any, ...]] = []
    for number, one in now.items():
        old = before.get(number, {})

        def grown(field: str, one: dict[str, Any] = one, old: dict[str, Any] = old) -> float:
            return float(one[field] - old.get(field, 0))

        def datagrams(field: str, one: dict[str, Any] = one, old: dict[str, Any] = old) -> float:
            return float(one["udp"][field] - old.get("udp", one["udp"])[field])

        refused = sum(each["count"] for each in one["refused"]) - sum(e["count"] for e in old.get("refused", ()))
        calls = grown("trapped_calls")
        rows.append(
            (
                one["name"],
                one["open_in"],
                one["open_out"],
                grown("accepted") / seconds,
                grown("connected") / seconds,
                (grown("received") + datagrams("bytes_received")) / seconds,
                (grown("sent") + datagrams("bytes_sent")) / seconds,
                refused / seconds,
                calls / seconds,
                grown("trapped_call_seconds") / calls if calls else None,
                one["rate"],
            )
        )
    column = SORTS[sort]
    pair = column in (3, 5)  # both directions
    rows.sort(key=lambda row: row[0] if not column else (-row[column] - (row[column + 1] if pair else 0), row[0]))
    return rows


def _cells(row: tuple[Any, ...]) -> list[str]:
    cells = [plain(row[0]), str(row[1]), str(row[2]), *(f"{rate:.0f}" for rate in row[3:5])]
    cells += [*(amount(rate) for rate in row[5:7]), *(f"{rate:.0f}" for rate in row[7:9])]
    cells.append("-" if row[9] is None else f"{row[9] * 1e6:.0f} us")
    cells.append(f"{amount(row[10])}/s" if row[10] else "-")
    return cells


def fitting(rows: list[list[str]], width: int, sort: str) -> dict[int, int]:
    """The columns that are shown in @width columns of a terminal, and how wide each is.

    A number that is cut is a wrong one. So whole columns go, and never that by which the rows are sorted.
    @rows: cells, in the order of COLUMNS.
    """
    widths = {n: max(len(row[n]) for row in (COLUMNS, *rows)) for n in range(len(COLUMNS))}
    name = min(widths[0], NAME_LEAST)
    room = width - name
    for group in DISPENSABLE:
        if sum(GAP + wide for n, wide in widths.items() if n) > room and SORTS[sort] not in group:
            for n in group:
                del widths[n]
    rest = width - sum(GAP + wide for n, wide in widths.items() if n)
    return {**widths, 0: max(min(widths[0], rest), 1)}


def _table(rows: list[tuple[Any, ...]], delay: float, width: int, sort: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    title = f"graft top, {time.strftime('%H:%M:%S')}, every {delay:g} s"
    table = Table(title=title, box=None, title_justify="left", padding=(0, GAP, 0, 0), pad_edge=False)
    cells = [_cells(row) for row in rows]
    shown = fitting(cells, width, sort)
    for n, wide in shown.items():
        table.add_column(COLUMNS[n], justify="right" if n else "left", no_wrap=True, width=wide)
    for row, texts in zip(rows, cells, strict=True):
        table.add_row(*(Text(texts[n]) for n in shown), style="bold red" if row[7] else "")
    return table
