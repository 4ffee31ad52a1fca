"""scripts/steady.py: what fails beside other tests has one more chance by itself, but few do, and never the fence's."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONCE = "def test_{n}(): before = p.exists(); p.touch(); assert before\n"
PASSES = "def test_{n}(): pass\n"
FAILS = "def test_{n}(): assert 0\n"


@pytest.mark.parametrize(
    ("name", "tests", "status", "told"),
    [
        ("test_one.py", [PASSES], 0, ""),
        ("test_one.py", [ONCE, PASSES], 0, "UNSTEADY: test_one.py::test_0"),
        ("test_one.py", [FAILS, PASSES], 1, "again, by itself: test_one.py::test_0"),
        ("test_one.py", [ONCE, FAILS], 1, "again, by itself"),
        ("test_one.py", [FAILS] * 3, 1, ""),
        ("test_peers.py", [ONCE], 1, ""),
        ("test_user_attacks.py", [ONCE], 1, ""),
        ("tests/attack/test_one.py", [ONCE], 1, ""),
        ("tests/kernel/test_one.py", [ONCE], 1, ""),
        ("test_one.py", [], 5, ""),  # pytest found no test
        ("test_one.py", ["nonsense"], 2, ""),  # it was interrupted by an error
    ],
)
def test_who_has_a_second_chance(tmp_path, name, tests, status, told):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = "import pathlib\np = pathlib.Path(__file__).with_suffix('.seen')\n"
    path.write_text(seen + "".join(text.format(n=n) for n, text in enumerate(tests)))
    command = [sys.executable, ROOT / "scripts/steady.py", "--rootdir", ".", "-p", "no:randomly", name]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("UNSTEADY" in done.stdout) == told.startswith("UNSTEADY")
    assert told in done.stdout
    assert ("by itself" in done.stdout) == bool(told)
