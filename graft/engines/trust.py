"""What of the settings of engines' containers is believed.

Who writes a container's labels or annotations is, with Docker, Podman and plain OCI bundles, whoever runs the engine:
root, or as good as root, who could bind the ports and add the addresses without graft. In Kubernetes it is whoever
may create pods. That user has a share of the cluster, and Kubernetes' own limits (hostPort, for one) do not
look at annotations. So of a pod only what takes nothing is believed, and the rest if the administrator says so.

An address is the whole node's: what is sent to it from any program of the node goes to the container. So no setting
of any engine gives one from outside the network that the engine has given, but for the administrator's ranges.
"""

from collections.abc import Collection, Iterable

from graft.engines.container import POLICY, SWITCHES, Container, asked_by
from graft.errors import Refused
from graft.rules.address import Address, Prefix
from graft.rules.configuration import Configuration
from graft.rules.limits import Limits
from graft.rules.own_address import Own
from graft.rules.publication import Publication
from graft.rules.request import setting_of
from graft.tenants import attachments
from graft.tenants.registry import Registry
from graft.tenants.tenant import POD

HARMLESS = ("family",)  # of SWITCHES: it costs the container time, and gives it nothing


def check_believed(container: Container, configuration: Configuration, most: Limits, path: str) -> None:
    """Raise Refused for the first setting of a pod that takes something, if the administrator has not allowed it.

    @most: graftd's limits, beyond which a limit takes something. @path: the configuration's file, for the message.
    """
    if container.engine != POD:
        return
    for key, value in sorted(container.settings.items()):
        word = _word(key, value, most)
        if word and not _allows(configuration.annotations, word):
            raise Refused(
                f"annotation '{key}={value}': pods may not use {word} on this node",
                hint=f'{path}, [pods], annotations = ["{word}"] allows it',
                code="EPERM",
            )


def _word(key: str, value: str, most: Limits) -> str:
    """What the administrator has to name for this setting; "" if it takes nothing. Raises UsageError."""
    label, items = asked_by(key, value)
    if label == POLICY:
        return ""  # an administrator's, and less than what it has without
    if label in SWITCHES:
        takes = bool(items) and label not in HARMLESS
    else:
        takes = any(setting_of(label, item).takes(item, most) for item in items)
    if not takes:
        return ""
    return key if key.startswith("graft.endpoint.") else f"graft.{label}"


def _allows(annotations: Collection[str], word: str) -> bool:
    return word in annotations or (word.startswith("graft.endpoint.") and "graft.endpoint" in annotations)


def check_addresses(
    container: Container, owned: Iterable[Own], given: Iterable[Prefix], allowed: Iterable[Prefix], path: str
) -> None:
    """Raise Refused for an address that is neither in a network that the engine @given the container, nor @allowed.

    Of such a network, its first and last addresses are its own: the gateway, and broadcast. @path: as above.
    """
    given = list(given)
    for own in owned:
        address = own.address
        if any(prefix.covers(address) for prefix in allowed):
            continue
        network = next((prefix for prefix in given if prefix.covers(address)), None)
        if network is None and container.network and not container.hooked and not given:
            raise Refused(
                f"{container.what} 'graft.ip={address}': the container's network is not known yet",
                hint=f'--ip gives one of it; or {path}, addresses = ["{address}"] allows it',
                code="EACCES",
            )
        if network is None:
            where = (
                f"the container's network ({', '.join(map(str, given))})" if given else "a network of the container"
            )
            raise Refused(
                f"{container.what} 'graft.ip={address}': not in {where}",
                hint=f'take one of it; or {path}, addresses = ["{address}"] allows it',
                code="EACCES",
            )
        if _special(network, address):
            raise Refused(
                f"{container.what} 'graft.ip={address}': the gateway's or a broadcast address of {network}",
                hint="take another one",
                code="EACCES",
            )


def check_ports(publications: Iterable[Publication], reserved: Collection[tuple[int, int]], path: str) -> None:
    """Raise Refused if a pod's publication takes one of the ports that are the node's, as (protocol, port).

    While such a port is in use, nobody can publish it. This is for the moment in which kubelet, or whatever else of
    the node's, is being restarted. @path: as above.
    """
    for publication in publications:
        for port in range(publication.host_first, publication.host_first + publication.span):
            if (publication.protocol, port) in reserved:
                raise Refused(
                    f"-p {publication}: port {port} is the node's, not a pod's",
                    hint=f"publish another host port; {path}, reserved_ports and reserve_listening, say which are",
                    code="EACCES",
                )


def _special(network: Prefix, address: Address) -> bool:
    longest = address.bits
    host = int.from_bytes(address.raw, "big") & ((1 << (longest - network.length)) - 1)
    return longest - network.length > 1 and (host < 2 or (address.v4 and host == (1 << (32 - network.length)) - 1))


def given_to(registry: Registry, container: Container) -> list[Prefix]:
    """The subnets of the networks that its engine gives a container which it is about to create.

    dockerd does not tell a driver which container an endpoint is for, and enters the netns later. So those are all of
    Docker's that no container has yet.
    """
    waiting = attachments.alone(registry)
    found = [
        subnet
        for key, attachment in registry.attachments.items()
        if attachment.in_netns(*container.where)
        or (container.network and key.startswith("docker/") and attachment in waiting)
        for subnet in attachment.subnets
    ]
    return list(dict.fromkeys(found))
