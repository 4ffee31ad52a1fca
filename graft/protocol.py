"""Messages on graftd.sock and agent.sock, and their framing.

graftd.sock, the admin socket (root and the group graft): a request is one line, a JSON object, with descriptors
attached (SCM_RIGHTS, unix(7)). The answer is one line, {"ok": ...} or {"error": {...}}. A connection carries one
request, or `hello` and then one request.

agent.sock, the agent socket (anyone): one JSON document, of one of two kinds.
    ContainerProcessState with one descriptor, as OCI runtimes send it to a seccomp agent (OCI runtime specification,
    config-linux.md, "Container Process State"). The runtime does not read an answer, and runc keeps the connection
    open, so the document is complete when it parses.
    A request of graft's own, which has an `op`: what the wrapper asks before it installs its filter, and what the API
    asks. The answer is as on the admin socket, and may carry a descriptor.

A message has at most MESSAGE_MAX bytes and DESCRIPTORS_MAX descriptors. Unknown fields are refused, except in
ContainerProcessState, which the specification may extend.
"""

import json
from typing import Annotated, Any, get_type_hints

import msgspec

from graft.errors import GraftError, UsageError
from graft.rules.request import Request

MESSAGE_MAX = 1 << 20
Int32 = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
DESCRIPTORS_MAX = 4


class AdminRequest(msgspec.Struct, tag_field="op", forbid_unknown_fields=True, kw_only=True):
    """What all admin requests have: the client's version, and a namespace by name, pid or path (None: the peer's)."""

    version: str
    netns: str | None = None


class Hello(AdminRequest, tag="hello"):
    """Lets a peer send its request later, from inside a container: graftd checks it now, before it has a filter.

    The connection stays open for one request. With rules, @names or a netns, the answer's `swap` says whether the
    filter of a target with these rules, or that is told the names of its endpoints, needs the traps of the swap path.
    """

    ingress: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()
    names: bool = False


class Run(AdminRequest, tag="run", rename={"traps_addresses": "swap"}):
    """`graft run`: a target becomes a container's. The descriptor is its seccomp listener. It follows a Hello.

    `request` is a JSON array, the fields of Request in their order. Of a direct container there is a second
    descriptor, its network namespace: its process lives in graftd's.
    """

    name: str | None = None
    request: Request = Request()
    argv: list[str] = []
    strict: bool = False
    traps_addresses: bool = False  # does its filter trap the calls that the swap path needs (graft/trap/swap.py)?
    joins: bool = False  # was its netns there before (--netns)?


class NewEndpoint(msgspec.Struct, forbid_unknown_fields=True):
    """One `add`: the words after the name, and the index of its netns among the message's descriptors (-1: none)."""

    name: str
    words: list[str]
    netns: int = -1


class EndpointAdd(AdminRequest, tag="endpoint-add"):
    """`graft endpoint add` of one or more endpoints: all of them or none."""

    endpoints: list[NewEndpoint]


class EndpointDel(AdminRequest, tag="endpoint-del"):
    """`graft endpoint del` of one or more endpoints: all of them or none."""

    names: list[str]


class EndpointShow(AdminRequest, tag="endpoint-show"):
    """`graft endpoint show`, of one endpoint or of all."""

    name: str | None = None


class EndpointMove(AdminRequest, tag="endpoint-move"):
    """`graft endpoint move`: the ingress rules of container @source that name an endpoint become @target's.

    The answer comes when nobody waits in the queues of @source any more, or after a few seconds: `waiting` is how
    many do. The code of the error is EAGAIN while @target has no server where @source has one.
    """

    name: str
    source: str
    target: str


class RuleMove(AdminRequest, tag="rule-move"):
    """`graft rule move`: publications of container @source become @target's; the rest as of EndpointMove."""

    source: str
    target: str
    publish: tuple[str, ...]


class RuleAdd(AdminRequest, tag="rule-add"):
    """`graft rule add`: all of them or none."""

    publish: tuple[str, ...] = ()
    ingress: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()


class RuleDel(AdminRequest, tag="rule-del"):
    """`graft rule del`: all of them or none."""

    publish: tuple[str, ...] = ()
    ingress: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()


class RuleShow(AdminRequest, tag="rule-show"):
    """`graft rule show`."""


class Ps(AdminRequest, tag="ps"):
    """`graft ps`."""


class Inspect(AdminRequest, tag="inspect"):
    """`graft inspect`."""

    name: str


class Learnt(AdminRequest, tag="learnt"):
    """`graft run --learn`: what this container has reached, also for a while after its end."""

    name: str


class Log(AdminRequest, tag="log"):
    """`graft log` of one container or of all. With `follow` the connection stays open for what comes: of each call a
    line, also of what is allowed with `every`.
    """

    name: str | None = None
    follow: bool = False
    every: bool = False


class Sockets(AdminRequest, tag="sockets"):
    """`graft sockets`: what is open of one container or of all."""

    name: str | None = None


