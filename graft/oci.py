"""OCI bundles: which container is it, what does it want of graft, and its config.json with graft's traps in it.

What a container wants is said by settings: labels of Docker, annotations of Podman, Kubernetes and plain OCI.

    graft.publish          [HADDR:]HPORT:PORT[/tcp|/udp], ...          as `graft run -p`
    graft.ingress          ADDR:PORT[-PORT]=ENDPOINT, ...              as `graft run -i`
    graft.endpoint.NAME    [ADDR:]PORT[-PORT]                          a bind there becomes one to endpoint NAME
    graft.egress           host | none | PREFIX/LEN=ENDPOINT, ...      as `graft run --egress` and `-e`
    graft.ip               ADDR, ...                                   as `graft run --ip`
    graft.limit            sockets=N, udp=N                            as `graft run --limit`
    graft.family           on                                          for programs of the family AF_GRAFT
    graft                  on, or what graft.publish has               (Podman: what selects the container)

An image may bring labels and, with Podman, annotations: those are refused, since an image must not publish ports of
the host.
"""

import contextlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from graft import host, linux, protocol, seccomp
from graft.endpoint import PROTOCOL_NAME, parse_egress, parse_ingress, parse_publication
from graft.errors import GraftError, Refused, UsageError
from graft.limits import Limits, parse_limits
from graft.network import check_families, parse_own
from graft.seal import seal

Document = dict[str, Any]
PREFIX = "graft"
SETTINGS = ("publish", "ingress", "egress", "ip", "limit", "family")
ON = ("", "on", "1", "true", "yes")
OFF = ("off", "0", "false", "no")
DOCKER_FILES = ("resolv.conf", "hostname", "hosts")
DOCKER_HOOK = "libnetwork-setkey"
CRI = "io.kubernetes.cri."
ARGV_MAX = 256  # words, and characters of each, that `graft ps` may show
NAME_ROOM = 51  # a name of 64 with a hyphen and 12 digits of the id


class Container(NamedTuple):
    """What an engine says about a container that is about to be."""

    engine: str  # docker, podman, cri, oci
    id: str
    name: str
    settings: dict[str, str]
    directory: str = ""  # where Docker keeps what it knows
    network: str = ""  # Docker's name of it, if it has one
    path: str = ""  # of the namespace, if that exists,
    where: tuple[int, int] = (0, 0)  # with inode and cookie, if those can be seen


def read(path: Path) -> Document:
    """A JSON document that an engine wrote: a file, and no link. Raises Refused."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Refused(f"{path} is not a file", code="EINVAL")
            document: Document = json.loads(file.read())
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {getattr(error, 'strerror', None) or error}", code="EIO") from None
    return document


def identify(config: Document, number: str) -> Container:
    """Whose bundle is this? @number: the id that the runtime was given; "" in a hook of Podman."""
    path = netns_path(config)
    return _identify(config, number)._replace(path=path, where=_where(path))


def _identify(config: Document, number: str) -> Container:
    annotations: dict[str, str] = config.get("annotations") or {}
    mounts = {m.get("destination"): m.get("source", "") for m in config.get("mounts") or ()}
    if f"{CRI}container-type" in annotations:
        name = annotations.get(f"{CRI}sandbox-name", number[:12])
        space = annotations.get(f"{CRI}sandbox-namespace", "default")
        return Container("cri", number, f"{space}_{name}", _ours(annotations))
    if annotations.get("io.container.manager") == "libpod":
        return _podman(config, number, mounts.get("/dev/shm", ""), _ours(annotations))
    directory = _docker_directory(config, number, mounts)
    if directory:
        return _docker(directory, number)
    if DOCKER_HOOK in json.dumps(config.get("hooks") or {}):
        raise Refused("what Docker knows of this container is not to be found", hint="is its data root visible?")
    return Container("oci", number, number[:64], _ours(annotations))


def _ours(labels: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in labels.items() if k == PREFIX or k.startswith(f"{PREFIX}.")}


def _podman(config: Document, number: str, shm: str, settings: dict[str, str]) -> Container:
    """Its id is in the cgroup's name, its name and image in containers/storage, where it is before its hooks run."""
    path = (config.get("linux") or {}).get("cgroupsPath") or ""
    found = re.search(r"([0-9a-f]{64})(\.scope)?$", path) or re.search(r"/([0-9a-f]{64})/userdata/shm$", shm)
    number = number or (found[1] if found else "")
    if not number:
        raise Refused("Podman's container has no id", hint="--cgroups=disabled is not supported", code="EINVAL")
    storage = _podman_storage(Path((config.get("root") or {}).get("path") or "/"), shm)
    entry: Document = {}
    if storage:
        entries: Any = read(storage / "containers.json")
        entry = next((e for e in entries if e.get("id") == number), {})
    if settings and (not storage or entry.get("image")):
        _check_annotations(storage, entry.get("image") or "", settings)
    return Container("podman", number, str(next(iter(entry.get("names") or ()), number[:12])), settings)


