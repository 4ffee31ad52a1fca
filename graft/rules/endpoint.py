"""Endpoints and rules: their values and their grammar. Nothing here has a side effect.

    endpoint      NAME type {ipv4|ipv6} addr ADDR port {PORT|dynamic} [netns {PID|NAME|PATH}]
                  NAME type unix path PATH [netns ...]
                  NAME type local
    ingress rule  ADDR:PORT[-PORT]=EPNAME          -i; the address is exact: 0.0.0.0 and [::] mean a wildcard bind
    egress rule   PREFIX/LEN=EPNAME                -e; the longest prefix wins
    publication   [HADDR:]HPORT[-HPORT]:PORT[-PORT][/tcp|/udp]    -p

The grammar is AF_GRAFT's (iproute2's `ip graft`, libgraft-convert). An address is 16 bytes in network order, IPv4 as
::ffff:a.b.c.d, as in csrc/abi.h. The parsers raise UsageError with the text, the position in it, and the form that
is expected.
"""

import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from graft.errors import UsageError
from graft.rules.address import MAPPED, Address, parse_address, parse_port, parse_ports
from graft.rules.slices import NAMES4, NAMES6, SLICE6_NETWORK, SLICES4, in_names, in_slices

T = TypeVar("T")

NAME_MAX = 15
UNIX_PATH_MAX = 107  # bytes; sun_path holds 108 with the NUL (unix(7))
DEFAULT_SOURCE = "default-source"  # AF_GRAFT: the source of a socket that was not bound
TYPES = ("ipv4", "ipv6", "unix", "local")
ADD_FORM = (
    "add NAME type {ipv4|ipv6} addr ADDR port {PORT|dynamic} [netns ...], "
    "or type unix path PATH [netns ...], or type local"
)


class Endpoint(NamedTuple):
    """A name for an address of a host netns. It has `span` ports in a row, more than 1 only for a range of `-p`."""

    name: str
    address: Address | None  # None: type unix or local
    port: int = 0  # 0: dynamic
    span: int = 1
    published: bool = False  # made by -p, removed with the container
    path: str = ""  # of type unix and local
    netns: str = ""  # as the user named it
    place: int = 0  # the number of that host netns in the registry; 0 is graftd's own
    imported: bool = False  # copied from the host's table for a container, removed with it
    local: bool = False  # type local: a unix socket whose path graftd chooses
    ingress: bool = False  # of an imported one: does an ingress rule of the container name it?
    egress: bool = False  # does an egress rule?
    filed: bool = False  # it stands in endpoints.toml
    by_user: bool = False  # a user without root has added it: a path is opened with the rights of who binds it

    @property
    def serves(self) -> bool:
        """May programs of its table's namespace serve there? An imported one is for what the rules say."""
        return self.ingress or not self.imported

    @property
    def leaves(self) -> bool:
        """May they connect and send to it, and from it? A publication says where a server is, and nothing else."""
        return (self.egress or not self.imported) and not self.published

    @property
    def kind(self) -> str:
        """The endpoint's type: "ipv4", "ipv6", "unix" or "local"."""
        if self.address:
            return self.address.kind
        return "local" if self.local else "unix"

    @property
    def port_text(self) -> str:
        """The port as text: PORT, PORT-PORT or `dynamic`."""
        if not self.port:
            return "dynamic"
        return str(self.port) if self.span == 1 else f"{self.port}-{self.port + self.span - 1}"

    @property
    def where(self) -> str:
        """The address as text: ADDR:PORT or PATH."""
        return self.address.with_port(self.port_text) if self.address else self.path


class IngressRule(NamedTuple):
    """A bind to `address`, ports `first` to `last`, becomes a bind to the endpoint."""

    address: Address
    first: int
    last: int
    endpoint: str
    protocols: tuple[int, ...] = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)

    def __str__(self) -> str:
        ports = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"{self.address.with_port(ports)}={self.endpoint}"


class EgressRule(NamedTuple):
    """A connection to a destination in `prefix`/`length` leaves from the endpoint."""

    prefix: Address
    length: int
    endpoint: str

    def __str__(self) -> str:
        return f"{self.prefix}/{self.length}={self.endpoint}"


