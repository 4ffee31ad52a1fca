"""graft.toml: what the administrator of a host decides for graftd and all containers. Endpoints of the host in files.

The grammar is in man/graft.toml.5.md. Each key is optional; without a file the defaults hold, which are the narrow
ones. graftd reads the files when it starts, when they change, and when it is told to (graft/daemon/files.py). What
an option or the environment says wins.
"""

import contextlib
import errno
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from graft import toml
from graft.errors import Failure, UsageError
from graft.rules.address import PROTOCOL_NAME, Address, Prefix, parse_address, parse_ports, parse_prefix
from graft.rules.endpoint import EndpointWords, parse_endpoint_words, parse_name
from graft.rules.limits import Limits, parse_limits
from graft.rules.request import LABELS
from graft.rules.where import parse_where

CONFIGURATION = Path("/etc/graft/graft.toml")
FORMER = "graftd.toml"  # its name before; it is read where there is no other
FILES_MAX = 256  # of endpoints.d
LEVELS = ("debug", "info", "warning", "error")
WATCHDOG_MOST = 86400  # seconds
ADDRESS_WAIT_MOST = 600  # seconds
# sshd; etcd; the API server; kubelet, kube-proxy and the cloud, controller and scheduler managers
NODE_PORTS = ((22, 22), (2379, 2380), (6443, 6443), (10248, 10250), (10256, 10259))
# What an author of pods may ask for if pods.annotations says so; the others take nothing, and need no word
FREE = ("sysctl", "interface", "allow", "learn", "names")  # of LABELS: they take nothing, whatever they say
TAKING = tuple(label for label in LABELS if label not in FREE)
ANNOTATIONS = (*(f"graft.{label}" for label in TAKING), "graft.netadmin", "graft.endpoint")

Ports = tuple[int, int]  # first and last, both included


