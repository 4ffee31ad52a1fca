"""A container as an engine describes it, and what it asks of graft by labels or annotations."""

from typing import Any, NamedTuple

from graft import protocol
from graft.errors import GraftError, UsageError
from graft.rules.endpoint import parse_egress, parse_ingress
from graft.rules.limits import Limits, parse_limits
from graft.rules.own_address import check_families, parse_own
from graft.rules.publication import parse_publication

Document = dict[str, Any]
PREFIX = "graft"
SETTINGS = ("publish", "ingress", "egress", "ip", "limit", "family")
ON = ("", "on", "1", "true", "yes")
OFF = ("off", "0", "false", "no")


NAME_ROOM = 51  # characters: 64 for the whole name, less a hyphen and 12 digits of the container's id


class Container(NamedTuple):
    """A container that an engine is about to create, in the words of that engine."""

    engine: str  # docker, podman, cri, oci
    id: str
    name: str
    settings: dict[str, str]  # the labels or annotations `graft` and `graft.*`
    directory: str = ""  # where Docker keeps this container's config.v2.json
    network: str = ""  # the name of the Docker network that it is on, if any
    path: str = ""  # of the netns that it joins; "" if the runtime makes one
    where: tuple[int, int] = (0, 0)  # inode and cookie of that netns; zeros if it cannot be opened


def wish(container: Container) -> protocol.Metadata:
    """Parse a container's settings. Raises UsageError, which names the setting."""
    asked: dict[str, Any] = {"publish": [], "ingress": [], "egress": [], "ip": [], "limits": []}
    what = "label" if container.engine == "docker" else "annotation"
    for key, value in sorted(container.settings.items()):
        try:
            _setting(asked, key, value)
        except GraftError as error:
            raise UsageError(f"{what} '{key}={value}': {error.message}", hint=error.hint, code=error.code) from None
    return protocol.Metadata(
        **asked,
        name=_name(container),
        container=container.id,
        engine=container.engine,
        directory=container.directory,
    )


def _name(container: Container) -> str:
    """Return a name that `graft ps` can show: at most 64 characters; no number, which would be taken for a PID."""
    plain = plain_name(container.name) if container.name else ""
    if len(plain) > 64:
        plain = f"{plain[:NAME_ROOM]}-{container.id[:12]}"
    return plain if plain and not plain.isdigit() else f"c-{plain or container.id[:12]}"


def plain_name(text: str) -> str:
    """Return @text with "_" for everything that is no ASCII letter, digit, "_", "." or "-"; "_" if it is empty."""
    return "".join(c if (c.isalnum() and c.isascii()) or c in "_.-" else "_" for c in text) or "_"


def _items(value: str) -> list[str]:
    return value.replace(",", " ").split()


def _setting(asked: dict[str, Any], key: str, value: str) -> None:
    name = key.removeprefix(PREFIX).removeprefix(".")
    if not name:
        if value.lower() in ON:
            return
        if value.lower() in OFF:
            raise UsageError("a container without this setting does not use graft", hint="omit it")
        name = "publish"
    if name == "publish":
        for item in _items(value):
            parse_publication(item)
            asked["publish"].append(item)
    elif name == "ingress":
        for item in _items(value):
            parse_ingress(item)
            asked["ingress"].append(item)
    elif name.startswith("endpoint."):
        for item in _items(value):
            where = item if ":" in item else f"0.0.0.0:{item}"
            rule = f"{where}={name.removeprefix('endpoint.')}"
            parse_ingress(rule)
            asked["ingress"].append(rule)
    elif name == "egress":
        for item in _items(value):
            if item in ("host", "none"):
                asked["egress_default"] = item
            else:
                parse_egress(item)
                asked["egress"].append(item)
    elif name == "ip":
        asked["ip"] += _items(value)
        check_families([parse_own(item) for item in asked["ip"]])
    elif name == "limit":
        parse_limits(_items(value), Limits())
        asked["limits"] += _items(value)
    elif name == "family":
        if value.lower() not in (*ON, *OFF):
            raise UsageError("the value is neither on nor off")
        asked["swap"] = value.lower() in ON
    else:
        known = ", ".join(f"{PREFIX}.{s}" for s in SETTINGS)
        raise UsageError("unknown setting", hint=f"{known}, {PREFIX}.endpoint.NAME")
