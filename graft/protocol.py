"""Messages on graftd's two sockets, and their framing.

Admin socket (root; group graft): one JSON object a line, descriptors attached to it. The first message of a
connection may be any request; the answer is one line, {"ok": ...} or {"error": {...}}.
Agent socket (anyone): the OCI runtimes' seccomp agent protocol: one ContainerProcessState JSON document
(OCI runtime spec, config-linux.md) with one descriptor; there is no answer to a runtime. Such a document
is complete when it parses, because runc keeps the connection open. Or one of our own documents, with an
`op`: what the wrapper asks before it installs its filter, and what the Python API asks.

A message is at most MESSAGE_MAX bytes with at most DESCRIPTORS_MAX descriptors.
"""

import errno
import json
import os
import socket
from typing import Annotated, Any

import msgspec

from graft import linux
from graft.errors import GraftError, UsageError

MESSAGE_MAX = 1 << 20
Int32 = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
DESCRIPTORS_MAX = 4


class Request(msgspec.Struct, tag_field="op", forbid_unknown_fields=True, kw_only=True):
    """What all requests have: the client's version, and the namespace that is meant (default: the caller's)."""

    version: str
    netns: str | None = None


class Hello(Request, tag="hello"):
    """Opens a conversation: answered without ending the connection, while the peer is still unfiltered.

    With rules it is answered by what the filter of a target with these rules has to trap.
    """

    ingress: list[str] = []
    egress: list[str] = []


class Run(Request, tag="run"):
    """A target wants in. Descriptors: its seccomp listener. Follows Hello on the same connection."""

    name: str | None = None
    publish: list[str] = []
    ingress: list[str] = []
    egress: list[str] = []
    egress_default: str | None = None
    argv: list[str] = []
    strict: bool = False
    swap: bool = False
    ip: list[str] = []
    limits: list[str] = []


class NewEndpoint(msgspec.Struct, forbid_unknown_fields=True):
    """One `add`: the words after the name, and which of the message's descriptors is its netns (-1: none)."""

    name: str
    words: list[str]
    netns: int = -1


class EndpointAdd(Request, tag="endpoint-add"):
    """graft endpoint add, of one or many: all or none."""

    endpoints: list[NewEndpoint]


class EndpointDel(Request, tag="endpoint-del"):
    """graft endpoint del, of one or many: all or none."""

    names: list[str]


class EndpointShow(Request, tag="endpoint-show"):
    """graft endpoint show."""

    name: str | None = None


class RuleAdd(Request, tag="rule-add"):
    """graft rule add."""

    publish: list[str] = []
    ingress: list[str] = []
    egress: list[str] = []


class RuleDel(Request, tag="rule-del"):
    """graft rule del."""

    publish: list[str] = []
    ingress: list[str] = []
    egress: list[str] = []


class RuleShow(Request, tag="rule-show"):
    """graft rule show."""


class Ps(Request, tag="ps"):
    """graft ps."""


class Inspect(Request, tag="inspect"):
    """graft inspect."""

    name: str


class Status(Request, tag="status"):
    """What graftd is, for graft doctor and graft bench."""


class Bundle(Request, tag="bundle"):
    """graft-runtime: an OCI runtime is about to create this container; put the traps into its config.json."""

    bundle: str
    id: str


class Hook(Request, tag="hook"):
    """An OCI hook of the stage `precreate`: config.json goes in, and comes back with the traps."""

    config: dict[str, Any]


class Attach(Request, tag="attach"):
    """graft-cni ADD. The descriptor is the namespace; @within: where connections leave from the addresses."""

    key: str
    network: str
    addresses: list[str] = []
    within: str = ""
    publish: list[str] = []
    names: list[str] = []
    resolver: str = ""


class Attached(Request, tag="attached"):
    """graft-cni CHECK."""

    key: str


class Detach(Request, tag="detach"):
    """graft-cni DEL."""

    key: str


class Stop(Request, tag="stop"):
    """graftd --stop."""

    force: bool = False
    replace: bool = False


AnyRequest = (
    Hello
    | Run
    | EndpointAdd
    | EndpointDel
    | EndpointShow
    | RuleAdd
    | RuleDel
    | RuleShow
    | Ps
    | Inspect
    | Status
    | Bundle
    | Hook
    | Attach
    | Attached
    | Detach
    | Stop
)
_decoder = msgspec.json.Decoder(AnyRequest)


