"""graft-cni: a CNI plugin (CNI specification 1.0.0) with the commands ADD, DEL, CHECK and VERSION.

    {"type": "graft-cni", "capabilities": {"portMappings": true, "aliases": true},
     "ipam": {"type": "host-local", "subnet": "10.88.0.0/16"}}

First in its list, it gives the netns the address that the IPAM plugin chose. The address is on the host's stack, and
the netns has no interface. After another plugin (`prevResult`), it takes that plugin's address, unless that address
is on an interface inside the netns.

Published ports come as `portMappings`, with keys as Podman or as containerd spells them.
`network` (CIDR): connections to it leave from the container's address. The default is the IPAM plugin's subnet; in a
cluster it has to be the prefix of the pods on all nodes.
`resolver: false`: no resolver of graft's at the gateway's address, because the cluster has its own DNS.

This module imports little, because an engine starts an interpreter for each call.
"""

import json
import os
import subprocess
import sys
from typing import Any

from graft import client
from graft.engines import rootless
from graft.engines.mappings import publication
from graft.errors import GraftError

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0")
PREVIOUS = "prevResult"
TIMEOUT = 60
INCOMPATIBLE, UNSUPPORTED_FIELD, INVALID_ENVIRONMENT, DECODING, INVALID_CONFIG, TRY_LATER, OWN = (
    1,
    2,
    4,
    6,
    7,
    11,
    100,
)

Document = dict[str, Any]


