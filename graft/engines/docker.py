"""Docker's network and IPAM driver (libnetwork): `docker network create -d graft NAME`.

dockerd finds the driver's socket in /run/docker/plugins by its name, and sends HTTP requests with JSON bodies
(libnetwork's docs/remote.md and docs/ipam.md).

What libnetwork calls an endpoint is an attachment here. CreateEndpoint brings its addresses and ports; Join says
where its netns will be; whatever runs in that netns gets both (graft/tenants/registry.py). dockerd never tells a
driver which container an endpoint belongs to, so the netns is what identifies it.

No interface is made. Join answers DisableGatewayService, because dockerd would otherwise connect the container to its
own gateway bridge, with a proxy on the published ports.

graft stores nothing about networks. An endpoint's address comes with its network's prefix. So after a reboot, which
empties /run, graft serves the networks that Docker still knows.
"""

import contextlib
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
import msgspec

from graft.engines.ipam import Ipam
from graft.engines.libnetwork import Mapping, Request, decode
from graft.engines.resolver import Resolver
from graft.errors import GraftError, Refused, UsageError
from graft.log import log
from graft.process.closing import end, receive, take_out_of_band
from graft.process.loop import Loop
from graft.process.store import Store
from graft.rules.address import PROTOCOL_NAME, Address, parse_address
from graft.rules.own_address import network_of
from graft.rules.publication import Publication, append, fold, host_addresses, overlap, parse_publication
from graft.tenants import attachments
from graft.tenants.attachment import Attachment
from graft.tenants.peers import Peer, refuse_contained
from graft.tenants.publish import check_free
from graft.tenants.registry import Registry

PLUGINS = Path("/run/docker/plugins")
TYPE = "application/vnd.docker.plugins.v1.1+json"
BODY_MAX = 32 << 20  # bytes; Docker names each port of a range twice, with 120 bytes, and 65,535 are 16 MiB
GENERIC = "com.docker.network.generic"
MAC = "com.docker.network.endpoint.macaddress"
PORTMAP = "com.docker.network.portmap"
CHOSEN = range(49153, 65536)  # host ports for -P, the range that Docker uses

Document = dict[str, Any]


