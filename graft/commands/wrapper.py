"""AF_GRAFT's wrapper, `graft [-v] [-i RULE]... [-e RULE]... -- PROGRAM`: check the rules, then launch.wrap()."""

import os

import click

from graft.commands.launch import Plan, wrap
from graft.commands.options import netns_option
from graft.errors import UsageError
from graft.rules.endpoint import check_distinct, parse_egress, parse_ingress
from graft.rules.request import Request

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "ignore_unknown_options": False,
    "allow_interspersed_args": False,
}


@click.command(context_settings=CONTEXT)
@netns_option("Run in this network namespace (or container); default: the caller's.")
@click.option("-v", "--verbose", is_flag=True, help="Print each conversion on standard error.")
@click.option(
    "-i",
    "--ingress",
    multiple=True,
    metavar="ADDR:PORT[-PORT]=ENDPOINT",
    help="A bind to ADDR:PORT becomes a bind to the endpoint. The first rule that matches applies.",
)
@click.option(
    "-e",
    "--egress-rule",
    "egress",
    multiple=True,
    metavar="PREFIX/LEN=ENDPOINT",
    help="A connection to PREFIX leaves from the endpoint. The longest prefix that matches applies.",
)
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
def command(
    netns: str | None, verbose: bool, ingress: tuple[str, ...], egress: tuple[str, ...], program: tuple[str, ...]
) -> None:
    """Run PROGRAM in the current network namespace; the rules put its sockets on the host's stack.

    Only what a rule names is converted; any other bind or connection is refused. The endpoints are those of the
    current namespace ('graft endpoint show'); no privilege is needed to use them.

    \b
    graft -i 0.0.0.0:80=ep-http -- nginx -g 'daemon off;'
    graft -i 0.0.0.0:0-65535=ep-in4 -i '[::]:0-65535=ep-in6' -- iperf3 -s
    graft -e 10.0.0.0/8=ep-lan -e 0.0.0.0/0=ep-out -- curl http://10.1.2.3/
    graft -- ./written-for-af-graft

    Without -i, rules are read from GRAFT_INGRESS_CONVERT; without -e, from GRAFT_EGRESS_CONVERT. Spaces separate
    rules there. GRAFT_VERBOSE=1 means -v.
    """
    if not program or not program[0]:
        raise UsageError("no program is given", hint="graft [-v] [-i RULE]... [-e RULE]... -- PROGRAM [ARGS]...")
    ingress, inward = _rules("-i", ingress, "GRAFT_INGRESS_CONVERT")
    egress, outward = _rules("-e", egress, "GRAFT_EGRESS_CONVERT")
    parsed_in, parsed_out = [], []
    for at, text in enumerate(ingress):
        with _naming(inward, at):
            parsed_in.append(parse_ingress(text))
    for at, text in enumerate(egress):
        with _naming(outward, at):
            parsed_out.append(parse_egress(text))
    check_distinct(parsed_in, parsed_out)
    verbose = verbose or os.environ.get("GRAFT_VERBOSE", "0") not in ("", "0")
    wrap(Plan(list(program), netns=netns, request=Request(ingress=ingress, egress=egress)), verbose=verbose)


def _rules(option: str, given: tuple[str, ...], variable: str) -> tuple[tuple[str, ...], str]:
    if given:
        return given, option
    return tuple(os.environ.get(variable, "").split()), variable


class _naming:  # noqa: N801 - it is used as a statement: with _naming(...)
    """Add to a UsageError which rule of which option or variable it is about. @at: the rule's index, from 0."""

    def __init__(self, source: str, at: int) -> None:
        self.source = source
        self.at = at

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, UsageError):
            raise UsageError(f"{self.source}, rule {self.at + 1}: {error.message}", hint=error.hint) from None
