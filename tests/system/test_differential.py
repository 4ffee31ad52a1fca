"""Random sequences of socket calls, on a host and under graft: each call has the same result, but for listed rules.

tests/system/differential has the sequences, the program that carries them out, and the rules; docs/differences.md has each rule's
reason. A sequence that differs is shrunk, and shown with its seed: `python3 -m tests.system.differential SEED 1`.
"""

import re

import pytest

from graft.bench.lab import ROOT
from tests.conftest import need
from tests.system.differential.compare import world
from tests.system.differential.rules import RULES, rule_of

SEEDS = (*range(1, 3001), 101144, 101377, 110741, 111125)  # the last: rare rules, found among other seeds
SHOWN = 10  # of the sequences that no rule explains


def reasons():
    """The reason of each rule, as the document has it."""
    text = (ROOT / "docs/differences.md").read_text().partition("## Random calls")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([^|]+) \|$", text, re.MULTILINE))


def test_every_rule_has_its_reason():
    assert sorted(reasons()) == sorted(RULES)
    assert all(len(reason) > 20 for reason in reasons().values())


@pytest.mark.timeout(600)  # half a minute on a machine that does nothing else
def test_random_calls():
    need("nsenter", "sysctl")
    held: set[str] = set()
    unexplained: list[str] = []
    with world() as one:
        for found in one.look(SEEDS, rule_of):
            name = rule_of(found)
            if name:
                held.add(name)
            elif len(unexplained) < SHOWN:
                unexplained.append(str(one.shrink(found, lambda f: not rule_of(f))))
    assert not unexplained, "\n".join(unexplained)
    assert held == set(RULES), f"rules that nothing needs: {sorted(set(RULES) - held)}"
