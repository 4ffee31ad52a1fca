# ruff: noqa: F811 (fixtures)
"""What an ordinary user tries with what was granted before, and with requests that are long."""

import pytest

from graft import __version__
from graft.bench.lab import GRAFT, wait_for
from tests.attack.test_users import tries, unharmed, users, victim  # noqa: F401
from tests.conftest import python


def test_an_endpoint_from_before_a_grant_was_taken_back(users, unharmed):
    """What bob added when he might is no way around what he may now: neither its port, nor its way out."""
    users.grant("[users.bob]\nports = ['unprivileged', 80]\n")
    for name, port in (("low", "80"), ("gate", "dynamic")):
        users.by("bob", "endpoint", "add", name, "type", "ipv4", "addr", "10.77.0.1", "port", port, check=True)
    running = users.spawn_by("bob", "--name", "before", "sleep", "60")
    wait_for(lambda: "before" in users.by("bob", "ps").stdout, "it")
    users.by("bob", "endpoint", "add", "--netns", "before", "way", "type", "ipv4", "addr", "10.77.0.1", "port", "dynamic", check=True)
    users.grant("[users.bob]\negress = 'none'\nendpoints = ['gate', 'way']\n")
    low, out = ("-i", "0.0.0.0:80=low"), ("-e", "0.0.0.0/0=gate")
    users.refused(users.command("bob", GRAFT, "run", *low, "true"), 1, "endpoint 'low': port 80/tcp is below 1024")
    users.refused(users.command("bob", GRAFT, "run", *out, "true"), 1, "endpoint 'gate' is one of yours")
    users.refused(users.command("bob", GRAFT, "rule", "add", "before", *low), 1, "endpoint 'low': port 80/tcp is below 1024")
    users.refused(users.command("bob", GRAFT, "rule", "add", "before", "-e", "0.0.0.0/0=way"), 1, "endpoint 'way' is one of yours")
    users.end(running)
    users.grant("")
    for name in ("low", "gate"):
        users.by("bob", "endpoint", "del", name, check=True)


BIND = "import socket; s = socket.create_server(('', 80)); print('up', flush=True); s.accept()"


def listening(users, user, name, *options):
    process = users.spawn_by(user, "--name", name, *options, *python(BIND), stdout=-1)
    assert process.stdout.readline() == "up\n"
    return process


def test_nobody_but_root_moves_a_port(users, unharmed):
    """What is moved is led past whoever is bound there, such as a server of root's on the host's loopback."""
    his = [users.spawn_by("bob", "--name", "has", "-p", "8401:80", "sleep", "60"), listening(users, "bob", "gets")]
    wait_for(lambda: "has" in users.by("bob", "ps").stdout, "bob's")
    for kind, what in (("rule", ("-p", "8401:80")), ("endpoint", ("tcp-8401",))):
        move = (GRAFT, kind, "move", *what, "--from", "has", "--to", "gets")
        users.refused(users.command("bob", *move), 1, "only root may hand a port over")
    assert users.client(*python("import socket; socket.create_connection(('10.77.0.1', 8401), 5)")).returncode != 0
    users.graft("rule", "move", "-p", "8401:80", "--from", "has@bob", "--to", "gets@bob", check=True)
    assert users.client(*python("import socket; socket.create_connection(('10.77.0.1', 8401), 5)")).returncode == 0
    for process in his:
        users.end(process)


GOES = """import socket, sys
for name in sys.argv[1:]:
    try:
        host, _, port = name.partition(":")
        print(socket.create_connection((host, int(port)), 3).recv(2).decode())
    except OSError as error:
        print(error.strerror or error)
"""