def parse_name(text: str, *, what: str = "endpoint name") -> str:
    """Check an endpoint's name: 1 to 15 bytes without white space, '=' and '/'. Raises UsageError.

    AF_GRAFT's sgr_epname holds 15 bytes and a NUL.
    """
    size = len(text.encode(errors="surrogateescape"))
    if not size:
        raise UsageError(f"{what} is empty", hint=f"give 1 to {NAME_MAX} bytes")
    if size > NAME_MAX:
        raise UsageError(f"{what} '{text}' is {size} bytes long", hint=f"at most {NAME_MAX}")
    if not text.isprintable() or any(c.isspace() or c in "=/" for c in text):
        raise UsageError(
            f"{what} '{text}' has a space, '=', '/' or a control character", hint="use letters and digits"
        )
    return text


def parse_endpoint_port(text: str) -> int:
    """Parse PORT, or `dynamic`, which is 0. Raises UsageError."""
    return 0 if text == "dynamic" else parse_port(text)


def parse_path(text: str) -> str:
    """Check the path of a unix endpoint: absolute, of a file, at most 107 bytes (unix(7)). Raises UsageError."""
    size = len(text.encode(errors="surrogateescape"))
    if size > UNIX_PATH_MAX:
        raise UsageError(f"path '{text}' is {size} bytes long", hint=f"a unix socket's has at most {UNIX_PATH_MAX}")
    if text.endswith("/"):
        raise UsageError(f"path '{text}' names a directory", hint="like /run/app/http.sock")
    if not text.startswith("/") or "\0" in text:
        raise UsageError(f"path '{text}' is not absolute", hint="like /run/app/http.sock")
    if any(
        "\ud800" <= c <= "\udfff" for c in text
    ):  # a message to graftd has no such bytes, so it would be another path
        raise UsageError(f"path '{text}' is not text in UTF-8", hint="like /run/app/http.sock")
    return text


class EndpointWords(NamedTuple):
    """The checked words of `add`. `addr` and `port` are for ipv4 and ipv6 endpoints, `path` is for unix ones."""

    type: str
    addr: str = ""
    port: str = ""
    path: str = ""
    netns: str = ""


def parse_endpoint_words(words: Sequence[str]) -> EndpointWords:
    """Parse the KEY VALUE pairs after the name: each at most once, in any order, as in ip(8). Raises UsageError."""
    found: dict[str, str] = {}
    for at in range(0, len(words), 2):
        key = words[at]
        if key not in EndpointWords._fields:
            raise UsageError(f"unknown word '{key}'", hint=ADD_FORM)
        if key in found:
            raise UsageError(f"'{key}' is given twice", hint=ADD_FORM)
        if at + 1 == len(words):
            raise UsageError(f"'{key}' lacks its value", hint=ADD_FORM)
        found[key] = words[at + 1]
    if "type" not in found:
        raise UsageError("'type' is missing", hint=ADD_FORM)
    if found["type"] not in TYPES:
        raise UsageError(f"endpoint type '{found['type']}' is unknown", hint="ipv4, ipv6, unix or local")
    if found["type"] == "local":
        wrong = next((key for key in ("addr", "port", "path", "netns") if key in found), None)
        if wrong:
            raise UsageError(f"'{wrong}' does not go with type local", hint=ADD_FORM)
        return EndpointWords("local")
    if "path" in found and ("addr" in found or "port" in found):
        raise UsageError("'path' does not go with 'addr' and 'port'", hint=ADD_FORM)
    unix = found["type"] == "unix"
    for key in ("addr", "port", "path"):
        if (key == "path") == unix and key not in found:
            raise UsageError(f"'{key}' is missing", hint=ADD_FORM)
        if (key == "path") != unix and key in found:
            raise UsageError(f"'{key}' does not go with type {found['type']}", hint=ADD_FORM)
    told = EndpointWords(**found)
    if unix:
        parse_path(told.path)
    else:
        address = parse_address(told.addr, kind=told.type)
        if in_slices(address):
            raise UsageError(
                f"address {told.addr} stands for the loopback of a container",
                hint=f"one outside {SLICES4} and {SLICE6_NETWORK}",
            )
        if in_names(address):
            raise UsageError(
                f"address {told.addr} stands for the name of an endpoint",
                hint=f"one outside {NAMES4} and {NAMES6}",
            )
        parse_endpoint_port(told.port)
    if "netns" in found and not told.netns:
        raise UsageError("'netns' is empty", hint="a PID, a name or a path")
    return told


