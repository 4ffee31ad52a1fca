"""docs/kernels.md is what scripts/kernels.py makes of the tests' results, and these are of kernels that are tested."""

import json
import re

import pytest

from scripts import kernels

RESULTS = kernels.known()


def test_the_document_has_the_tables():
    text = kernels.DOCUMENT.read_text()
    assert text.partition(kernels.BEGIN)[2].partition(kernels.END)[0] == kernels.table(RESULTS)
    outside = text.partition(kernels.BEGIN)[0] + text.partition(kernels.END)[2]
    assert not re.findall(r"^\|", outside, re.MULTILINE), "a row that no test has made"


def test_each_result_is_of_a_kernel_that_is_tested():
    assert set(json.loads(kernels.RESULTS.read_text())) <= set(kernels.rows())


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_whole(name):
    one = RESULTS[name]
    assert one["release"] == one["version"]
    assert name.partition("-")[0] + "." in one["release"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", one["on"])
    assert one["packages"]
    findings = {finding["name"]: finding for finding in one["doctor"]}
    assert one["release"] in findings["machine"]["found"]
    for counts in one["groups"].values():
        assert set(counts) == {*kernels.OUTCOMES, "on", "interrupted"}
        assert sum(counts[outcome] for outcome in kernels.OUTCOMES)
        assert not counts["failed"]
    missing = {finding["name"] for finding in one["doctor"] if finding["needed"] and not finding["good"]}
    assert not (missing and one["groups"]), "what lacks something needed has no tests"


def test_what_a_guest_leaves_is_read(tmp_path):
    (tmp_path / "release").write_text("6.99.1-amd64\n")
    (tmp_path / "machine").write_text("x86_64\n")
    (tmp_path / "fetched").write_text("6.99.1-amd64\nsid\nlinux-a linux-b\n")
    finding = {"name": "a b", "needed": False, "good": False, "found": "no\nsuch|thing", "remedy": "a newer one"}
    (tmp_path / "doctor.json").write_text(json.dumps([finding, {**finding, "good": True, "found": f"{kernels.ROOT}/graft/graft-sup"}]))
    (tmp_path / "core.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.kernel.test_a" name="one"/>'
        '<testcase classname="tests.kernel.test_a" name="two"><skipped message="no module"/></testcase>'
        '<testcase classname="tests.system.test_b" name="three"><failure message="x"/></testcase>'
        "</testsuite></testsuites>"
    )
    one = kernels.result(tmp_path, tmp_path / "fetched")
    assert one["doctor"][1]["found"] == "graft/graft-sup"
    ran = {"on": one["on"], "interrupted": False}
    assert one["groups"] == {
        "probes": {"passed": 1, "skipped": 1, "failed": 0, **ran},
        "system": {"passed": 0, "skipped": 0, "failed": 1, **ran},
    }
    printed = kernels.table({"6.99": one})
    assert "| 6.99.1-amd64 | x86_64 | sid | 1 passed, 1 skipped | 0 passed, 1 failed | - |" in printed
    assert "| 6.99.1-amd64 | note | a b | no such\\|thing | a newer one |" in printed
    assert "| 6.99.1-amd64 | `tests.kernel.test_a.two` | no module |" in printed
    attacked = {"passed": 7, "skipped": 1, "failed": 0, "on": "2026-01-02", "interrupted": True}
    why = ("tests.attack.test_c.four: no wire", "tests.kernel.test_a.zero: no module then")
    old = {**one, "groups": {"probes": {"passed": 0}, "attacks": attacked}, "skipped": list(why)}
    both = kernels.merged(one, old)
    assert both["groups"] == {**one["groups"], "attacks": attacked}
    assert both["skipped"] == [why[0], *one["skipped"]]
    printed = kernels.table({"6.99": both})
    assert "| 0 passed, 1 failed | 7 passed, 1 skipped; not all: interrupted (2026-01-02) |" in printed
    assert kernels.merged(one, {**old, "release": "6.99.0-amd64"}) is one
    assert kernels.merged(one, None) is one