class Docker:
    """The driver. Its listening socket is in the descriptor store, so that it survives a restart of graftd."""

    def __init__(
        self, directory: Path, loop: Loop, store: Store, registry: Registry, resolver: Resolver, *, managed: bool
    ) -> None:
        self.loop = loop
        self.store = store
        self.registry = registry
        self.resolver = resolver
        self.managed = managed  # does systemd keep the socket?
        self.path = PLUGINS / f"{directory.name}.sock"
        self.sock: socket.socket | None = None
        self.ipam = Ipam(registry)

    def start(self, inherited: int = -1) -> None:
        """Listen on @inherited if that is a descriptor (0 or more), else on a new socket if Docker is installed."""
        if inherited >= 0:
            self.sock = socket.socket(fileno=inherited)
        elif shutil.which("dockerd") or PLUGINS.is_dir():
            PLUGINS.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.bind(str(self.path))
                self.path.chmod(0o600)
                sock.listen(128)
            except OSError:
                sock.close()
                raise
            self.sock = sock
            self.store.put("docker", sock.fileno())
        if self.sock:
            self.sock.setblocking(False)
            self.loop.add(self.sock.fileno(), self._accept)

    def tick(self) -> None:
        """Listen if Docker has been installed meanwhile. To be called each second."""
        if not self.sock:
            with contextlib.suppress(OSError):  # no room, or no descriptor: the next second
                self.start()

    def held(self) -> list[tuple[str, int]]:
        """Return the names and descriptors that the next keeper has to hold."""
        return [("docker", self.sock.fileno())] if self.sock else []

    def cleanup(self) -> None:
        """Remove the socket, because no other graftd will follow."""
        if self.sock and not self.managed:  # systemd keeps its own sockets, to start the next graftd by them
            self.path.unlink(missing_ok=True)
            self.store.remove("docker")

    def _accept(self, _events: int) -> None:
        assert self.sock
        with contextlib.suppress(OSError):
            sock, _ = self.sock.accept()
            self._meet(sock)

    def _meet(self, sock: socket.socket) -> None:
        peer = Peer(sock)
        try:
            self._vet(peer)
        except Refused as error:  # nothing is read of it: a peer that sends slowly would hold the loop up
            log.warning("docker: pid %d: %s", peer.pid, error)
            peer.close()
            end(sock)
            return
        Conversation(self.loop, sock, peer, self.answer)

    def _vet(self, peer: Peer) -> None:
        if peer.uid:
            raise Refused("only root may use Docker's plugin socket", code="EPERM")
        refuse_contained(self.registry, peer, "Docker's plugin socket")

    def answer(self, method: str, body: bytes, peer: Peer) -> Document:
        """Answer one call @method of dockerd, which is @peer. A method that is not known gets {}.

        Raises GraftError, which becomes the reply's "Err", and ValueError or MsgspecError for a bad request.
        """
        known: dict[str, Callable[[Request, int], Document]] = {
            "Plugin.Activate": lambda _r, _p: {"Implements": ["NetworkDriver", "IpamDriver"]},
            "NetworkDriver.GetCapabilities": lambda _r, _p: {"Scope": "local", "ConnectivityScope": "local"},
            "NetworkDriver.CreateNetwork": self._create_network,
            "NetworkDriver.CreateEndpoint": self._create_endpoint,
            "NetworkDriver.EndpointOperInfo": lambda _r, _p: {"Value": {}},
            "NetworkDriver.Join": self._join,
            "NetworkDriver.Leave": self._leave,
            "NetworkDriver.DeleteEndpoint": self._delete_endpoint,
            "IpamDriver.GetCapabilities": self.ipam.capabilities,
            "IpamDriver.GetDefaultAddressSpaces": lambda _r, _p: {
                "LocalDefaultAddressSpace": "graft",
                "GlobalDefaultAddressSpace": "graft",
            },
            "IpamDriver.RequestPool": self.ipam.request_pool,
            "IpamDriver.ReleasePool": self.ipam.release_pool,
            "IpamDriver.RequestAddress": self.ipam.request_address,
            "IpamDriver.ReleaseAddress": self.ipam.release_address,
        }
        self._vet(peer)
        handler = known.get(method)
        return handler(decode(body), peer.pid) if handler else {}

    # -- the network driver --

    def _create_network(self, request: Request, _pid: int) -> Document:
        options = request.options or {}
        if options.get("com.docker.network.internal"):
            raise UsageError("--internal is not supported", hint="give the containers --label graft.egress=none")
        generic = options.get(GENERIC) or {}
        for key in generic:
            raise UsageError(f"option '{key}' is unknown", hint="a network of graft has no options")
        for subnet in (*(request.ipv4 or ()), *(request.ipv6 or ())):
            if subnet.pool:
                network_of(subnet.pool, 0)
        return {}

    def _create_endpoint(self, request: Request, _pid: int) -> Document:
        registry = self.registry
        attachment = Attachment(f"docker/{request.endpoint}", request.network)
        if (request.interface and request.interface.mac) or (request.options or {}).get(MAC):
            raise UsageError("a container has no link-layer address of its own", hint="leave out --mac-address")
        number = attachments.number(registry, attachment.network)
        for text in (request.interface.ipv4, request.interface.ipv6) if request.interface else ():
            if text and not text.startswith(("0.0.0.0", "::/")):
                attachment.give(text, number)
        attachment.offered = _offered((request.options or {}).get(PORTMAP) or [])
        if not self._twins(attachment):
            attachment.publications = self._publications(attachment)
        attachments.add(registry, attachment)
        return {"Interface": {}}

    def _twins(self, attachment: Attachment) -> list[Attachment]:
        """Return attachments to other networks that publish the same ports.

        They may be the same container's, which CreateEndpoint does not say. Join tells, by the sandbox's key.
        """
        return [
            other
            for other in self.registry.attachments.values()
            if attachment.offered
            and other.network != attachment.network
            and _offered(other.offered) == attachment.offered  # a graftd before this one left it as Docker gave it
        ]

    def _publications(self, attachment: Attachment) -> list[Publication]:
        found: list[Publication] = []
        begin: dict[tuple[int, Address | None], int] = {}  # where the next one is looked for
        for entry in attachment.offered:
            if "publish" in entry:
                publication = parse_publication(entry["publish"])
                self._check(attachment, publication, found)
            else:
                mapping = msgspec.convert(entry, Mapping)
                place = (mapping.protocol, _address(mapping))
                publication = self._chosen(attachment, mapping, found, begin.get(place, 0))
                begin[place] = publication.host_first + 1
            append(publication, found)
        return found

    def _chosen(self, attachment: Attachment, mapping: Mapping, others: list[Publication], begin: int) -> Publication:
        """Return the publication for a port mapping of Docker that names no host port, or a range of them.

        The first port that is free is taken, those from @begin on first. Raises UsageError, Refused.
        """
        address = _address(mapping)
        wanted = range(mapping.first, (mapping.last or mapping.first) + 1) if mapping.first else CHOSEN
        refused: Refused | None = None
        for port in sorted(wanted, key=lambda port: port < begin):
            publication = Publication(address, port, mapping.port, 1, mapping.protocol)
            try:
                self._check(attachment, publication, others)
            except Refused as error:
                refused = refused or error
            else:
                return publication
        raise refused or Refused("no port of the host is free", code="EADDRINUSE")

    def _check(self, attachment: Attachment, publication: Publication, others: list[Publication]) -> None:
        registry = self.registry
        for other in others:
            same = (other.protocol, other.address) == (publication.protocol, publication.address)
            if same and overlap(publication.host_first, publication.span, other.host_first, other.span):
                raise Refused(f"-p {publication}: the host's port is published twice", code="EADDRINUSE")
        addresses = host_addresses(publication, ipv6=registry.ipv6)
        check_free(registry, publication, addresses, where=(0, 0), shared=bool(attachment.addresses))

    def _attachment(self, request: Request) -> Attachment:
        attachment = self.registry.attachments.get(f"docker/{request.endpoint}")
        if attachment is None:
            raise Refused(f"endpoint {request.endpoint[:12]} is unknown", code="ENOENT")
        return attachment

    def _join(self, request: Request, pid: int) -> Document:
        attachment = self._attachment(request)
        key = request.sandbox
        attachment.sandbox = [key, f"/proc/{pid}/root{key}"]
        attachment.netns = attachment.cookie = 0
        if not attachment.publications and not any(key in twin.sandbox for twin in self._twins(attachment)):
            attachment.publications = self._publications(attachment)
        attachments.join(self.registry, attachment)
        self.resolver.start()
        return {"DisableGatewayService": True}

    def _leave(self, request: Request, _pid: int) -> Document:
        registry = self.registry
        attachment = registry.attachments.get(f"docker/{request.endpoint}")
        if attachment is None:
            return {}
        key = attachment.sandbox[0] if attachment.sandbox else ""
        attachments.hand_on(registry, attachment, [t for t in self._twins(attachment) if key in t.sandbox])
        attachments.leave(registry, attachment)
        return {}

    def _delete_endpoint(self, request: Request, _pid: int) -> Document:
        attachments.detach(self.registry, f"docker/{request.endpoint}")
        self.resolver.start()
        return {}