def make_endpoint(name: str, words: EndpointWords, place: int = 0, local_path: str = "") -> Endpoint:
    """The endpoint that checked words describe. @local_path is the socket's path for one of type local.

    Raises UsageError.
    """
    if words.type == "local":
        return Endpoint(parse_name(name), None, path=parse_path(local_path), local=True)
    if words.type == "unix":
        return Endpoint(parse_name(name), None, path=words.path, netns=words.netns, place=place)
    address = parse_address(words.addr, kind=words.type)
    return Endpoint(parse_name(name), address, parse_endpoint_port(words.port), netns=words.netns, place=place)


def _at(kind: str, text: str, position: int, work: Callable[[], T]) -> T:
    """Run a parser on the part of a rule that begins at @position, and add the position to its UsageError."""
    try:
        return work()
    except UsageError as error:
        where = f"{kind} rule '{text}', character {position + 1}"
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None


def _lacks(kind: str, text: str, position: int, sign: str, form: str) -> UsageError:
    return UsageError(f"{kind} rule '{text}', character {position + 1}: lacks '{sign}'", hint=form)


def parse_ingress(text: str) -> IngressRule:
    """Parse ADDR:PORT[-PORT]=EPNAME. Raises UsageError.

    An IPv6 address may lack its brackets: the last ':' ends it.
    """
    form = "the form is ADDR:PORT[-PORT]=ENDPOINT, like 0.0.0.0:80=ep-http"
    where, equals, name = text.partition("=")
    address, colon, ports = where.rpartition(":")
    if not equals:
        raise _lacks("ingress", text, len(text), "=", form)
    if not colon:
        raise _lacks("ingress", text, len(where), ":", form)
    host = _at("ingress", text, 0, lambda: parse_address(address))
    first, last = _at("ingress", text, len(address) + 1, lambda: parse_ports(ports))
    return IngressRule(host, first, last, _at("ingress", text, len(where) + 1, lambda: parse_name(name)))


def parse_egress(text: str) -> EgressRule:
    """Parse PREFIX/LEN=EPNAME. Raises UsageError, also if bits after LEN are set."""
    form = "the form is PREFIX/LEN=ENDPOINT, like 10.0.0.0/8=ep-out"
    where, equals, name = text.partition("=")
    prefix, slash, length_text = where.partition("/")
    if not equals:
        raise _lacks("egress", text, len(text), "=", form)
    if not slash:
        raise _lacks("egress", text, len(where), "/", form)
    address = _at("egress", text, 0, lambda: parse_address(prefix))
    after = len(prefix) + 1
    longest = address.bits
    if not length_text.isascii() or not length_text.isdigit() or len(length_text) > 3 or int(length_text) > longest:
        raise UsageError(
            f"egress rule '{text}', character {after + 1}: '{length_text}' is not a prefix length",
            hint=f"0 to {longest}",
        )
    length = int(length_text)
    host_bits = (1 << (longest - length)) - 1
    value = int.from_bytes(address.raw[12:] if address.v4 else address.raw, "big")
    if value & host_bits:
        base = (value & ~host_bits).to_bytes(longest // 8, "big")
        right = Address(MAPPED + base if address.v4 else base)
        raise UsageError(
            f"egress rule '{text}', character 1: '{prefix}' has bits set after the prefix",
            hint=f"write {right}/{length}",
        )
    return EgressRule(address, length, _at("egress", text, len(where) + 1, lambda: parse_name(name)))


def check_distinct(ingress: Sequence[IngressRule], egress: Sequence[EgressRule]) -> None:
    """Raise UsageError (EEXIST) for two rules with the same range or prefix: the second could never apply.

    Other overlaps are allowed: of two ranges the first wins, of two prefixes the longer one.
    """
    binds: dict[tuple[Address, int, int, int], IngressRule] = {}
    for rule in ingress:
        for protocol in rule.protocols:
            other = binds.setdefault((rule.address, rule.first, rule.last, protocol), rule)
            if other is not rule:
                raise UsageError(f"rule '{rule}' repeats the range of '{other}'", hint="omit one", code="EEXIST")
    prefixes: dict[tuple[Address, int], EgressRule] = {}
    for out in egress:
        first = prefixes.setdefault((out.prefix, out.length), out)
        if first is not out:
            raise UsageError(f"rule '{out}' repeats the prefix of '{first}'", hint="omit one", code="EEXIST")


def endpoint_names(ingress: list[IngressRule], egress: list[EgressRule]) -> list[str]:
    """The names of the endpoints that the rules use, with repetitions."""
    return [*(rule.endpoint for rule in ingress), *(rule.endpoint for rule in egress)]
