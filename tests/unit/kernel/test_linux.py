"""System calls of graft/kernel/linux.py that need no root."""

import ctypes
import errno
import os

import pytest

from graft.kernel import linux


@pytest.mark.parametrize("opens", [linux.open_directory, linux._walk_to], ids=["openat2", "steps"])
def test_a_directory_without_links(tmp_path, monkeypatch, opens):
    """By openat2(2), and where a sandbox has none (systemd's RestrictSUIDSGID)."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for path in (f"{tmp_path}/a/b", "a/b", f"{tmp_path}/a//b/", f"{tmp_path}/a/../a/b"):
        fd = opens(path)
        assert os.fstat(fd).st_ino == (tmp_path / "a/b").stat().st_ino
        os.close(fd)
    for path, number in (
        (f"{tmp_path}/link/b", errno.ELOOP),
        (f"{tmp_path}/link", errno.ELOOP),
        (f"{tmp_path}/file", errno.ENOTDIR),
        (f"{tmp_path}/file/b", errno.ENOTDIR),
        (f"{tmp_path}/none/b", errno.ENOENT),
    ):
        with pytest.raises(OSError, match=os.strerror(number)) as refused:
            opens(path)
        assert refused.value.errno == number, path
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_openat2_that_is_missing(tmp_path, monkeypatch):
    def missing(*_):
        ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(linux.libc, "syscall", missing)
    fd = linux.open_directory(str(tmp_path))
    assert os.fstat(fd).st_ino == tmp_path.stat().st_ino
    os.close(fd)
