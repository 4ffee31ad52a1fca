"""Containers that connect without end, and the server that they connect to."""

from collections.abc import Callable

from graft.bench.lab import Lab, wait_for
from tests.conftest import python

WORKER = """
import socket, sys, time
failed = done = 0
no_time_wait = b'\\1\\0\\0\\0\\0\\0\\0\\0'  # SO_LINGER of no time: connections to one server would take all ports
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    try:
        s = socket.socket(); s.setsockopt(1, 13, no_time_wait); s.connect(({address!r}, {port})); s.close(); done += 1
    except OSError as e:
        failed += 1; print(e, file=sys.stderr)
print(done, failed)
"""


def another(current: Callable[[], int], before: int) -> bool:
    """Is there a process, and not that of @before?"""
    return current() not in (0, before)


def server_on_client(lab: Lab, port: int = 9000) -> None:
    """A server on the client that accepts and closes."""
    code = f"""
import socket
s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('0.0.0.0', {port})); s.listen(4096)
while True: s.accept()[0].close()
"""
    lab.spawn(*python(code), client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", f"sport = :{port}").stdout, "the server")
