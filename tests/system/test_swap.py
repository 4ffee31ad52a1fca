"""Endpoints that need another socket than socket() gave: unix ones, and those of other namespaces."""

import json
import socket
import subprocess
from functools import partial

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, HOST6, wait_for
from tests.conftest import need, python


@pytest.fixture
def path(lab):
    """A unix endpoint ep-unix on the host."""
    where = lab.work / "run" / "swap.sock"
    where.parent.mkdir(exist_ok=True)
    where.parent.chmod(0o755)
    lab.graft("endpoint", "add", "ep-unix", "type", "unix", "path", where, check=True)
    yield where
    lab.graft("endpoint", "del", "ep-unix", check=True)
    where.unlink(missing_ok=True)


@pytest.fixture
def away(lab):
    """Endpoints of the host's table in the client's namespace: in, out, and its loopback."""
    words = {
        "away-in": f"type ipv4 addr {CLIENT4} port 7080 netns {lab.client_ns}",
        "away-out": f"type ipv4 addr {CLIENT4} port dynamic netns {lab.client_ns}",
        "away-lo": f"type ipv4 addr 127.0.0.1 port dynamic netns {lab.client_ns}",
    }
    lab.add_endpoints(words)
    yield
    lab.delete_endpoints(words)


def answers(path):
    """Does anybody listen there?"""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def speak(path, data=b"", timeout=20):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        wait_for(lambda: sock.connect_ex(str(path)) == 0, "the server")
        if data:  # to send nothing to a server that has answered and closed is EPIPE
            sock.sendall(data)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
            if not data:
                break
        return answer


SERVER = """
import socket, sys
s = socket.socket()
s.setsockopt(1, 2, 1)
s.setsockopt(6, 1, 1)                    # TCP_NODELAY, TCP_DEFER_ACCEPT
s.setsockopt(6, 9, 1)
s.bind(('0.0.0.0', 80)); s.listen()
s.setsockopt(6, 1, 1); s.setsockopt(0, 1, 16)
print(s.getsockname(), s.getsockopt(6, 1), flush=True)
c, a = s.accept()
c.setsockopt(6, 1, 1)
c.sendall(b'hello over ' + str(c.family == socket.AF_INET).encode())
c.close()
"""


