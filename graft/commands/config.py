"""`graft config`: the administrator's files, before graftd reads them."""

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from graft.commands.options import CONTEXT, say
from graft.errors import GraftError, Refused, UsageError
from graft.rules.configuration import (
    CONFIGURATION,
    FORMER,
    configuration_path,
    endpoints_directory,
    endpoints_paths,
    read_configuration,
    read_endpoints,
)
from graft.rules.grants import read_users, users_path
from graft.rules.policy_file import check_policy, policies_directory
from graft.toml import Faults, is_lost


@click.group(context_settings=CONTEXT)
def command() -> None:
    """Check the files in /etc/graft before graftd reads them.

    \b
    graft config check
    graft config check ./new && cp -r ./new/. /etc/graft && systemctl reload graftd
    """


@command.command("check", context_settings=CONTEXT)
@click.argument("directory", required=False, type=click.Path(path_type=Path))
def check(directory: Path | None) -> None:
    """Check all files of DIRECTORY; default: /etc/graft.

    Each fault is a line with the file, the line in it and what was probably meant. The exit status is 1 then.
    graftd takes all of a file or nothing, and all files of endpoints or none of them.
    """
    if directory:
        if not directory.is_dir():
            raise UsageError(f"{directory} is not a directory", hint="graft config check [DIRECTORY]", code="ENOTDIR")
        names = (CONFIGURATION.name, FORMER)
        name = next((name for name in names if os.path.lexists(directory / name)), CONFIGURATION.name)
        os.environ["GRAFT_CONFIG"] = str(directory.absolute() / name)
    faults, found = 0, 0
    for paths, read in _groups():
        found += len(paths)
        try:
            read()
        except GraftError as error:
            found_here = error.found if isinstance(error, Faults) else [error]
            faults += len(found_here)
            for fault in found_here:
                say(f"wrong  {fault}")
        else:
            for path in paths:
                say(f"right  {path}")
    if not found and not faults:
        say(f"note   {configuration_path().parent} has no file that graft reads: the defaults are in force")
    for note in _strays(configuration_path().parent):
        say(f"note   {note}")
    if faults:
        counted = "1 fault" if faults == 1 else f"{faults} faults"
        raise Refused(f"{counted}: of a file that has one nothing is taken", code="EINVAL")


def _groups() -> Iterator[tuple[list[Path], Callable[[], object]]]:
    """Files that are read together, as far as they are there, and what reads them."""
    path = configuration_path()
    if os.path.lexists(path) or is_lost(path):
        yield [path], read_configuration
    endpoints = []
    with contextlib.suppress(GraftError):  # read_endpoints() tells it
        endpoints = [path for path in endpoints_paths() if os.path.lexists(path)]
    yield endpoints, read_endpoints
    if os.path.lexists(users_path()):
        yield [users_path()], read_users
    for policy in sorted(policies_directory().glob("*.toml")):
        yield [policy], lambda policy=policy: check_policy(policy)  # type: ignore[misc]


def _strays(directory: Path) -> Iterator[str]:
    """What stands in @directory and is not read."""
    known = [path.name for path in (configuration_path(), endpoints_directory(), users_path(), policies_directory())]
    known.append("endpoints.toml")
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        if entry.name in known or entry.name.startswith("."):
            continue
        if entry.name == FORMER:
            yield f"{entry} is not read, because {configuration_path()} is there"
            continue
        close = difflib.get_close_matches(entry.name, known, 1, 0.7)
        yield f"{entry} is not read{f': did you mean {close[0]}?' if close else ''}"
    for inner in (endpoints_directory(), policies_directory()):
        for entry in sorted(inner.iterdir()) if inner.is_dir() else ():
            if entry.suffix != ".toml" and not entry.name.startswith("."):
                yield f"{entry} is not read: its name does not end in .toml"
