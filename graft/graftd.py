"""The command graftd: start the daemon in the foreground, or stop it.

Under a service manager that keeps descriptors (FDSTORE in the environment, sockets by LISTEN_FDS) this
process is the daemon; elsewhere it becomes the keeper, and the daemon is its child.
"""

import os
import sys

import click

from graft import __version__
from graft.cli import CONTEXT, guarded
from graft.errors import Failure, Refused


@click.command(context_settings=CONTEXT)
@click.option("--stop", is_flag=True, help="End the running graftd; refused while containers run.")
@click.option("--force", is_flag=True, help="With --stop: although containers run. Their new sockets fail then.")
@click.option("--replace", is_flag=True, help="End the running graftd and start this one; no call is lost.")
@click.option("--idle-exit", is_flag=True, help="End when nothing has run for 5 seconds.")
@click.version_option(__version__, "-V", "--version", message="graftd %(version)s")
def command(stop: bool, force: bool, replace: bool, idle_exit: bool) -> None:
    """Supervise grafted containers.

    \b
    graftd                 in the foreground; 'graft run' starts one by itself where none runs
    graftd --stop          end it
    graftd --replace       put this version in its place, in the background, while containers run
    systemctl enable --now graftd.socket      where systemd runs: started on demand, upgraded in place
    """
    from graft import client

    if stop and replace:
        raise click.UsageError("--stop and --replace exclude each other")
    if stop or replace:
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
        from graft.daemon import main as daemon

        daemon()
        return
    from graft.keeper import main as keeper

    if not keeper(-1):
        raise Refused("graftd is running already", hint="'graftd --stop' ends it", code="EEXIST")


def main() -> int:
    """Entry point of `graftd`."""
    return guarded("graftd", lambda: command.main(prog_name="graftd", standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
