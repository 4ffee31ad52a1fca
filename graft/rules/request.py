"""What a container may ask for: the options of `graft run`, and the labels or annotations of engines.

Each option is described here, once: its text in Request, its value in Parsed, its words in SETTINGS. From these come
the command line (graft/commands/run.py), the labels (graft/engines/container.py), both messages that carry a request
(graft/protocol.py), and what state.json and `graft inspect` have of it. What is left to write for a new option is
what graftd does about it, a test, and its entry in man/graft.1.md.

Pure. It imports little, because it is a part of each start of `graft run`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from graft.errors import UsageError
from graft.rules.address import Address, parse_address
from graft.rules.endpoint import EgressRule, IngressRule, parse_egress, parse_ingress
from graft.rules.limits import UNLIMITED, Limits, parse_limits
from graft.rules.own_address import Own, check_families, parse_own
from graft.rules.policy import LEARN, Allowed, parse_allows, parse_learn
from graft.rules.publication import Publication, parse_publication
from graft.rules.slices import in_names, in_slices
from graft.rules.sysctl import parse_sysctls


class Request(NamedTuple):
    """What is asked for, as texts that are not parsed yet.

    A new field goes last and has a default: messages and files of an older release lack it.
    """

    publish: tuple[str, ...] = ()
    ingress: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()
    egress_default: str | None = None
    ip: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    resolver: tuple[str, ...] = ()
    sysctl: tuple[str, ...] = ()
    interface: tuple[str, ...] = ()
    direct: str | None = None
    allow: tuple[str, ...] = ()
    learn: str | None = None
    names: str | None = None

    @property
    def asks_graft(self) -> bool:
        """Do the container's queries for names go to graftd's resolver?"""
        return bool(self.names or self.allow or self.learn)

    def given(self) -> dict[str, Any]:
        """The fields that are not empty, by name, in types that json.dumps() takes."""
        return {name: value for name, value in self._asdict().items() if value}


class Parsed(NamedTuple):
    """The values of a request, under the names that its texts have in Request."""

    publish: list[Publication]
    ingress: list[IngressRule]
    egress: list[EgressRule]
    egress_default: str | None  # "host", "none"; None: not said
    ip: list[Own]
    limits: Limits  # 0 for a limit that is not named
    resolver: list[Address]
    sysctl: dict[str, str]  # values by name
    interface: str  # a device's name, or NO_INTERFACE; "": not said
    direct: bool  # do its programs make their sockets themselves?
    allow: list[Allowed]
    learn: bool
    names: bool  # does it ask graftd's resolver for names, wherever it sends queries?


class Setting(NamedTuple):
    """The words of one option. With `choices` it takes one of them; without, it may be given several times.

    With one choice it takes no argument on the command line, and its label has that word.
    """

    field: str  # of Request and Parsed
    options: tuple[str, ...]  # of `graft run`; errors name the first
    metavar: str | None
    help: str
    label: str  # graft.LABEL; two settings may share one: a word among the choices is the setting's that has them
    parse: Callable[[Any], Any]  # from what Request has to what Parsed has; raises UsageError
    choices: tuple[str, ...] = ()
    for_root: Callable[[str], bool] = lambda _: True  # may only root of the host ask for this text?
    takes: Callable[[str, Limits], bool] = lambda *_: True  # does a pod need the administrator's word for it?

    def texts(self, request: Request) -> tuple[str, ...]:
        """What @request says of this setting, as it was given: one text for each time."""
        value = getattr(request, self.field)
        return value if isinstance(value, tuple) else (value,) if value is not None else ()


def _each(parse: Callable[[str], Any]) -> Callable[[Sequence[str]], list[Any]]:
    return lambda texts: [parse(text) for text in texts]


def _egress_default(text: str | None) -> str | None:
    if text not in (None, *EGRESS_DEFAULTS):
        raise UsageError(f"egress '{text}' is unknown", hint="host or none")
    return text


def parse_resolver(text: str) -> Address:
    """`--resolver ADDR`: a nameserver, not in a container's slice of the loopback. Raises UsageError.

    A link-local address of IPv6 has its zone, a device of the host's (RFC 4007, 11), which is left out here.
    """
    bare, percent, zone = text.partition("%")
    address = parse_address(bare)
    if percent and (not address.link_local or not zone or len(zone) > NAME_MAX):
        raise UsageError(
            f"resolver {text} is no address with a device", hint="like fe80::1%eth0, which is link-local"
        )
    if address.link_local and not percent:
        raise UsageError(f"resolver {text} is link-local, and lacks its device", hint=f"like {text}%eth0")
    if in_slices(address) or in_names(address) or address.any or address.group:
        raise UsageError(f"resolver {address} is no nameserver's address", hint="one like 127.0.0.53")
    return address


def _check_resolvers(request: Request) -> None:
    """Raise UsageError for a resolver beyond the loopback that the container itself would ask, as it may ask others.

    graft's own asks it for a container with a list of destinations, or with names.
    """
    for text in () if request.asks_graft else request.resolver:
        if not parse_resolver(text).loopback:
            raise UsageError(
                f"resolver {text} is not on the host's loopback",
                hint="one like 127.0.0.53; with --allow or --names it may be anywhere",
            )


def parse_interface(texts: Sequence[str]) -> str:
    """`--interface NAME`: the name of a device (at most 15 bytes, dev_valid_name of net/core/dev.c), `lo`, or `none`.

    Names are narrower than the kernel's, because they are parts of paths below /proc/sys/net. Raises UsageError.
    """
    for text in texts:
        plain = text.isascii() and all(c.isalnum() or c in "_.-" for c in text)
        if not (plain and 1 <= len(text) <= NAME_MAX) or text in RESERVED_NAMES:
            raise UsageError(
                f"interface '{text}' is not a name for a device",
                hint=f"1 to {NAME_MAX} letters, digits, '_', '.', '-', such as eth0; or {NO_INTERFACE}",
            )
    if len(set(texts)) > 1:
        raise UsageError(f"interfaces {' and '.join(texts)}: a container has one", hint="name one")
    return texts[0] if texts else ""


def _direct(text: str | None) -> bool:
    if text not in (None, DIRECT):
        raise UsageError(f"direct '{text}' is unknown", hint=DIRECT)
    return text == DIRECT


def _names(text: str | None) -> bool:
    if text not in (None, NAMES):
        raise UsageError(f"names '{text}' is unknown", hint=NAMES)
    return text == NAMES


def _own_addresses(texts: Sequence[str]) -> list[Own]:
    owned = [parse_own(text) for text in texts]
    check_families(owned)
    return owned


def _exceeds(text: str, most: Limits) -> bool:
    asked = parse_limits((text,), UNLIMITED)._replace(rate=0)  # a rate takes nothing
    return any(one > limit for one, limit in zip(asked, most, strict=True))


EGRESS_DEFAULTS = ("host", "none")
NO_INTERFACE = "none"
DIRECT = "on"
NAMES = "on"
CONTAINER_NAME_MAX = 64
NAME_MAX = 15  # IFNAMSIZ without its NUL
# of the kernel: no names, and what /proc/sys/net has for all devices; the other end of a pair (kernel/nowhere.py)
RESERVED_NAMES = (".", "..", "all", "default", "graft-peer")
SETTINGS = (
    Setting(
        "publish",
        ("-p", "--publish"),
        "[HADDR:]HPORT:PORT[/tcp|/udp]",
        "Publish PORT of the container as HPORT of the host; ranges as 9000-9010:9000-9010.",
        "publish",
        _each(parse_publication),
    ),
    Setting(
        "ingress",
        ("-i", "--ingress"),
        "ADDR:PORT[-PORT]=ENDPOINT",
        "A bind to ADDR:PORT becomes a bind to the endpoint.",
        "ingress",
        _each(parse_ingress),
        for_root=lambda _: False,
    ),
    Setting(
        "egress",
        ("-e", "--egress-rule"),
        "PREFIX/LEN=ENDPOINT",
        "Connections to PREFIX leave from the endpoint; other destinations are refused.",
        "egress",
        _each(parse_egress),
        for_root=lambda _: False,
    ),
    Setting(
        "egress_default",
        ("--egress",),
        None,
        "Connections out: as the host's (default), or none. With -e: for destinations without a rule.",
        "egress",
        _egress_default,
        EGRESS_DEFAULTS,
        for_root=lambda text: text != "none",
        takes=lambda *_: False,  # what it has without, or less
    ),
    Setting(
        "ip",
        ("--ip",),
        "ADDR",
        "The container's own address on the host's stack: wildcard binds use it, connections leave from it.",
        "ip",
        _own_addresses,
    ),
    Setting(
        "limits",
        ("--limit",),
        "sockets=N|udp=N|ports=N|rate=RATE",
        "How many sockets it may have, and how fast each sends; default: graftd's limit.",
        "limit",
        lambda texts: parse_limits(texts, UNLIMITED),
        for_root=lambda _: False,  # others get graftd's limit at most
        takes=_exceeds,
    ),
    Setting(
        "resolver",
        ("--resolver",),
        "ADDR",
        "A resolver on the host's loopback that it may ask; with --allow or --names one that graft asks.",
        "resolver",
        _each(parse_resolver),
    ),
    Setting(
        "sysctl",
        ("--sysctl",),
        "NAME=VALUE|ignore",
        "A sysctl of its network namespace, for its sockets; ignore: also one that acts on nothing.",
        "sysctl",
        parse_sysctls,
        takes=lambda *_: False,  # of its own sockets
    ),
    Setting(
        "interface",
        ("--interface",),
        "NAME|none",
        "The device inside that has its addresses; default: eth0 for addresses of its own, lo for the host's.",
        "interface",
        parse_interface,
        for_root=lambda text: text != NO_INTERFACE,
        takes=lambda *_: False,  # it is in the container's own namespace
    ),
    Setting(
        "direct",
        ("--direct",),
        None,
        "Its programs make their TCP and UDP sockets themselves, at the host's rate, in a cgroup with the policy.",
        "direct",
        _direct,
        (DIRECT,),
    ),
    Setting(
        "allow",
        ("--allow",),
        "NAME|ADDR[/LEN][:PORT]",
        "What it may reach, and nothing else: names, *.NAME for all below, addresses.",
        "allow",
        parse_allows,
        takes=lambda *_: False,  # less than what it has without
    ),
    Setting(
        "learn",
        ("--learn",),
        None,
        "Let everything through, and print at the end what --allow would have to name.",
        "learn",
        parse_learn,
        (LEARN,),
        takes=lambda *_: False,
    ),
    Setting(
        "names",
        ("--names",),
        None,
        "Ask graft's resolver, which knows endpoints of its table, and containers with --ip, as NAME.graft.",
        "names",
        _names,
        (NAMES,),
        takes=lambda *_: False,  # it names what it reaches anyway
    ),
)
LABELS = tuple(dict.fromkeys(setting.label for setting in SETTINGS))


def parse_request(request: Request) -> Parsed:
    """Parse everything that is asked for. Raises UsageError for the first text that is wrong."""
    _check_resolvers(request)
    parsed = Parsed(**{setting.field: setting.parse(getattr(request, setting.field)) for setting in SETTINGS})
    if (parsed.allow or parsed.learn) and parsed.egress_default == "none" and not parsed.egress:
        lets = "--learn lets everything through" if parsed.learn else "--allow names what may be reached"
        raise UsageError(f"{lets}, and --egress none says nothing", hint="omit one of them")
    if parsed.allow and parsed.learn:
        raise UsageError("--learn lets everything through, and --allow does not", hint="omit one of them")
    return parsed


def check_options(request: Request) -> None:
    """Check each text by itself. Raises UsageError, which names the option of `graft run`."""
    for setting in SETTINGS:
        for text in setting.texts(request):
            try:
                setting.parse(text if setting.choices else (text,))
            except UsageError as error:
                raise UsageError(f"{setting.options[0]}: {error.message}", hint=error.hint) from None
    try:
        _check_resolvers(request)
    except UsageError as error:
        raise UsageError(f"--resolver: {error.message}", hint=error.hint) from None


def parse_container_name(name: str) -> str:
    """Check a container's name: 1 to 64 of letters, digits, '_', '.', '-', and not a number. Raises UsageError."""
    if (
        not name
        or len(name) > CONTAINER_NAME_MAX
        or not all((c.isalnum() and c.isascii()) or c in "_.-" for c in name)
    ):
        raise UsageError(
            f"container name '{name}' is not valid", hint=f"1 to {CONTAINER_NAME_MAX} letters, digits, '_', '.', '-'"
        )
    if name.isdigit():
        raise UsageError(f"container name '{name}' looks like a pid", hint="add a letter")
    return name


def needs_root(request: Request) -> bool:
    """Does @request ask for anything that only root of the host may have?"""
    return any(setting.for_root(text) for setting in SETTINGS for text in setting.texts(request))


def setting_of(label: str, item: str) -> Setting:
    """The setting that an item of the label graft.@label, one of LABELS, belongs to."""
    named = [setting for setting in SETTINGS if setting.label == label]
    fitting = [s for s in named if item in s.choices] or [s for s in named if not s.choices] or named
    return fitting[0]


def with_label(request: Request, label: str, items: Sequence[str]) -> Request:
    """@request with what the items of the label graft.@label, one of LABELS, add to it. Raises UsageError."""
    added: dict[str, Any] = {}
    more: dict[str, list[str]] = {}
    for item in items:
        setting = setting_of(label, item)
        if setting.choices:
            added[setting.field] = item
        else:
            more.setdefault(setting.field, []).append(item)
    added |= {field: (*getattr(request, field), *texts) for field, texts in more.items()}
    request = request._replace(**added)
    for setting in SETTINGS:
        if setting.label == label:
            setting.parse(getattr(request, setting.field))
    return request