class StatsAll(AdminRequest, tag="stats"):
    """`graft stats`: what each container has done so far."""


class Dashboard(AdminRequest, tag="dashboard"):
    """`graft dashboard`: a page for a browser, as long as the connection is open. The answer has its address."""

    at: str
    public: bool = False


class Status(AdminRequest, tag="status"):
    """graftd's version, pid and counters, for `graft doctor` and `graft bench`."""


class Bundle(AdminRequest, tag="bundle"):
    """graft-runtime: an OCI runtime is about to create this container. graftd adds the traps to its config.json."""

    bundle: str
    id: str


class Hook(AdminRequest, tag="hook"):
    """Podman's OCI hook of the stage `precreate`: the answer is @config with the traps."""

    config: dict[str, Any]


class Prepare(AdminRequest, tag="prepare"):
    """A user's engine is about to create a container: the answer is @config with the traps.

    What the engine's files say of it is the user's own word, as graft/engines/container.py has it. The descriptor, if
    there is one, is the namespace that it joins.
    """

    config: dict[str, Any]
    engine: str
    id: str
    name: str
    settings: dict[str, str] = {}
    network: str = ""
    sandbox: bool = False


class Exec(AdminRequest, tag="exec"):
    """graft-runtime: a runtime is about to execute @process (runtime-spec config.md, "Process") in a container."""

    id: str
    process: dict[str, Any]


class Start(AdminRequest, tag="start"):
    """graft-runtime: a runtime is about to let the first process of a container go on."""

    id: str


class OciState(msgspec.Struct):
    """The `state` in ContainerProcessState (OCI runtime specification, runtime.md, "State")."""

    id: str
    pid: int = 0
    status: str = ""
    bundle: str = ""
    annotations: dict[str, str] = {}


class Begin(AdminRequest, tag="begin"):
    """graft-runtime as a hook: the first process of a direct container waits in its cgroup for the policy.

    @state: runtime-spec runtime.md, "State". @metadata: the listenerMetadata that graftd has sealed. The answer has
    the path of the container's network namespace.
    """

    metadata: str
    state: OciState


class Attach(AdminRequest, tag="attach"):
    """graft-cni ADD. The descriptor is the namespace. Connections to `within` (a prefix) leave from the addresses."""

    key: str
    network: str
    addresses: list[str] = []
    within: str = ""
    publish: list[str] = []
    names: list[str] = []
    resolver: str = ""
    pod: bool = False  # of Kubernetes: who asks for its ports is not the node's root


class Attached(AdminRequest, tag="attached"):
    """graft-cni CHECK: the answer has the addresses that the host still has. A descriptor instead of a key: of any
    attachment of that namespace.
    """

    key: str = ""


class Detach(AdminRequest, tag="detach"):
    """graft-cni DEL; an attachment that does not exist is no error."""

    key: str


class Stop(AdminRequest, tag="stop"):
    """`graftd --stop` and `graftd --replace`; accepted from a client of any version."""

    force: bool = False
    replace: bool = False


class Plan(AdminRequest, tag="plan"):
    """graft-front: what is left to do for `graft run` with these words. It follows a Hello, and Run follows it.

    In hex: `words`, separated by zero bytes, and `direct`, GRAFT_DIRECT of its environment. So is the answer, as
    graft/commands/plan.py has it.
    """

    words: str
    direct: str = ""


class Reload(AdminRequest, tag="reload"):
    """`graftd --reload`: read the administrator's files that have changed, now. The answer is what is wrong."""


AnyRequest = (
    Hello
    | Run
    | EndpointAdd
    | EndpointDel
    | EndpointShow
    | EndpointMove
    | RuleMove
    | RuleAdd
    | RuleDel
    | RuleShow
    | Ps
    | Inspect
    | Learnt
    | Log
    | Sockets
    | StatsAll
    | Dashboard
    | Status
    | Bundle
    | Hook
    | Prepare
    | Exec
    | Start
    | Begin
    | Attach
    | Attached
    | Detach
    | Stop
    | Plan
    | Reload
)
_decoder = msgspec.json.Decoder(AnyRequest)


class ContainerProcessState(msgspec.Struct):
    """What an OCI runtime sends with a listener. `fds` names the descriptors, `metadata` is the listenerMetadata."""

    fds: list[str]
    state: OciState
    pid: int = 0
    metadata: str = ""


class Metadata(msgspec.Struct, forbid_unknown_fields=True, rename={"traps_addresses": "swap"}):
    """The listenerMetadata that graft understands (OCI runtime specification, config-linux.md), as JSON.

    There the fields of `request` stand beside the others, by their names.
    """

    name: str | None = None
    request: Request = Request()
    strict: bool = False
    traps_addresses: bool = False  # as in Run
    wrapper: bool = False
    verbose: bool = False
    argv: list[str] = []
    container: str = ""  # the engine's id of the container
    engine: str = ""  # which engine that is
    directory: str = ""  # where Docker keeps its config.v2.json, which has the names
    netadmin: bool = False  # may its processes have CAP_NET_ADMIN?
    sandbox: bool = False  # is it a pod's pause container, which makes no socket?
    uid: int = 0  # of the user without root whose engine's container it is
    seal: str = ""  # proves that graftd wrote this (graft/engines/seal.py)


