"""A rootless engine's calls, as its user: `graft --engine ...` (graft/daemon/users_engines.py says why).

    hook            Podman's OCI hook of the stage precreate (oci-hooks(5)): config.json from stdin to stdout
    bundle DIR ID   graft-runtime before the real runtime's `create`: config.json in the bundle gets the traps
    port            Podman's `rootlessport`: its ports on a network of graft's are the container's own

What goes wrong is told by the hook on Podman's stderr, because Podman does not show a hook's; and where rootlessport
tells it, on stdout.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft import client
from graft.engines import rootless
from graft.errors import Failure, GraftError, Refused, UsageError

HELPERS = ("/usr/local/libexec/podman", "/usr/local/lib/podman", "/usr/libexec/podman", "/usr/lib/podman")
PORT = "rootlessport"
READY = b"1"  # what rootlessport writes to the descriptor `ReadyFD`


def main(words: list[str]) -> int:
    """Run one of them; returns the exit status."""
    commands: dict[tuple[str, int], Callable[..., None]] = {
        ("hook", 0): hook,
        ("bundle", 2): of_bundle,
        (PORT.removeprefix("rootless"), 0): port,
    }
    command = commands.get((words[0] if words else "", len(words) - 1))
    try:
        if command is None:
            raise UsageError("graft --engine is for engines alone", hint="graft --help")
        command(*words[1:])
    except GraftError as error:
        text = f"graft: {error.message} ({error.hint})" if error.hint else f"graft: {error.message}"
        os.write({"hook": _engines_stderr(), "port": 1}.get(words[0], 2), f"{text}\n".encode())
        return 1
    return 0


def _engines_stderr() -> int:
    """A descriptor of the parent's stderr; this process's, if that cannot be had."""
    from graft.kernel import linux

    try:
        return linux.pidfd_getfd(os.pidfd_open(os.getppid()), 2)
    except OSError:
        return 2


def hook() -> None:
    """Podman's hook. Raises GraftError."""
    try:
        config = json.load(sys.stdin)
    except ValueError as error:
        raise UsageError(f"config.json on standard input: {error}") from None
    json.dump(_prepared(config, ""), sys.stdout)


def of_bundle(directory: str, container_id: str) -> None:
    """Change config.json in @directory, of the container @container_id. Raises GraftError."""
    from graft.engines.bundle import read, write

    path = Path(directory, "config.json")
    try:
        write(path, _prepared(read(path), container_id))
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None


def _prepared(config: Any, container_id: str) -> Any:
    from graft.engines.bundle import NETWORKS, ROOTS_NETWORKS, is_unasked, netns_path, recognise

    try:
        container = recognise(config, container_id)
        path = netns_path(config)
    except Refused as error:
        hint = ROOTS_NETWORKS if error.hint == NETWORKS else error.hint
        raise Refused(error.message, hint=hint, code=error.code) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"config.json does not follow the OCI runtime specification: {error!r}") from None
    if is_unasked(container, container_id):
        return config
    fds: list[int] = []
    if path:
        try:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise Failure(f"the network namespace {path}: {error.strerror}") from None
    rootless.reach_graftd()
    return _order(
        "prepare",
        tuple(fds),
        config=config,
        engine=container.engine,
        id=container.id,
        name=container.name,
        settings=container.settings,
        network=container.network,
        sandbox=container.sandbox,
    )


def _order(op: str, fds: tuple[int, ...], **fields: Any) -> Any:
    """Ask the user socket; say what is missing where there is none. Raises GraftError."""
    rootless.check_graftd()
    return client.call(op, start=False, fds=fds, **fields)


def port() -> None:
    """As rootlessport, which gets JSON on stdin: be ready where the namespace is on a network of graft's.

    Else become Podman's own. Raises GraftError.
    """
    text = sys.stdin.read()
    try:
        asked = json.loads(text)
        path, ready = str(asked["NetNSPath"]), int(asked["ReadyFD"])
    except (ValueError, KeyError, TypeError):
        path, ready = "", -1
    if path and _is_grafts(path):
        os.write(ready, READY)
        return
    real = next((p for p in (f"{place}/{PORT}" for place in HELPERS) if os.access(p, os.X_OK)), None)
    if real is None:
        raise Failure(f"Podman's {PORT} is not in {', '.join(HELPERS)}", code="ENOENT")
    again = os.memfd_create(PORT)
    os.write(again, text.encode())
    os.lseek(again, 0, os.SEEK_SET)
    os.dup2(again, 0)
    os.execv(real, [PORT])  # noqa: S606 - it is Podman's own


def _is_grafts(path: str) -> bool:
    """Is the namespace at @path on a network of graft's? No, where graftd cannot be asked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        rootless.reach_graftd()
        client.call("attached", start=False, fds=(fd,))
    except GraftError:
        return False
    finally:
        os.close(fd)
    return True
