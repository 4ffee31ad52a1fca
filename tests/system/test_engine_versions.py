"""docs/engines.md says which versions the tests have run with: those of this system, in its column."""

import re
import subprocess
from pathlib import Path

import pytest

from graft.bench.lab import ROOT
from tests.conftest import need

COLUMNS = {"bookworm": "Debian 12", "trixie": "Debian 13", "forky": "Debian testing"}
NETAVARK = ("/usr/lib/podman/netavark", "/usr/libexec/podman/netavark")


def told(program: str) -> str:
    """The version that a program says it has, without what a distribution adds."""
    need(program)
    out = subprocess.run((program, "--version"), capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+\.\d+(\.\d+)*", out)
    assert found, out
    return found[0]


def test_the_table_has_these_versions():
    system = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    column = COLUMNS.get(system.get("VERSION_CODENAME", "").strip('"'))
    if column is None:
        pytest.skip(f"the table has no column for {system.get('PRETTY_NAME', 'this system')}")
    lines = [line for line in (ROOT / "docs/engines.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    at = rows[0].index(column)
    shown = [row[at] for row in rows[2:] if "without root" not in row[0]]
    podman = told("podman")
    netavark = next((path for path in NETAVARK if Path(path).exists()), None)
    if netavark and "CNI" not in shown[1]:
        podman += f", netavark {told(netavark).rpartition('.')[0]}"
    else:
        podman += ", CNI"
    assert shown == [told("dockerd"), podman, told("containerd"), f"{told('runc')}, {told('crun')}"]
