"""Who joins the namespace of a container that runs: what it may ask for besides, and what must be the same."""

from graft import protocol
from graft.errors import Refused
from graft.kernel import sysctl
from graft.rules.request import DIRECT, Parsed, Request
from graft.rules.sysctl import IGNORE, OWN, parse_sysctls
from graft.tenants.tenant import POD, Tenant


def new_rules(running: Tenant, target: protocol.Run | protocol.Metadata, asked: Parsed, container_id: str) -> Parsed:
    """What @target adds to the container @running, whose namespace it joins: rules that it does not have yet.

    @container_id: the engine's id of what joins; "" if no engine made it. Raises Refused if it asks for another
    policy than the container's.
    """
    if any(own not in running.given for own in asked.ip):
        raise Refused(
            f"this namespace runs container '{running.name}', which has its addresses",
            hint="omit --ip",
            code="EEXIST",
        )
    if target.name and target.name != running.name and not container_id:
        raise Refused(f"this namespace runs container '{running.name}'", hint="omit --name", code="EEXIST")
    if asked.egress_default and running.egress_host != (asked.egress_default == "host"):
        raise Refused(
            f"container '{running.name}' runs with egress {'host' if running.egress_host else 'none'}",
            hint="one namespace has one policy; omit --egress",
            code="EEXIST",
        )
    if asked.direct != bool(running.cgroup):
        raise Refused(
            f"container '{running.name}' {'is direct' if running.cgroup else 'is not direct'}",
            hint=f"one namespace has one policy; {'give' if running.cgroup else 'omit'} --direct",
            code="EEXIST",
        )
    if any(new not in (0, have) for new, have in zip(asked.limits, running.limits, strict=True)):
        raise Refused(
            f"container '{running.name}' runs with limits {running.limits}",
            hint="one namespace has one policy; omit --limit",
            code="EEXIST",
        )
    check_same_sysctls(running, target.request.sysctl)
    if asked.names and not running.asks_graft:
        raise Refused(
            f"container '{running.name}' asks other resolvers than graft's",
            hint="one namespace has one policy; omit --names",
            code="EEXIST",
        )
    if any(address not in running.open_resolvers for address in asked.resolver):
        raise Refused(
            f"container '{running.name}' may not ask that resolver",
            hint="one namespace has one policy; omit --resolver",
            code="EEXIST",
        )
    check_same_policy(running, target)
    if asked.interface and (asked.interface,) != running.asked.interface[:1]:
        raise Refused(
            f"container '{running.name}' runs with interface {(*running.asked.interface, 'as by default')[0]}",
            hint="one namespace has one; omit --interface",
            code="EEXIST",
        )
    if container_id and container_id in running.members:  # `exec`: do not bring back what was removed meanwhile
        return asked._replace(publish=[], ingress=[], egress=[])
    return asked._replace(  # `exec` and a second `graft run` repeat rules that the container has
        publish=[p for p in asked.publish if p not in running.publications],
        ingress=[r for r in asked.ingress if r not in running.ingress],
        egress=[r for r in asked.egress if r not in running.egress],
    )


def as_begun(running: Tenant, asked: Request) -> Request:
    """What a further container of the pod @running asks for: the pod has the policy that it began with.

    kubelet makes a container anew with the annotations that the pod has by then, which anybody may have changed.
    """
    same = ("egress_default", "ip", "allow", "learn", "names", "interface", "sysctl")
    kept = {name: getattr(running.asked, name) for name in same}
    return asked._replace(**kept, limits=(), resolver=(), direct=DIRECT if running.cgroup else None)


def check_same_policy(running: Tenant, target: protocol.Run | protocol.Metadata) -> None:
    """Raise Refused if @target, which joins the container @running, asks for another list of destinations.

    A pod of Kubernetes' has the list that it began with, also if a file has changed since.
    """
    asked = target.request
    if running.policy and isinstance(target, protocol.Metadata) and target.engine == POD:
        return
    if (asked.allow and set(asked.allow) != set(running.asked.allow)) or (asked.learn and not running.asked.learn):
        raise Refused(
            f"container '{running.name}' runs with {'another' if running.policy else 'no'} list of destinations",
            hint="one namespace has one policy; omit --allow, --policy and --learn",
            code="EEXIST",
        )


def check_same_sysctls(running: Tenant, texts: tuple[str, ...]) -> None:
    """Raise Refused for a sysctl that the container @running does not have; those of OWN hold by the netns itself."""
    if IGNORE in texts:
        return
    have = parse_sysctls(running.asked.sysctl)
    for name, value in parse_sysctls(texts).items():
        if name not in OWN and (have.get(name) or sysctl.read(name)) != value:
            raise Refused(
                f"container '{running.name}' runs without sysctl {name}={value}",
                hint="one namespace has one policy; omit --sysctl",
                code="EEXIST",
            )
