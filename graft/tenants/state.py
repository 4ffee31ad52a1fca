"""state.json: the registry as JSON, for the next graftd.

It names network namespaces by inode and cookie, which mean nothing after a reboot. The run directory is on a tmpfs,
so the file is gone then as well.

What it has of a tenant are the fields that the class Tenant declares. CODECS says how their types are written. A
field that a file lacks has its default: so a newer release reads the file of an older one, and an older one passes
over what it does not know. VERSION changes only if that does not do.
"""

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from graft.rules.address import Address, parse_address
from graft.rules.endpoint import EgressRule, Endpoint, IngressRule, parse_egress, parse_ingress
from graft.rules.limits import Limits, parse_limits
from graft.rules.own_address import Own
from graft.rules.publication import Publication, parse_publication
from graft.rules.request import Request
from graft.tenants.attachment import Attachment, own_document, restore_attachment, restore_own
from graft.tenants.tenant import Known, Member, Table, Tenant, endpoint_document

VERSION = 4


class Codec(NamedTuple):
    """How a value is written to JSON, and read again; `read` also gets what has been read before."""

    write: Callable[[Any], Any]
    read: Callable[[Known, Any], Any]


CODECS: dict[Any, Codec] = {
    Address: Codec(str, lambda _, saved: parse_address(saved)),
    Attachment: Codec(lambda attachment: attachment.key, lambda known, key: known.attachments[key]),
    EgressRule: Codec(str, lambda _, saved: parse_egress(saved)),
    IngressRule: Codec(
        lambda rule: {"rule": str(rule), "protocols": list(rule.protocols)},
        lambda _, saved: parse_ingress(saved["rule"])._replace(protocols=tuple(saved["protocols"])),
    ),
    Limits: Codec(str, lambda _, saved: parse_limits([saved], Limits())),
    Member: Codec(list, lambda _, saved: Member(*saved)),
    Own: Codec(own_document, lambda _, saved: restore_own(saved)),
    Publication: Codec(str, lambda _, saved: parse_publication(saved)),
    Request: Codec(Request.given, lambda _, saved: restore_request(saved)),
    Table: Codec(lambda table: table.netns, lambda known, netns: known.tables[netns]),
    Tenant | None: Codec(lambda tenant: tenant.id if tenant else 0, lambda known, number: known.tenants.get(number)),
}


def restore_request(saved: dict[str, Any]) -> Request:
    """A request from what `given` returned, without what this release does not know."""
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in saved.items()
        if name in Request._fields
    }
    return Request(**known)


def _codec(kind: Any) -> Codec | None:
    """The codec of values of the type @kind; None if they are written as they are."""
    if kind in CODECS:
        return CODECS[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        return Codec(list, lambda _, saved: tuple(saved))
    if origin in (list, set):
        codec = _codec(inner[0])
        if codec is None:
            return Codec(list, lambda _, saved: origin(saved))
        write, read = codec
        return Codec(
            lambda values: [write(value) for value in values],
            lambda known, saved: origin(read(known, value) for value in saved),
        )
    if origin is dict:
        write, read = _codec(inner[1]) or Codec(lambda value: value, lambda _, saved: saved)
        return Codec(
            lambda values: {key: write(value) for key, value in list(values.items())},  # a call thread may add one
            lambda known, saved: {key: read(known, value) for key, value in saved.items()},
        )
    return None


def _field_codecs() -> list[tuple[str, str, Codec | None]]:
    """Of each field of a tenant: its name, its key in state.json, and its codec."""
    kinds = get_type_hints(Tenant)
    return [(f.name, f.metadata.get("key", f.name), _codec(kinds[f.name])) for f in fields(Tenant)]


FIELDS = _field_codecs()


def _dump_tenant(tenant: Tenant) -> dict[str, Any]:
    values = vars(tenant)
    return {key: codec.write(values[name]) if codec else values[name] for name, key, codec in FIELDS}


def _restore_tenant(known: Known, saved: dict[str, Any]) -> Tenant:
    present = {name: (codec, saved[key]) for name, key, codec in FIELDS if key in saved}
    return Tenant(**{name: codec.read(known, value) if codec else value for name, (codec, value) in present.items()})


def dump(known: Known) -> dict[str, Any]:
    """The whole registry in types that json.dumps() takes."""
    return {
        "version": VERSION,
        "real_paths": True,
        "next_id": known.next_id,
        "next_slot": known.next_slice,
        "tables": [
            {
                "netns": table.netns,
                "cookie": table.cookie,
                "label": table.label,
                "endpoints": [{**endpoint_document(e), **_further(e)} for e in table.endpoints.values()],
            }
            for table in known.tables.values()
        ],
        "places": [[p.number, p.inode, p.label] for p in known.places.values()],
        "users_file": known.users_file,
        "networks": known.networks,
        "pools": known.pools,
        "added": [str(address) for address in known.added],
        "attachments": [attachment.document() for attachment in known.attachments.values()],
        "tenants": [_dump_tenant(tenant) for tenant in known.tenants.values()],
    }


def _further(endpoint: Endpoint) -> dict[str, Any]:
    """What state.json has of an endpoint, and commands do not show."""
    by_user = {"by_user": True} if endpoint.by_user else {}
    return {"place": endpoint.place, "imported": endpoint.imported, **by_user}


def restore(known: Known, document: dict[str, Any]) -> None:
    """Fill an empty registry from what `dump` returned; the tenants have no descriptors yet.

    Raises KeyError, TypeError, ValueError, or GraftError for a document of another shape.
    """
    known.next_id = document["next_id"]
    known.next_slice = document["next_slot"]
    real = document.get("real_paths", False)  # 0.1.0 did not follow the links of a path that it was given
    for saved in document["tables"]:
        table = known.tables[saved["netns"]] = Table(saved["netns"], saved["cookie"], saved["label"])
        for e in saved["endpoints"]:
            table.endpoints[e["name"]] = _endpoint(e if real else {**e, "path": _real(e.get("path", ""))})
    known.lost_places = {number: (inode, label) for number, inode, label in document.get("places", [])}
    known.users_file = document.get("users_file")
    known.networks = document["networks"]
    known.pools = {prefix: (part, taken) for prefix, (part, taken) in document.get("pools", {}).items()}
    known.added = {parse_address(a) for a in document["added"]}
    for saved in document["attachments"]:
        known.attachments[saved["key"]] = restore_attachment(saved)
    for saved in document["tenants"]:
        tenant = _restore_tenant(known, saved)
        if tenant.scope:
            known.scopes[tenant.scope] = tenant
        known.tenants[tenant.id] = tenant


def _real(path: str) -> str:
    """The path of a unix endpoint, with the links in its directory followed."""
    directory, name = os.path.split(path)
    return os.path.join(os.path.realpath(directory), name) if path else ""


def _endpoint(saved: dict[str, Any]) -> Endpoint:
    """An endpoint from its entry in state.json."""
    unix = saved["type"] in ("unix", "local")
    port = 0 if unix or saved["port"] == "dynamic" else int(str(saved["port"]).partition("-")[0])
    return Endpoint(
        saved["name"],
        None if unix else parse_address(saved["addr"]),
        port,
        saved["span"],
        saved["published"],
        path=saved.get("path", ""),
        netns=saved.get("netns", ""),
        place=saved["place"],
        imported=saved["imported"],
        local=saved["type"] == "local",
        filed=saved.get("filed", False),
        by_user=saved.get("by_user", False),
    )