# What release 0.1 knows of listenerMetadata, in the order in which it seals it. Newer fields are written after these,
# and only if they are not empty, so that release 0.1 recognises containers that use nothing newer.
METADATA_ORDER = (
    *("name", "publish", "ingress", "egress", "egress_default", "strict", "swap", "wrapper", "verbose", "argv"),
    *("ip", "limits", "container", "engine", "directory", "seal"),
)


class AgentRequest(msgspec.Struct, tag_field="op", forbid_unknown_fields=True, kw_only=True):
    """A request of graft's own on the agent socket. It is always about the peer's own netns and user."""


class Traps(AgentRequest, tag="traps"):
    """Does the filter of a wrapper with these rules need the traps of the swap path? The answer's `swap` says so."""

    ingress: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()


class Option(msgspec.Struct, forbid_unknown_fields=True):
    """A socket option that is set before bind(2). The value is its bytes in hexadecimal."""

    level: Int32
    name: Int32
    value: str


class Open(AgentRequest, tag="open"):
    """Asks for a socket that is bound to an endpoint, or may be connected to one, or both.

    The answer has its `family`, the `address` to connect to if there is one, and the socket's descriptor. `type` is
    SOCK_STREAM or SOCK_DGRAM.
    """

    type: int
    bind: str | None = None
    connect: str | None = None
    options: list[Option] = []


class Permit(AgentRequest, tag="permit"):
    """Asks that the attached socket may connect or send to an endpoint. The answer has the endpoint's `address`."""

    name: str


class Endpoints(AgentRequest, tag="endpoints"):
    """Asks for the endpoint table of the peer's netns."""


AnyAgentRequest = Traps | Open | Permit | Endpoints

_state_decoder = msgspec.json.Decoder(ContainerProcessState)
_agent_decoder = msgspec.json.Decoder(AnyAgentRequest)
_request_fields = msgspec.defstruct(  # the fields of Request by name, of the same types
    "_request_fields", [(name, kind, Request._field_defaults[name]) for name, kind in get_type_hints(Request).items()]
)


def decode_request(line: bytes) -> AnyRequest:
    """Decode one request of the admin socket. Raises UsageError."""
    try:
        request: AnyRequest = _decoder.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"malformed request: {error}") from None
    return request


def decode_state(text: bytes) -> ContainerProcessState:
    """Decode the document that an OCI runtime sends. Raises UsageError."""
    try:
        return _state_decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"malformed container process state: {error}") from None


def is_agent_request(text: bytes) -> bool:
    """Is this a request of graft's own, and not a runtime's document? Only the former has an `op`."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "op" in document


def decode_agent_request(text: bytes) -> AnyAgentRequest:
    """Decode one request of graft's own on the agent socket. Raises UsageError."""
    try:
        request: AnyAgentRequest = _agent_decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"malformed request: {error}") from None
    return request


def decode_metadata(text: str) -> Metadata:
    """Decode the listenerMetadata of an agent message; an empty one means the defaults. Raises UsageError."""
    if not text.strip():
        return Metadata()
    try:
        document = msgspec.json.decode(text, type=dict[str, Any])
        if "request" in document:
            raise UsageError("malformed listenerMetadata: Object contains unknown field `request`")
        asked = {name: document.pop(name) for name in Request._fields if name in document}
        metadata = msgspec.convert(document, Metadata)
        metadata.request = Request(*msgspec.structs.astuple(msgspec.convert(asked, _request_fields)))
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"malformed listenerMetadata: {error}") from None
    return metadata


def metadata_document(metadata: Metadata) -> dict[str, Any]:
    """The JSON object of a listenerMetadata, with its fields in the order in which they are sealed."""
    fields = {**msgspec.to_builtins(metadata), **metadata.request._asdict()}
    del fields["request"]
    known = {name: fields.pop(name) for name in METADATA_ORDER}
    return {**known, **{name: value for name, value in fields.items() if value}}


def complete(text: bytes) -> bool:
    """Is @text a whole JSON document? True also if more bytes cannot make it one: decoding then finds the error."""
    if text[:1] == b"{" and not text.rstrip().endswith(b"}") and text.count(b"{") > text.count(b"}"):
        return False  # a quick answer for most pieces of a long document
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos < len(text.rstrip()) and not error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):  # not UTF-8, a number with 5,000 digits, a thousand brackets
        return True
    return True


def error_document(error: GraftError) -> dict[str, Any]:
    """The answer for an error, in JSON."""
    return {
        "error": {
            "status": error.exit_status,
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
        }
    }
