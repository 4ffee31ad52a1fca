"""graftd.toml: what the administrator of a host decides for all of its containers. endpoints.toml: its endpoints.

The grammar is in man/graftd.8.md, "CONFIGURATION". Each key is optional; without a file the defaults hold, which are
the narrow ones. graftd reads both when it starts, and when they change (graft/daemon/files.py).
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from graft import toml
from graft.errors import Failure, UsageError
from graft.rules.address import PROTOCOL_NAME, Address, Prefix, parse_address, parse_ports, parse_prefix
from graft.rules.endpoint import EndpointWords, parse_endpoint_words, parse_name
from graft.rules.request import LABELS

CONFIGURATION = Path("/etc/graft/graftd.toml")
# sshd; etcd; the API server; kubelet, kube-proxy and the cloud, controller and scheduler managers
NODE_PORTS = ((22, 22), (2379, 2380), (6443, 6443), (10248, 10250), (10256, 10259))
# What an author of pods may ask for if pods.annotations says so; the others take nothing, and need no word
FREE = ("sysctl", "interface", "allow", "learn", "names")  # of LABELS: they take nothing, whatever they say
TAKING = tuple(label for label in LABELS if label not in FREE)
ANNOTATIONS = (*(f"graft.{label}" for label in TAKING), "graft.netadmin", "graft.endpoint")

Ports = tuple[int, int]  # first and last, both included


class Configuration(NamedTuple):
    """The values of graftd.toml. The names are its keys."""

    reserved_ports: tuple[Ports, ...] = (
        NODE_PORTS  # that no container binds at an address of its own, nor pod publishes
    )
    reserve_listening: bool = True  # the same of what listens on the host's wildcard address when graftd begins
    addresses: tuple[Prefix, ...] = ()  # that engines' settings may give, beside those of the engine's own network
    annotations: tuple[str, ...] = ()  # [pods]: names of what pods' annotations may take
    resolvers: tuple[Address, ...] = ()  # [pods]: whom pods with egress `none` may ask for names, at port 53

    def reserved(self, listening: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        """The ports that are the node's, as (protocol, port). @listening: those taken on the wildcard address."""
        listed = {
            (protocol, port)
            for first, last in self.reserved_ports
            for port in range(first, last + 1)
            for protocol in PROTOCOL_NAME
        }
        return listed | set(listening if self.reserve_listening else ())

    def document(self) -> dict[str, Any]:
        """The configuration in JSON, for `graft doctor`."""
        return {
            "reserved_ports": [ports_text(ports) for ports in self.reserved_ports],
            "reserve_listening": self.reserve_listening,
            "addresses": [str(prefix) for prefix in self.addresses],
            "pods": {
                "annotations": list(self.annotations),
                "resolvers": [str(address) for address in self.resolvers],
            },
        }


def ports_text(ports: Ports) -> str:
    """The range as it is written: PORT or PORT-PORT."""
    return str(ports[0]) if ports[0] == ports[1] else f"{ports[0]}-{ports[1]}"


def _parse_prefix(value: Any) -> Prefix:
    return parse_prefix(toml.text(value))


def _parse_resolver(value: Any) -> Address:
    address = parse_address(toml.text(value))
    if address.loopback or address.any:
        raise UsageError(f"'{value}' is no resolver of pods", hint='an address that pods have, like "10.96.0.10"')
    return address


def _parse_ports(value: Any) -> Ports:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UsageError(f"{toml.shown(value)} is not a port", hint='like 22 or "2379-2380"')
    return parse_ports(value if isinstance(value, str) else toml.shown(value), least=1)


def _parse_annotation(value: Any) -> str:
    name = toml.text(value)
    if name not in ANNOTATIONS and not (name.startswith("graft.endpoint.") and name != "graft.endpoint."):
        raise UsageError(f"'{name}' is no annotation that needs it", hint=f"{', '.join(ANNOTATIONS)}[.NAME]")
    return name


SCHEMA: toml.Schema = {
    "reserved_ports": toml.each(_parse_ports),
    "reserve_listening": toml.flag,
    "addresses": toml.each(_parse_prefix),
    "pods": {"annotations": toml.each(_parse_annotation), "resolvers": toml.each(_parse_resolver)},
}


def configuration_path() -> Path:
    """Where the configuration is: GRAFT_CONFIG of the environment, or CONFIGURATION."""
    return Path(os.environ.get("GRAFT_CONFIG") or CONFIGURATION)


def read_configuration(descriptor: int = toml.BY_PATH) -> Configuration:
    """The configuration at configuration_path(); the defaults if there is none, and GRAFT_CONFIG names none.

    @descriptor: as toml.read() has it. Raises Failure, which names the file and the key.
    """
    path = configuration_path()
    try:
        found = toml.read(path, SCHEMA, descriptor)
    except FileNotFoundError as error:
        if path != CONFIGURATION:
            raise Failure(f"{path}: {error.strerror}", code="ENOENT") from None
        return Configuration()
    return Configuration(**{**found.pop("pods", {}), **found})


def endpoints_path() -> Path:
    """Where the host's endpoints are: endpoints.toml, beside the configuration."""
    return configuration_path().with_name("endpoints.toml")


def _parse_endpoint(name: str, value: Any) -> EndpointWords:
    parse_name(name)
    words = parse_endpoint_words(toml.text(value).split())
    if words.netns:
        raise UsageError("a file names no network namespace", hint=f"graft endpoint add {name} ... netns NETNS")
    return words


def read_endpoints(descriptor: int = toml.BY_PATH) -> dict[str, EndpointWords]:
    """The endpoints in the file at endpoints_path(), by name; none if there is no file.

    @descriptor: as toml.read() has it. Raises Failure, which names the file, the line and the endpoint.
    """
    try:
        return toml.read_names(endpoints_path(), _parse_endpoint, descriptor)
    except FileNotFoundError:
        return {}
