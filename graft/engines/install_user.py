"""Plans of `graft install` and `graft uninstall` by a user without root: what changes in that user's configuration.

Podman      a drop-in of the user's containers.conf(5), with the directories of a hook, of the plugins and of graft's
            `rootlessport`, beside those that are in force; these in ~/.config/containers/graft; the network `graft`
            where the user's Podman keeps its networks
Docker      the user's daemon.json gets a runtime

An array of containers.conf in a drop-in replaces what an earlier file says, so that each is written out.
"""

import ipaddress
import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft import client
from graft.engines.install import (
    NAME,
    Change,
    Options,
    Plan,
    backend,
    changed,
    conflist,
    linked,
    podman_hook,
    podman_network,
    program,
)
from graft.engines.install import docker as docker_of
from graft.errors import Refused
from graft.rules.address import parse_prefix
from graft.rules.grants import users_path

SYSTEM = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
HELPERS = ("/usr/local/libexec/podman", "/usr/local/lib/podman", "/usr/libexec/podman", "/usr/lib/podman")
CNI = ("/usr/local/libexec/cni", "/usr/libexec/cni", "/usr/local/lib/cni", "/usr/lib/cni", "/opt/cni/bin")
NETAVARK = ("/usr/local/libexec/netavark", "/usr/libexec/netavark", "/usr/local/lib/netavark", "/usr/lib/netavark")
HOOKS = ("/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d")
LENGTH = 24
ARRAYS = (  # tables and keys of containers.conf, with what holds where no file says anything
    ("engine", "hooks_dir", ()),
    ("engine", "helper_binaries_dir", HELPERS),
    ("network", "cni_plugin_dirs", CNI),
    ("network", "netavark_plugin_dirs", NETAVARK),
)


def _configuration() -> Path:
    """Where the user's programs have their configuration (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def _files(drop_in: Path) -> list[Path]:
    """The files of containers.conf(5) that are in force for the user, in their order, without @drop_in."""
    found = []
    for path in (*map(Path, SYSTEM), drop_in.parents[1] / "containers.conf"):
        found += [path, *sorted(path.with_name(f"{path.name}.d").glob("*.conf"))]
    return [path for path in found if path != drop_in and path.is_file()]


def _in_force(drop_in: Path) -> dict[str, list[str]]:
    """The arrays of ARRAYS as they are in force without graft, by their keys. Raises Refused."""
    found = {key: list(default) for _, key, default in ARRAYS}
    for path in _files(drop_in):
        try:
            document = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise Refused(f"{path}: {error}", hint="fix it first", code="EINVAL") from None
        for table, key, _ in ARRAYS:
            value = (document.get(table) or {}).get(key)
            if isinstance(value, list):
                found[key] = [word for word in value if isinstance(word, str)]
    return found


def _drop_in(arrays: dict[str, list[str]], own: Path) -> str:
    lines = ["# written by 'graft install podman'; 'graft uninstall podman' takes it back"]
    for table in dict.fromkeys(table for table, _, _ in ARRAYS):
        lines.append(f"[{table}]")
        for at, key, _ in ARRAYS:
            if at == table:
                values = [str(own), *(place for place in arrays[key] if place != str(own))]
                lines.append(f"{key} = {json.dumps(values)}")
    return "\n".join(lines) + "\n"


def _granted_subnet() -> str:
    """The user's part of a range of addresses that root has granted; "" if there is none. Raises GraftError.

    Of a range that is granted to many, each user has a network of LENGTH bits, by the uid: else their Podmans would
    give the same addresses.
    """
    granted: dict[str, Any] = client.call("status", start=False)["granted"]
    text = next((prefix for prefix in granted["addresses"] if ":" not in prefix), "")
    if not text:
        return ""
    whole = ipaddress.IPv4Network(text)
    if whole.prefixlen >= LENGTH:
        return text
    at = os.getuid() % (1 << (LENGTH - whole.prefixlen)) << (32 - LENGTH)
    return f"{whole[at]}/{LENGTH}"


def _check_granted(subnet: str) -> None:
    """Raise Refused if root has not granted @subnet, a CIDR, to this user; and GraftError."""
    granted: dict[str, Any] = client.call("status", start=False)["granted"]
    wanted = parse_prefix(subnet)
    for prefix in map(parse_prefix, granted["addresses"]):
        if prefix.length <= wanted.length and prefix.covers(wanted.address):
            return
    hint = f"root may grant it: {users_path()}"
    raise Refused(f"--subnet {subnet}: not granted to you", hint=hint, code="EACCES")


def _networks() -> Path:
    """Where the user's Podman with netavark keeps its networks."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    return data / "containers/storage/networks"


def podman(options: Options, *, install: bool) -> Plan:
    """Plan the drop-in, what it names, and the network `graft`. Raises Refused or Failure."""
    base = _configuration() / "containers"
    own = base / NAME
    drop_in = base / "containers.conf.d/graft.conf"
    kind = backend() if install else ""
    if install and not kind:
        raise Refused("this Podman's netavark has no plugins", hint="Podman 4.5 or later", code="EPROTONOSUPPORT")
    if install and options.subnet:
        _check_granted(options.subnet)
    subnet = (options.subnet or _granted_subnet()) if install else ""
    graft = program(NAME)
    files: dict[Path, str | None] = {
        own / "graft.json": podman_hook(graft, NAME, "--engine", "hook") if install else None,
        drop_in: _drop_in(_in_force(drop_in), own) if install else None,
        base.parent / "cni/net.d/88-graft.conflist": conflist(NAME, subnet) if kind == "cni" else None,
        _networks() / "graft.json": podman_network(NAME, subnet) if kind == "netavark" else None,
    }
    links = {"rootlessport": "graft-runtime", "graft-cni": "graft-cni", NAME: "graft-netavark"}
    changes: list[Change] = []
    for name, target in links.items():
        changes += linked(own / name, program(target) if install else None)
    for path, text in files.items():
        changes += changed(path, text if install else None)
    found = f"networks by {kind}, {subnet or 'no addresses are granted to you: containers have ports, and no names'}"
    return Plan(changes, [], "", found)


def docker(options: Options, *, install: bool) -> Plan:
    """Plan the runtime `graft` in the user's daemon.json. Raises Refused, UsageError or Failure."""
    plan = docker_of(options, install=install, path=_configuration() / "docker/daemon.json")
    return plan._replace(reload=["systemctl", "--user", "reload", "docker"])


def containerd(_options: Options, *, install: bool) -> Plan:  # noqa: ARG001 - as the others
    """Raise Refused: pods are root's."""
    raise Refused("containerd's pods are root's", hint="sudo graft install containerd", code="EPERM")


ENGINES: dict[str, Callable[..., Plan]] = {"docker": docker, "podman": podman, "containerd": containerd}
