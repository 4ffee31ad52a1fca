"""Policy files (TOML): what a container is allowed to reach. The entries are those of graft/rules/policy.py.

    allow = ["pypi.org:443", "*.pythonhosted.org:443", "10.0.0.0/8"]

`graft run --policy FILE` reads the file that is named, whoever owns it: who runs it is root, and has named it. The
label or annotation `graft.policy` has a name, which stands for a file of the administrator's in policies_directory().
"""

from pathlib import Path
from typing import Any

from graft import toml
from graft.errors import Failure, UsageError
from graft.rules.configuration import configuration_path
from graft.rules.policy import ENTRIES_MAX, parse_allow


def _parse_entry(value: Any) -> str:
    entry = toml.text(value)
    parse_allow(entry)
    return entry


SCHEMA: toml.Schema = {"allow": toml.each(_parse_entry)}


def policies_directory() -> Path:
    """Where the policies are that labels and annotations name: beside graft.toml."""
    return configuration_path().with_name("policies")


def read_policy(path: Path, *, anybodys: bool = False) -> tuple[str, ...]:
    """The entries of the file at @path, which allows something. @anybodys: others than root may write it.

    Raises UsageError, which names the file, the line and the entry.
    """
    try:
        return check_policy(path, anybodys=anybodys)
    except Failure as error:
        raise UsageError(error.message, hint=error.hint) from None


def check_policy(path: Path, *, anybodys: bool = False) -> tuple[str, ...]:
    """As read_policy(), but what is wrong in the file is a Failure, with all of it."""
    try:
        found = toml.read(path, SCHEMA, anybodys=anybodys)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file", hint="name a policy file", code="ENOENT") from None
    entries: tuple[str, ...] = found.get("allow", ())
    if not entries:
        raise UsageError(f"{path}: it allows nothing", hint='allow = ["pypi.org:443"]; or --egress none, without it')
    if len(entries) > ENTRIES_MAX:
        raise UsageError(f"{path}: {len(entries)} destinations are too many", hint=f"at most {ENTRIES_MAX}")
    return entries


def named_policy(name: str) -> tuple[str, ...]:
    """The entries of the administrator's policy @name. Raises UsageError."""
    if not name or name.startswith(".") or not all((c.isalnum() and c.isascii()) or c in "_.-" for c in name):
        raise UsageError(f"'{name}' is not a policy's name", hint=f"that of a file {policies_directory()}/NAME.toml")
    return read_policy(policies_directory() / f"{name}.toml")
