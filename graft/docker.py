"""Docker's network and IPAM driver: `docker network create -d graft NAME`.

dockerd finds the socket in /run/docker/plugins by its name, and speaks HTTP with JSON bodies (libnetwork's
docs/remote.md and docs/ipam.md). An endpoint of Docker's is an attachment here: CreateEndpoint takes its address and
ports, Join says where its namespace will be, and what runs there gets both (graft/registry.py). dockerd never says
which container it is; the namespace does. No interface is made, and DisableGatewayService keeps dockerd from adding
one of its own, with a proxy on the published ports.

Nothing is kept about networks: an endpoint's address names its network's prefix, so that a host that has restarted
without /run needs nothing of ours to go on with networks that Docker still knows.
"""

import contextlib
import ipaddress
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11

from graft import attachments, host, protocol
from graft.endpoint import PROTOCOL_NAME, Publication, host_addresses, parse_address
from graft.errors import GraftError, Refused, UsageError
from graft.log import log
from graft.loop import Loop
from graft.network import Attachment, network_of

if TYPE_CHECKING:
    from graft.daemon import Daemon

PLUGINS = Path("/run/docker/plugins")
TYPE = "application/vnd.docker.plugins.v1.1+json"
BODY_MAX = 1 << 20
GENERIC = "com.docker.network.generic"
PORTMAP = "com.docker.network.portmap"
GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}
POOLS = ipaddress.ip_network("10.89.0.0/16")  # of which an unnamed network gets a /24
CHOSEN = range(49153, 65536)  # host ports for -P, as Docker has them

Document = dict[str, Any]


