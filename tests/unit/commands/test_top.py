"""`graft top` on narrow terminals: no number is cut."""

import pytest
from rich.console import Console

from graft.commands import top

ROWS = [
    ("web", 12, 1, 1234.0, 0.0, 34e6, 1.9e6, 0.0, 15.0, 0.004517, 2000000),
    ("a-name-of-many-characters-0123456789", 0, 100, 0, 15.0, 0, 1300.0, 15.0, 30.0, None, 0),
]


def lines(width, sort="traffic"):
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(top._table(ROWS, 1.0, width, sort))
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [200, 132, 100, 81, 80, 66, 60, 48])
@pytest.mark.parametrize("sort", top.SORTS)
def test_whole_numbers(width, sort):
    title, head, web, other = lines(width, sort)
    assert title.startswith("graft top, ")
    assert max(map(len, (head, web, other))) <= width
    assert "…" not in head + web
    assert "…" not in other.split(maxsplit=1)[1]
    assert top.COLUMNS[top.SORTS[sort]] in head


def test_what_stays():
    heads = {width: " ".join(lines(width)[1].split()) for width in (132, 80, 60, 48)}
    assert heads[132] == " ".join(top.COLUMNS)
    assert heads[80] == "CONTAINER OPEN IN OUT RECEIVED/s SENT/s REFUSED/s"
    assert heads[60] == "CONTAINER RECEIVED/s SENT/s REFUSED/s"
    assert heads[48] == "CONTAINER RECEIVED/s SENT/s"