@pytest.mark.parametrize("how", ["wrapper", "run"])
def test_a_server_on_a_unix_socket(lab, path, how):
    """bind(0.0.0.0:80) lands on a socket file; TCP's options succeed before, on and after it."""
    words = ("-i", "0.0.0.0:80=ep-unix", "--") if how == "wrapper" else ("run", "-i", "0.0.0.0:80=ep-unix")
    server = lab.spawn(GRAFT, *words, *python(SERVER), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert speak(path) == b"hello over True"
    out, err = server.communicate(timeout=20)
    assert (out, err) == ("('0.0.0.0', 80) 0\n", "")
    wait_for(lambda: not path.exists(), "the socket to go with its program")


def test_a_socket_file_left_behind_is_replaced_and_others_are_not(lab, path):
    code = "import socket,errno\ns = socket.socket()\ntry:\n  s.bind(('0.0.0.0', 80)); print('bound')\nexcept OSError as e: print(errno.errorcode[e.errno])"
    wrapped = ("-i", "0.0.0.0:80=ep-unix", "--", *python(code))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert lab.graft(*wrapped).stdout == "bound\n"
    wait_for(lambda: not path.exists(), "the socket to go with its program")
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        assert lab.graft(*wrapped).stdout == "EADDRINUSE\n"
    path.unlink()
    path.write_text("a file that is not a socket")
    assert lab.graft(*wrapped).stdout == "EADDRINUSE\n"
    assert path.read_text().startswith("a file")


def test_a_directory_that_the_container_changes(lab, path):
    """A link in the place of the directory is not followed, neither to bind nor to remove; the file is the user's."""
    aside, other = path.parent.with_name("aside"), path.parent.with_name("other")
    other.mkdir()
    code = "import socket, errno\ns = socket.socket()\ntry:\n  s.bind(('0.0.0.0', 80)); print('bound', flush=True); input()\nexcept OSError as e: print(errno.errorcode[e.errno])"
    user = ("setpriv", "--reuid=1234", "--regid=1234", "--clear-groups")
    wrapped = ("-i", "0.0.0.0:80=ep-unix", "--", *user, *python(code))
    try:
        server = lab.spawn(GRAFT, *wrapped, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdout.readline() == "bound\n"
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1234)
        path.parent.rename(aside)
        path.parent.symlink_to(aside)
        server.communicate("\n", timeout=20)
        wait_for(lambda: lab.graft("ps", "-q").stdout == "", "the program to be gone")
        assert (aside / path.name).exists()
        path.parent.unlink()
        path.parent.symlink_to(other)
        assert lab.graft(*wrapped).stdout == "ELOOP\n"
        assert not list(other.iterdir())
    finally:
        path.parent.unlink()
        aside.rename(path.parent)
        other.rmdir()


def test_links_are_followed_when_an_endpoint_is_added(lab):
    real, link = lab.work / "real", lab.work / "link"
    real.mkdir()
    link.symlink_to(real)
    lab.graft("endpoint", "add", "ep-link", "type", "unix", "path", link / "s.sock", check=True)
    assert f"path {real}/s.sock" in lab.graft("endpoint", "show").stdout
    lab.graft("endpoint", "del", "ep-link", check=True)
    link.unlink()
    real.rmdir()
    slash = lab.graft("endpoint", "add", "ep-link", "type", "unix", "path", "/tmp/")
    assert (slash.returncode, slash.stderr.splitlines()[0]) == (2, "graft: path '/tmp/' names a directory (like /run/app/http.sock)")


def test_redis_serves_through_a_unix_endpoint(lab, path):
    need("redis-server", "redis-cli")
    lab.spawn(GRAFT, "-i", "0.0.0.0:6379=ep-unix", "--", "redis-server", "--bind", "0.0.0.0", "--save", "", "--protected-mode", "no", stdout=subprocess.DEVNULL)
    wait_for(partial(answers, path), "redis")
    assert wait_for(lambda: lab.host("redis-cli", "-s", path, "ping").stdout, "an answer") == "PONG\n"
    assert lab.host("redis-cli", "-s", path, "set", "a", "1").stdout == "OK\n"
    assert lab.host("redis-benchmark", "-s", path, "-q", "-n", "2000", "-c", "20", "-t", "get,set").returncode == 0


def test_nginx_serves_through_a_unix_endpoint(lab, path):
    need("nginx", "curl")
    conf = lab.work / "nginx-unix.conf"
    conf.write_text(
        f"pid {lab.work}/nginx-unix.pid; error_log stderr; worker_processes 2; daemon off;\n"
        "events {}\n"
        "http { access_log off; server { listen 80; listen [::]:80; location / { return 200 'from nginx\\n'; } } }\n"
    )
    lab.graft("endpoint", "add", "ep-six", "type", "ipv6", "addr", HOST6, "port", "8086", check=True)
    rules = ("-i", "0.0.0.0:80=ep-unix", "-i", "[::]:80=ep-six")
    server = lab.spawn(GRAFT, *rules, "--", "nginx", "-c", conf, stderr=subprocess.PIPE)
    wait_for(partial(answers, path), "nginx")
    for _ in range(3):
        assert lab.host("curl", "-sS", "--unix-socket", path, "http://x/").stdout == "from nginx\n"
    assert lab.client("curl", "-sS", f"http://[{HOST6}]:8086/").stdout == "from nginx\n"
    lab.graft("endpoint", "del", "ep-six", check=True)
    lab.end(server)
    assert "emerg" not in server.stderr.read()


def test_a_client_is_grafted_onto_a_unix_socket(lab, path):
    """connect(10.9.8.7:80) goes to the socket file; names and options are what a TCP client expects."""
    code = """
import socket
s = socket.socket(); s.settimeout(20)
s.setsockopt(6, 1, 1)
s.connect(('10.9.8.7', 80))
s.setsockopt(6, 1, 1)
print(s.getpeername(), s.getsockname(), s.getsockopt(6, 1))
s.sendall(b'question'); print(s.recv(99))
t = socket.socket(); t.setblocking(False)
print(t.connect_ex(('10.9.8.7', 80)))
print(socket.socket().connect_ex(('10.9.9.7', 80)))
"""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(20)
        client = lab.spawn(GRAFT, "-e", "10.9.8.0/24=ep-unix", "--", *python(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        connection, _ = listener.accept()
        assert connection.recv(99) == b"question"
        connection.sendall(b"answer")
        out, err = client.communicate(timeout=20)
        connection.close()
    assert err == ""
    assert out.splitlines() == ["('10.9.8.7', 80) ('0.0.0.0', 0) 0", "b'answer'", "0", "101"], out
    nobody = lab.graft("-e", "10.9.8.0/24=ep-unix", "--", *python("import socket; print(socket.socket().connect_ex(('10.9.8.7', 80)))"))
    assert nobody.stdout == "111\n", "a file without a server is a refused connection"


EPOLL = """
import os, select, socket
e = select.epoll(); f = select.epoll()
s = socket.socket(); s.setblocking(False)
copy = os.dup(s.fileno()); os.set_inheritable(copy, True)
e.register(s.fileno(), select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
f.register(copy, select.EPOLLIN)
s.setsockopt(1, 9, 1); s.setsockopt(1, 20, (5).to_bytes(8, 'little') + bytes(8))
before = (s.get_inheritable(), os.get_blocking(s.fileno()), os.get_inheritable(copy))
r = s.connect_ex(('10.9.8.7', 80)); print(r in (0, 115))
while not (events := e.poll(20)): pass
print([(fd == s.fileno(), bool(ev & select.EPOLLOUT)) for fd, ev in events])
print(before == (s.get_inheritable(), os.get_blocking(s.fileno()), os.get_inheritable(copy)), before)
print(s.getsockopt(1, 9), s.getsockopt(1, 20, 16)[:8] == (5).to_bytes(8, 'little'))
os.write(copy, b'via the copy')
print([fd == copy for fd, ev in f.poll(20)])
print(os.read(copy, 99))
e.modify(s.fileno(), select.EPOLLOUT); print(len(e.poll(20)))
e.unregister(s.fileno()); f.unregister(copy)
"""


@pytest.mark.core
def test_a_swap_carries_descriptors_flags_options_and_epoll(lab, path):
    """What nginx does as a proxy: registered with epoll before it connects; and a dup, watched elsewhere."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(20)
        client = lab.spawn(GRAFT, "-e", "10.9.8.0/24=ep-unix", "--", *python(EPOLL), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        connection, _ = listener.accept()
        assert connection.recv(99) == b"via the copy"
        connection.sendall(b"seen")
        out, err = client.communicate(timeout=20)
        connection.close()
    assert err == ""
    assert out.splitlines() == ["True", "[(True, True)]", "True (False, False, True)", "1 True", "[True]", "b'seen'", "1"]


def test_many_threads_connect_at_once(lab, path):
    """More than graftd works on at a time: they wait, as on any socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(500)
        code = """
import socket, threading
told = []
def work():
    s = socket.socket(); told.append(s.connect_ex(('10.9.8.7', 80)))
threads = [threading.Thread(target=work) for _ in range(60)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sorted(set(told)), len(told))
"""
        assert lab.graft("-e", "10.9.8.0/24=ep-unix", "--", *python(code)).stdout == "[0] 60\n"


def test_an_nginx_proxy_reaches_its_backend_through_a_unix_endpoint(lab, path):
    need("nginx", "curl")
    conf = lab.work / "nginx-proxy.conf"
    conf.write_text(
        f"pid {lab.work}/nginx-proxy.pid; error_log stderr; daemon off;\n"
        "events {}\n"
        "http { access_log off; server { listen 80; location / { proxy_pass http://10.9.8.7:80; } } }\n"
    )
    backend = "import socketserver,http.server,sys\nclass S(socketserver.ThreadingUnixStreamServer): allow_reuse_address=True\nclass H(http.server.BaseHTTPRequestHandler):\n  def do_GET(self):\n    self.send_response(200); self.end_headers(); self.wfile.write(b'from the backend\\n')\n  def address_string(self): return 'x'\n  def log_message(self, *a): pass\nS(sys.argv[1], H).serve_forever()"
    lab.spawn(*python(backend), path)
    wait_for(partial(answers, path), "the backend")
    path.chmod(0o666)  # nginx's workers are another user
    lab.spawn_graft("--name", "proxy", "-p", "8087:80", "-e", "10.9.8.0/24=ep-unix", "nginx", "-c", conf, stderr=subprocess.DEVNULL)
    lab.wait_listening(8087)
    for _ in range(5):
        assert lab.client("curl", "-sS", f"http://{HOST4}:8087/").stdout == "from the backend\n"


def test_a_container_cannot_get_such_endpoints_later(lab, path):
    lab.spawn_graft("--name", "plain", "sleep", "60")
    wait_for(lambda: lab.containers() == ["plain"], "the container")
    argv = (GRAFT, "rule", "add", "plain", "-i", "0.0.0.0:80=ep-unix")
    result = lab.refused(argv, 1, "was started without such endpoints")
    assert result.stderr.count("\n") == 1


# -- other namespaces --


def test_a_wrapper_serves_in_another_namespace(lab, away):
    """All its endpoints are there: its sockets are made there at once, nothing is swapped."""
    code = "import socket; s=socket.create_server(('0.0.0.0', 80)); print(s.getsockname(), flush=True); c,a=s.accept(); c.sendall(repr(a[0]).encode()); c.close()"
    server = lab.spawn(GRAFT, "-i", "0.0.0.0:80=away-in", "--", *python(code), stdout=subprocess.PIPE)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :7080").stdout, "the server")
    assert not lab.listening(7080)
    got = lab.host(*python(f"import socket; print(socket.create_connection(('{CLIENT4}',7080),10).recv(99).decode())"))
    assert got.stdout == f"'{HOST4}'\n"
    assert server.communicate(timeout=10)[0] == "('0.0.0.0', 80)\n"


def test_a_wrapper_connects_from_another_namespace(lab, away):
    server = lab.spawn(*python(f"import socket; s=socket.create_server(('{HOST4}',7081));\nwhile True:\n c,a=s.accept(); c.sendall(a[0].encode()); c.close()"))
    lab.wait_listening(7081)
    code = f"import socket; s=socket.create_connection(('{HOST4}',7081),10); print(s.recv(99).decode())"
    assert lab.graft("-e", "0.0.0.0/0=away-out", "--", *python(code)).stdout == f"{CLIENT4}\n"
    lab.end(server)
    inner = lab.spawn(*python("import socket; s=socket.create_server(('127.0.0.1',7082)); c,a=s.accept(); c.sendall(b'its loopback'); c.close()"), client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :7082").stdout, "the server")
    code = "import socket; print(socket.create_connection(('127.0.0.1',7082),10).recv(99).decode())"
    assert lab.graft("-e", "127.0.0.0/8=away-lo", "--", *python(code)).stdout == "its loopback\n"
    lab.end(inner)


def test_endpoints_of_two_namespaces_in_one_program(lab, away):
    """The swap path: each bind and connect goes where its endpoint is, also after epoll and options."""
    lab.graft("endpoint", "add", "home-in", "type", "ipv4", "addr", HOST4, "port", "7083", check=True)
    code = """
import select, socket
a, b = socket.socket(), socket.socket()
e = select.epoll()
for s, port in ((a, 80), (b, 81)):
    s.setsockopt(1, 2, 1); s.setsockopt(6, 4, 33); e.register(s.fileno(), select.EPOLLIN)
    s.bind(('0.0.0.0', port)); s.listen(); print(s.getsockname(), s.getsockopt(6, 4), flush=True)
for _ in range(2):
    while not (events := e.poll(20)): pass
    s = a if events[0][0] == a.fileno() else b
    c, peer = s.accept(); c.sendall(str(s.getsockname()[1]).encode()); c.close()
"""
    server = lab.spawn(GRAFT, "-i", "0.0.0.0:80=away-in", "-i", "0.0.0.0:81=home-in", "--", *python(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :7080").stdout, "the one away")
    lab.wait_listening(7083)
    ask = "import socket; print(socket.create_connection(('{}',{}),10).recv(99).decode())"
    assert lab.host(*python(ask.format(CLIENT4, 7080))).stdout == "80\n"
    assert lab.client(*python(ask.format(HOST4, 7083))).stdout == "81\n"
    out, err = server.communicate(timeout=20)
    assert (out, err) == ("('0.0.0.0', 80) 33\n('0.0.0.0', 81) 33\n", "")
    lab.graft("endpoint", "del", "home-in", check=True)


def test_datagrams_from_two_namespaces(lab, away):
    lab.graft("endpoint", "add", "home-out", "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
    echo = "import socket; s=socket.socket(2,2); s.bind(('{}',7084))\nwhile True:\n d,a=s.recvfrom(99); s.sendto(a[0].encode(), a)"
    servers = [lab.spawn(*python(echo.format(HOST4))), lab.spawn(*python(echo.format(CLIENT4)), client=True)]
    lab.wait_listening(7084, udp=True)
    wait_for(lambda: lab.client("ss", "-ulnH", "sport = :7084").stdout, "the one away")
    code = f"""
import socket
for to in ('{HOST4}', '{CLIENT4}'):
    s = socket.socket(2, 2); s.settimeout(10); s.sendto(b'x', (to, 7084)); print(*s.recvfrom(99))
    s = socket.socket(2, 2); s.settimeout(10); s.connect((to, 7084)); s.send(b'x'); print(s.recv(99))
"""
    rules = ("-e", f"{HOST4}/32=away-out", "-e", f"{CLIENT4}/32=home-out")
    result = lab.graft(*rules, "--", *python(code))
    assert result.stdout.splitlines() == [
        f"b'{CLIENT4}' ('{HOST4}', 7084)",
        f"b'{CLIENT4}'",
        f"b'{HOST4}' ('{CLIENT4}', 7084)",
        f"b'{HOST4}'",
    ], result.stderr
    for server in servers:
        lab.end(server)
    lab.graft("endpoint", "del", "home-out", check=True)


def test_graftd_killed_keeps_the_namespaces_of_endpoints(own_lab):
    own_lab.graft("endpoint", "add", "away", "type", "ipv4", "addr", CLIENT4, "port", "7085", "netns", own_lab.client_ns, check=True)
    pid = own_lab.daemon_pid()
    subprocess.run(("kill", "-9", str(pid)), check=True)
    wait_for(lambda: own_lab.daemon_pid() not in (0, pid), "the next graftd")
    (shown,) = json.loads(own_lab.graft("endpoint", "show", "-j").stdout)
    assert shown["netns"] == own_lab.client_ns
    server = own_lab.spawn(GRAFT, "-i", "0.0.0.0:80=away", "--", *python("import socket,time; s=socket.create_server(('0.0.0.0',80)); time.sleep(60)"))
    wait_for(lambda: own_lab.client("ss", "-tlnH", "sport = :7085").stdout, "the server")
    own_lab.end(server)
    own_lab.graft("endpoint", "del", "away", check=True)


def _is_another(lab, pid):
    return lab.daemon_pid() not in (0, pid)


def test_kill_9_in_the_middle_of_swaps(own_lab):
    """No connect to a unix endpoint is lost or doubled while graftd dies again and again."""
    path = own_lab.work / "kill.sock"
    own_lab.graft("endpoint", "add", "ep-unix", "type", "unix", "path", path, check=True)
    counted = "import socket,sys\ns=socket.socket(1); s.bind(sys.argv[1]); s.listen(512)\nwhile True:\n c,_=s.accept()\n try: c.sendall(b'x')\n except OSError: pass\n c.close()"  # of a killed graftd: gone
    own_lab.spawn(*python(counted), path)
    wait_for(partial(answers, path), "the server")
    code = "import socket,time\nend=time.time()+6; n=0\nwhile time.time()<end:\n s=socket.socket(); s.settimeout(20); s.connect(('10.9.8.7',80)); assert s.recv(9)==b'x'; s.close(); n+=1\nprint(n)"
    clients = [own_lab.spawn(GRAFT, "-e", "10.0.0.0/8=ep-unix", "--", *python(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for _ in range(4):
        pid = wait_for(own_lab.daemon_pid, "graftd")
        subprocess.run(("sleep", "0.8"))
        subprocess.run(("kill", "-9", str(pid)))
        wait_for(partial(_is_another, own_lab, pid), "the next graftd")
    for client in clients:
        out, err = client.communicate(timeout=60)
        assert err == "", err
        assert int(out) > 50


def test_containers_meet_at_a_local_endpoint(own_lab):
    """type local: TCP programs on both sides, a unix socket between them, nothing on the wire."""
    need("redis-server", "redis-cli", "redis-benchmark", "iperf3")
    own_lab.graft("endpoint", "add", "cache", "type", "local", check=True)
    assert own_lab.graft("endpoint", "show").stdout == "cache type local\n"
    command = ("redis-server", "--port", "6379", "--save", "", "--protected-mode", "no")
    own_lab.spawn_graft("--name", "cache", "-i", "0.0.0.0:6379=cache", *command, stdout=-3)
    client = ("run", "-e", "10.9.9.9/32=cache")
    wait_for(lambda: own_lab.graft(*client, "redis-cli", "-h", "10.9.9.9", "ping").stdout == "PONG\n", "redis")
    load = own_lab.graft(*client, "redis-benchmark", "-h", "10.9.9.9", "-q", "-n", "2000", "-t", "get,set")
    assert load.returncode == 0, load.stderr
    assert not own_lab.listening(6379)
    names = """
import socket
s = socket.create_connection(('10.9.9.9', 6379))
print(s.getpeername(), s.getsockname(), s.getsockopt(6, 2), s.family.name)
"""
    assert own_lab.graft(*client, *python(names)).stdout == "('10.9.9.9', 6379) ('0.0.0.0', 0) 65483 AF_INET\n"
    other = own_lab.graft("run", "-e", "10.9.9.8/32=cache", *python("import socket; socket.create_connection(('10.9.9.9', 6379), 3)"))
    assert "Network is unreachable" in other.stderr
    own_lab.end(own_lab.started[0])
    refused = own_lab.graft(*client, "redis-cli", "-h", "10.9.9.9", "ping")
    assert "Connection refused" in refused.stderr
    assert list((own_lab.run_dir / "local").iterdir()) == []


def test_buffers_stay_the_families_own(lab, path):
    """TCP's small defaults, which grow by themselves, are not carried over to a unix socket, which has no such."""
    lab.graft("endpoint", "add", "ep-buffers", "type", "unix", "path", path, check=True)
    code = "import socket; s = socket.socket(); {set}s.bind(('0.0.0.0', 80)); print(s.getsockopt(1, 7))"
    try:
        default = lab.graft("run", "-i", "0.0.0.0:80=ep-buffers", *python(code.format(set=""))).stdout
        chosen = lab.graft("run", "-i", "0.0.0.0:80=ep-buffers", *python(code.format(set="s.setsockopt(1, 7, 30000); "))).stdout
        plain = lab.host(*python("import socket; print(socket.socket(socket.AF_UNIX).getsockopt(1, 7))")).stdout
    finally:
        lab.graft("endpoint", "del", "ep-buffers", check=True)
    assert default == plain
    assert chosen == "60000\n"
