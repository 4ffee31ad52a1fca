"""graftd's end of Docker's network driver: when it is there."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from graft.engines import docker


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.setattr(docker, "PLUGINS", tmp_path / "plugins")
    monkeypatch.setenv("PATH", str(tmp_path))
    kept: dict[str, int] = {}
    store: Any = SimpleNamespace(put=kept.__setitem__, remove=kept.pop)
    loop: Any = SimpleNamespace(add=lambda *_: None)
    nobody: Any = None  # whom it asks for networks
    one = docker.Docker(tmp_path / "graft", loop, store, nobody, nobody, managed=False)
    yield one
    one.cleanup()
    if one.sock:
        one.sock.close()


def test_docker_that_is_installed_later_finds_the_plugin(plugin, tmp_path):
    plugin.start()
    plugin.tick()
    assert plugin.sock is None
    (tmp_path / "dockerd").touch(0o755)
    plugin.tick()
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(tmp_path / "plugins/graft.sock"))
    listening = plugin.sock
    plugin.tick()
    assert plugin.sock is listening