def _podman_storage(root: Path, shm: str) -> Path | None:
    """The directory DRIVER-containers, by a container's /dev/shm or the layer that it has for its root."""
    if re.search(r"/[0-9a-f]{64}/userdata/shm$", shm):
        return Path(shm).parents[2]
    pairs = zip((root, *root.parents), root.parents, strict=False)
    return next((p / f"{c.name}-containers" for c, p in pairs if (p / f"{c.name}-containers").is_dir()), None)


def _check_annotations(storage: Path | None, image: str, settings: dict[str, str]) -> None:
    """Podman 4 hands an image's annotations on to its containers: refuse those."""
    if storage is None:
        raise Refused("what Podman knows of this container's image is not to be found", code="EINVAL")
    manifest = storage.with_name(storage.name.replace("-containers", "-images")) / image / "manifest"
    _check_brought("annotation", read(manifest).get("annotations") or {}, settings)


def _check_brought(what: str, brought: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Refuse settings that an image brought: who runs it decides, not who built it."""
    for key, value in settings.items():
        if brought.get(key) == value:
            raise Refused(
                f"{what} '{key}' is the image's, which may not ask for the host's network",
                hint=f"take it over with another value, or out with --{what} {key}=",
                code="EPERM",
            )


def _docker_directory(config: Document, number: str, mounts: dict[Any, str]) -> str:
    """Where Docker keeps what it knows of a container: beside what it mounts, or above its root file system."""
    beside = [os.path.dirname(os.path.dirname(mounts.get(f"/etc/{name}", ""))) for name in DOCKER_FILES]
    above = Path((config.get("root") or {}).get("path") or "/").parents
    roots = [str(p / "containers") for p in above]
    return next(
        (f"{place}/{number}" for place in (*beside, *roots) if os.path.exists(f"{place}/{number}/config.v2.json")), ""
    )


def _docker(directory: str, number: str) -> Container:
    known = read(Path(directory, "config.v2.json"))
    host = read(Path(directory, "hostconfig.json"))
    labels = _ours((known.get("Config") or {}).get("Labels") or {})
    if labels:
        _check_image(known, Path(directory).parents[1], labels)
    mode = host.get("NetworkMode") or "default"
    if mode in ("default", "bridge", "host"):
        raise Refused(
            f"network '{mode}' is not graft's",
            hint="--network none, or a network made by 'docker network create -d graft NAME'",
            code="EINVAL",
        )
    if mode == "none":
        bound = ",".join(_bindings(host))
        if bound:
            labels["graft.publish"] = ",".join(filter(None, (labels.get("graft.publish", ""), bound)))
    else:
        _check_twice(host, labels)
    user = "" if mode == "none" or mode.startswith("container:") else mode
    return Container("docker", number, str(known.get("Name", "")).lstrip("/"), labels, directory, user)


def _check_image(known: Document, root: Path, labels: dict[str, str]) -> None:
    kind, _, digest = str(known.get("Image", "")).partition(":")
    path = root / "image" / str(known.get("Driver", "")) / "imagedb/content" / kind / digest
    _check_brought("label", (read(path).get("config") or {}).get("Labels") or {}, labels)


def _check_twice(host: Document, labels: dict[str, str]) -> None:
    """Refuse a port that `-p` and a label publish: on a network, Docker tells the one to its driver."""
    bound = {p.partition("/")[0::2] for p in host.get("PortBindings") or {}}
    for item in _items(labels.get("graft.publish", "")):
        with contextlib.suppress(UsageError):  # wish() says what is wrong
            p = parse_publication(item)
            for port in range(p.first, p.first + p.span):
                if (str(port), PROTOCOL_NAME[p.protocol]) in bound:
                    raise Refused(
                        f"label 'graft.publish={item}': -p publishes port {port} already",
                        hint="a socket has one address; publish it once",
                        code="EINVAL",
                    )


def _bindings(host: Document) -> list[str]:
    """`docker run -p` with --network none, as publications."""
    found = []
    for port, places in (host.get("PortBindings") or {}).items():
        number, _, protocol_name = port.partition("/")
        for place in places or ():
            address = place.get("HostIp") or ""
            address = f"[{address}]:" if ":" in address else f"{address}:" if address else ""
            if address in ("0.0.0.0:", "[::]:"):
                address = ""
            if not place.get("HostPort"):
                raise Refused(
                    f"-p {number}: the host's port is missing",
                    hint=f"-p HPORT:{number}, or a network of driver graft",
                )
            found.append(f"{address}{place['HostPort']}:{number}/{protocol_name or 'tcp'}")
    return found


def wish(container: Container) -> protocol.Metadata:
    """What a container's settings ask for. Raises UsageError that names the setting."""
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
    """One that `graft ps` can show."""
    plain = plain_name(container.name) if container.name else ""
    if len(plain) > 64:
        plain = f"{plain[:NAME_ROOM]}-{container.id[:12]}"
    return plain if plain and not plain.isdigit() else f"c-{plain or container.id[:12]}"


def plain_name(text: str) -> str:
    """@text without what a terminal or a table would take for something else."""
    return "".join(c if (c.isalnum() and c.isascii()) or c in "_.-" else "_" for c in text) or "_"


def _items(value: str) -> list[str]:
    return value.replace(",", " ").split()


def _setting(asked: dict[str, Any], key: str, value: str) -> None:
    name = key.removeprefix(PREFIX).removeprefix(".")
    if not name:
        if value.lower() in ON:
            return
        if value.lower() in OFF:
            raise UsageError("a container is graft's or has no such setting", hint="leave it away")
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
            raise UsageError("neither on nor off")
        asked["swap"] = value.lower() in ON
    else:
        known = ", ".join(f"{PREFIX}.{s}" for s in SETTINGS)
        raise UsageError("graft has no such setting", hint=f"{known}, {PREFIX}.endpoint.NAME")


def netns_path(config: Document) -> str:
    """Where the namespace is that the container joins; "" if it gets one of its own."""
    namespaces = (config.get("linux") or {}).get("namespaces") or ()
    return next((n.get("path") or "" for n in namespaces if n["type"] == "network"), "")


def _without_waiting(path: str, flags: int) -> int:
    """It may be a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


def _where(path: str) -> tuple[int, int]:
    """Inode and cookie of the namespace at @path; zeros if that is none, or cannot be seen."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            linux.check_netns(file.fileno())
            return os.fstat(file.fileno()).st_ino, host.netns_cookie_of(file.fileno())
    except OSError:
        return 0, 0


def devices(path: str) -> list[str]:
    """The network devices that are up in the namespace at @path; none if that is not one, or cannot be seen."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            linux.check_netns(file.fileno())
            with linux.inside_netns(file.fileno()):
                return [name for name, state in psutil.net_if_stats().items() if state.isup]
    except OSError:
        return []


def edit(config: Document, asked: protocol.Metadata, directory: Path) -> Document:
    """config.json with graft's traps, told to the agent socket in graftd's @directory. Raises Refused."""
    section: Document = config.get("linux") or {}
    namespaces = {n["type"]: n.get("path", "") for n in section.get("namespaces") or ()}
    if "network" not in namespaces:
        raise Refused(
            "the container has the host's network",
            hint="give it a namespace of its own: --network none",
            code="EINVAL",
        )
    asked.argv = [word[:ARGV_MAX] for word in ((config.get("process") or {}).get("args") or ())[:ARGV_MAX]]
    listener, metadata = str(directory / "agent.sock"), seal(asked, directory)
    merged = seccomp.merge(section.get("seccomp"), listener=listener, metadata=metadata, swap=asked.swap)
    return {**config, "linux": {**section, "seccomp": merged}}


def write(path: Path, config: Document) -> None:
    """Replace config.json: whole or not at all."""
    temporary = path.with_name(f"{path.name}.graft-{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(temporary, flags, path.stat().st_mode & 0o777), "w") as file:
        file.write(json.dumps(config))
    temporary.rename(path)
