"""A container as an engine describes it, and what it asks of graft by labels or annotations."""

from typing import Any, NamedTuple

from graft import protocol
from graft.errors import GraftError, UsageError
from graft.rules.policy_file import named_policy
from graft.rules.request import LABELS, with_label
from graft.rules.sysctl import IGNORE

Document = dict[str, Any]
PREFIX = "graft"
ON = ("", "on", "1", "true", "yes")
OFF = ("off", "0", "false", "no")
POLICY = "policy"  # the name of an administrator's file, whose entries are as those of graft.allow
SWITCHES = ("family", "netadmin")  # settings that are no options of `graft run`: on or off


NAME_ROOM = 51  # characters: 64 for the whole name, less a hyphen and 12 digits of the container's id


class Container(NamedTuple):
    """A container that an engine is about to create, in the words of that engine."""

    engine: str  # docker, podman, cri, oci
    id: str
    name: str
    settings: dict[str, str]  # the labels or annotations `graft` and `graft.*`
    directory: str = ""  # where Docker keeps this container's config.v2.json
    network: str = ""  # the name of the Docker network that it is on, if any
    sandbox: bool = False  # is it the pause container of a pod, which makes no socket?
    path: str = ""  # of the netns that it joins; "" if the runtime makes one
    where: tuple[int, int] = (0, 0)  # inode and cookie of that netns; zeros if it cannot be opened
    hooked: bool = (
        True  # Docker: is it joined to its networks by a hook, within `create`? From 28 on it is after that
    )

    @property
    def what(self) -> str:
        """What its engine calls a setting."""
        return "label" if self.engine == "docker" else "annotation"


def metadata_of(container: Container) -> protocol.Metadata:
    """What a container asks for by its settings. Raises UsageError, which names the setting."""
    metadata = protocol.Metadata(
        name=_name(container),
        container=container.id,
        engine=container.engine,
        directory=container.directory,
        sandbox=container.sandbox,
    )
    for key, value in sorted(container.settings.items()):
        try:
            _take(metadata, key, value)
        except GraftError as error:
            raise UsageError(
                f"{container.what} '{key}={value}': {error.message}", hint=error.hint, code=error.code
            ) from None
    return metadata


def _name(container: Container) -> str:
    """Return a name that `graft ps` can show: at most 64 characters; no number, which would be taken for a PID."""
    plain = plain_name(container.name) if container.name else ""
    if len(plain) > 64:
        plain = f"{plain[:NAME_ROOM]}-{container.id[:12]}"
    return plain if plain and not plain.isdigit() else f"c-{plain or container.id[:12]}"


def plain_name(text: str) -> str:
    """Return @text with "_" for everything that is no ASCII letter, digit, "_", "." or "-"; "_" if it is empty."""
    return "".join(c if (c.isalnum() and c.isascii()) or c in "_.-" else "_" for c in text) or "_"


def items_of(value: str) -> list[str]:
    """The items of a setting's value: separated by commas or blanks."""
    return value.replace(",", " ").split()


def asked_by(key: str, value: str) -> tuple[str, list[str]]:
    """What a setting asks for: one of LABELS or SWITCHES and its items, ("", []) for no more than graft itself.

    Ports in `graft` are those of graft.publish; graft.endpoint.NAME is an ingress rule. Raises UsageError.
    """
    label = key.removeprefix(PREFIX).removeprefix(".")
    items = items_of(value)
    if not label:
        if value.lower() in ON:
            return "", []
        if value.lower() in OFF:
            raise UsageError("a container without this setting does not use graft", hint="omit it")
        label = "publish"
    elif label.startswith("endpoint."):
        name = label.removeprefix("endpoint.")
        items = [f"{item if ':' in item else f'0.0.0.0:{item}'}={name}" for item in items]
        label = "ingress"
    if label in SWITCHES:
        if value.lower() not in (*ON, *OFF):
            raise UsageError("the value is neither on nor off")
        return label, [label] if value.lower() in ON else []
    if label == POLICY:
        return label, items
    if label not in LABELS:
        known = ", ".join(f"{PREFIX}.{name}" for name in (*LABELS, POLICY, *SWITCHES))
        raise UsageError("unknown setting", hint=f"{known}, {PREFIX}.endpoint.NAME")
    return label, items


def _take(metadata: protocol.Metadata, key: str, value: str) -> None:
    label, items = asked_by(key, value)
    if label in SWITCHES:
        setattr(metadata, "traps_addresses" if label == "family" else label, bool(items))
    elif label == "sysctl" and any(item != IGNORE for item in items):
        raise UsageError("sysctls are the engine's to set", hint=f"{IGNORE} is the only value")
    elif label == POLICY:
        entries = [entry for name in dict.fromkeys(items) for entry in named_policy(name)]
        metadata.request = with_label(metadata.request, "allow", entries)
    elif label:
        metadata.request = with_label(metadata.request, label, items)