class CniError(Exception):
    """An error for the runtime. @code: one of the specification ("Error"), or 100 and up for the plugin's own."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.details = code, message, details


def main() -> int:
    """Run `graft-cni`: configuration on standard input, result or error on standard output. Returns the status."""
    version = VERSIONS[-1]
    try:
        text = sys.stdin.read()
        try:
            config = json.loads(text or "{}")
        except ValueError as error:
            raise CniError(DECODING, "the network configuration is not JSON", str(error)) from None
        if not isinstance(config, dict):
            raise CniError(INVALID_CONFIG, "the network configuration is not an object")
        version = config.get("cniVersion") or "0.1.0"
        result = _command(os.environ.get("CNI_COMMAND", ""), config, text)
    except CniError as error:
        return _refuse(version, error.code, error.message, error.details)
    except subprocess.TimeoutExpired as error:
        return _refuse(version, TRY_LATER, f"{error.cmd[0]} took too long", "")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return _refuse(version, INVALID_CONFIG, "the network configuration is malformed", repr(error))
    except GraftError as error:
        return _refuse(version, TRY_LATER if error.code == "ECONNREFUSED" else OWN, error.message, error.hint)
    if result is not None:
        print(json.dumps(result))
    return 0


def _refuse(version: str, code: int, message: str, details: str) -> int:
    print(json.dumps({"cniVersion": version, "code": code, "msg": f"graft: {message}", "details": details}))
    return 1


def _command(command: str, config: Document, text: str) -> Document | None:
    if command == "VERSION":
        return {"cniVersion": VERSIONS[-1], "supportedVersions": list(VERSIONS)}
    if command not in ("ADD", "DEL", "CHECK"):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_COMMAND '{command}' is unknown", "ADD, DEL, CHECK or VERSION")
    if config.get("cniVersion") not in VERSIONS:
        raise CniError(INCOMPATIBLE, f"cniVersion '{config.get('cniVersion')}' is unknown", ", ".join(VERSIONS))
    if not config.get("name"):
        raise CniError(INVALID_CONFIG, "the configuration has no name")
    root = rootless.reach_graftd()
    if command == "ADD":
        return add(config, text, root)
    if command == "CHECK":
        check(config, text)
    else:
        delete(config, text)
    return None


def _environment(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise CniError(INVALID_ENVIRONMENT, f"{name} is not set")
    return value


def _key() -> str:
    return f"cni/{_environment('CNI_CONTAINERID')}/{_environment('CNI_IFNAME')}"


def _delegate(config: Document, text: str, command: str) -> Document:
    """Run the IPAM plugin with the same input and environment ("Section 4: Plugin Delegation"). Raises CniError.

    Returns its result; {} if the configuration names no IPAM plugin.
    """
    kind = (config.get("ipam") or {}).get("type")
    if not kind:
        return {}
    found = [
        os.path.join(d, kind) for d in _environment("CNI_PATH").split(":") if os.path.isfile(os.path.join(d, kind))
    ]
    if "/" in kind or not found:
        raise CniError(INVALID_CONFIG, f"IPAM plugin '{kind}' is not in CNI_PATH", _environment("CNI_PATH"))
    done = subprocess.run(
        [found[0]],
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "CNI_COMMAND": command},
    )
    try:
        said = json.loads(done.stdout or "{}")
    except ValueError:
        said = {}
    if done.returncode:
        raise CniError(
            said.get("code", OWN), f"{kind}: {said.get('msg') or done.stderr.strip()}", said.get("details", "")
        )
    return dict(said)


def _ports(config: Document) -> list[str]:
    """Return `portMappings` as publications; those without a host port are none."""
    found = []
    for mapping in (config.get("runtimeConfig") or {}).get("portMappings") or ():
        port = {key.lower(): value for key, value in mapping.items()}
        if not port.get("hostport"):
            continue
        kind = (port.get("protocol") or "tcp").lower()
        found.append(publication(port.get("hostip") or "", port["hostport"], port["containerport"], kind))
    return found


def _arguments() -> dict[str, str]:
    return dict(w.partition("=")[::2] for w in os.environ.get("CNI_ARGS", "").split(";"))


def _names(config: Document) -> list[str]:
    aliases = ((config.get("runtimeConfig") or {}).get("aliases") or {}).get(config["name"]) or []
    return [n for n in (_arguments().get("K8S_POD_NAME", ""), *aliases) if n]


def _inside(previous: Document) -> bool:
    """Return whether the result of the previous plugin has an interface inside the netns."""
    return any(interface.get("sandbox") for interface in previous.get("interfaces") or ())


def add(config: Document, text: str, root: str = "") -> Document:
    """ADD: give the netns its addresses and ports. Returns the result for the runtime. Raises CniError, GraftError.

    @config: the network configuration, parsed; @text: as it came, for the IPAM plugin. @root: the root directory of
    a rootless engine, whose own nameservers are in a network that the container's sockets do not see.
    """
    previous = config.get(PREVIOUS) or {}
    path = _environment("CNI_NETNS")
    assigned = _delegate(config, text, "ADD") or (previous if not _inside(previous) else {})
    ips = assigned.get("ips") or []
    gateways = sorted((ip["gateway"] for ip in ips if ip.get("gateway")), key=lambda text: ":" in text)
    gateway = gateways[0] if gateways else ""  # of IPv4, if it has both
    try:
        netns = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        client.call(
            "attach",
            start=False,
            fds=(netns,),
            key=_key(),
            network=config["name"],
            addresses=[ip["address"] for ip in ips],
            within=config.get("network") or "",
            publish=_ports(config),
            names=_names(config),
            pod="K8S_POD_NAME" in _arguments(),
            resolver=gateway if config.get("resolver", True) else "",
        )
    except BaseException as error:
        if config.get("ipam"):
            _delegate(config, text, "DEL")
        if isinstance(error, OSError):
            raise CniError(INVALID_ENVIRONMENT, f"CNI_NETNS {path}: {error.strerror}") from None
        raise
    result = {
        "cniVersion": config["cniVersion"],
        "interfaces": previous.get("interfaces") or [],
        "ips": previous.get("ips") or [],
        "routes": previous.get("routes") or [],
        "dns": previous.get("dns") or config.get("dns") or {},
    }
    if ips and not _inside(previous):
        # Podman shows only addresses that belong to an interface in the result; eth0 comes with the container
        result["interfaces"] = [{"name": _environment("CNI_IFNAME"), "mac": "00:00:00:00:00:00", "sandbox": path}]
        result["ips"] = [{**ip, "interface": 0} for ip in ips]
        if config["cniVersion"] != "1.0.0":
            for ip in result["ips"]:
                ip["version"] = "6" if ":" in ip["address"] else "4"
        if gateway and config.get("resolver", True) and not result["dns"]:
            result["dns"] = {"nameservers": [gateway]}
    if root and not result["dns"]:
        result["dns"] = {"nameservers": rootless.nameservers(root)}
    return result


def delete(config: Document, text: str) -> None:
    """DEL: take the addresses and ports back. It succeeds again if they are gone. Raises CniError, GraftError."""
    client.call("detach", start=False, key=_key())  # first: another container may have the address then
    if config.get("ipam"):
        _delegate(config, text, "DEL")


def check(config: Document, text: str) -> None:
    """CHECK: verify that the container still has the addresses of ADD's result. Raises CniError, GraftError."""
    previous = config.get(PREVIOUS)
    if previous is None:
        raise CniError(INVALID_CONFIG, f"CHECK without {PREVIOUS}")
    if config.get("ipam"):
        _delegate(config, text, "CHECK")
    wanted = (
        [] if _inside(previous) and not config.get("ipam") else [ip["address"] for ip in previous.get("ips") or ()]
    )
    found = client.call("attached", start=False, key=_key())
    missing = [a for a in wanted if a.partition("/")[0] not in found["addresses"]] or found["missing"]
    if missing:
        raise CniError(OWN, f"{', '.join(missing)}: no longer an address of this container")
