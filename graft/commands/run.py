"""`graft run`: check the options, and hand them to graft/commands/launch.py as a Plan."""

import contextlib
import os
from pathlib import Path
from typing import Any

import click

from graft import client
from graft.commands.launch import Plan, find_user, run
from graft.commands.options import CONTEXT, Command, complete_command, netns_option
from graft.errors import Failure, GraftError, Refused, UsageError
from graft.rules.request import DIRECT, SETTINGS, Request, check_options, parse_request

RUN_CONTEXT = {**CONTEXT, "ignore_unknown_options": False, "allow_interspersed_args": False}


def request_options(function: Command) -> Command:
    """Add the options of SETTINGS to a command, which gets the fields of Request as keyword arguments."""
    for setting in reversed(SETTINGS):
        kind: dict[str, Any] = {"multiple": True}
        if setting.choices:
            one, *more = setting.choices
            kind = {"type": click.Choice(setting.choices)} if more else {"flag_value": one, "default": None}
        function = click.option(*setting.options, setting.field, metavar=setting.metavar, help=setting.help, **kind)(
            function
        )
    return function


def _default_direct() -> bool:
    """What GRAFT_DIRECT says of a container for which no mode is given, else graft.toml.

    The file is root's, and so are direct containers. If it is wrong, graftd knows what it was before.
    Raises UsageError and Refused.
    """
    default = os.environ.get("GRAFT_DIRECT", "")
    if default not in ("", "off", DIRECT):
        raise UsageError(f"GRAFT_DIRECT={default} is unknown", hint=f"{DIRECT} or off")
    if default == DIRECT and client.is_user():
        raise Refused(f"GRAFT_DIRECT={DIRECT}: only root may start a direct container", hint="unset it", code="EPERM")
    if default or client.is_user():
        return default == DIRECT
    from graft.rules.configuration import configuration_path, read_configuration

    if not configuration_path().exists():
        return False
    try:
        return read_configuration().direct
    except Failure:
        with contextlib.suppress(GraftError):  # none runs: its start tells what is wrong
            return bool(client.call("status", start=False)["configuration"]["run"]["direct"])
        return False


@click.command(context_settings=RUN_CONTEXT)
@click.option("--name", help="Name of the container; default: the command and a number.")
@netns_option("Join this network namespace (or container); default: a new one, which leads nowhere.")
@request_options
@click.option(
    "--force-ip", is_flag=True, help="Take the addresses of --ip even if they are routed or answer elsewhere."
)
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Run the command as this user.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What it may reach, as --allow has it, from a file: allow = [...]. 'graft policy check' checks it.",
)
@click.option("--no-direct", is_flag=True, help="Trap socket(), also where graft.toml or GRAFT_DIRECT say --direct.")
@click.option("--accel", is_flag=True, help="Preload a library that spares dynamic programs the trap of socket().")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, shell_complete=complete_command)
def command(**parameters: Any) -> None:
    """Run COMMAND in a network namespace that leads nowhere, and its sockets on the host's stack.

    127.0.0.1 and ::1 inside are private to the container. A server that binds the wildcard address can be
    reached from outside only at ports that -p publishes.

    \b
    graft run -p 8080:80 nginx -g 'daemon off;'
    graft run -p 127.0.0.1:5432:5432 -p '[::1]:5432:5432' postgres -D /srv/db
    graft run -p 53:53/udp -p 53:53 --user nobody dnsserver
    graft run --name db --egress none redis-server
    graft run --ip 10.88.0.5 nginx -g 'daemon off;'
    graft run --netns blue curl http://example.org/
    graft run --direct -p 8080:80 caddy run
    graft run --accel -p 8080:80 haproxy -f haproxy.cfg
    graft run --allow pypi.org:443 --allow '*.pythonhosted.org:443' pip install flask
    graft run --learn ./build.sh

    The exit status is COMMAND's; 125 if graft failed, 126 or 127 if COMMAND cannot run.
    """
    client.act_as_user()
    run(plan_of(**parameters))


def plan_of(
    name: str | None,
    netns: str | None,
    user: str | None,
    accel: bool,
    no_direct: bool,
    force_ip: bool,
    policies: tuple[Path, ...],
    command: tuple[str, ...],
    **fields: Any,
) -> Plan:
    """What the options of `graft run` say. Raises GraftError."""
    if no_direct and fields["direct"]:
        raise UsageError("--direct and --no-direct exclude each other", hint="omit one of them")
    if not (no_direct or accel or fields["direct"]) and _default_direct():
        fields["direct"] = DIRECT
    if policies:
        from graft.rules.policy_file import read_policy

        fields["allow"] += tuple(entry for path in policies for entry in read_policy(path, anybodys=True))
    request = Request(**fields)
    if force_ip and not request.ip:
        raise UsageError("--force-ip goes with --ip")
    check_options(request)
    parse_request(request)
    if accel and request.direct:
        raise UsageError("--accel spares the trap of socket(), and with --direct there is none", hint="omit --accel")
    if not command[0]:
        raise UsageError("the command is empty", hint="graft run [OPTIONS] COMMAND ARG...")
    return Plan(
        list(command),
        name=name,
        netns=netns,
        user=find_user(user) if user is not None else None,
        accel=accel,
        force_ip=force_ip,
        request=request,
    )
