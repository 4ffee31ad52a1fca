"""What `make release` makes: equal from one commit, complete, and with checksums that are right."""

import hashlib
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from graft import __version__
from tests.packages.conftest import place


@pytest.fixture
def release() -> Path:
    return place() / "new"


def test_two_releases_are_equal(release):
    """Byte for byte, though each was made in a directory of its own."""
    again = release.parent / "again/new"
    names = {path.name for path in release.iterdir()}
    assert names == {path.name for path in again.iterdir()}
    assert [name for name in sorted(names) if (release / name).read_bytes() != (again / name).read_bytes()] == []


def test_it_is_complete(release):
    sums = dict(reversed(line.split("  ")) for line in (release / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in release.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((release / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    kinds = ("graft_*_amd64.deb", "graft-bench_*_all.deb", "graft-*-py3-none-linux_x86_64.whl", "graft-*.tar.gz", "graft_api-*-py3-none-any.whl")
    assert all(len(list(release.glob(kind))) == 1 for kind in kinds)
    assert len(sums) == len(kinds) + len(("CHANGELOG.md", "graft.cdx.json"))


def test_the_licences(release):
    """Each archive has the text of what it is under."""
    for wheel, texts in ("graft-*.whl", ("LICENSE", "LICENSE-GPL-2.0")), ("graft_api-*.whl", ("LICENSE",)):
        with zipfile.ZipFile(next(release.glob(wheel))) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist() if ".dist-info/licenses/" in name]
            assert sorted(names) == list(texts)
    with tarfile.open(next(release.glob("graft-*.tar.gz"))) as archive:
        assert {"LICENSE", "LICENSE-GPL-2.0"} <= {name.partition("/")[2] for name in archive.getnames()}


def test_the_bill_of_materials(release):
    """graft, what it needs, and the licence of each."""
    bill = json.loads((release / "graft.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert (bill["metadata"]["component"]["name"], bill["metadata"]["component"]["version"]) == ("graft", __version__)
    parts = {part["name"]: part for part in bill["components"]}
    assert {"click", "h11", "msgspec", "psutil", "rich"} <= set(parts)
    assert all(part.get("licenses") for part in parts.values())


def test_the_changelogs(release):
    """Both forms have every item of NEWS.md."""
    news = (release.parent / "tree/NEWS.md").read_text()
    kept = (release / "CHANGELOG.md").read_text()
    command = "dpkg-deb --fsys-tarfile {}/graft_*.deb | tar -xO ./usr/share/doc/graft/changelog.gz | zcat"
    assert kept.count("\n- ") == news.count("\n- ")
    shell = ("sh", "-c", command.format(release).replace("changelog.gz", "changelog.Debian.gz"))
    debian = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    assert debian.count("\n  * ") >= news.count("\n- ")
    assert debian.startswith(f"graft ({__version__}")