def _address(mapping: Mapping) -> Address | None:
    """The host's address of a port mapping, None for every one. Raises UsageError, also for another protocol."""
    if mapping.protocol not in PROTOCOL_NAME:
        raise UsageError(f"port {mapping.port}: protocol {mapping.protocol} is neither tcp nor udp")
    return parse_address(mapping.host) if mapping.host else None


def _offered(mappings: list[Any]) -> list[dict[str, Any]]:
    """Docker's port mappings for `Attachment.offered`, in an order of their own.

    What names one port of the host's is a publication, of a whole range if Docker has named each port of it. The rest
    is left as it is: a host port is chosen for it. Raises UsageError, MsgspecError.
    """
    fixed: list[Publication] = []
    rest: list[dict[str, Any]] = []
    for entry in mappings:
        if "publish" in entry:
            fixed.append(parse_publication(entry["publish"]))
            continue
        mapping = msgspec.convert(entry, Mapping)
        address = _address(mapping)
        if mapping.first and (mapping.last or mapping.first) == mapping.first:
            fixed.append(Publication(address, mapping.first, mapping.port, 1, mapping.protocol))
        else:
            rest.append(entry)
    return [*sorted(({"publish": str(p)} for p in fold(fixed)), key=json.dumps), *sorted(rest, key=json.dumps)]