class OciState(msgspec.Struct):
    """The runtime state inside ContainerProcessState."""

    id: str
    pid: int = 0
    status: str = ""
    bundle: str = ""
    annotations: dict[str, str] = {}


class ContainerProcessState(msgspec.Struct):
    """What an OCI runtime sends with a listener."""

    fds: list[str]
    state: OciState
    pid: int = 0
    metadata: str = ""


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    """`listenerMetadata` that graft understands."""

    name: str | None = None
    publish: list[str] = []
    ingress: list[str] = []
    egress: list[str] = []
    egress_default: str | None = None
    strict: bool = False
    swap: bool = False
    wrapper: bool = False
    verbose: bool = False
    argv: list[str] = []
    ip: list[str] = []
    limits: list[str] = []
    container: str = ""  # the engine's id of it,
    engine: str = ""  # and which one that is
    directory: str = ""  # Docker's, where the names are
    seal: str = ""  # graftd's own hand, graft/seal.py


class AgentRequest(msgspec.Struct, tag_field="op", forbid_unknown_fields=True, kw_only=True):
    """A document of our own on the agent socket. It speaks for the peer's own netns and user."""


class Traps(AgentRequest, tag="traps"):
    """What must the filter of a wrapper with these rules trap?"""

    ingress: list[str] = []
    egress: list[str] = []


class Option(msgspec.Struct, forbid_unknown_fields=True):
    """A socket option to set before bind; the value in hexadecimal."""

    level: Int32
    name: Int32
    value: str


class Open(AgentRequest, tag="open"):
    """A socket that is bound to an endpoint, or may be connected to one. Answered with its descriptor."""

    type: int
    bind: str | None = None
    connect: str | None = None
    options: list[Option] = []


class Permit(AgentRequest, tag="permit"):
    """May the attached socket be connected to an endpoint, or send to it? Answered with its address."""

    name: str


class Endpoints(AgentRequest, tag="endpoints"):
    """The endpoint table of the peer's netns."""


AnyAgentRequest = Traps | Open | Permit | Endpoints

_state_decoder = msgspec.json.Decoder(ContainerProcessState)
_agent_decoder = msgspec.json.Decoder(AnyAgentRequest)
_metadata_decoder = msgspec.json.Decoder(Metadata)


def decode_request(line: bytes) -> AnyRequest:
    """One admin request. Raises UsageError."""
    try:
        request: AnyRequest = _decoder.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"malformed request: {error}") from None
    return request


def decode_state(text: bytes) -> ContainerProcessState:
    """One agent message. Raises UsageError."""
    try:
        return _state_decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"malformed container process state: {error}") from None


def is_agent_request(text: bytes) -> bool:
    """Is this a document of ours, and no runtime's?"""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "op" in document


def decode_agent_request(text: bytes) -> AnyAgentRequest:
    """One request on the agent socket. Raises UsageError."""
    try:
        request: AnyAgentRequest = _agent_decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"malformed request: {error}") from None
    return request


def decode_metadata(text: str) -> Metadata:
    """The metadata of an agent message; empty means the defaults. Raises UsageError."""
    if not text.strip():
        return Metadata()
    try:
        return _metadata_decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"malformed listenerMetadata: {error}") from None


def complete(text: bytes) -> bool:
    """Is @text a whole JSON document (or hopeless, which decoding will tell)?"""
    if text[:1] == b"{" and not text.rstrip().endswith(b"}") and text.count(b"{") > text.count(b"}"):
        return False  # most pieces of a long one, at the cost of a look
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos < len(text.rstrip()) and not error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):  # not UTF-8, a number of 5,000 digits, a thousand brackets
        return True
    return True


def error_document(error: GraftError) -> dict[str, Any]:
    """An error as it travels."""
    return {
        "error": {
            "status": error.exit_status,
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
        }
    }


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """pid, uid, gid of the peer when it connected (SO_PEERCRED, unix(7))."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return (
        int.from_bytes(raw[:4], "little", signed=True),
        int.from_bytes(raw[4:8], "little"),
        int.from_bytes(raw[8:], "little"),
    )


def peer_pidfd(sock: socket.socket, pid: int) -> int:
    """A pidfd of the process that connected a unix socket, -1 if it has ended (SO_PEERPIDFD, since Linux 6.5).

    Before, one of whatever has its @pid now.
    """
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, linux.SO_PEERPIDFD, 4), "little")
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return -1
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
