"""What dockerd sends to a network or IPAM driver (libnetwork: drivers/remote/api/api.go, ipams/remote/api/api.go)."""

import socket
from typing import Any

import msgspec


class Interface(msgspec.Struct, rename={"ipv4": "Address", "ipv6": "AddressIPv6", "mac": "MacAddress"}):
    """The addresses of an endpoint, those of IP each with its network's prefix."""

    ipv4: str | None = None
    ipv6: str | None = None
    mac: str | None = None


class Subnet(msgspec.Struct, rename="pascal"):
    """One subnet of a network that is made."""

    pool: str | None = None


class Request(
    msgspec.Struct,
    rename={
        "network": "NetworkID",
        "endpoint": "EndpointID",
        "sandbox": "SandboxKey",
        "interface": "Interface",
        "options": "Options",
        "ipv4": "IPv4Data",
        "ipv6": "IPv6Data",
        "pool": "Pool",
        "sub_pool": "SubPool",
        "v6": "V6",
        "pool_id": "PoolID",
        "address": "Address",
    },
):
    """The fields of all requests that graft reads. What is not there may be null."""

    network: str = ""
    endpoint: str = ""
    sandbox: str = ""
    interface: Interface | None = None
    options: dict[str, Any] | None = None
    ipv4: list[Subnet] | None = None
    ipv6: list[Subnet] | None = None
    pool: str | None = None
    sub_pool: str | None = None
    v6: bool = False
    pool_id: str = ""
    address: str | None = None


class Mapping(
    msgspec.Struct,
    rename={"port": "Port", "protocol": "Proto", "host": "HostIP", "first": "HostPort", "last": "HostPortEnd"},
):
    """A published port (libnetwork/types, PortBinding). `protocol`: an IPPROTO_; without `first` any port will do."""

    port: int
    protocol: int = socket.IPPROTO_TCP
    host: str | None = None
    first: int | None = None
    last: int | None = None


def decode(body: bytes) -> Request:
    """The request in a body. Raises msgspec.MsgspecError."""
    return msgspec.json.decode(body or b"{}", type=Request)
