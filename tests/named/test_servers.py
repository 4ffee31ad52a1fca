"""Servers that everybody runs: proxies, databases, brokers, a login server."""

import functools

import pytest

from graft.bench.lab import CLIENT4, wait_for
from tests.named.place import Grafted

pytestmark = pytest.mark.tree
CURL = ("curl", "-sS", "--max-time", "20")
WEB = ("python3", "-m", "http.server", "--bind", CLIENT4)


def asked(place, *command, port=None, own6=True):
    """What a client prints from each side; HOST in @command is the address."""
    sides = [(place.client, place.address4), (place.beside, place.address4), (place.inside, "127.0.0.1"), (place.inside, place.address4)]
    if own6:
        sides[1:1] = [(place.client, place.address6), (place.inside, "::1")]
    return [who(*(str(word).replace("HOST", host) for word in command)) for who, host in sides]


def page(place):
    """A web server on the client with one page; its address."""
    (place.work / "page").write_text("a page of the client's\n")
    place.serve_far(*WEB, "--directory", place.work, "8000", port=8000)
    return f"http://{CLIENT4}:8000/page"


HAPROXY = """
global
    stats socket {work}/stats
defaults
    mode http
    timeout connect 5s
    timeout client 10s
    timeout server 10s
    option forwardfor
frontend in
    bind :::8080 v4v6
    default_backend out
backend out
    option httpchk GET /page
    server far {client}:8000 check inter 100ms
"""


def test_haproxy(stage):
    """It checks its backend, and is reloaded: the new worker takes the listener over."""
    stage.need("haproxy", "curl", "python3")

    def play(place):
        page(place)
        (place.work / "conf").write_text(HAPROXY.format(work=place.work, client=CLIENT4))
        place.start("haproxy", "-W", "-f", place.work / "conf", "-p", place.work / "pid", publish=("8080",))

        def up():
            return place.client("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://{place.address4}:8080/page") == "200"

        wait_for(up, "haproxy's backend")
        seen = asked(place, *CURL, "http://HOST:8080/page", own6=False)
        return [*seen, place.client(*CURL, f"http://[{place.address6}]:8080/page")]

    assert set(stage.same(play)) == {"a page of the client's\n"}


def test_squid(stage):
    stage.need("squid", "curl", "python3")

    def play(place):
        url = page(place)
        conf = place.work / "conf"
        conf.write_text(
            f"http_port 3128\nhttp_access allow all\npid_filename {place.work}/pid\ncache_log {place.work}/squid.log\n"
            f"access_log none\ncoredump_dir {place.work}\ncache deny all\nshutdown_lifetime 0 seconds\nvisible_hostname graft\n"
        )
        place.start("squid", "-N", "-f", conf, publish=("3128",))
        return [
            who(*CURL, "-x", f"http://{host}:3128", url)
            for who, host in (
                (place.client, place.address4),
                (place.client, f"[{place.address6}]"),
                (place.beside, place.address4),
                (place.inside, "localhost"),
            )
        ]

    assert set(stage.same(play)) == {"a page of the client's\n"}


def test_mosquitto(stage):
    """A message from outside to a subscriber inside, and the other way round."""
    stage.need("mosquitto", "mosquitto_pub", "mosquitto_sub")

    def play(place):
        (place.work / "conf").write_text("listener 1883\nallow_anonymous true\nuser root\n")
        place.start("mosquitto", "-c", place.work / "conf", publish=("1883",))
        seen: list[str] = []
        for who, host, other, there in (
            (place.client, place.address4, place.inside, "localhost"),
            (place.inside, "127.0.0.1", place.client, place.address6),
            (place.beside, place.address4, place.inside, place.address4),
        ):
            who("mosquitto_pub", "-h", host, "-t", "topic", "-r", "-q", "1", "-m", f"from {len(seen)}")
            seen.append(other("mosquitto_sub", "-h", there, "-t", "topic", "-C", "1", "-W", "10"))
        return seen

    assert stage.same(play) == ["from 0\n", "from 1\n", "from 2\n"]


def test_postgres(stage):
    """Also with LISTEN and NOTIFY, which go by the client's connection, and its address as the server sees it."""
    stage.need("psql", "chown")

    def play(place):
        folder = place.work / "data"
        begin = (
            f"mkdir {folder} && chown postgres {folder} && cd {folder} && export PATH=$(echo /usr/lib/postgresql/*/bin):$PATH &&"
            f" setpriv --reuid postgres --clear-groups initdb -A trust -D {folder} >/dev/null &&"
            f" echo 'host all all all trust' >>{folder}/pg_hba.conf &&"
            f" setpriv --reuid postgres --clear-groups postgres -D {folder} -k {folder} -c listen_addresses='*'"
        )
        place.start("sh", "-c", begin, publish=("5432",))
        query = "listen news; notify news, 'told'; select host(inet_client_addr()) is not null, inet_server_port()"
        return asked(place, "psql", "-h", "HOST", "-U", "postgres", "-At", "-c", "create table if not exists t (n int)", "-c", query)

    seen = stage.same(play)
    assert all("t|5432" in one for one in seen), seen


def test_mariadb(stage):
    stage.need("mariadbd", "mariadb-install-db", "mariadb")

    def play(place):
        folder = place.work / "data"
        begin = (
            f"mkdir {folder} && chown mysql {folder} && mariadb-install-db --no-defaults --user=mysql --datadir={folder} --skip-name-resolve"
            f" >/dev/null && echo \"create user guest@'%';\" >{place.work}/init && exec mariadbd --no-defaults --user=mysql --datadir={folder}"
            f" --socket={folder}/sock --bind-address=* --skip-name-resolve --init-file={place.work}/init"
        )
        place.start("sh", "-c", begin, publish=("3306",))
        ask = ("mariadb", "--no-defaults", "-h", "HOST", "--protocol=tcp", "-u", "guest", "-N", "-e", "select 6 * 7, user()")
        return asked(place, *ask)

    seen = stage.same(play)
    assert all(one.startswith("42\tguest@") for one in seen), seen


