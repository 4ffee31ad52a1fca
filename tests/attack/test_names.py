"""A hostile program under a list of destinations: raw addresses, other resolvers, rebinding, answers of its own making.

The nameserver says which names it was asked for: a name that is refused is not among them. A witness at what may not be reached says whom it has seen.
"""


import sys
from pathlib import Path
from typing import Any

import pytest

from graft.bench.lab import CLIENT4, HOST4, wait_for
from tests.attack.test_attacks import LOW_PORTS, MODES, PROFILES
from tests.conftest import need_root
from tests.system.outside import outsides

PROGRAM = Path(__file__).parent / "programs/names.py"
REFUSED = "ENETUNREACH"
# What each attack comes to; a tuple: one of these
EXPECTED = {
    "raw_addresses": " ".join([REFUSED] * 6),
    "mapped_addresses": f"{REFUSED} {REFUSED}",
    "another_port_of_an_allowed_name": f"OK {REFUSED} {REFUSED}",
    "fast_open": REFUSED,
    "reconnected": f"{REFUSED} {REFUSED}",
    "other_resolvers": "3 3 3 3 3",
    "resolvers_at_other_ports": " ".join([REFUSED] * 4),
    "what_is_no_query": "silence 2 2 3",
    "data_in_a_query": "0 3 3 3",
    "rebinding": f"OK EAI_-2 EAI_-2 EAI_-2 EAI_-2 EAI_-2 {REFUSED} {REFUSED}",
    "ttl_of_nothing": "OK OK OK OK OK",
    "poisoned_chain": f"0 EAI_-2 {REFUSED} {REFUSED}",
    "chain_without_an_end": "2 OK",
    "giant_answers": "0 True OK True",
    "forged_answers": ("OK", "ECONNREFUSED OK", "ECONNREFUSED"),
    "resolver_by_its_own_address": f"{REFUSED} {REFUSED} 3",
    "takes_the_resolvers_place": REFUSED,
}
ZONE: dict[str, dict[str, Any]] = {
    "good.evil.test": {"A": [CLIENT4], "TTL": 0},
    "loop.evil.test": {"A": ["127.0.0.1"], "AAAA": ["::1"]},
    "host.evil.test": {"A": [HOST4], "AAAA": ["2001:db8:77::1"]},
    "meta.evil.test": {"A": ["169.254.169.254"], "AAAA": ["fe80::1"]},
    "next.evil.test": {"A": ["10.88.7.7"]},
    "mapped.evil.test": {"AAAA": ["::ffff:127.0.0.1", f"::ffff:{HOST4}"]},
    "zero.evil.test": {"A": [CLIENT4], "TTL": 0},
    "poison.evil.test": {
        "CNAME": ["p2.evil.test"],
        "POISON": [["bank.test", "A", "203.0.113.7"], ["www.test", "A", "203.0.113.8"], ["p2.evil.test.other", "A", "203.0.113.8"]],
    },
    "p2.evil.test": {"A": [CLIENT4]},
    "loop1.evil.test": {"CNAME": ["loop2.evil.test"]},
    "loop2.evil.test": {"CNAME": ["loop1.evil.test"]},
    "giant.evil.test": {"A": [f"198.18.{n >> 8}.{n & 255}" for n in range(4000)]},
    "*.many.evil.test": {"A": ["198.51.100.1"], "TTL": 0},
}


@pytest.fixture
def outside(lab):
    need_root()
    for one in outsides(lab):
        one.write(ZONE)
        one.greet(8000, 8001)
        yield one


def attack(outside, name, mode, profile, *more):
    """What @name comes to; what graftd knows of the container is looked at by its own command."""
    direct = ("--direct",) if mode == "direct" else ()
    allow = ("www.test:8000", "*.evil.test:8000")
    argv = (*PROFILES[profile], sys.executable, "-I", PROGRAM, name, *more)
    done = outside.run(*argv, allow=allow, options=(*direct, *LOW_PORTS))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("mode", MODES)
def test_attacks(outside, lab, mode, profile):
    """All of them, by each kind of program; what was refused has been asked of nobody."""
    neighbour = lab.spawn_graft("--name", "next", "--ip", "10.88.7.7", "sleep", "60")
    wait_for(lambda: "next" in lab.containers(), "the neighbour")
    wrong = {}
    for name, expected in EXPECTED.items():
        found = attack(outside, name, mode, profile)
        if found != expected and not (isinstance(expected, tuple) and found in expected):
            wrong[name] = found
    assert not wrong
    asked = "\n".join(outside.queries()).lower()
    assert "secret" not in asked
    assert "other.test" not in asked
    assert "in-addr" not in asked
    assert "bank.test" not in asked
    assert "traceback" not in (lab.run_dir / "graftd.log").read_text().lower()
    lab.end(neighbour)


@pytest.mark.parametrize("mode", MODES)
def test_names_of_a_wildcard(outside, lab, mode):
    """Two thousand names that are allowed, and as many that are not."""
    assert attack(outside, "names_of_a_wildcard", mode, "user", "2000") == "True OK"


