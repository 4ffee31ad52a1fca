"""`graft bench`: options, signals and output files; graft/bench does the measuring."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from graft.commands.options import CONTEXT
from graft.errors import Failure, Refused, from_oserror

WIDTH = 180  # of the summary where no terminal says how wide it is


@click.command(context_settings=CONTEXT)
@click.option("--quick", is_flag=True, help="One short round, other peers in three cases only: under 2 minutes.")
@click.option(
    "--case", "cases", multiple=True, metavar="NAME", help="Run only this case (or those whose names contain it)."
)
@click.option(
    "--against",
    multiple=True,
    metavar="PEER",
    help="Compare with this peer, and not with all: docker, bridge, bypass4netns; --list names them.",
)
@click.option(
    "--rootless", is_flag=True, help="Compare what an ordinary user can have: graft, pasta, slirp4netns ..."
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=None, metavar="N", help="Rounds of pairs; default 5.")
@click.option(
    "--time", "limit", metavar="TIME", help="Stop after so long: 90s, 10m, 1h. Keeps what is measured by then."
)
@click.option("--rate", default="", metavar="RATE", help="Rate of the wire, as tc(8) takes it: 1gbit. Default: none.")
@click.option(
    "--delay", default="", metavar="TIME", help="Delay of the wire, one way: 5ms. Needs the kernel's netem."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write every sample to FILE."
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the report, an HTML page, to FILE."
)
@click.option("--list", "listing", is_flag=True, help="List the cases and the peers, and measure nothing.")
def command(
    quick: bool,
    cases: tuple[str, ...],
    against: tuple[str, ...],
    rootless: bool,
    rounds: int | None,
    limit: str | None,
    rate: str,
    delay: str,
    json_path: Path | None,
    out: Path | None,
    listing: bool,
) -> None:
    """Measure graft against the host's own stack and other networking that is installed, in interleaved pairs.

    Two network namespaces, joined by a veth pair, play a host and a client; nothing touches the machine's own
    addresses, ports or containers. Nothing else should run meanwhile: more than an hour, less with --case.
    A run that is interrupted, or whose time is up, writes the rounds that are done, marked as partial.

    \b
    graft bench --quick
    graft bench --case short-out --case http --against docker --json result.json --out report.html
    graft bench --rootless --json rootless.json
    """
    import msgspec
    from rich.console import Console

    if find_spec("graft.bench") is None:
        raise Refused("graft bench is not installed", hint="apt install ./graft-bench_*.deb", code="ENOENT")
    from graft.bench import run, scale, summary
    from graft.bench.cases import CASES
    from graft.bench.report import page
    from graft.bench.stop import Stop, seconds

    choice = run.Choice(cases, against, rounds or (1 if quick else 5), quick, rate, delay, rootless)
    if listing:
        for case in CASES:
            click.echo(f"{case.name:20} {case.title}")
        for name, each in scale.CASES.items():
            click.echo(f"{name:20} {(each.__doc__ or '').splitlines()[0]}")
        for peer in choice.known():
            click.echo(f"--against {peer.name:20} {peer.reason() or peer.title}")
        return
    if os.geteuid() != 0:
        raise Refused("graft bench needs root", hint="sudo graft bench", code="EPERM")
    for path in (json_path, out):
        if path and not path.absolute().parent.is_dir():
            raise Refused(
                f"{path}: there is no directory {path.absolute().parent}", hint="create it first", code="ENOENT"
            )
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    stop = Stop(seconds(limit) if limit is not None else 0.0)
    result = run.benchmark(choice, console, stop)
    try:
        if json_path:
            json_path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        if out:
            out.write_text(page(result))
    except OSError as error:
        raise from_oserror(f"write {error.filename}", error) from None
    if result.rows:
        console.print(f"{summary.LEGEND}; * the best", highlight=False, soft_wrap=True)
        console.print(summary.table(result.rows, list(result.peers)))
    for skip in result.skipped:
        what = " ".join(filter(None, (skip.case, skip.peer)))
        console.print(f"not measured: {what}: {skip.reason}", highlight=False, soft_wrap=True)
    if result.partial:
        console.print(str(result.partial), highlight=False, soft_wrap=True)
    ended = stop.error()
    if ended:
        raise ended
    if result.partial:
        raise Failure(result.partial.why)
    if not result.rows and not result.growth:
        raise Failure("nothing could be measured", hint="see the reasons above")
