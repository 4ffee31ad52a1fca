"""Port mappings of CNI and netavark: one family where the engine names one, as portmap and Docker have it."""

import pytest

from graft.engines.mappings import publication
from graft.rules.publication import parse_publication


@pytest.mark.parametrize(
    ("host_ip", "text", "families"),
    [
        ("", "8080:80/tcp", {4, 6}),
        ("0.0.0.0", "0.0.0.0:8080:80/tcp", {4}),
        ("::", "[::]:8080:80/tcp", {6}),
        ("192.0.2.1", "192.0.2.1:8080:80/tcp", {4}),
        ("fd00::1", "[fd00::1]:8080:80/tcp", {6}),
    ],
)
def test_an_address_of_the_hosts(host_ip, text, families):
    assert publication(host_ip, 8080, 80, "tcp") == text
    address = parse_publication(text).address
    assert ({4, 6} if address is None else {4 if address.v4 else 6}) == families


def test_a_range():
    assert publication("", 8080, 80, "udp", 3) == "8080-8082:80-82/udp"