def test_redis_and_its_client_in_containers_of_their_own(stage):
    stage.need("redis-server", "redis-cli")

    def play(place):
        place.start("redis-server", "--save", "", "--protected-mode", "no", "--bind", "* -::*", publish=("6379",))
        seen = asked(place, "redis-cli", "-h", "HOST", "incr", "visits")
        return [*seen, place.alone("redis-cli", "-h", place.address4, "incr", "visits")]

    assert stage.same(play, Grafted) == [f"{n}\n" for n in range(1, 8)]


def test_etcd(stage):
    stage.need("etcd", "etcdctl")

    def play(place):
        urls = ("--listen-client-urls", "http://0.0.0.0:2379", "--advertise-client-urls", f"http://{place.address4}:2379")
        peers = ("--listen-peer-urls", "http://127.0.0.1:2380")
        place.start("etcd", "--data-dir", place.work / "data", *urls, *peers, publish=("2379",))
        command = ("env", "ETCDCTL_API=3", "etcdctl", "--endpoints", "http://HOST:2379")
        put = asked(place, *command, "put", "key", "value", own6=False)
        return put, asked(place, *command, "get", "key", own6=False)

    put, got = stage.same(play)
    assert (set(put), set(got)) == ({"OK\n"}, {"key\nvalue\n"})


NATS = """
import socket, sys
c = socket.create_connection((sys.argv[1], 4222), 10); f = c.makefile('r'); f.readline()
c.sendall(b'CONNECT {"verbose":false}\\r\\nSUB news 1\\r\\nPUB news 4\\r\\ntold\\r\\nPING\\r\\n')
while (line := f.readline().strip()) != 'PONG': print(line)
"""


def test_nats(stage):
    stage.need("nats-server", "python3")

    def play(place):
        place.start("nats-server", "-a", "::", "-p", "4222", publish=("4222",))
        return asked(place, "python3", "-c", NATS, "HOST")

    assert set(stage.same(play)) == {"MSG news 1 4\ntold\n"}


def test_nginx_is_replaced_while_it_serves(stage):
    """USR2: a new master takes the listeners by descriptor, the old one goes."""
    stage.need("nginx", "curl")

    def play(place):
        conf = place.work / "nginx.conf"
        conf.write_text(
            f"pid {place.work}/pid; error_log stderr; events {{}}\nhttp {{ access_log off; server {{ listen 8080;"
            " listen [::]:8080; location / { return 200 \"from nginx\\n\"; } } }\n"
        )
        signals = f"cd {place.work}; read signal; kill -$signal $(cat pid); read signal; kill -$signal $(cat pid.oldbin); read end"
        process = place.start("sh", "-c", f"/usr/sbin/nginx -c {conf}; {signals}", publish=("8080",), stdin=-1)
        old = (place.work / "pid").read_text()
        for signal, done in (
            ("USR2", lambda: (place.work / "pid.oldbin").exists() and (place.work / "pid").exists()),
            ("QUIT", lambda: not (place.work / "pid.oldbin").exists()),
        ):
            process.stdin.write(f"{signal}\n")
            process.stdin.flush()
            wait_for(done, f"nginx after {signal}")
        assert (place.work / "pid").read_text() != old
        return asked(place, *CURL, "http://HOST:8080/", own6=False)

    assert set(stage.same(play)) == {"from nginx\n"}


SSHD = """
Port 2222
HostKey {work}/key
PidFile none
AuthorizedKeysFile {work}/user.pub
StrictModes no
GatewayPorts clientspecified
PermitRootLogin yes
UsePAM no
"""


@pytest.mark.parametrize("where", ["SERVER", "0.0.0.0", "127.0.0.1"])
def test_ssh_forwards_a_port_of_the_server(stage, where):
    """ssh -R ADDRESS:PORT: the server listens at an address that the client names."""
    stage.need("sshd", "ssh", "ssh-keygen", "curl")

    def play(place):
        url = page(place)
        address = place.address4 if where == "SERVER" else where
        work = place.work
        place.beside("sh", "-c", f"for k in key user; do ssh-keygen -q -t ed25519 -N '' -f {work}/$k; done")
        (work / "conf").write_text(SSHD.format(work=work))
        place.start("sh", "-c", f"mkdir -p /run/sshd; exec /usr/sbin/sshd -D -e -f {work}/conf", publish=("2222", "8022-8022"))
        ssh = (
            "ssh", "-F", "none", "-N", "-p", "2222", "-i", work / "user", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "ExitOnForwardFailure=yes", "-R", f"{address}:8022:{CLIENT4}:8000", f"root@{place.address4}",
        )  # fmt: skip
        place.processes.append(place.lab.spawn(*place.within(ssh), client=True, stderr=-3))
        inside = functools.partial(place.inside, "curl", "-s", "--max-time", "5", "http://{}:8022/page".format("127.0.0.1" if where == "127.0.0.1" else place.address4))
        wait_for(lambda: "page" in place.inside("sh", "-c", f"{' '.join(inside.args)} || true"), "the forwarding")
        sides = [] if where == "127.0.0.1" else [place.client, place.beside]
        return [who(*CURL, f"http://{place.address4}:8022/page") for who in sides] + [inside()], url

    assert set(stage.same(play)[0]) == {"a page of the client's\n"}
