"""Collect what came of tests on emulated kernels (scripts/kernels.sh), and print it as docs/kernels.md has it.

usage: kernels.py --result NAME DIRECTORY FETCHED     what the guest left in DIRECTORY, to build/kernels/NAME.json
       kernels.py --write                             all of build/kernels to docs/kernels.json and docs/kernels.md;
                                                      groups of tests that have not run stay as they were there
       kernels.py                                     print the tables of docs/kernels.json
"""

import datetime
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.printed import print_or_write

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "scripts/kernels.txt"
BUILT = ROOT / "build/kernels"
RESULTS = ROOT / "docs/kernels.json"
DOCUMENT = ROOT / "docs/kernels.md"
BEGIN = "<!-- printed by scripts/kernels.py -->\n"
END = "<!-- end of what scripts/kernels.py prints -->\n"
GROUPS = {"probes": "tests.kernel.", "system": "tests.system.", "attacks": "tests.attack.", "units": "tests.unit."}
OUTCOMES = ("passed", "skipped", "failed")


def rows() -> list[str]:
    """The names of the kernels in scripts/kernels.txt, in order."""
    return [line.split()[0] for line in ROWS.read_text().splitlines() if line and not line.startswith("#")]


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    """The outcome of one test of a JUnit file, and why it was skipped."""
    for child in case:
        if child.tag in ("failure", "error"):
            return "failed", ""
        if child.tag == "skipped":
            return "skipped", child.get("message", "")
    return "passed", ""


def result(directory: Path, fetched: Path) -> dict[str, Any]:
    """What the guest left in @directory; @fetched: the version, the suite and the packages, one a line."""
    version, suite, packages = fetched.read_text().splitlines()
    doctor = (directory / "doctor.json").read_text().replace(f"{ROOT}/", "")  # where the checkout was says nothing
    counts: dict[str, Counter[str]] = {}
    skipped: Counter[str] = Counter()
    for file in sorted(directory.glob("*.xml")):
        for case in ElementTree.parse(file).iter("testcase"):  # noqa: S314 - pytest has written it
            name = f"{case.get('classname')}."
            group = next((group for group, prefix in GROUPS.items() if name.startswith(prefix)), "")
            if not group:  # pytest's own complaint that it was interrupted
                continue
            outcome, why = _outcome(case)
            counts.setdefault(group, Counter())[outcome] += 1
            if why:
                skipped[f"{name}{case.get('name')}: {why}".replace("\n", " ")] += 1
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    interrupted = (directory / "interrupted").exists()
    return {
        "release": (directory / "release").read_text().strip(),
        "machine": (directory / "machine").read_text().strip(),
        "version": version,
        "suite": suite,
        "packages": packages.split(),
        "on": today,
        "groups": {
            group: {**{o: count[o] for o in OUTCOMES}, "on": today, "interrupted": interrupted}
            for group, count in counts.items()
        },
        "skipped": sorted(skipped),
        "doctor": json.loads(doctor),
    }


def merged(new: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    """@new with the groups that have not run there, as they were in @old if that is of the same release."""
    if old is None or old["release"] != new["release"]:
        return new
    kept = {group: counts for group, counts in old["groups"].items() if group not in new["groups"]}
    skipped = [line for line in old["skipped"] if any(line.startswith(GROUPS[group]) for group in kept)]
    both = {**kept, **new["groups"]}
    return {
        **new,
        "groups": {group: both[group] for group in GROUPS if group in both},
        "skipped": sorted({*new["skipped"], *skipped}),
    }


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _counts(counts: dict[str, Any] | None, on: str) -> str:
    """A cell: what came of a group, and when if that was not @on."""
    if not counts:
        return "-"
    told = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o] or o == "passed")
    told += "; not all: interrupted" if counts["interrupted"] else ""
    return told if counts["on"] == on else f"{told} ({counts['on']})"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The text between the markers."""
    lines = [
        "| kernel | machine | Debian | probes | system tests | attacks | on |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in results.values():
        groups = [_counts(one["groups"].get(group), one["on"]) for group in ("probes", "system", "attacks")]
        lines.append(f"| {' | '.join((one['release'], one['machine'], one['suite'], *groups, one['on']))} |")
    lines += ["", "What `graft doctor` says there is missing, or worth a note:", ""]
    lines += ["| kernel | | finding | found | remedy |", "| --- | --- | --- | --- | --- |"]
    for one in results.values():
        for finding in one["doctor"]:
            if not finding["good"]:
                mark = "MISSING" if finding["needed"] else "note"
                texts = (finding["name"], _cell(finding["found"]), _cell(finding["remedy"]))
                lines.append(f"| {one['release']} | {mark} | {' | '.join(texts)} |")
    lines += [
        "",
        "Tests that were skipped, with their reasons:",
        "",
        "| kernel | test | because |",
        "| --- | --- | --- |",
    ]
    for one in results.values():
        for skipped in one["skipped"]:
            name, _, why = skipped.partition(": ")
            lines.append(f"| {one['release']} | `{_cell(name)}` | {_cell(why)} |")
    return "\n".join(lines) + "\n"


def known() -> dict[str, dict[str, Any]]:
    """The results in docs/kernels.json by the name of the kernel, in the order of scripts/kernels.txt."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {name: found[name] for name in rows() if name in found}


def main() -> None:
    """Collect, print, or write."""
    match sys.argv[1:]:
        case ["--result", name, directory, fetched]:
            BUILT.mkdir(parents=True, exist_ok=True)
            path = BUILT / f"{name}.json"
            path.write_text(json.dumps(result(Path(directory), Path(fetched)), indent=1) + "\n")
            print(f"kernels: {path.relative_to(ROOT)}")
            return
        case ["--write"]:
            new = {path.stem: json.loads(path.read_text()) for path in BUILT.glob("*.json")}
            old = known()
            found = {**old, **{name: merged(one, old.get(name)) for name, one in new.items()}}
            kept = {name: found[name] for name in rows() if name in found}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        case []:
            pass
        case _:
            sys.exit(__doc__)
    print_or_write(table(known()), DOCUMENT, BEGIN, END)


if __name__ == "__main__":
    main()