def test_an_endpoint_of_ones_own_is_no_leave(users, unharmed):
    """By its name it leads where the container may go without it: not past users.toml, nor to others' loopbacks."""
    server = users.spawn("python3", "-c", "import socket; s = socket.create_server(('10.77.0.2', 7711)); print('up', flush=True)\nwhile 1: s.accept()[0].sendall(b'hi')",
                         client=True, stdout=-1)  # fmt: skip
    assert server.stdout.readline() == "up\n"
    for egress, told in (("none", "Network is unreachable\n"), ("host", "hi\n")):
        users.grant(f"[users.alice]\negress = '{egress}'\n")
        box = users.spawn_by("alice", "--name", "box", "--names", "sleep", "60")
        wait_for(lambda: "box" in users.by("alice", "ps").stdout, "alice's")
        users.by("alice", "endpoint", "add", "out", "type", "ipv4", "addr", "10.77.0.2", "port", "7711", "--netns", "box", check=True)
        went = users.by("alice", "run", "--netns", "box", *python(GOES), "out.graft:1")
        assert went.stdout == told, went.stderr
        users.end(box)
    users.grant("")
    add = ("endpoint", "add", "slice", "type", "ipv4", "addr", "127.90.1.2", "port", "63000")
    users.refused(users.command("alice", GRAFT, *add), 2, "address 127.90.1.2 stands for the loopback of a container")
    users.end(server)


LONG = {
    "ports": ("run", "publish", "[f'{p}:{p}' for p in range(2000, 30000)]"),
    "resolvers": ("run", "resolver", "[f'127.0.{n >> 8}.{n & 255}' for n in range(1, 30000)]"),
    "rules": ("run", "egress", "[f'10.{n >> 8}.{n & 255}.0/24=x' for n in range(30000)]"),
    "endpoints": ("endpoint-add", "endpoints", "[dict(name=f'e{n}', words=['type', 'ipv4', 'addr', '10.77.0.1', 'port', 'dynamic']) for n in range(6000)]"),
    "labels": ("prepare", "settings", "{'graft.publish': ','.join(f'{p}:{p}' for p in range(20000, 60000))}"),
    "sysctls": ("prepare", "config", "dict(process={}, linux=dict(sysctl={f'net.ipv4.conf.e{n}.forwarding': '1' for n in range(20000)}))"),
    "profile": ("prepare", "config", "dict(process={}, linux=dict(namespaces=[dict(type='network')], seccomp=dict(defaultAction='SCMP_ACT_ALLOW', syscalls=[dict("
                "names=['listen'], action='SCMP_ACT_KILL', args=[dict(index=i, value=n, op='SCMP_CMP_EQ')]) for i in range(5) for n in range(1, 61, 2)])))"),
}  # fmt: skip


@pytest.mark.parametrize("what", LONG)
def test_long_lists_keep_nobody_waiting(users, unharmed, what):
    """Hundreds of kilobytes in one request, which took graftd up to half a minute each."""
    op, field, value = LONG[what]
    code = f"""
from graft.rules.request import Request
s = connect(); exchange(s, op='hello'); own_netns(); fds, op, value = [listener()] if {op!r} == 'run' else [], {op!r}, {value}
wish = dict(op='run', argv=['x'], request=list(Request({field}=value))) if op == 'run' else dict(op=op, {field}=value)
if op == 'prepare': wish = dict(engine='podman', id='x', name='n', config=dict(process={{}})) | wish
data = json.dumps(dict(version={__version__!r}, **wish)).encode() + b'\\n'
data = data[socket.send_fds(s, [data[:1000]], fds):]; began = time.monotonic(); s.sendall(data)
told(json.loads(s.recv(65536))); print(time.monotonic() - began < 3, flush=True)
os._exit(0)
"""
    code_told, soon = tries(users, "bob", code)
    assert code_told in ("ENOSPC", "EINVAL", "E2BIG")
    assert soon == "True"


def test_many_rules_to_delete_keep_nobody_waiting(users, unharmed):
    """Each is looked for among all that the container has."""
    box = users.spawn_by("alice", "--name", "box", "sleep", "60")
    wait_for(lambda: "box" in users.by("alice", "ps").stdout, "alice's")
    done = users.by("alice", "rule", "del", "box", *(word for n in range(1, 601) for word in ("-p", f"{3000 + n}:{n}")))
    assert "600 rules are too many" in done.stderr
    users.end(box)
