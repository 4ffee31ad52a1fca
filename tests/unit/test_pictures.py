"""The ten pictures: as scripts/pictures.py draws them, well-formed, each on the page with words for who does not see it."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from scripts import pictures
from scripts.pictures import DIRECTORY, PICTURES, WIDTH, Picture

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/pictures.md").read_text()


def test_they_are_as_they_are_drawn():
    done = subprocess.run((sys.executable, pictures.__file__), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.stem for path in DIRECTORY.iterdir()} == PICTURES.keys()


def test_the_page_shows_each_in_order():
    shown = re.findall(r"^!\[([^]]+)\]\(pictures/([\w-]+)\.svg\)$", PAGE, re.M)
    assert [name for _, name in shown] == list(PICTURES)
    assert all(len(words) > 40 for words, _ in shown)
    assert len(PICTURES) == len(re.findall(r"^## \d+\. ", PAGE, re.M)) == 10


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_whole(name):
    drawn = ET.fromstring((DIRECTORY / f"{name}.svg").read_text())
    _, _, width, height = map(int, drawn.attrib["viewBox"].split())
    assert width == WIDTH
    for rect in drawn.iter("{http://www.w3.org/2000/svg}rect"):
        x, y = int(rect.get("x", 0)), int(rect.get("y", 0))
        assert 0 <= x <= x + int(rect.attrib["width"]) <= width
        assert 0 <= y <= y + int(rect.attrib["height"]) <= height
    for text in drawn.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 < int(text.attrib["y"]) < height
    assert "http" not in (DIRECTORY / f"{name}.svg").read_text().replace("http://www.w3.org/2000/svg", "").replace("http://10.88", "")


@pytest.mark.parametrize(
    "draw",
    [
        lambda p: p.words(700, 20, "a line that leaves the page"),
        lambda p: p.box("box", 10, 10, 60, 40, "more than fits"),
        lambda p: p.box("box", 10, 10, 60, 40, "1", "2", "3"),
    ],
)
def test_what_does_not_fit_is_an_error(draw):
    with pytest.raises(ValueError, match="picture"):
        draw(Picture("picture", 100))
