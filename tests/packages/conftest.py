"""The systems that scripts/packages.sh has made, one of each suite for each test that asks for one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import lack, need_root
from tests.packages.system import System

SUITES = ("bookworm", "trixie")


def place() -> Path:
    """The directory with the systems, and the packages in `new` and `old`."""
    need_root()
    told = os.environ.get("GRAFT_PACKAGES")
    if not told:
        lack("there are no packages here (make test-packages makes them)")
    return Path(str(told))


@contextlib.contextmanager
def booted(suite: str) -> Iterator[System]:
    where = place()
    system = System(where / suite / "root", where)
    try:
        yield system
    finally:
        system.end()


@pytest.fixture(params=SUITES)
def empty(request: pytest.FixtureRequest) -> Iterator[System]:
    """A Debian that has booted, without graft."""
    with booted(request.param) as system:
        yield system


@pytest.fixture(scope="module", params=SUITES)
def installed(request: pytest.FixtureRequest) -> Iterator[System]:
    """One for all tests of a file: an empty Debian on which apt has installed the package, as the README says."""
    with booted(request.param) as system:
        system.told("apt-get -y -q install /packages/new/graft_*.deb")
        yield system
