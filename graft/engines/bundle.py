"""OCI bundles: identify the container, read what it asks of graft, and put graft's traps into its config.json.

A container asks by settings: labels in Docker; annotations in Podman, Kubernetes and plain OCI bundles. Most are
options of `graft run` (graft/rules/request.py); graft/engines/container.py has the others. man/graft.1.md tells users
of them.

A label or annotation that came with the image is refused. Whoever runs a container decides about the host's ports;
whoever built its image does not. An image has labels, and Podman 4 passes an image's annotations on as well.

The specifications are runtime-spec config.md (config.json), and, for what is read of the engines' own files:
moby container/container.go (config.v2.json, hostconfig.json) and containers/storage (containers.json).
"""

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from graft import protocol
from graft.engines import profile
from graft.engines.container import PREFIX, Container, Document, items_of
from graft.engines.joined import below, where
from graft.engines.seal import seal
from graft.errors import Refused, UsageError
from graft.rules.address import PROTOCOL_NAME
from graft.rules.publication import parse_publication
from graft.rules.request import with_label
from graft.rules.sysctl import carries
from graft.tenants.tenant import POD

DOCKER_FILES = ("resolv.conf", "hostname", "hosts")
DOCKER_HOOK = b"libnetwork-setkey"
CONTAINERD_ROOTS = ("/var/lib/containerd",)  # `root` of a containerd that dockerd has not started
CONTENT = "io.containerd.content.v1.content/blobs"
DIGEST = re.compile(r"[a-z0-9]+:[0-9a-f]{32,128}")
PODMAN_CONTAINERS = ("containers.json", "volatile-containers.json")  # the second one has those of --rm, since 4.4
CRI = "io.kubernetes.cri."
SANDBOX = (f"{CRI}container-type", "io.kubernetes.cri-o.ContainerType")  # of a pause container they say "sandbox"
NET_ADMIN = "CAP_NET_ADMIN"
NETWORKS = "--network none, or a network made by 'docker network create -d graft NAME'"
ROOTS_NETWORKS = "--network none; Docker has networks of graft's for root alone"  # what a user is told instead
ARGV_MAX = 256  # `graft ps` shows at most so many words of a command, and so many characters of each


def read(path: Path) -> Document:
    """Parse a JSON document that an engine wrote. Raises Refused if @path is a symbolic link or no regular file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Refused(f"{path} is not a file", code="EINVAL")
            document: Document = msgspec.json.decode(file.read())
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise Refused(f"{path}: {getattr(error, 'strerror', None) or error}", code="EIO") from None
    return document


def identify(config: Document, container_id: str, root: str = "") -> Container:
    """Find out which container of which engine a bundle is.

    @config: the parsed config.json. @container_id: the id that the runtime was given; "" in a hook of Podman,
    which has none. @root: the root directory that the engine's process sees, which may have mounted the netns where
    graftd does not see it. Raises Refused if the engine's own files about the container are missing, or say that its
    network is not graft's, or if the netns that it joins cannot be opened.
    """
    path = netns_path(config)
    path = below(root, path) if path else ""
    return recognise(config, container_id)._replace(path=path, where=where(path))


def recognise(config: Document, container_id: str) -> Container:
    """As identify(), but without looking for the netns."""
    return _identify(config, container_id)._replace(sandbox=is_sandbox(config))


def is_unasked(container: Container, container_id: str) -> bool:
    """Does a hook of Podman's, which gives no @container_id, stand before a container whose pod has asked for another
    of its containers alone?
    """
    return not container_id and container.engine == "podman" and not container.settings


def is_sandbox(config: Document) -> bool:
    """Is it the pause container of a pod, which holds the pod's namespaces, and makes no socket?"""
    annotations = config.get("annotations") or {}
    return any(annotations.get(key) == "sandbox" for key in SANDBOX)


def _identify(config: Document, container_id: str) -> Container:
    annotations: dict[str, str] = config.get("annotations") or {}
    mounts = {m.get("destination"): m.get("source", "") for m in config.get("mounts") or ()}
    if f"{CRI}container-type" in annotations:
        name = annotations.get(f"{CRI}sandbox-name", container_id[:12])
        space = annotations.get(f"{CRI}sandbox-namespace", "default")
        return Container("cri", container_id, f"{space}_{name}", _ours(annotations))
    if annotations.get("io.container.manager") == "libpod":
        return _podman(config, container_id, mounts.get("/dev/shm", ""), annotations)
    directory = _docker_directory(config, container_id, mounts)
    hooked = DOCKER_HOOK in msgspec.json.encode(config.get("hooks") or {})
    if directory:
        return _docker(directory, container_id)._replace(hooked=hooked)
    if hooked:
        raise Refused("Docker's files about this container are not found", hint="is its data root visible to graftd?")
    kind = (
        "cri" if any(key.startswith("io.kubernetes.") for key in annotations) else "oci"
    )  # CRI-O's are pods as well
    return Container(kind, container_id, container_id[:64], _ours(annotations))