class Conversation:
    """One HTTP connection of dockerd, which keeps it open for many requests."""

    def __init__(
        self, loop: Loop, sock: socket.socket, peer: Peer, answer: Callable[[str, bytes, Peer], Document]
    ) -> None:
        self.loop = loop
        self.sock = sock
        self.peer = peer
        self.answer = answer
        self.http = h11.Connection(h11.SERVER)
        self.target = ""
        self.body = bytearray()
        take_out_of_band(sock)
        sock.setblocking(True)
        sock.settimeout(5)  # dockerd reads at once; a peer that does not must not hold us up
        loop.add(sock.fileno(), self._ready)

    def _ready(self, _events: int) -> None:
        try:
            data = receive(self.sock)
            self.http.receive_data(data)
            while self._step():
                pass
            if not data:
                self._close()
        except (OSError, h11.ProtocolError) as error:
            log.debug("docker: %s", error)
            self._close()

    def _step(self) -> bool:
        event = self.http.next_event()
        if isinstance(event, h11.Request):
            self.target, self.body = event.target.decode(errors="replace"), bytearray()
        elif isinstance(event, h11.Data):
            self.body += event.data[: BODY_MAX + 1 - len(self.body)]  # what is too much is read, and not kept
        elif isinstance(event, h11.EndOfMessage):
            self._reply(json.dumps(self._document()).encode())
            if self.http.our_state is h11.MUST_CLOSE:
                self._close()
                return False
            self.http.start_next_cycle()
        else:
            return False
        return True

    def _document(self) -> Document:
        method = self.target.strip("/")
        try:
            if len(self.body) > BODY_MAX:
                raise UsageError(f"{method}: more than {BODY_MAX >> 20} MiB", hint="publish fewer ports one by one")
            return self.answer(method, bytes(self.body), self.peer)
        except GraftError as error:
            log.warning("docker: %s: %s", method, error)
            return {"Err": str(error)}
        except (ValueError, TypeError, AttributeError, RecursionError, msgspec.MsgspecError) as error:
            log.warning("docker: %s: malformed request: %r", method, error)
            return {"Err": f"graft: malformed request {method}: {error}"}

    def _reply(self, body: bytes) -> None:
        headers = [("Content-Type", TYPE), ("Content-Length", str(len(body)))]
        out = self.http.send(h11.Response(status_code=200, headers=headers))
        out = (out or b"") + (self.http.send(h11.Data(body)) or b"") + (self.http.send(h11.EndOfMessage()) or b"")
        self.sock.sendall(out)

    def _close(self) -> None:
        if self.sock.fileno() >= 0:
            self.loop.remove(self.sock.fileno())
            end(self.sock)
            self.peer.close()
