"""nginx of a user's container, in rootless Podman with a published port, beside the same nginx of the user on the host."""

import re
import statistics

import pytest

from graft.bench.lab import HOST4, wait_for
from tests.conftest import need
from tests.system.engines import NGINX
from tests.system.rootless import RootlessPodman, users_of

pytestmark = pytest.mark.alone
PAIRS = 9
LEAST = 0.9  # of the host's; 0.98 on a machine with nothing else to do (docs/performance.md)
BODY = "location /kib { return 200 '%s'; }" % ("x" * 1024)


def test_requests_of_a_published_server():
    need("podman", "runc", "nginx", "wrk", "slirp4netns")
    with users_of() as users:
        alice, lab = users["alice"], users.lab
        podman = RootlessPodman(alice, "runc")
        podman.install()

        def rate(port: int, *more: str) -> float:
            told = lab.client("wrk", "-t1", "-c16", "-d1s", *more, f"http://{HOST4}:{port}/kib").stdout
            found = re.search(r"Requests/sec:\s+([0-9.]+)", told)
            assert found, told
            return float(found[1])

        try:
            for port in (8880, 8881):
                text = NGINX.replace("access_log /dev/stdout", "access_log off").replace("listen 80", f"listen {port}")
                podman.write(f"{port}.conf", text % BODY).chmod(0o644)
            config = ("-v", f"{alice.home}/8881.conf:/nginx.conf:ro")
            network = ("--annotation", "graft=on", "--network", "graft", "-p", "8881:8881")
            podman.run("-d", *network, *config, argv=("nginx", "-c", "/nginx.conf"))
            on_host = alice.spawn("nginx", "-c", alice.home / "8880.conf")
            for port in (8880, 8881):
                wait_for(lambda port=port: lab.client("curl", "-sS", f"http://{HOST4}:{port}/kib").stdout, "nginx")  # type: ignore[misc]
            for more in ((), ("-H", "Connection: close")):
                pairs = [rate(8881, *more) / rate(8880, *more) for _ in range(PAIRS)]
                print(f"{more}: {statistics.median(pairs):.3f} of {min(pairs):.3f} to {max(pairs):.3f}")
                assert statistics.median(pairs) >= LEAST, pairs
            lab.end(on_host)
        finally:
            podman.clear()
