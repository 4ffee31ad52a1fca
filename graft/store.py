"""The descriptor store: sd_notify(3) to whoever keeps descriptors for graftd, systemd or the keeper."""

import os
import socket

LISTEN_FDS_START = 3


class Store:
    """Puts descriptors away and takes them back at start. Without a keeper, `kept` is false."""

    def __init__(self) -> None:
        self.path = os.environ.get("NOTIFY_SOCKET", "")
        self.kept = bool(self.path) and ("GRAFT_KEEPER" in os.environ or int(os.environ.get("FDSTORE", "0")) > 0)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def _notify(self, message: str, fds: tuple[int, ...] = ()) -> None:
        if not self.path:
            return
        address = "\0" + self.path[1:] if self.path.startswith("@") else self.path
        self.sock.connect(address)
        socket.send_fds(self.sock, [message.encode()], fds)

    def put(self, name: str, fd: int) -> None:
        """Store a copy of @fd under @name (no colon). Raises OSError if the keeper is gone."""
        if self.kept:
            self._notify(f"FDSTORE=1\nFDNAME={name}", (fd,))

    def remove(self, name: str) -> None:
        """Drop what is stored under @name."""
        if self.kept:
            self._notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def ready(self) -> None:
        """Tell the service manager that start-up is over."""
        self._notify("READY=1")

    @staticmethod
    def inherited() -> list[tuple[str, int]]:
        """(name, descriptor) of everything handed over at start (sd_listen_fds_with_names(3))."""
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            return []
        count = int(os.environ.get("LISTEN_FDS", "0"))
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        pairs = []
        for i in range(count):
            fd = LISTEN_FDS_START + i
            os.set_inheritable(fd, False)
            pairs.append((names[i] if i < len(names) else "unknown", fd))
        return pairs
