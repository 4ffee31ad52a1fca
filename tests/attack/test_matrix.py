"""The matrix: every kind of socket, every call on it, by every kind of program; expectations come from rules.

All in both modes (test_attacks.py). Each program does the cells of a row and a column in one process (matrix/agent.py); an oracle without graft does them
beside it. After each the host is compared, and on a difference the cells are halved until one is left.
"""

import json
import re
import time
from collections import defaultdict

import pytest

from graft.bench.lab import laboratory
from tests.attack.matrix import calls, rows
from tests.attack.matrix.laboratory import Matrix, Who
from tests.attack.matrix.rules import GAPS, TRAP_ONLY, gap_of, reached, rule_of
from tests.attack.test_attacks import MODES
from tests.conftest import need, need_root

LOOKS = 100  # looks at the host to find one cell among many, 0.1 s each


class Run:
    """All cells, and what was found."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.count = 0
        self.looks = LOOKS
        self.done = []
        self.gaps = set()
        self.once = defaultdict(list)  # what was seen once, and not when the cells were done again
        self.found = defaultdict(set)  # by row, call and what came of it: the programs

    def row(self, row):
        """Do a row in every program that has it."""
        columns = defaultdict(list)
        for who in self.matrix.programs:
            if row in rows.CONTAINERS.get(who.place, ()):
                for group in rows.groups(row, who.place):
                    columns[group].append(who)
        for open_here in (False, True):  # those that may reach the host come after the others
            for group, whole in columns.items():
                who = [w for w in whole if (w.place == "host") == open_here]
                if who:
                    self.column(row, group, who)
                    visits = self.visits(who[0].place)
                    if visits and not self.search(row, group, who):
                        self.once[row] += visits[:3]
        changes = self.matrix.changes()
        self.let_go()
        self.gaps |= {gap_of(row, f"the host: {change}") for change in changes}
        if any(not gap_of(row, f"the host: {change}") for change in changes):
            found = [self.search(row, group, who) for group, who in columns.items()]
            if not any(found):
                self.once[row] += changes[:3]

    def column(self, row, group, who):
        """The cells of a row and column in some programs, compared with the oracles'."""
        cells = calls.cells(group, self.matrix.where, *self.like(row))
        oracles = [Who(profile, "oracle") for profile in dict.fromkeys(w.profile for w in who)]
        answers = self.ask((*oracles, *who), row, group, 0, len(cells))
        for place in dict.fromkeys(w.place for w in who):
            rules = [rule_of(row, call, place) for call in cells]
            for w in who:
                if w.place == place:
                    self.compare(row, cells, rules, w, answers[w], answers[Who(w.profile, "oracle")])

    def visits(self, place):
        """Who has been where without a right to."""
        seen = self.matrix.visitors()
        return [f"reached {where} from {source}" for where, source in seen if not reached(place, where, source)]

    def let_go(self):
        """Close the sockets that programs have kept."""
        self.ask([w for w in self.matrix.programs if w.place != "the host"], "", "", 0, 0)

    def search(self, row, group, who):
        """Which cells have changed the host? The first program that does it again is looked at closely."""
        cells = calls.cells(group, self.matrix.where, *self.like(row))
        return any(self.looks > 0 and self.narrow(row, group, cells, w, 0, len(cells)) for w in who)

    @staticmethod
    def like(row):
        """What the cells depend on: is it for IPv6, the type."""
        _, family, what, _ = row.split()
        return family == "6", what

    def ask(self, who, row, group, first, last):
        for w in who:
            self.matrix.programs[w].ask(row, group, first, last)
        return {w: self.matrix.programs[w].answer() for w in who}

    def compare(self, row, cells, rules, who, answer, oracle):
        self.count += len(cells)
        for call, rule, outcome, plain in zip(cells, rules, answer["outcomes"], oracle["outcomes"], strict=True):
            if rule is None:
                self.add(row, call, "no rule", who)
            elif not rule(outcome, plain):
                self.add(row, call, f"{outcome}, not {rule.__name__}: {plain}", who)
        for number, *needles in answer["told"]:
            self.add(row, cells[number], f"shows {', '.join(needles)}", who)

    def add(self, row, call, what, who):
        self.found[row, calls.told(call), what].add(f"{who.profile}/{who.place}")

    def narrow(self, row, group, cells, who, first, last):
        """Halve the cells until one is left that changes the host, or by which somebody is reached; was there one?"""
        self.looks -= 1
        self.ask((who,), row, group, first, last)
        found = self.matrix.changes() + self.visits(who.place)
        self.ask((who,), "", "", 0, 0)
        if not found:
            return False
        if last - first > 1 and self.looks > 0:
            middle = (first + last) // 2
            halves = [self.narrow(row, group, cells, who, *part) for part in ((first, middle), (middle, last))]
            if any(halves):
                return True
        call = cells[first] if last - first == 1 else (group, first, last)
        self.add(row, call, f"the host: {'; '.join(found[:3])}", who)
        return True

    def report(self, row):
        """What was found in a row, a line each, but for known gaps."""
        by_what = defaultdict(list)
        for (where, call, what), who in sorted(self.found.items()):
            gap = gap_of(where, f"{call}: {what}")
            if where == row and gap:
                self.gaps.add(gap)
            elif where == row:
                by_what[what, tuple(sorted(who))].append(call)
        lines = [f"the host, once: {what}" for what in self.once[row]]
        return lines + [f"{what} | {' '.join(who)} | {len(found)}: {' '.join(found[:4])}" for (what, who), found in by_what.items()]


@pytest.fixture(scope="module", params=MODES)
def run(request):
    need_root()
    need("setpriv", "unshare", "nft")
    with laboratory("matrix") as lab:
        yield Run(Matrix(lab, mode=request.param))


@pytest.mark.parametrize("row", rows.ROWS)
def test_row(run, row):
    began, before = time.monotonic(), run.count
    run.row(row)
    run.done.append(row)
    print(json.dumps({"row": row, "cells": run.count - before, "seconds": round(time.monotonic() - began, 1)}))
    found = run.report(row)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("gap", GAPS)
def test_gap(run, gap):
    """What is known to be open is still found; if not, its line in GAPS has to go."""
    if run.matrix.mode == "direct" and gap in TRAP_ONLY:
        pytest.skip("it is of sockets that are made for a program")
    if not any(re.search(GAPS[gap][0], row) for row in run.done):
        pytest.skip("no row of it was done")
    assert gap in run.gaps, "closed: take it out of GAPS"
