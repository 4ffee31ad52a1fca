# ruff: noqa: F811 (fixtures)
"""What an ordinary user learns of the names of others."""

from tests.attack.test_users import alices, unharmed, users, victim  # noqa: F401
from tests.conftest import python

QUESTIONS = r"""
import socket, struct
def ask(name, kind):
    s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(5)
    asked = b''.join(bytes([len(label)]) + label.encode() for label in name.split('.'))
    s.sendto(struct.pack('>6H', 1, 256, 1, 0, 0, 0) + asked + struct.pack('>BHH', 0, kind, 1), ('127.0.0.11', 53))
    reply = s.recv(999)
    return str(reply[3] & 15 or reply[7])
print(*(ask(name, 1) for name in ('named.graft', 'named@alice.graft')))
s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(5)
s.sendto(struct.pack('>6H', 1, 256, 1, 0, 0, 0) + b'\x019\x011\x0299\x0210\x07in-addr\x04arpa\0' + struct.pack('>HH', 12, 1), ('127.0.0.11', 53))
print(b'named' in s.recv(999))
"""


def test_names_of_others_are_told_to_nobody(users, unharmed):
    """alice's container is known by name to her own containers, and to root's; who wants its address is told no name."""
    users.grant("[default]\naddresses = ['10.99.1.0/24']\n")
    process = alices(users, "--name", "named", "--ip", "10.99.1.9")
    for user, told in (("alice", "1 3\nTrue\n"), ("bob", "3 3\nFalse\n")):
        assert users.by(user, "run", "--names", "--egress", "none", *python(QUESTIONS)).stdout == told
    assert users.graft("run", "--names", "--egress", "none", *python(QUESTIONS)).stdout == "3 1\nTrue\n"
    done = users.by("bob", "run", "--ip", "10.99.1.9", "true")
    assert done.stderr == "graft: 10.99.1.9 is in use (use another)\n"
    users.end(process)
    users.grant("")
