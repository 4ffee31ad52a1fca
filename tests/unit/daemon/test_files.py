"""The administrator's files: when a change is taken, and what a fault costs."""

import os
import shutil
import time

import pytest

from graft import toml
from graft.daemon import files
from graft.daemon.files import Group
from graft.errors import Failure
from graft.rules.configuration import read_endpoints


class Taken:
    """What a file says; "bad" is a fault."""

    def __init__(self, path):
        self.path = path
        self.texts = []

    def __call__(self, opened):
        text = "".join(os.pread(descriptor, 100, 0).decode() for descriptor in opened.values())
        if "bad" in text:
            raise Failure(f"{self.path}, line 1: bad")
        self.texts.append(text)


@pytest.fixture
def at(tmp_path):
    return tmp_path / "etc" / "endpoints.toml"


@pytest.fixture
def taken(at):
    return Taken(at)


@pytest.fixture
def file(at, taken):
    return Group(lambda: [at], taken)


def settle(file):
    """Two looks: one that sees a change, one that finds it at rest."""
    file.look()
    file.look()


def test_what_does_not_change_is_not_read(file, taken):
    settle(file)
    assert taken.texts == []


def test_a_directory_that_is_made_later(file, taken, at):
    at.parent.mkdir()
    at.write_text("a")
    file.look()
    assert taken.texts == [], "it may not be whole yet"
    file.look()
    settle(file)
    assert taken.texts == ["a"]


def test_it_is_replaced_and_removed(file, taken, at):
    at.parent.mkdir()
    at.write_text("a")
    settle(file)
    at.with_suffix(".new").write_text("b")
    at.with_suffix(".new").rename(at)
    settle(file)
    at.unlink()
    settle(file)
    assert taken.texts == ["a", "b", ""]


def test_removed_and_made_anew_is_one_change(file, taken, at):
    """install(1) does so: nobody is to lose an endpoint for that moment."""
    at.parent.mkdir()
    at.write_text("a")
    settle(file)
    at.unlink()
    file.look()
    at.write_text("b")
    settle(file)
    assert taken.texts == ["a", "b"]


def test_it_is_not_read_while_somebody_writes(file, taken, at):
    at.parent.mkdir()
    at.write_text("a")
    settle(file)
    with at.open("w") as writer:
        writer.write("b")
        writer.flush()
        for _ in range(5):
            file.look()
        assert taken.texts == ["a"], "it was empty, and then half of it was there"
        writer.write("c")
    settle(file)
    assert taken.texts == ["a", "bc"]


def test_a_file_that_is_held_is_told(file, taken, at, caplog):
    at.parent.mkdir(exist_ok=True)
    at.write_text("a")
    with at.open("a"):
        for _ in range(3 * files.HELD_LOOKS):
            file.look()
        assert file.fault == f"{at}: somebody has it open to write, and it is read when that ends"
    settle(file)
    assert (taken.texts, file.fault) == (["a"], "")
    assert sum(r.levelname == "ERROR" for r in caplog.records) == 1


def test_what_is_read_is_what_was_looked_at(file, taken, at, monkeypatch):
    """Between the look and the reading a link leads elsewhere, and back again."""
    at.parent.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (at.parent / name).write_text(name)
    at.symlink_to("a")
    file.look()
    opened = toml.at_once

    def elsewhere(path, flags):
        return opened(path.replace(at.name, "b"), flags)

    monkeypatch.setattr(toml, "at_once", elsewhere)
    file.look()
    monkeypatch.setattr(toml, "at_once", opened)
    assert taken.texts == []
    settle(file)
    assert taken.texts == ["a"]


def test_a_reader_does_not_hold_it_up(file, taken, at):
    at.parent.mkdir()
    at.write_text("a")
    with at.open():
        settle(file)
    assert taken.texts == ["a"]


def test_links_of_a_config_map(file, taken, at):
    """Kubernetes: the file is a link through ..data, which is a link to a directory, and is renamed."""
    at.parent.mkdir()
    for name in ("..1", "..2"):
        (at.parent / name).mkdir()
        (at.parent / name / at.name).write_text(name)
    (at.parent / "..data").symlink_to("..1")
    at.symlink_to(f"..data/{at.name}")
    settle(file)
    (at.parent / "..data_tmp").symlink_to("..2")
    (at.parent / "..data_tmp").rename(at.parent / "..data")
    shutil.rmtree(at.parent / "..1")
    settle(file)
    assert taken.texts == ["..1", "..2"]


def test_a_directory_that_is_exchanged(file, taken, at):
    at.parent.mkdir()
    at.write_text("a")
    settle(file)
    at.parent.rename(at.parent.with_name("old"))
    at.parent.mkdir()
    at.write_text("b")
    settle(file)
    assert taken.texts == ["a", "b"]


