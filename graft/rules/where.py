"""Where graftd serves a page: an address and a port, or a path."""

from typing import NamedTuple

from graft.errors import UsageError
from graft.rules.address import Address, parse_address, parse_port


class Where(NamedTuple):
    """An address and a port, or a path."""

    address: Address | None
    port: int
    path: str

    def __str__(self) -> str:
        return self.address.with_port(self.port) if self.address else self.path


def parse_where(text: str, *, public: bool, option: str, consent: str = "") -> Where:
    """Parse ADDR:PORT or an absolute path. An address beyond the loopback needs @public. Raises UsageError.

    @option: as errors name it. @consent: by what it becomes public; @option with `-public` unless given.
    """
    if text.startswith("/"):
        return Where(None, 0, text)
    host, colon, port = text.rpartition(":")
    if not colon:
        raise UsageError(f"{option} '{text}' is no address", hint="ADDR:PORT like 127.0.0.1:9435, or a path")
    try:
        where = Where(parse_address(host), parse_port(port, least=1), "")
    except UsageError as error:
        raise UsageError(f"{option} '{text}': {error.message}", hint=error.hint) from None
    assert where.address
    if not where.address.loopback and not public:
        raise UsageError(
            f"{option} {text} is not on the loopback: everybody who reaches it could read it",
            hint=f"127.0.0.1:{port}, or add {consent or f'{option}-public'}",
        )
    return where
