"""`graft run` and the other commands by ordinary users, by the user socket (graft/daemon/users.py)."""


import pytest

from graft.bench.lab import HOST4
from tests.conftest import need, need_root, python
from tests.users import UIDS, users_laboratory

SERVER = "import socket; s = socket.create_server(({host!r}, {port})); print('up', flush=True)\nwhile 1: c, a = s.accept(); c.sendall(a[0].encode()); c.close()"
ASK = "import socket; print(socket.create_connection(({host!r}, {port}), 5).recv(99).decode())"


@pytest.fixture(scope="module")
def users():
    need_root()
    need("setpriv", "newuidmap")
    with users_laboratory() as lab:
        lab.start_daemon()
        yield lab


def serve(lab, user, *options, host="0.0.0.0", port=80):
    process = lab.spawn_by(user, *options, *python(SERVER.format(host=host, port=port)), stdout=-1)
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("user", UIDS)
def test_the_command_is_its_user(users, user):
    shown = users.by(user, "run", "sh", "-c", "id -u; id -g; grep CapEff /proc/self/status", check=True).stdout.split()
    assert shown == [str(UIDS[user]), str(UIDS[user]), "CapEff:", "0000000000000000"]


def test_a_published_server_sees_the_real_client(users):
    server = serve(users, "alice", "-p", "8080:80")
    assert users.client(*python(ASK.format(host=HOST4, port=8080))).stdout == "10.77.0.2\n"
    users.end(server)


def test_two_users_have_a_loopback_each(users):
    both = [serve(users, user, "--name", "svc", host="127.0.0.1", port=5000) for user in ("alice", "bob")]
    for user in ("alice", "bob"):
        told = users.by(user, "run", "--netns", "svc", *python(ASK.format(host="127.0.0.1", port=5000)))
        assert told.stdout == "127.0.0.1\n", told.stderr
    for server in both:
        users.end(server)
