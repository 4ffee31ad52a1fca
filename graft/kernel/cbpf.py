"""Classic BPF for seccomp (linux/filter.h, linux/seccomp.h): instructions, verdicts, an assembler."""

import struct

LD_W_ABS = 0x20
JEQ_K = 0x15
JGE_K = 0x35
AND_K = 0x54
RET_K = 0x06

RET_ALLOW = 0x7FFF0000
RET_ERRNO = 0x00050000
RET_USER_NOTIF = 0x7FC00000
RET_KILL_PROCESS = 0x80000000

# struct seccomp_data (linux/seccomp.h), little endian
OFFSET_NR = 0
OFFSET_ARCH = 4
OFFSET_ARGS = 16


class Assembler:
    """An assembler for classic BPF with labels. A jump goes forward, over at most 255 instructions."""

    def __init__(self) -> None:
        self.code: list[tuple[int, str | None, str | None, int]] = []
        self.labels: dict[str, int] = {}

    def op(self, code: int, k: int, *, true: str | None = None, false: str | None = None) -> None:
        """Append an instruction; where @true or @false names no label, the next instruction follows."""
        self.code.append((code, true, false, k))

    def label(self, name: str) -> None:
        """Give the next instruction a label."""
        self.labels[name] = len(self.code)

    def assemble(self) -> bytes:
        """The program as struct sock_filter records, 8 bytes each. Raises KeyError; struct.error for a far jump."""

        def distance(name: str | None, here: int) -> int:
            return 0 if name is None else self.labels[name] - here - 1

        return b"".join(
            struct.pack("=HBBI", code, distance(true, at), distance(false, at), k)
            for at, (code, true, false, k) in enumerate(self.code)
        )
