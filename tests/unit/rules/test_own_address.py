"""Addresses of containers' own, and to which namespace an attachment belongs."""

import os

import pytest

from graft.errors import UsageError
from graft.rules.address import parse_address
from graft.rules.own_address import check_families, network_of, parse_own
from graft.tenants.attachment import Attachment, restore_attachment


def test_an_inode_that_comes_again_is_another_namespace(tmp_path):
    """The engine was killed before it took the attachment back; the kernel gives the number to the next namespace."""
    known = Attachment("cni/c/eth0", "n")
    known.netns, known.cookie = 4026531840, 7
    assert known.in_netns(4026531840, 7)
    assert not known.in_netns(4026531840, 8)
    assert restore_attachment(known.document()).in_netns(4026531840, 7)
    late = Attachment("docker/e", "n")
    late.sandbox = [str(tmp_path / "gone"), str(tmp_path)]
    inode = os.stat(tmp_path).st_ino
    assert not late.in_netns(inode + 1, 1)
    assert late.in_netns(inode, 5)
    assert not late.in_netns(inode, 6)
    assert not Attachment("docker/f", "n").in_netns(0, 0)


def test_prefixes():
    own = network_of("10.77.1.5/16", 3)
    assert (str(own.address), str(own.prefix), own.length, own.network) == ("10.77.1.5", "10.77.0.0", 16, 3)
    assert str(network_of("fd00::5/64", 1).prefix) == "fd00::"
    wide = network_of("10.244.3.5/24", 1, "10.244.0.0/16")
    assert (str(wide.prefix), wide.length) == ("10.244.0.0", 16)
    assert network_of("fd00::5/64", 1, "10.244.0.0/16").length == 64
    assert parse_own("10.1.2.3").length == 0
    with pytest.raises(UsageError, match="of one family"):
        check_families([parse_own("10.1.2.3"), parse_own("10.1.2.4")])
    check_families([parse_own("10.1.2.3"), parse_own("fd00::1")])


@pytest.mark.parametrize("text", ["10.1.2.3", "10.1.2.3/33", "10.1.2.3/x", "127.0.0.1/8", "0.0.0.0/0", "fd00::1/129"])
def test_what_is_no_network(text):
    with pytest.raises(UsageError):
        network_of(text, 1)


def test_addresses_are_restored():
    attachment = Attachment("k", "n")
    attachment.addresses = [network_of("10.77.1.5/16", 3)]
    attachment.resolver = parse_address("10.77.0.1")
    again = restore_attachment(attachment.document())
    assert (again.addresses, str(again.resolver)) == (attachment.addresses, "10.77.0.1")