class Configuration(NamedTuple):
    """The values of graft.toml. The names are its keys, of whatever table."""

    reserved_ports: tuple[Ports, ...] = (
        NODE_PORTS  # that no container binds at an address of its own, nor pod publishes
    )
    reserve_listening: bool = True  # the same of what listens on the host's wildcard address when graftd begins
    count_datagrams: bool = False  # are the bytes of UDP counted? It costs each datagram some time
    addresses: tuple[Prefix, ...] = ()  # that engines' settings may give, beside those of the engine's own network
    annotations: tuple[str, ...] = ()  # [pods]: names of what pods' annotations may take
    resolvers: tuple[Address, ...] = ()  # [pods]: whom pods with egress `none` may ask for names, at port 53
    limits: Limits = Limits()  # of a container that names none
    listen: str = ""  # [metrics]: where they are served
    public: bool = False  # [metrics]: also beyond the loopback
    direct: bool = False  # [run]: of root's `graft run`, unless the command says otherwise
    log: str = "info"
    watchdog: int | None = None  # seconds; None: as whoever started graftd has it
    address_wait: float = 1.0  # seconds

    def reserved(self, listening: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        """The ports that are the node's, as (protocol, port). @listening: those taken on the wildcard address."""
        numbers: set[int] = set()
        end = -1
        for first, last in sorted(self.reserved_ports):  # each port once, however often the file has it
            numbers.update(range(max(first, end + 1), last + 1))
            end = max(end, last)
        listed = {(protocol, port) for port in numbers for protocol in PROTOCOL_NAME}
        return listed | set(listening if self.reserve_listening else ())

    def document(self) -> dict[str, Any]:
        """The configuration in JSON, for `graft doctor`."""
        return {
            "reserved_ports": [ports_text(ports) for ports in self.reserved_ports],
            "reserve_listening": self.reserve_listening,
            "count_datagrams": self.count_datagrams,
            "addresses": [str(prefix) for prefix in self.addresses],
            "pods": {
                "annotations": list(self.annotations),
                "resolvers": [str(address) for address in self.resolvers],
            },
            "limits": str(self.limits),
            "metrics": {"listen": self.listen, "public": self.public},
            "run": {"direct": self.direct},
            "log": self.log,
            "watchdog": self.watchdog,
            "address_wait": self.address_wait,
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


def _parse_limits(value: Any) -> Limits:
    return parse_limits((toml.text(value),), Limits())


def _parse_where(value: Any) -> str:
    return str(parse_where(toml.text(value), public=True, option="listen"))


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    if metrics.get("listen"):
        parse_where(metrics["listen"], public=metrics.get("public", False), option="listen", consent="public = true")


def _parse_wait(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= ADDRESS_WAIT_MOST:
        raise UsageError(f"{toml.shown(value)} is not a number of seconds from 0 to {ADDRESS_WAIT_MOST}")
    return float(value)


SCHEMA: toml.Schema = {
    "limits": _parse_limits,
    "log": toml.one_of(*LEVELS),
    "watchdog": toml.number(0, WATCHDOG_MOST),
    "address_wait": _parse_wait,
    "reserved_ports": toml.each(_parse_ports),
    "reserve_listening": toml.flag,
    "count_datagrams": toml.flag,
    "addresses": toml.each(_parse_prefix),
    "metrics": toml.Whole({"listen": _parse_where, "public": toml.flag}, "listen", _check_metrics),
    "run": {"direct": toml.flag},
    "pods": {"annotations": toml.each(_parse_annotation), "resolvers": toml.each(_parse_resolver)},
}


def configuration_path() -> Path:
    """Where the configuration is: GRAFT_CONFIG of the environment, or CONFIGURATION, or FORMER beside that."""
    named = os.environ.get("GRAFT_CONFIG")
    former = CONFIGURATION.with_name(FORMER)
    if named:
        return Path(named)
    return former if former.exists() and not os.path.lexists(CONFIGURATION) else CONFIGURATION


def read_configuration(opened: toml.Opened | None = None) -> Configuration:
    """The configuration at configuration_path(); the defaults if there is none, and GRAFT_CONFIG names none.

    @opened: as toml.read() has it. Raises Failure, which names the file, the line and the key.
    """
    path = configuration_path()
    try:
        found = toml.read(path, SCHEMA, opened)
    except FileNotFoundError:
        if os.environ.get("GRAFT_CONFIG"):
            raise Failure(f"{path}: {os.strerror(errno.ENOENT)}", code="ENOENT") from None
        return Configuration()
    tables = [found.pop(name, {}) for name in ("metrics", "run", "pods")]
    return Configuration(**found, **{key: value for table in tables for key, value in table.items()})


def _endpoints_file() -> Path:
    return configuration_path().with_name("endpoints.toml")


def endpoints_directory() -> Path:
    """Where each file has endpoints of the host: beside the configuration."""
    return configuration_path().with_name("endpoints.d")


def endpoints_paths() -> list[Path]:
    """The files that have endpoints of the host, in the order in which they are read; endpoints.toml may be missing.

    In the directory those that end in .toml; not those that begin with a dot, in which editors and ConfigMaps keep
    what is not whole. Raises Failure for a directory that cannot be read.
    """
    directory = endpoints_directory()
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".toml") and name[0] != ".")
    except FileNotFoundError:
        if toml.is_lost(directory):
            raise Failure(f"{directory}: {toml.LOST_LINK}", code="EINVAL") from None
        names = []
    except OSError as error:
        raise Failure(
            f"{directory}: {error.strerror}", hint="a directory of files NAME.toml", code="EINVAL"
        ) from None
    if len(names) > FILES_MAX:
        raise Failure(f"{directory}: {len(names)} files are too many", hint=f"at most {FILES_MAX}", code="E2BIG")
    return [_endpoints_file(), *(directory / name for name in names)]


def _parse_endpoint(name: str, value: Any) -> EndpointWords:
    parse_name(name)
    words = parse_endpoint_words(toml.text(value).split())
    if words.netns:
        raise UsageError("a file names no network namespace", hint=f"graft endpoint add {name} ... netns NETNS")
    return words


def read_endpoints(opened: toml.Opened | None = None) -> dict[str, EndpointWords]:
    """The endpoints in all files of endpoints_paths(), by name; none if there is no file.

    @opened: as toml.read() has it. Raises Failure, which names the file, the line and the endpoint; also for one
    that stands in two files, and for files of more than toml.SIZE_MAX bytes together.
    """
    names, found, faults, size = toml.Names(), dict[str, EndpointWords](), list[Failure](), 0
    for path in endpoints_paths() if opened is None else opened:
        with contextlib.suppress(FileNotFoundError):
            size += toml.size(path) if opened is None else os.fstat(opened[path]).st_size
            if size > toml.SIZE_MAX:
                raise Failure(f"{path}: with the files before it more than {toml.SIZE_MAX >> 20} MiB", code="EINVAL")
            try:
                found |= toml.read_names(path, _parse_endpoint, opened, names)
            except toml.Faults as error:
                faults += error.found
    if faults:
        raise toml.Faults(faults)
    return found


def endpoint_place(name: str) -> str:
    """The file and the line of the endpoint @name; the directory of such files, if it is in none that can be read."""
    names = toml.Names()
    with contextlib.suppress(Failure):
        for path in endpoints_paths():
            with contextlib.suppress(Failure, FileNotFoundError):
                toml.read_names(path, lambda _name, _value: None, None, names)
    return names.sources[name].where(name) if name in names.sources else str(endpoints_directory())
