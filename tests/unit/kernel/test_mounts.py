"""mountinfo as the kernel writes it: escapes, names in any encoding, a mount without a source."""

import os
from pathlib import Path

import pytest

from graft.kernel.mounts import Mount, mounts_of

LINE = b"36 25 0:31 %b %b rw,relatime shared:7 - %b %b rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("written", "place"),
    [
        (b"/sys", "/sys"),
        (rb"/a\040b\134\011", "/a b\\\t"),
        ("/données/ü".encode(), "/données/ü"),
        (b"/a\xc2\xa0b\x0b", "/a\xa0b\x0b"),
        (b"/\xff", os.fsdecode(b"/\xff")),
        (b"/-", "/-"),
    ],
)
def test_place_is_that_of_the_kernel(written: bytes, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = LINE % (b"/", b"/before", b"proc", b"proc") + LINE % (b"/x", written, b"cgroup2", b"")
    monkeypatch.setattr(Path, "read_bytes", lambda path: text if str(path) == "/proc/7/mountinfo" else b"")
    options = ("rw", "nsdelegate")
    assert mounts_of(7) == [Mount("/before", "proc", "/", options, 31), Mount(place, "cgroup2", "/x", options, 31)]