def _ours(labels: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in labels.items() if k == PREFIX or k.startswith(f"{PREFIX}.")}


def _of_member(annotations: Mapping[str, str], name: str) -> dict[str, str]:
    """What of these is for the container @name, which is POD-MEMBER if a pod has it.

    `podman generate kube` writes a container's annotation into those of its pod, as KEY/MEMBER, and `podman kube
    play` gives the pod's to each container.
    """
    found: dict[str, str] = {}
    for key, value in sorted(annotations.items()):  # those of one container follow those of all
        plain, slash, member = key.partition("/")
        if not slash or name == member or name.endswith(f"-{member}"):
            found[plain] = value
    return found


def _podman(config: Document, container_id: str, shm: str, annotations: Mapping[str, str]) -> Container:
    """Identify Podman's container. Its id is in the name of its cgroup, or else in the path of its /dev/shm.

    Its name and image are in containers/storage. Podman writes those before it runs the hooks.
    """
    path = (config.get("linux") or {}).get("cgroupsPath") or ""
    found = re.search(r"([0-9a-f]{64})(\.scope)?$", path) or re.search(r"/([0-9a-f]{64})/userdata/shm$", shm)
    container_id = container_id or (found[1] if found else "")
    if not container_id:
        raise Refused("Podman's container has no id", hint="--cgroups=disabled is not supported", code="EINVAL")
    storage = _podman_storage(Path((config.get("root") or {}).get("path") or "/"), shm)
    entry: Document = {}
    if storage:
        files = [path for path in (storage / name for name in PODMAN_CONTAINERS) if path.exists()]
        entries: list[Any] = [read(path) for path in files or [storage / PODMAN_CONTAINERS[0]]]
        entry = next((e for file in entries for e in file if e.get("id") == container_id), {})
    asked = {key: value for key, value in annotations.items() if _ours({key.partition("/")[0]: value})}
    if asked and (not storage or entry.get("image")):
        _check_annotations(storage, entry.get("image") or "", asked)
    name = str(next(iter(entry.get("names") or ()), container_id[:12]))
    return Container("podman", container_id, name, _of_member(asked, name))


def _podman_storage(root: Path, shm: str) -> Path | None:
    """Return the directory DRIVER-containers of containers/storage, or None.

    It is found from the source of the container's /dev/shm (@shm), or from the layer that is its @root.
    """
    if re.search(r"/[0-9a-f]{64}/userdata/shm$", shm):
        return Path(shm).parents[2]
    pairs = zip((root, *root.parents), root.parents, strict=False)
    return next((p / f"{c.name}-containers" for c, p in pairs if (p / f"{c.name}-containers").is_dir()), None)


def _check_annotations(storage: Path | None, image: str, settings: dict[str, str]) -> None:
    """Refuse annotations of the image: Podman 4 passes them on to its containers. Raises Refused."""
    if storage is None:
        raise Refused("Podman's files about this container's image are not found", code="EINVAL")
    manifest = storage.with_name(storage.name.replace("-containers", "-images")) / image / "manifest"
    _check_brought("annotation", read(manifest).get("annotations") or {}, settings)


