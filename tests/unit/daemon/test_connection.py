"""A connection's answers, byte for byte: csrc/runtime.c reads them without a JSON parser."""

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graft.daemon.connection import Connection
from graft.errors import Refused
from graft.process.loop import Loop

ROOT = Path(__file__).parents[3]
RUNTIME = ROOT / "graft" / "graft-runtime"
VALUE = {"config": {"args": ["sh", 'say "ok": {}'], "umask": None, "name": "ü"}}


@contextlib.contextmanager
def asking(words: list[str], text: str, directory: Path, serve: Callable[..., Any]) -> Iterator[subprocess.Popen[str]]:
    """Run graft-runtime as @words; @serve answers its request as graftd's connection would."""
    listening = socket.socket(socket.AF_UNIX)
    listening.settimeout(20)
    listening.bind(str(directory / "graftd.sock"))
    listening.listen()
    words = [words[0], "--graft-run-dir", str(directory), *words[1:]]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, executable=RUNTIME, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdin
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None
        loop = Loop()
        ended = False

        def closed(_connection: Connection) -> None:
            nonlocal ended
            ended = True

        with listening:
            sock, _ = listening.accept()
        Connection(loop, sock, lambda raw: raw.endswith(b"\n"), serve, closed, 0.0)
        while not ended:
            for fd, events in loop.epoll.poll(20):
                loop.callbacks[fd](events)
        yield process
    finally:
        process.kill()
        process.wait()


def test_graft_runtime_reads_an_answer(tmp_path):
    """It takes what follows the first bytes, up to the last brace."""
    asked = []

    def serve(_connection: Connection, raw: bytes, _fds: list[int]) -> Any:
        asked.append(json.loads(raw))
        return VALUE

    with asking(["graft-hook"], '{"ociVersion": "1.0.2"}\n', tmp_path, serve) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out) == VALUE
    assert asked[0]["config"] == {"ociVersion": "1.0.2"}


def test_graft_runtime_reads_a_refusal(tmp_path):
    def serve(_connection: Connection, _raw: bytes, _fds: list[int]) -> Any:
        raise Refused('port 80 of "web" is taken', hint="publish another")

    with asking(["graft-runtime", "create", "--bundle", str(tmp_path), "id"], "", tmp_path, serve) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err == 'graft: port 80 of "web" is taken (publish another)\n'
