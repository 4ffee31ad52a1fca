"""state.json: the registry as JSON, for the next graftd.

It names network namespaces by inode and cookie, which mean nothing after a reboot. The run directory is on a tmpfs,
so the file is gone then as well.
"""

from typing import Any

from graft.rules.address import parse_address
from graft.rules.endpoint import Endpoint, parse_egress, parse_ingress
from graft.rules.limits import Limits, parse_limits
from graft.rules.publication import parse_publication
from graft.tenants.attachment import own_document, restore_attachment, restore_own
from graft.tenants.tenant import Known, Member, Table, Tenant, endpoint_document

VERSION = 4


def dump(known: Known) -> dict[str, Any]:
    """The whole registry in types that json.dumps() takes."""
    return {
        "version": VERSION,
        "next_id": known.next_id,
        "next_slot": known.next_slot,
        "tables": [
            {
                "netns": table.netns,
                "cookie": table.cookie,
                "label": table.label,
                "endpoints": [
                    {**endpoint_document(e), "place": e.place, "imported": e.imported}
                    for e in table.endpoints.values()
                ],
            }
            for table in known.tables.values()
        ],
        "places": [[p.number, p.inode, p.label] for p in known.places.values()],
        "networks": known.networks,
        "added": [str(address) for address in known.added],
        "attachments": [attachment.document() for attachment in known.attachments.values()],
        "tenants": [
            {
                "id": t.id,
                "kind": t.kind,
                "home": t.home,
                "verbose": t.verbose,
                "swap": t.swap,
                "place": t.place,
                "parent": t.parent.id if t.parent else 0,
                "scope": t.scope,
                "uid": t.uid,
                "followers": list(t.followers),
                "paths": t.paths,
                "slot": t.slot,
                "name": t.name,
                "netns": t.netns,
                "ingress": [{"rule": str(r), "protocols": list(r.protocols)} for r in t.ingress],
                "egress": [str(r) for r in t.egress],
                "publications": [str(p) for p in t.publications],
                "egress_host": t.egress_host,
                "strict": t.strict,
                "trusted": t.trusted,
                "resolvers": [str(a) for a in t.resolvers],
                "given": [own_document(own) for own in t.given],
                "members": t.members,
                "attached": [attachment.key for attachment in t.attached],
                "argv": t.argv,
                "pid": t.pid,
                "started": t.started,
                "limits": str(t.limits),
            }
            for t in known.tenants.values()
        ],
    }


def restore(known: Known, document: dict[str, Any]) -> None:
    """Fill an empty registry from what `dump` returned; the tenants have no descriptors yet.

    Raises KeyError, TypeError, ValueError, or GraftError for a document of another shape.
    """
    known.next_id = document["next_id"]
    known.next_slot = document["next_slot"]
    for saved in document["tables"]:
        table = known.tables[saved["netns"]] = Table(saved["netns"], saved["cookie"], saved["label"])
        for e in saved["endpoints"]:
            table.endpoints[e["name"]] = _endpoint(e)
    known.lost_places = {number: (inode, label) for number, inode, label in document.get("places", [])}
    known.networks = document["networks"]
    known.added = {parse_address(a) for a in document["added"]}
    for saved in document["attachments"]:
        known.attachments[saved["key"]] = restore_attachment(saved)
    for saved in document["tenants"]:
        tenant = Tenant(saved["id"], saved["slot"], saved["name"], known.tables[saved["netns"]])
        tenant.ingress = [
            parse_ingress(r["rule"])._replace(protocols=tuple(r["protocols"])) for r in saved["ingress"]
        ]
        tenant.egress = [parse_egress(r) for r in saved["egress"]]
        tenant.publications = [parse_publication(p) for p in saved["publications"]]
        tenant.egress_host = saved["egress_host"]
        tenant.strict = saved["strict"]
        tenant.trusted = saved["trusted"]
        tenant.resolvers = [parse_address(a) for a in saved["resolvers"]]
        tenant.given = [restore_own(own) for own in saved["given"]]
        tenant.members = {number: Member(*member) for number, member in saved["members"].items()}
        tenant.attached = [known.attachments[key] for key in saved["attached"]]
        tenant.limits = parse_limits([saved["limits"]], Limits())
        tenant.argv, tenant.pid, tenant.started = saved["argv"], saved["pid"], saved["started"]
        tenant.kind, tenant.home, tenant.place = saved["kind"], saved["home"], saved["place"]
        tenant.verbose, tenant.swap, tenant.scope = saved["verbose"], saved["swap"], saved["scope"]
        tenant.uid, tenant.followers = saved["uid"], set(saved["followers"])
        tenant.parent = known.tenants.get(saved["parent"])
        tenant.paths = {path: (kept[0], kept[1], kept[2]) for path, kept in saved["paths"].items()}
        if tenant.scope:
            known.scopes[tenant.scope] = tenant
        known.tenants[tenant.id] = tenant


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
    )
