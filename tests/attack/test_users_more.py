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


def test_moves_are_of_ones_own(users, unharmed):
    """Neither from another's container nor to one, nor what another has at an endpoint that both may use."""
    users.graft("endpoint", "add", "both", "type", "ipv4", "addr", "10.77.0.1", "port", "8400", check=True)
    users.grant("[users.alice]\nendpoints = ['both']\n[users.bob]\nendpoints = ['both']\n")
    hers = listening(users, "alice", "hers", "-i", "0.0.0.0:80=both")
    his = [
        users.spawn_by("bob", "--name", "has", "-p", "8401:80", "-i", "0.0.0.0:81=both", "sleep", "60"),
        listening(users, "bob", "gets"),
    ]
    wait_for(lambda: "has" in users.by("bob", "ps").stdout, "bob's")
    words = {
        "from hers": ("endpoint", "both", "hers", "gets", "no container 'hers' of yours runs"),
        "to hers": ("rule", "8401:80", "has", "hers@alice", "no container 'hers@alice' of yours runs"),
        "what she has": ("endpoint", "both", "has", "gets", "container 'has' does not serve at 10.77.0.1:8400: another program does"),
    }
    for kind, what, source, target, told in words.values():
        name = ("-p", what) if kind == "rule" else (what,)
        done = users.refused(users.command("bob", GRAFT, kind, "move", *name, "--from", source, "--to", target), 1, told)
        assert "alice" not in done.stderr.replace("hers@alice", "")
    users.end(hers)
    users.grant("")
    told = "endpoint 'both' is not granted to you any more"
    users.refused(users.command("bob", GRAFT, "endpoint", "move", "both", "--from", "has", "--to", "gets"), 1, told)
    users.by("bob", "rule", "move", "-p", "8401:80", "--from", "has", "--to", "gets", check=True)
    assert users.client(*python("import socket; socket.create_connection(('10.77.0.1', 8401), 5)")).returncode == 0
    for process in his:
        users.end(process)
    users.graft("endpoint", "del", "both", check=True)


LONG = {
    "ports": ("run", "publish", "[f'{p}:{p}' for p in range(2000, 30000)]"),
    "resolvers": ("run", "resolver", "[f'127.0.{n >> 8}.{n & 255}' for n in range(1, 30000)]"),
    "rules": ("run", "egress", "[f'10.{n >> 8}.{n & 255}.0/24=x' for n in range(30000)]"),
    "endpoints": ("endpoint-add", "endpoints", "[dict(name=f'e{n}', words=['type', 'ipv4', 'addr', '10.77.0.1', 'port', 'dynamic']) for n in range(6000)]"),
    "labels": ("prepare", "settings", "{'graft.publish': ','.join(f'{p}:{p}' for p in range(20000, 60000))}"),
}


@pytest.mark.parametrize("what", LONG)
def test_long_lists_keep_nobody_waiting(users, unharmed, what):
    """Hundreds of kilobytes in one request, which took graftd up to half a minute each."""
    op, field, value = LONG[what]
    code = f"""
from graft.rules.request import Request
s = connect(); exchange(s, op='hello'); own_netns(); fds, op, value = [listener()] if {op!r} == 'run' else [], {op!r}, {value}
wish = dict(op='run', argv=['x'], request=list(Request({field}=value))) if op == 'run' else dict(op=op, {field}=value)
if op == 'prepare': wish |= dict(engine='podman', id='x', name='n', config=dict(process={{}}))
data = json.dumps(dict(version={__version__!r}, **wish)).encode() + b'\\n'
data = data[socket.send_fds(s, [data[:1000]], fds):]; began = time.monotonic(); s.sendall(data)
told(json.loads(s.recv(65536))); print(time.monotonic() - began < 3, flush=True)
os._exit(0)
"""
    code_told, soon = tries(users, "bob", code)
    assert code_told in ("ENOSPC", "EINVAL")
    assert soon == "True"