class Docker:
    """The driver, behind a socket that survives graftd in the descriptor store."""

    def __init__(self, daemon: "Daemon") -> None:
        self.daemon = daemon
        self.path = PLUGINS / f"{daemon.directory.name}.sock"
        self.sock: socket.socket | None = None
        self.pools: dict[str, Pool] = {}

    def start(self, inherited: int = -1) -> None:
        """Listen, where Docker is installed."""
        if inherited >= 0:
            self.sock = socket.socket(fileno=inherited)
        elif shutil.which("dockerd") or PLUGINS.is_dir():
            PLUGINS.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.bind(str(self.path))
            self.path.chmod(0o600)
            self.sock.listen(128)
            self.daemon.store.put("docker", self.sock.fileno())
        if self.sock:
            self.sock.setblocking(False)
            self.daemon.loop.add(self.sock.fileno(), self._accept)

    def held(self) -> list[tuple[str, int]]:
        """What the keeper's successor shall have."""
        return [("docker", self.sock.fileno())] if self.sock else []

    def cleanup(self) -> None:
        """No graftd will follow."""
        if self.sock and not self.daemon.managed:  # systemd's stay, to start the next one
            self.path.unlink(missing_ok=True)
            self.daemon.store.remove("docker")

    def _accept(self, _events: int) -> None:
        assert self.sock
        with contextlib.suppress(OSError):
            peer, _ = self.sock.accept()
            Conversation(self.daemon.loop, peer, self.answer)

    def answer(self, method: str, request: Document, pid: int) -> Document:
        """One call of dockerd, which is process @pid. A GraftError is its "Err"."""
        known: dict[str, Callable[[Document, int], Document]] = {
            "Plugin.Activate": lambda _r, _p: {"Implements": ["NetworkDriver", "IpamDriver"]},
            "NetworkDriver.GetCapabilities": lambda _r, _p: {"Scope": "local", "ConnectivityScope": "local"},
            "NetworkDriver.CreateNetwork": self._create_network,
            "NetworkDriver.CreateEndpoint": self._create_endpoint,
            "NetworkDriver.EndpointOperInfo": lambda _r, _p: {"Value": {}},
            "NetworkDriver.Join": self._join,
            "NetworkDriver.Leave": self._leave,
            "NetworkDriver.DeleteEndpoint": self._delete_endpoint,
            "IpamDriver.GetCapabilities": lambda _r, _p: {"RequiresMACAddress": False},
            "IpamDriver.GetDefaultAddressSpaces": lambda _r, _p: {
                "LocalDefaultAddressSpace": "graft",
                "GlobalDefaultAddressSpace": "graft",
            },
            "IpamDriver.RequestPool": self._request_pool,
            "IpamDriver.ReleasePool": self._release_pool,
            "IpamDriver.RequestAddress": self._request_address,
            "IpamDriver.ReleaseAddress": self._release_address,
        }
        handler = known.get(method)
        return handler(request, pid) if handler else {}

    # -- the network driver --

    def _create_network(self, request: Document, _pid: int) -> Document:
        options = request.get("Options") or {}
        if options.get("com.docker.network.internal"):
            raise UsageError("--internal is not supported", hint="--label graft.egress=none for the containers")
        generic = options.get(GENERIC) or {}
        for key in generic:
            raise UsageError(f"option '{key}' is unknown", hint="a network of graft has no options")
        for data in (*(request.get("IPv4Data") or ()), *(request.get("IPv6Data") or ())):
            if data.get("Pool"):
                network_of(data["Pool"], 0)
        return {}

    def _create_endpoint(self, request: Document, _pid: int) -> Document:
        registry = self.daemon.registry
        attachment = Attachment(f"docker/{request['EndpointID']}", request["NetworkID"])
        interface = request.get("Interface") or {}
        number = attachments.number(registry, attachment.network)
        for text in (interface.get("Address"), interface.get("AddressIPv6")):
            if text and not text.startswith(("0.0.0.0", "::/")):
                attachment.addresses.append(network_of(text, number))
        mappings = (request.get("Options") or {}).get(PORTMAP) or []
        attachment.offered = sorted(mappings, key=json.dumps)
        if not self._twins(attachment):
            attachment.publications = self._publications(attachment)
        attachments.add(registry, attachment)
        return {"Interface": {}}

    def _twins(self, attachment: Attachment) -> list[Attachment]:
        """Endpoints in other networks with the same ports: of the same container, perhaps. Join tells."""
        return [
            other
            for other in self.daemon.registry.attachments.values()
            if attachment.offered and other.network != attachment.network and other.offered == attachment.offered
        ]

    def _publications(self, attachment: Attachment) -> list[Publication]:
        found: list[Publication] = []
        for entry in attachment.offered:
            found.append(self._publication(attachment, entry, found))
        return found

    def _publication(self, attachment: Attachment, entry: Document, others: list[Publication]) -> Publication:
        """A port mapping of Docker's; where it leaves the host's port open, the first that is free."""
        protocol_number = entry.get("Proto", socket.IPPROTO_TCP)
        if protocol_number not in PROTOCOL_NAME:
            raise UsageError(f"port {entry.get('Port')}: protocol {protocol_number} is neither tcp nor udp")
        bare = entry.get("HostIP") or ""
        address = parse_address(bare) if bare not in ("", "::") else None
        first = entry.get("HostPort") or 0
        last = entry.get("HostPortEnd") or first
        wanted = range(first, last + 1) if first else CHOSEN
        refused: Refused | None = None
        for port in wanted:
            publication = Publication(address, port, entry["Port"], 1, protocol_number)
            try:
                self._check(attachment, publication, others)
            except Refused as error:
                refused = refused or error
            else:
                return publication
        raise refused or Refused("no port of the host is free", code="EADDRINUSE")

    def _check(self, attachment: Attachment, publication: Publication, others: list[Publication]) -> None:
        registry = self.daemon.registry
        for other in others:
            same = (other.protocol, other.address) == (publication.protocol, publication.address)
            if same and other.host_first == publication.host_first:
                raise Refused(f"-p {publication}: the host's port is published twice", code="EADDRINUSE")
        addresses = host_addresses(publication, ipv6=registry.ipv6)
        registry.check_free(publication, addresses, where=(0, 0), shared=bool(attachment.addresses))

    def _attachment(self, request: Document) -> Attachment:
        attachment = self.daemon.registry.attachments.get(f"docker/{request['EndpointID']}")
        if attachment is None:
            raise Refused(f"endpoint {request['EndpointID'][:12]} is not known", code="ENOENT")
        return attachment

    def _join(self, request: Document, pid: int) -> Document:
        attachment = self._attachment(request)
        key = request["SandboxKey"]
        attachment.sandbox = [key, f"/proc/{pid}/root{key}"]
        attachment.netns = attachment.cookie = 0
        if not attachment.publications and not any(key in twin.sandbox for twin in self._twins(attachment)):
            attachment.publications = self._publications(attachment)
        attachments.join(self.daemon.registry, attachment)
        self.daemon.resolver.start()
        return {"DisableGatewayService": True}

    def _leave(self, request: Document, _pid: int) -> Document:
        registry = self.daemon.registry
        attachment = registry.attachments.get(f"docker/{request['EndpointID']}")
        if attachment is None:
            return {}
        key = attachment.sandbox[0] if attachment.sandbox else ""
        attachments.hand_on(registry, attachment, [t for t in self._twins(attachment) if key in t.sandbox])
        attachments.leave(registry, attachment)
        return {}

    def _delete_endpoint(self, request: Document, _pid: int) -> Document:
        attachments.detach(self.daemon.registry, f"docker/{request['EndpointID']}")
        self.daemon.resolver.start()
        return {}

    # -- the IPAM driver --

    def _request_pool(self, request: Document, _pid: int) -> Document:
        wanted = request.get("Pool") or ""
        if request.get("V6") and not wanted:
            raise UsageError("IPv6 needs --subnet", hint="like --subnet fd00:77::/64")
        network = ipaddress.ip_network(wanted) if wanted else self._free_pool()
        network_of(str(network), 0)
        pool = Pool(network, request.get("SubPool") or "")
        self.pools[str(network)] = pool
        return {"PoolID": str(network), "Pool": str(network), "Data": {}}

    def _free_pool(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        """One that neither a pool nor an address of the host is in: dockerd would ask again for ever."""
        used = [pool.network for pool in self.pools.values()]
        local = [ipaddress.ip_address(a) for a in host.addresses()]
        for network in POOLS.subnets(new_prefix=24):
            if not any(network.overlaps(u) for u in used if u.version == 4) and not any(a in network for a in local):
                return network
        raise Refused(f"no part of {POOLS} is free", hint="--subnet", code="ENOSPC")

    def _release_pool(self, request: Document, _pid: int) -> Document:
        self.pools.pop(request["PoolID"], None)
        return {}

    def _pool(self, number: str) -> "Pool":
        """A pool of before graftd's restart is known by its name, which is its prefix."""
        if number not in self.pools:
            self.pools[number] = Pool(ipaddress.ip_network(number), "")
        return self.pools[number]

    def _request_address(self, request: Document, _pid: int) -> Document:
        pool = self._pool(request["PoolID"])
        used = {
            str(own.address)
            for attachment in self.daemon.registry.attachments.values()
            for own in attachment.addresses
        }
        gateway = (request.get("Options") or {}).items() >= GATEWAY.items()
        chosen = pool.take(request.get("Address") or "", used, gateway=gateway)
        return {"Address": f"{chosen}/{pool.network.prefixlen}", "Data": {}}

    def _release_address(self, request: Document, _pid: int) -> Document:
        self._pool(request["PoolID"]).taken.discard(request.get("Address", ""))
        return {}


class Pool:
    """Addresses of one network."""

    def __init__(self, network: ipaddress.IPv4Network | ipaddress.IPv6Network, part: str) -> None:
        self.network = network
        self.part = ipaddress.ip_network(part) if part else network
        self.taken: set[str] = set()

    def take(self, wanted: str, used: set[str], *, gateway: bool) -> str:
        """@wanted or the next that is free; the first is the gateway's. Raises Refused."""
        if wanted:
            if ipaddress.ip_address(wanted) not in self.network:
                raise Refused(f"{wanted} is not in {self.network}", code="EINVAL")
            if wanted in used or (wanted in self.taken and not gateway):
                raise Refused(f"{wanted} is in use", code="EADDRINUSE")
            self.taken.add(wanted)
            return wanted
        for n, address in enumerate(self.part.hosts()):
            text = str(address)
            if (n > 0 or gateway) and text not in used and text not in self.taken:
                self.taken.add(text)
                return text
        raise Refused(f"no address of {self.part} is free", code="ENOSPC")


class Conversation:
    """One connection of dockerd's, which is kept open for many requests."""

    def __init__(self, loop: Loop, sock: socket.socket, answer: Callable[[str, Document, int], Document]) -> None:
        self.loop = loop
        self.sock = sock
        self.answer = answer
        self.pid, uid, _ = protocol.credentials(sock)
        self.http = h11.Connection(h11.SERVER)
        self.target = ""
        self.body = b""
        if uid:
            sock.close()
            return
        sock.setblocking(True)
        sock.settimeout(5)  # dockerd reads at once; whoever does not loses its connection
        loop.add(sock.fileno(), self._ready)

    def _ready(self, _events: int) -> None:
        try:
            data = self.sock.recv(65536)
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
            self.target, self.body = event.target.decode(errors="replace"), b""
        elif isinstance(event, h11.Data):
            self.body += event.data
            if len(self.body) > BODY_MAX:
                raise h11.RemoteProtocolError("the request is too large")
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
            request = json.loads(self.body or b"{}")
            return self.answer(method, request if isinstance(request, dict) else {}, self.pid)
        except GraftError as error:
            log.warning("docker: %s: %s", method, error)
            return {"Err": str(error)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
            self.sock.close()
