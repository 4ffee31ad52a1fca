"""CPython's own network tests: under graft the same tests pass as on the host."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import lack

# Its 700 tests collect garbage three times each, which on Debian 13 (Python 3.13) and two busy processors takes minutes.
LIMIT = 500
HUNG = "Timeout (0:"  # faulthandler.dump_traceback_later()
# Runs for minutes on some virtual machines with or without graft: AF_VSOCK is none of graft's families.
LEAVE_OUT = ("-i", "*VSOCK*")


def results(output):
    """Test → ok, skipped, FAIL or ERROR; of a verbose unittest run."""
    found = {}
    for match in re.finditer(r"^(test\w+ \([\w.]+\)).*? \.\.\. (?:.*?\n)*?.*?(ok|skipped|FAIL|ERROR|expected failure)\b", output, re.M):
        found[match[1]] = match[2]
    return found


@pytest.mark.timeout(2 * LIMIT)
def test_test_socket_passes_as_on_the_host(lab):
    probe = lab.host("python3", "-c", "import test.test_socket")
    if probe.returncode:
        lack("python3 has no test package (libpython3-testsuite)")
    # one that hangs ends with the stacks of its threads, which say where
    command = ("python3", "-m", "test", "-v", "--timeout", str(LIMIT), "test_socket", *LEAVE_OUT)
    with ThreadPoolExecutor() as pool:
        both = (pool.submit(lab.host, *command, timeout=LIMIT), pool.submit(lab.graft, "run", *command, timeout=LIMIT))
    host, grafted = (one.result() for one in both)
    for one in (host, grafted):
        assert HUNG not in one.stderr, one.stdout[-2000:] + one.stderr[-8000:]
    on_host, under_graft = results(host.stdout), results(grafted.stdout)
    assert len(on_host) > 500, host.stdout[-2000:]
    differ = {name: (on_host[name], under_graft.get(name)) for name in on_host if on_host[name] != under_graft.get(name)}
    assert differ == {}
    assert grafted.returncode == host.returncode
