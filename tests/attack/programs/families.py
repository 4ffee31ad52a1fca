"""Socket families that know no namespaces: what they reach is the host's, or the hypervisor's."""

import itertools
import socket

from .common import attack
from .netns import outcome, wrong

BEYOND = {"vsock": 40, "qipcrtr": 42, "isdn": 34, "rds": 21, "smc": 43}


def every_type(family):
    """An attack that asks for each type of socket of @family, also with flags and with the upper half set."""

    def tries():
        for kind, flag in itertools.product(range(1, 7), (0, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)):
            try:
                socket.socket(family, kind | flag).close()
                return f"type {kind}"
            except OSError as error:
                last = error
        raise last

    return tries


for name, number in BEYOND.items():
    found = every_type(number)
    found.__name__ = f"family_{name}"
    attack(found)


@attack
def protocol_smc():
    """AF_SMC by another name, since Linux 6.11."""
    kinds = itertools.product((socket.AF_INET, socket.AF_INET6), (0, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC))
    told = {f"{family}-{flags}": outcome(socket.socket, family, socket.SOCK_STREAM | flags, 256) for family, flags in kinds}
    return wrong(told, "EPROTONOSUPPORT") or "EPROTONOSUPPORT"


@attack
def family_vsock_to_the_hypervisor():
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.settimeout(5)
    s.connect((socket.VMADDR_CID_HOST, 1024))
