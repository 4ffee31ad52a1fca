"""Print the table of graft/kernel/traps.py as docs/security.md has it.

usage: traps.py [--write]     --write: put it into docs/security.md, between the two markers
"""

import errno
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graft.kernel import traps
from graft.kernel.architecture import ARCHITECTURES
from scripts.printed import print_or_write

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/security.md"
BEGIN = "<!-- printed by scripts/traps.py -->\n"
END = "<!-- end of what scripts/traps.py prints -->\n"
FORMS = {"filter": "`graft run`", "profile": "engines"}
COMPAT = " and ".join(architecture.compat.name for architecture in ARCHITECTURES)
WHEN = {"always": "always", "addresses": "other sockets", "otherwise": "else"}


def table() -> str:
    """The text between the markers."""
    lines = ["| call | trapped if | by | when | because |", "| --- | --- | --- | --- | --- |"]
    for call in traps.CALLS:
        for trap in (trap for trap in traps.TRAPS if trap.call == call.name):
            tests = ", and ".join(condition.shown for condition in trap.conditions) or "every one"
            lines.append(f"| {call.name} | {tests} | {_forms(trap.forms)} | {_when(trap)} | {trap.why} |")
    lines += ["", "| call | answer |", "| --- | --- |"]
    for call in traps.CALLS:
        also = f" ({COMPAT} as well)" if call.compat else ""
        lines.append(f"| {call.name}{also} | {call.answer} |")
    lines += ["", "| ABI | refused call | with | by | because |", "| --- | --- | --- | --- | --- |"]
    for refusal in traps.REFUSED:
        error = errno.errorcode[refusal.error] if refusal.error else "SIGSYS"
        name = refusal.call or "all"
        forms = _forms(refusal.forms) + (", direct" if refusal.direct else "")
        lines.append(f"| {_abi(refusal)} | {name} | {error} | {forms} | {refusal.why} |")
    return "\n".join(lines) + "\n"


def _abi(refusal: traps.Refusal) -> str:
    """The names of the ABI on the architectures that have the call."""
    having = [one for one in ARCHITECTURES if refusal.known(one)]
    names = {"native": [one.machine for one in having], "compat": [one.compat.name for one in having]}
    return ", ".join(names.get(refusal.abi, [refusal.abi]))


def _when(trap: traps.Trap) -> str:
    modes = {None: "", True: ", direct", False: ", not direct"}
    return WHEN[trap.when] + modes[trap.direct]


def _forms(forms: tuple[traps.Form, ...]) -> str:
    return ", ".join(FORMS[form] for form in forms)


def main() -> None:
    """Print the table, or write it."""
    print_or_write(table(), DOCUMENT, BEGIN, END)


if __name__ == "__main__":
    main()