def _check_brought(what: str, brought: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Refuse settings that came with the image: whoever runs it decides, not whoever built it. Raises Refused."""
    for key, value in settings.items():
        if brought.get(key) == value:
            raise Refused(
                f"{what} '{key}' comes from the image, which may not ask for the host's network",
                hint=f"override it with another value, or clear it with --{what} {key}=",
                code="EPERM",
            )


def _docker_directory(config: Document, container_id: str, mounts: dict[Any, str]) -> str:
    """Return the directory with Docker's config.v2.json of a container, or "".

    It is the one that the container's /etc/resolv.conf, hostname or hosts is mounted from, or DATA-ROOT/containers/ID
    with DATA-ROOT above the container's root file system.
    """
    beside = [os.path.dirname(os.path.dirname(mounts.get(f"/etc/{name}", ""))) for name in DOCKER_FILES]
    above = Path((config.get("root") or {}).get("path") or "/").parents
    roots = [str(p / "containers") for p in above]
    places = filter(os.path.isabs, (*beside, *roots))  # Docker's are; what is relative would be so to graftd
    return next(
        (f"{place}/{container_id}" for place in places if os.path.exists(f"{place}/{container_id}/config.v2.json")),
        "",
    )


def _docker(directory: str, container_id: str) -> Container:
    known = read(Path(directory, "config.v2.json"))
    host = read(Path(directory, "hostconfig.json"))
    labels = _ours((known.get("Config") or {}).get("Labels") or {})
    if labels:
        _check_image(known, Path(directory).parents[1], labels)
    mode = host.get("NetworkMode") or "default"
    if mode in ("default", "bridge"):  # Docker 26 writes bridge for default, also for a service's container of swarm
        named = (known.get("NetworkSettings") or {}).get("Networks") or {}
        if "ingress" in named:
            raise Refused(
                "swarm's routing mesh leads to a device of the container, whose sockets are the host's",
                hint="--publish mode=host,target=...,published=...",
                code="EINVAL",
            )
        others = [name for name in named if name != "default"]
        mode = "bridge" if "bridge" in named or not others else others[0]
    if mode in ("bridge", "host"):
        raise Refused(
            f"network '{mode}' is not graft's",
            hint=NETWORKS,
            code="EINVAL",
        )
    if mode == "none":
        bound = ",".join(_bindings(host))
        if bound:
            labels["graft.publish"] = ",".join(filter(None, (labels.get("graft.publish", ""), bound)))
    else:
        _check_twice(host, labels)
    network = _user_defined(mode)
    return Container("docker", container_id, str(known.get("Name", "")).lstrip("/"), labels, directory, network)


def _user_defined(mode: str) -> str:
    """The name of the network in a NetworkMode of Docker's; "" if it is none, or another container's."""
    return "" if mode == "none" or mode.startswith("container:") else mode


def docker_network(directory: str) -> str:
    """The network that Docker gives a container whose files are in @directory, as `Container.network`.

    "" for no directory. Raises Refused.
    """
    return _user_defined(read(Path(directory, "hostconfig.json")).get("NetworkMode") or "") if directory else ""


def _check_image(known: Document, root: Path, labels: dict[str, str]) -> None:
    """Refuse labels of the image's. @known: config.v2.json. @root: Docker's data root. Raises Refused."""
    digest = str(known.get("Image", ""))
    own = root / "image" / str(known.get("Driver", "")) / "imagedb"
    if own.is_dir():
        images = [read(own / "content" / digest.replace(":", "/"))]
    else:
        images = _containerd_images(str((known.get("ImageManifest") or {}).get("digest") or digest), root)
    for image in images:
        _check_brought("label", (image.get("config") or {}).get("Labels") or {}, labels)


def _containerd_images(digest: str, root: Path) -> list[Document]:
    """The configurations of an image in containerd's store, one for each platform that is there.

    @digest: of its index or manifest (image-spec, image-index.md and manifest.md). @root: Docker's data root, below
    which is the store of a containerd that dockerd has started itself. Raises Refused.
    """
    stores = [root / "containerd/daemon", *map(Path, CONTAINERD_ROOTS)]
    places = [store / CONTENT / digest.replace(":", "/") for store in stores if DIGEST.fullmatch(digest)]
    place = next(filter(Path.exists, places), None)
    if place is None:
        raise Refused(
            f"Docker's files about this container's image are not found: {digest}",
            hint=f"graftd looks in {', '.join(map(str, stores))}; omit the labels",
            code="EIO",
        )
    manifest = read(place)
    blobs = place.parents[1]
    if "config" in manifest:
        return [read(_blob(blobs, manifest["config"]))]
    there = [_blob(blobs, entry) for entry in manifest.get("manifests") or ()]
    manifests = [read(path) for path in there if path.exists()]
    if not manifests:
        raise Refused(f"{place} has no image of a platform that is there", code="EIO")
    return [read(_blob(blobs, document["config"])) for document in manifests if "config" in document]


def _blob(blobs: Path, descriptor: Document) -> Path:
    digest = str(descriptor["digest"])
    if not DIGEST.fullmatch(digest):
        raise Refused(f"'{digest}' is no digest", code="EINVAL")
    return blobs / digest.replace(":", "/")


def _check_twice(host: Document, labels: dict[str, str]) -> None:
    """Refuse a port that both `-p` and a label publish: on a network, Docker tells its driver what -p says.

    Raises Refused.
    """
    bound = {p.partition("/")[0::2] for p in host.get("PortBindings") or {}}
    for item in items_of(labels.get("graft.publish", "")):
        with contextlib.suppress(UsageError):  # metadata_of() reports it
            p = parse_publication(item)
            for port in range(p.first, p.first + p.span):
                if (str(port), PROTOCOL_NAME[p.protocol]) in bound:
                    raise Refused(
                        f"label 'graft.publish={item}': -p publishes port {port} already",
                        hint="a socket has one address; publish it once",
                        code="EINVAL",
                    )


def _bindings(host: Document) -> list[str]:
    """Return what `docker run -p` with --network none asks for, as publications. Raises Refused.

    Docker chooses no port for such a container, so the host's port must be given.
    """
    found = []
    for port, places in (host.get("PortBindings") or {}).items():
        number, _, protocol_name = port.partition("/")
        for place in places or ():
            address = place.get("HostIp") or ""
            address = f"[{address}]:" if ":" in address else f"{address}:" if address else ""
            if not place.get("HostPort"):
                raise Refused(
                    f"-p {number}: the host's port is missing",
                    hint=f"-p HPORT:{number}, or a network of driver graft",
                )
            found.append(f"{address}{place['HostPort']}:{number}/{protocol_name or 'tcp'}")
    return found


def netns_path(config: Document) -> str:
    """Return the path of the netns that the container joins; "" if the runtime makes one for it."""
    namespaces = (config.get("linux") or {}).get("namespaces") or ()
    return next((n.get("path") or "" for n in namespaces if n["type"] == "network"), "")


def edit(config: Document, metadata: protocol.Metadata, directory: Path) -> Document:
    """Return @config with graft's traps in its seccomp profile (runtime-spec config-linux.md, "Seccomp").

    The runtime will send the listener to agent.sock in graftd's run @directory, with @metadata, sealed.
    Raises Refused for a container that has the host's network, or a profile that graft cannot be merged into.
    """
    section: Document = config.get("linux") or {}
    namespaces = {n["type"]: n.get("path", "") for n in section.get("namespaces") or ()}
    if "network" not in namespaces:
        raise shares_the_hosts(metadata.engine)
    metadata.argv = [word[:ARGV_MAX] for word in ((config.get("process") or {}).get("args") or ())[:ARGV_MAX]]
    merged = profile.merge(
        section.get("seccomp"),
        listener=str(directory / "agent.sock"),
        metadata=seal(metadata, directory),
        swap=metadata.traps_addresses,
        direct=bool(metadata.request.direct),
        follows=carries(metadata.request.sysctl),
    )
    return {**config, "linux": {**section, "seccomp": merged}}


def shares_the_hosts(engine: str) -> Refused:
    """Why a container is refused that has the host's network namespace, and what its user does about it."""
    if engine == POD:
        return Refused(
            "the pod has hostNetwork: true, so that it is in the node's network namespace already",
            hint="omit runtimeClassName: graft, or omit hostNetwork: true and take hostPort",
            code="EINVAL",
        )
    return Refused(
        "the container shares the host's network namespace", hint="give it its own: --network none", code="EINVAL"
    )


def add_sysctls(config: Document, metadata: protocol.Metadata) -> None:
    """Add the sysctls of the container's network (runtime-spec config-linux.md, "Sysctl") to what it asks for.

    Raises UsageError.
    """
    wanted = ((config.get("linux") or {}).get("sysctl") or {}).items()
    texts = [f"{name}={value}" for name, value in sorted(wanted) if name.startswith(("net.", "net/"))]
    metadata.request = with_label(metadata.request, "sysctl", texts)


def check_capabilities(process: Document, *, allowed: bool) -> None:
    """Refuse a process that would have CAP_NET_ADMIN, unless its container asked for that (@allowed). Raises Refused.

    @process: runtime-spec config.md, "Process". The capability holds in the container's own netns, and the sockets
    are the host's: a firewall there says OK and stops nothing, and a route leads nothing.
    """
    sets = (process.get("capabilities") or {}).values()
    if not allowed and any(str(name).upper() == NET_ADMIN for names in sets for name in names or ()):
        raise Refused(
            "CAP_NET_ADMIN is of no use: a firewall or a route inside acts on no socket: those are the host's",
            hint="leave out --cap-add and --privileged, use graft.egress; or create it with graft.netadmin=on",
            code="EPERM",
        )


def write(path: Path, config: Document) -> None:
    """Replace config.json at @path atomically, with the mode that it had. Raises OSError."""
    temporary = path.with_name(f"{path.name}.graft-{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(temporary, flags, path.stat().st_mode & 0o777), "wb") as file:
        file.write(msgspec.json.encode(config))
    temporary.rename(path)
