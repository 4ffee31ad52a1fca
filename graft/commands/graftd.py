"""The command graftd: start the daemon in the foreground, stop it, or replace it.

If systemd started this process by socket activation (LISTEN_PID, sd_listen_fds(3)), it is the daemon, and systemd
keeps its descriptors (FDSTORE). Otherwise it becomes the keeper, and the daemon is its child.
"""

import os
import sys

import click

from graft import __version__
from graft.commands.options import CONTEXT, guarded
from graft.errors import Failure, Refused


@click.command(context_settings=CONTEXT)
@click.option("--stop", is_flag=True, help="End the running graftd; refused while containers run.")
@click.option("--force", is_flag=True, help="With --stop: end it even if containers run; their new sockets fail.")
@click.option("--replace", is_flag=True, help="End the running graftd and start this one; no call is lost.")
@click.option(
    "--reload", "again", is_flag=True, help="Read the files in /etc/graft that have changed, and say what is wrong."
)
@click.option("--idle-exit", is_flag=True, help="End when nothing has run for 5 seconds.")
@click.option("--metrics", metavar="ADDR:PORT|PATH", help="Serve metrics for Prometheus there, at /metrics.")
@click.option("--metrics-public", is_flag=True, help="With --metrics: also at an address beyond the loopback.")
@click.version_option(__version__, "-V", "--version", message="graftd %(version)s")
def command(
    stop: bool, force: bool, replace: bool, again: bool, idle_exit: bool, metrics: str | None, metrics_public: bool
) -> None:
    """Supervise grafted containers.

    \b
    graftd                 run in the foreground; 'graft run' starts a graftd itself if none runs
    graftd --stop          end the running graftd
    graftd --metrics 127.0.0.1:9435    the same, with a page of metrics
    graftd --replace       replace it by this version, in the background, while containers run
    graftd --reload        read what has changed in /etc/graft
    systemctl enable --now graftd.socket      with systemd: start it on demand, upgrade it in place
    """
    from graft import client

    if metrics:
        from graft.rules.where import parse_where

        parse_where(metrics, public=metrics_public, option="--metrics")
        os.environ["GRAFT_METRICS"], os.environ["GRAFT_METRICS_PUBLIC"] = metrics, "1" if metrics_public else "0"
    elif metrics_public:
        raise click.UsageError("--metrics-public goes with --metrics")
    if stop + replace + again > 1:
        raise click.UsageError("--stop, --replace and --reload exclude each other")
    if again:
        _reload()
        return
    if stop or replace:
        if replace:
            from graft.rules.configuration import read_configuration
            from graft.rules.limits import default_limits

            default_limits(os.environ, read_configuration().limits)  # if one is wrong, the running graftd goes on
        try:
            client.order("stop", force=force, replace=replace)
        except Failure as error:
            if error.code != "ECONNREFUSED":
                raise
            if stop:
                raise Refused("graftd is not running", code="ECONNREFUSED") from None
        if replace:
            client.connect(start=True).close()
        return
    if force:
        raise click.UsageError("--force goes with --stop")
    if os.geteuid() != 0:
        raise Refused("graftd needs root", hint="sudo graftd", code="EPERM")
    if idle_exit:
        os.environ["GRAFT_IDLE_EXIT"] = "1"
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        daemon()
        return
    from graft.process.keeper import main as keeper

    if not keeper(-1):
        raise Refused("graftd is running already", hint="'graftd --stop' ends it", code="EEXIST")


def daemon() -> None:
    """Run as graftd. As graft.daemon.main.main()."""
    from graft.commands.plan import plan
    from graft.daemon.main import main

    main(plan)


def _reload() -> None:
    """Have the running graftd read its files. Raises Refused with what is wrong."""
    from graft import client

    try:
        faults = client.call("reload", start=False)
    except Failure as error:
        if error.code != "ECONNREFUSED":
            raise
        raise Refused("graftd is not running", code="ECONNREFUSED") from None
    if faults:
        raise Refused(f"{'; '.join(faults)}; what was in force stays so", code="EINVAL")


def main() -> int:
    """Run `graftd`; returns the exit status."""
    return guarded("graftd", lambda: command.main(prog_name="graftd", standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