def test_a_fault_is_told_once_and_costs_nothing(file, taken, at, caplog):
    at.parent.mkdir()
    at.write_text("a")
    settle(file)
    for text in ("bad", "bad\n", "bad again"):
        at.write_text(text)
        settle(file)
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == [
        f"{at}, line 1: bad; what was in force stays so"
    ]
    assert (taken.texts, file.fault) == (["a"], f"{at}, line 1: bad")
    at.write_text("b")
    settle(file)
    assert (taken.texts, file.fault) == (["a", "b"], "")
    at.write_text("bad")
    settle(file)
    assert sum(r.levelname == "ERROR" for r in caplog.records) == 2


def test_what_could_not_be_taken_is_tried_again(file, taken, at, monkeypatch):
    """The directory of a unix endpoint may be made after the file."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    at.parent.mkdir()
    at.write_text("bad")
    settle(file)
    monkeypatch.setattr(file, "take", lambda _file: taken.texts.append("now"))
    now[0] += files.AGAIN_SECONDS - 1
    settle(file)
    assert taken.texts == []
    now[0] += 1
    settle(file)
    settle(file)
    assert (taken.texts, file.fault) == (["now"], "")


def test_a_link_that_leads_nowhere_takes_nothing_back(file, taken, at, caplog):
    """It is a slip of the pen. What it led to is read when it is there again, also the very same file."""
    at.parent.mkdir()
    target = at.with_name("target")
    target.write_text("a")
    at.symlink_to(target)
    settle(file)
    at.unlink()
    at.symlink_to("nowhere")
    settle(file)
    settle(file)
    told = f"{at}: a symbolic link that leads nowhere"
    assert (taken.texts, file.fault) == (["a"], told)
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == [f"{told}; what was in force stays so"]
    at.unlink()
    at.symlink_to(target)
    settle(file)
    assert (taken.texts, file.fault) == (["a", "a"], "")


def test_files_that_cannot_be_told_at_the_start(tmp_path):
    """Such as those of a directory that is a link to nowhere: graftd starts, and takes them when they are there."""
    wrong = [True]
    texts = []

    def paths():
        if wrong:
            raise Failure("a link that leads nowhere")
        return [tmp_path / "a"]

    group = files.Group(paths, lambda _opened: texts.append((tmp_path / "a").read_text()))
    assert group.fault == "a link that leads nowhere"
    (tmp_path / "a").write_text("a")
    settle(group)
    wrong.clear()
    settle(group)
    settle(group)
    assert (texts, group.fault) == (["a"], "")
    wrong.append(True)
    settle(group)
    wrong.clear()  # as it was
    settle(group)
    assert group.fault == ""


def test_a_directory_that_is_lost_takes_nothing_back(file, taken, at, tmp_path):
    """A link to it that leads nowhere."""
    real = tmp_path / "real"
    real.mkdir()
    (real / at.name).write_text("a")
    at.parent.symlink_to(real)
    settle(file)
    real.rename(tmp_path / "gone")
    settle(file)
    settle(file)
    assert (taken.texts, file.fault) == (["a"], f"{at}: a symbolic link that leads nowhere")
    (tmp_path / "gone").rename(real)
    settle(file)
    assert file.fault == ""


@pytest.mark.parametrize("kind", ["directory", "fifo", "loop"])
def test_what_is_no_file(file, at, kind, monkeypatch):
    """It is told, and does not hold graftd up."""
    at.parent.mkdir()
    if kind == "directory":
        at.mkdir()
    elif kind == "fifo":
        os.mkfifo(at)
    else:
        at.symlink_to(at.name)
    file.take = read_endpoints
    monkeypatch.setenv("GRAFT_CONFIG", str(at.with_name("graft.toml")))
    settle(file)
    assert file.fault.startswith(f"{at}: ")


def test_files_that_are_read_together(at, taken):
    """A change of one reads all; one that is wrong keeps all as they were."""
    paths = [at, at.with_name("other.toml")]
    group = Group(lambda: paths, taken)
    at.parent.mkdir()
    at.write_text("a")
    settle(group)
    paths[1].write_text("b")
    settle(group)
    at.write_text("bad")
    settle(group)
    at.unlink()
    settle(group)
    assert (taken.texts, group.fault) == (["a", "ab", "b"], "")


def test_a_reload_waits_for_no_second_look(file, taken, at):
    at.parent.mkdir()
    at.write_text("a")
    file.reload()
    file.reload()
    assert taken.texts == ["a"], "what has not changed is not read"
    with at.open("a"):
        at.touch()
        file.reload()
        assert "somebody has it open to write" in file.fault
    file.reload()
    assert (taken.texts, file.fault) == (["a", "a"], "")
    at.write_text("bad")
    file.reload()
    file.reload()
    assert (taken.texts, file.fault) == (["a", "a"], f"{at}, line 1: bad")


def test_which_files_cannot_be_told(file, taken, at):
    """The directory of endpoints is a file, for one."""

    def paths():
        raise Failure("etc: Not a directory")

    file.paths = paths
    settle(file)
    assert (taken.texts, file.fault) == ([], "etc: Not a directory")
    file.paths = lambda: [at]
    at.parent.mkdir()
    at.write_text("a")
    settle(file)
    assert (taken.texts, file.fault) == (["a"], "")
