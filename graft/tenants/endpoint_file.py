"""Endpoints of the host that stand in files (endpoints.toml, endpoints.d), in the table of graftd's own netns.

They are there as those of `graft endpoint add` are: a container has one if somebody whom graftd believes gives it a
rule that names it, and keeps what it was given when the file changes.
"""

from collections.abc import Mapping, Sequence

from graft.errors import Refused
from graft.rules.configuration import endpoint_place
from graft.rules.endpoint import EndpointWords
from graft.tenants.registry import Registry
from graft.tenants.tenant import Table

HERE = "/proc/self/ns/net"


def home_table(registry: Registry) -> Table:
    """The table of graftd's own netns."""
    with open(HERE, "rb") as netns:
        return registry.table(netns.fileno(), HERE)


def take(registry: Registry, wanted: Mapping[str, EndpointWords]) -> None:
    """Have in the host's table what @wanted says, instead of what the file said before: all of it, or no change.

    Raises Refused for a name that `graft endpoint add` has given (EEXIST) and a directory that does not exist
    (ENOENT), and OSError if a map is full.
    """
    table = home_table(registry)
    before = table.endpoints
    table.endpoints = {name: endpoint for name, endpoint in before.items() if not endpoint.filed}
    try:
        made = registry.add_endpoints(table, [(name, words, 0) for name, words in wanted.items()])
    except BaseException as error:
        table.endpoints = before
        for tenant in registry.of_netns(table.netns):
            registry.apply(tenant)
        registry.forget_empty(table)
        if isinstance(error, Refused):
            where = endpoint_place(next((name for name in wanted if f"'{name}'" in error.message), ""))
            raise Refused(f"{where}: {error.message}", hint=error.hint, code=error.code) from None
        raise
    table.endpoints.update((endpoint.name, endpoint._replace(filed=True)) for endpoint in made)
    registry.forget_empty(table)
    registry.save()


def check_deletion(table: Table, names: Sequence[str]) -> None:
    """Raise Refused for an endpoint that would come back with the file."""
    for name in names:
        if name in table.endpoints and table.endpoints[name].filed:
            raise Refused(f"endpoint '{name}' stands in {endpoint_place(name)}", hint="remove it there", code="EBUSY")


def any_added(registry: Registry) -> bool:
    """Has anybody added an endpoint? Those of the file come with any graftd."""
    return any(not e.filed for table in registry.tables.values() for e in table.endpoints.values())
