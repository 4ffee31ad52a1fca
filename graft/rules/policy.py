"""What a container is allowed to reach: names and addresses, their grammar, and whom a list covers. Pure.

    NAME[:PORT]             pypi.org, pypi.org:443; a name in another script is kept in its xn-- form (IDNA)
    *.NAME[:PORT]           each name below NAME, at any depth, and not NAME itself
    ADDR[/LEN][:PORT]       192.0.2.1:5432, 10.0.0.0/8, 2001:db8::/32, [2001:db8::1]:443

The same words stand after `--allow`, in the label or annotation `graft.allow`, and in a policy file. Without a port
all ports are meant, of TCP and UDP. A destination that one entry covers is allowed: there is no order, and no
exception.

It is a part of each start of `graft run`, so that it imports little.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from graft.errors import UsageError
from graft.rules.address import Address, Prefix, parse_port, parse_prefix

NAME_MAX = 253  # characters of a name as text (RFC 1035, 2.3.4)
LABEL_MAX = 63
ENTRIES_MAX = 1000  # of one list
DEVIATIONS = "\u00df\u03c2\u200c\u200d"  # what IDNA 2003 maps or leaves out, and IDNA 2008 keeps (UTS 46, 2.3)
FORM = "like pypi.org, '*.github.com:443', 10.0.0.0/8 or [2001:db8::1]:443"
LEARN = "on"


class AllowedName(NamedTuple):
    """A name in lower case, without the final dot. `below`: it stands for the names below it. Port 0: all ports."""

    name: str
    below: bool
    port: int

    def __str__(self) -> str:
        return f"{'*.' if self.below else ''}{self.name}{f':{self.port}' if self.port else ''}"


class AllowedAddress(NamedTuple):
    """The addresses of a prefix. Port 0: all ports."""

    prefix: Prefix
    port: int

    def __str__(self) -> str:
        address, length = self.prefix
        text = str(address) if length == address.bits else str(self.prefix)
        if not self.port:
            return text
        return f"{text}:{self.port}" if address.v4 else f"[{text}]:{self.port}"


Allowed = AllowedName | AllowedAddress


class Policy(NamedTuple):
    """What one container is allowed. `names` and `below` have the ports of each name; 0: all ports."""

    names: dict[str, frozenset[int]]
    below: dict[str, frozenset[int]]
    addresses: tuple[AllowedAddress, ...]
    learns: bool  # everything is let through, and what was reached is remembered

    def ports(self, name: str) -> frozenset[int]:
        """The ports at which @name, in lower case, may be reached; 0: all. Empty: the name is not allowed."""
        found = self.names.get(name, NO_PORTS)
        rest = name.partition(".")[2]
        while rest:
            found |= self.below.get(rest, NO_PORTS)
            rest = rest.partition(".")[2]
        return found

    def covers(self, address: Address) -> bool:
        """Is @address itself allowed, at some port?"""
        return any(allowed.prefix.covers(address) for allowed in self.addresses)


NO_PORTS: frozenset[int] = frozenset()


def parse_allow(text: str) -> Allowed:
    """Parse one entry. Raises UsageError."""
    if "://" in text:
        raise UsageError(f"'{text}' is a URL", hint="its name and its port, like pypi.org:443")
    bare, port_text = _split(text)
    try:
        port = parse_port(port_text, least=1) if port_text is not None else 0
        if bare.startswith("[") or ":" in bare or (bare and all(c in "0123456789./" for c in bare)):
            return AllowedAddress(parse_prefix(bare.strip("[]") if bare[:1] == "[" else bare), port)
    except UsageError as error:
        whole = "" if error.message.startswith(f"'{text}'") else f"'{text}': "
        raise UsageError(f"{whole}{error.message}", hint=error.hint) from None
    below = bare.startswith("*.")
    return AllowedName(_name(bare[2:] if below else bare, text), below, port)


def _split(text: str) -> tuple[str, str | None]:
    """An entry's name or address, and its port as text; None if it has none. Raises UsageError."""
    if text.startswith("["):
        inside, bracket, rest = text.partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise UsageError(f"'{text}' is no name and no address", hint=FORM)
        return f"{inside}]", rest[1:] if rest else None
    if text.count(":") > 1:
        return text, None
    bare, colon, port = text.partition(":")
    return bare, port if colon else None


def _name(text: str, whole: str) -> str:
    """A name in the form in which it is asked for. Raises UsageError."""
    if "*" in text:
        raise UsageError(
            f"'{whole}' has a wildcard that is not the whole first label",
            hint="'*.example.org' stands for all names below example.org; 0.0.0.0/0 and ::/0 for all addresses",
        )
    name = text.removesuffix(".")
    if not name.isascii():
        name = _encoded(name, whole)
    name = name.lower()
    labels = name.split(".")
    fits = len(name) <= NAME_MAX and all(0 < len(label) <= LABEL_MAX for label in labels)
    plain = all(c.isalnum() or c in "-_." for c in name)
    if not (fits and plain) or any(label[0] == "-" or label[-1] == "-" for label in labels) or labels[-1].isdigit():
        raise UsageError(f"'{whole}' is no name and no address", hint=FORM)
    return name


def _encoded(name: str, whole: str) -> str:
    """A name in another script as it is asked for. Raises UsageError, also where programs differ about that."""
    try:
        encoded = name.encode("idna").decode()
        if any(c in DEVIATIONS for c in name.lower()):
            labels = [
                label if label.isascii() else f"xn--{label.encode('punycode').decode()}"
                for label in name.lower().split(".")
            ]
            raise UsageError(
                f"'{whole}' is {encoded} to some programs and {'.'.join(labels)} to others (IDNA 2003, IDNA 2008)",
                hint="write the one that is meant, or both",
            )
    except UnicodeError:
        raise UsageError(f"'{whole}' is no name (IDNA)", hint=FORM) from None
    return encoded


def parse_allows(texts: Sequence[str]) -> list[Allowed]:
    """Parse a list. Raises UsageError."""
    if len(texts) > ENTRIES_MAX:
        raise UsageError(f"{len(texts)} destinations are too many", hint=f"at most {ENTRIES_MAX}")
    return [parse_allow(text) for text in texts]


def parse_learn(text: str | None) -> bool:
    """`--learn`, which is given or not. Raises UsageError."""
    if text not in (None, LEARN):
        raise UsageError(f"learn '{text}' is unknown", hint=LEARN)
    return text == LEARN


@lru_cache(maxsize=1024)
def policy_of(texts: tuple[str, ...], learn: str | None) -> Policy | None:
    """The policy of what is asked for; None if neither a list nor to learn is. Raises UsageError."""
    if not texts and not learn:
        return None
    names: dict[str, frozenset[int]] = {}
    below: dict[str, frozenset[int]] = {}
    addresses = []
    for allowed in parse_allows(texts):
        if isinstance(allowed, AllowedAddress):
            addresses.append(allowed)
        else:
            of = below if allowed.below else names
            of[allowed.name] = of.get(allowed.name, NO_PORTS) | {allowed.port}
    return Policy(names, below, tuple(addresses), parse_learn(learn))
