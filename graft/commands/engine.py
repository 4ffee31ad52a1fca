"""`graft install` and `graft uninstall`: shared options, and a plan of graft/engines/install.py carried out."""

import os
import subprocess
import sys
from pathlib import Path

import click

from graft import client
from graft.commands.options import CONTEXT
from graft.commands.user_namespace import how_to_delegate, subordinate
from graft.engines import install_user, rootless
from graft.engines.install import ENGINES, Change, Options, Plan, check_version
from graft.engines.swarm import PLUGIN, add, remove, state
from graft.errors import Failure, Refused
from graft.text import listed

INSTALL = """Set up an engine to use graft. The change is shown first; nothing is restarted without --reload.

\b
sudo graft install docker                  then: docker run --runtime graft ...
sudo graft install docker --swarm --reload then: docker service create --network ... (docs/several-hosts.md)
sudo graft install podman                  then: podman run --annotation graft=on --network graft ...
sudo graft install containerd --reload     then: a RuntimeClass with the handler 'graft'
graft install podman                       without root: the user's own Podman; likewise docker (docs/rootless.md)
graft install docker --dry-run             show the change only
"""
UNINSTALL = """Remove from an engine's configuration what 'graft install' put there, and nothing else.

\b
sudo graft uninstall docker
graft uninstall containerd --dry-run       show the change only
"""


BY_HAND = {"docker": "without systemd: kill -HUP dockerd", "containerd": "without systemd: start it again"}


def make(*, install: bool) -> click.Command:
    """Return the click command: `graft install` if @install, else `graft uninstall`."""

    @click.command(context_settings=CONTEXT, help=INSTALL if install else UNINSTALL)
    @click.argument("engine", type=click.Choice(list(ENGINES)))
    @click.option("-y", "--yes", is_flag=True, help="Do not ask.")
    @click.option("-n", "--dry-run", is_flag=True, help="Show the change, but do not make it.")
    @click.option("--reload", "reload_", is_flag=True, help="Reload the engine (systemctl reload, or restart).")
    @click.option("--runtime", type=click.Choice(["runc", "crun"]), help="The runtime that graft-runtime runs.")
    @click.option(
        "--swarm", is_flag=True, help="For services: the default runtime, and the plugin graft:swarm (Docker)."
    )
    @click.option("--subnet", default="", metavar="CIDR", help="Addresses of the CNI network (Podman, containerd).")
    @click.option(
        "--network", default="", metavar="CIDR", help="The pods of all nodes, if that is more (containerd)."
    )
    @click.option("--root", type=Path, default=Path("/"), hidden=True)
    def command(
        engine: str,
        yes: bool,
        dry_run: bool,
        reload_: bool,
        runtime: str | None,
        swarm: bool,
        subnet: str,
        network: str,
        root: Path,
        force: bool = False,
    ) -> None:
        _check_prefix("--subnet", subnet)
        _check_prefix("--network", network)
        if network and engine != "containerd":
            raise click.UsageError("--network goes with containerd")
        if swarm and engine != "docker":
            raise click.UsageError("--swarm goes with docker")
        version = check_version(engine) if install else ""
        plan = plan_of(engine, Options(root, runtime or "", subnet, swarm, network), install=install)
        if install:
            click.echo(f"{engine}: found {version}, {plan.found}")
        plugin = _plugin_order(install=install) if swarm else ""
        if plugin:
            click.echo(f"{plugin} plugin {PLUGIN}")
        if not plan.changes and not plugin:
            click.echo(f"{engine}: graft is {'installed already' if install else 'not installed'}")
            if reload_ and plan.reload and not dry_run:
                _tell(engine, plan, reload_=True)
            return
        for change in plan.changes:
            click.echo(change.diff, nl=False)
        if dry_run:
            return
        if not install and not force and root == Path("/"):
            check_unused(engine)
        if not yes:
            if not sys.stdin.isatty():
                raise Refused("cannot ask: standard input is no terminal", hint="--yes, or --dry-run", code="ENOTTY")
            if not click.confirm("Make this change?"):
                raise Refused("nothing was changed", code="ECANCELED")
        if plugin and not install:
            remove()  # first: dockerd refuses it while a network needs it
        done: list[Change] = []
        try:
            for change in plan.changes:
                change.make()
                done.append(change)
            if plugin and install:
                add(Path(client.run_directory()))
        except Failure:
            for change in reversed(done):
                Change(change.path, change.after, change.before, change.link).make()
            raise
        if plan.changes:
            _tell(engine, plan, reload_=reload_)
        if plugin:
            click.echo(f"{engine}: the plugin {PLUGIN} is {'enabled' if install else 'removed'}")

    if install:
        return command
    return click.option("--force", is_flag=True, help="Even if containers of the engine use graft.")(command)


def plan_of(engine: str, options: Options, *, install: bool) -> Plan:
    """What is to change: of root's engine, or in the own configuration of a user without root. Raises GraftError."""
    if options.root != Path("/") or os.geteuid() == 0:
        return ENGINES[engine](options, install=install)
    if options.swarm:
        raise Refused("services of swarm are root's engine's", hint="sudo graft install docker --swarm", code="EPERM")
    if install:
        rootless.check_graftd()
        if not subordinate("uid"):
            raise Refused(
                f"you have no subordinate ids, without which {engine} runs no image",
                hint=f"root may give you some: {how_to_delegate()}",
                code="EPERM",
            )
    return install_user.ENGINES[engine](options, install=install)


def _plugin_order(*, install: bool) -> str:
    """What is left to do about the plugin: create, enable, remove, or "" for nothing. Raises Failure."""
    found = state()
    if install:
        return {"": "create", "disabled": "enable"}.get(found, "")
    return "remove" if found else ""


def check_unused(engine: str) -> None:
    """Raise Refused if containers of @engine use graft: without its plugin the engine could not take them down.

    If a graftd was killed with what it kept, one is started: it knows what is left, and sweeps what is not.
    """
    try:
        used = client.call("status", start=os.path.exists(f"{client.run_directory()}/state.json"))["engines"][engine]
    except Failure as error:
        if error.code != "ECONNREFUSED":
            raise
        return
    if used:
        raise Refused(
            f"{len(used)} of {engine}'s use graft: {listed(used)}",
            hint="end them first, or give --force: the engine cannot take them down then",
            code="EBUSY",
        )


def _check_prefix(option: str, text: str) -> None:
    import ipaddress

    try:
        ipaddress.ip_network(text or "0.0.0.0/0")
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from None


def _tell(engine: str, plan: Plan, *, reload_: bool) -> None:
    words = " ".join(plan.reload)
    if not plan.reload:
        click.echo(f"{engine}: done")
    elif reload_:
        done = subprocess.run(plan.reload, capture_output=True, text=True)
        if done.returncode:
            raise Failure(
                f"{words}: {(done.stderr or done.stdout).strip()}",
                hint=f"the configuration has been changed; {BY_HAND[engine]}",
            )
        click.echo(f"{engine}: done, with a {plan.reload[1]}")
    else:
        click.echo(f"{engine}: done; to apply it: {words} ({plan.note})")
