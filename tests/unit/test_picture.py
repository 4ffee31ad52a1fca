"""docs/processes.svg in a real browser: well-formed, legible in both colour schemes, and it names every process."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.conftest import need

ROOT = Path(__file__).parent.parent.parent
PICTURE = ROOT / "docs/processes.svg"
SVG = "{http://www.w3.org/2000/svg}"
PROCESSES = ("target", "graft-sup NAME", "graftd", "graft-keeper", "graft-guard")
SOCKETS = ("graftd, user.sock", "agent.sock", "helpers.sock", "Docker's plugin", "resolver")
CONTRAST = 4.5  # WCAG 2.1, success criterion 1.4.3

# every text with its box on the screen, the box of the shape that it stands in, and both colours
MEASURE = """
<!doctype html><meta charset="utf-8"><body style="margin:0">%s<pre id="measured"></pre><script>
const svg = document.querySelector("svg");
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const texts = [...svg.querySelectorAll("text")].map(text => {
  const around = text.parentNode === svg ? svg.querySelector(".page") : text.parentNode.querySelector("rect");
  const fill = getComputedStyle(around).fill;
  const behind = fill === "none" ? getComputedStyle(svg.querySelector(".page")).fill : fill;
  return {text: text.textContent, box: box(text), around: box(around), ink: getComputedStyle(text).fill, behind};
});
document.getElementById("measured").textContent = JSON.stringify({svg: box(svg), texts});
</script>
"""


def tree():
    return ET.fromstring(PICTURE.read_text())


def measured(tmp_path, scheme):
    """What chromium makes of it; AssertionError if it complains. @scheme: 0 dark, 1 light (blink's numbers)."""
    need("chromium")
    page = tmp_path / "picture.html"
    page.write_text(MEASURE % PICTURE.read_text())
    home = tmp_path / "browser"
    command = ("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--window-size=1200,800")
    shown = subprocess.run(
        (*command, f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={home}", "--dump-dom", page.as_uri()),
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    shutil.rmtree(home, ignore_errors=True)
    assert shown.returncode == 0, shown.stderr
    assert not re.search(r"CONSOLE|Uncaught|ERR_FILE|Failed to load", shown.stderr), shown.stderr
    return json.loads(html.unescape(shown.stdout.partition('<pre id="measured">')[2].partition("</pre>")[0]))


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def inside(box, around):
    return box[0] >= around[0] and box[1] >= around[1] and box[2] <= around[2] and box[3] <= around[3]


def test_it_names_every_process_and_socket():
    names = [text.text for text in tree().iter(f"{SVG}text") if text.get("class") == "name"]
    assert set(PROCESSES) <= set(names)
    assert "journal" in names
    sockets = [group.findtext(f"{SVG}text") for group in tree().iter(f"{SVG}g") if "socket" in (group.get("class") or "").split()]
    assert sockets == list(SOCKETS)


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_it_is_legible_in_a_browser(tmp_path, scheme):
    found = measured(tmp_path, scheme)
    assert len(found["texts"]) == len(list(tree().iter(f"{SVG}text")))
    for text in found["texts"]:
        assert (luminance(text["ink"]) > luminance(text["behind"])) is (scheme == 0), text
        assert inside(text["box"], found["svg"]), text
        assert inside(text["box"], text["around"]), text
        bright, dark = sorted((luminance(text["ink"]), luminance(text["behind"])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= CONTRAST, text


def test_it_is_shown_where_one_looks():
    for name in ("README.md", "docs/design.md"):
        assert re.search(r"!\[[^\]]+\]\((docs/)?processes\.svg\)", (ROOT / name).read_text()), name
