"""Requests of the admin and the user socket: which only read, free, carry descriptors; what their texts say."""

from typing import NamedTuple

from graft import __version__, protocol
from graft.daemon.connection import Connection
from graft.errors import Refused
from graft.rules.endpoint import EgressRule, IngressRule, parse_egress, parse_ingress
from graft.rules.publication import Publication, parse_publication

READING = (
    protocol.Hello,
    protocol.EndpointShow,
    protocol.RuleShow,
    protocol.Ps,
    protocol.Inspect,
    protocol.Learnt,
    protocol.Log,
    protocol.Sockets,
    protocol.StatsAll,
    protocol.Dashboard,
    protocol.Bundle,
    protocol.Prepare,
    protocol.Exec,
    protocol.Start,
    protocol.Attached,
    protocol.Status,
    protocol.Stop,
    protocol.Plan,
)


FREEING = (protocol.Detach,)

WITH_DESCRIPTORS = (
    protocol.Run,
    protocol.EndpointAdd,
    protocol.Attach,
    protocol.Prepare,
    protocol.Attached,
)


class Given(NamedTuple):
    """The rules of a request."""

    publications: list[Publication]
    ingress: list[IngressRule]
    egress: list[EgressRule]


def parse_given(request: protocol.RuleAdd | protocol.RuleDel) -> Given:
    """The rules of a request. Raises UsageError."""
    return Given(
        [parse_publication(p) for p in request.publish],
        [parse_ingress(r) for r in request.ingress],
        [parse_egress(r) for r in request.egress],
    )


def must_be_saved(request: protocol.AnyRequest) -> bool:
    """Is what it changes to be in state.json before it is done? What frees something is done in any case.

    Saving is tried again each second.
    """
    return not isinstance(request, READING + FREEING)


def check_version(request: protocol.AnyRequest) -> None:
    """Raise Refused (EPROTO) for a client of another version."""
    if request.version != __version__ and not isinstance(request, protocol.Stop):
        raise Refused(
            f"graftd {__version__} is running, this is graft {request.version}",
            hint="replace it by this version: graftd --replace",
            code="EPROTO",
        )


def viewer(connection: Connection) -> int | None:
    """The uid of a user without root who gives the order, to whom others are not named; None: root."""
    return connection.user.account.uid if connection.user else None


def method_of(name: str) -> str:
    """The name of the method for a request's class: EndpointAdd is answered by endpoint_add."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
