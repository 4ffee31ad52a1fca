"""AF_GRAFT's wrapper: only what is listed, in order, by the current namespace's table, for any program and user."""

import re
import subprocess

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, HOST6, ROOT, SECOND4, wait_for
from tests.conftest import need, python

BIND = """
import errno, socket, sys
for where in sys.argv[1:]:
    address, port = where.rsplit('_', 1)
    s = socket.socket(10 if ':' in address else 2)
    if ':' in address: s.setsockopt(41, 26, 1)
    try: s.bind((address, int(port))); s.listen(); print('bound')
    except OSError as e: print(errno.errorcode[e.errno])
"""
CONNECT = """
import errno, socket, sys
for where in sys.argv[1:]:
    address, port = where.rsplit('_', 1)
    s = socket.socket(10 if ':' in address else 2); s.settimeout(10)
    try: s.connect((address, int(port))); print(s.getsockname()[0])
    except OSError as e: print(errno.errorcode.get(e.errno, e))
"""


@pytest.fixture
def endpoints(lab):
    """Adds endpoints of the host's table, NAME=ADDR:PORT; takes all of it back."""

    def add(*texts, netns=None):
        words = {}
        for text in texts:
            name, where = text.split("=")
            address, port = where.rsplit("_", 1)
            words[name] = f"type {'ipv6' if ':' in address else 'ipv4'} addr {address} port {port}"
            added.append((name, netns))
        lab.add_endpoints(words, netns)

    added: list[tuple[str, str | None]] = []
    yield add
    for name, netns in added:
        lab.graft("endpoint", "del", name, *(("--netns", netns) if netns else ()))


@pytest.mark.core
def test_only_what_is_listed(lab, endpoints):
    endpoints(f"ep-a={HOST4}_8201", f"ep-out={HOST4}_dynamic")
    result = lab.graft("-i", "0.0.0.0:80=ep-a", "--", *python(BIND), "0.0.0.0_81", "127.0.0.1_80", f"{HOST4}_8201", "::_80", "0.0.0.0_0", "0.0.0.0_80")
    assert result.stdout.split() == ["EADDRNOTAVAIL"] * 5 + ["bound"]
    nothing = lab.graft("--", *python(BIND + CONNECT.replace("sys.argv[1:]", f"['{CLIENT4}_9']")), "0.0.0.0_80")
    assert nothing.stdout.split() == ["EADDRNOTAVAIL", "ENETUNREACH"]


def test_the_first_ingress_rule_wins(lab, endpoints):
    endpoints(f"ep-one={HOST4}_8202", f"ep-all={SECOND4}_dynamic")
    code = BIND.replace("print('bound')", "print(s.getsockname()); input()")
    for rules, shown in (
        (("-i", "0.0.0.0:80=ep-one", "-i", "0.0.0.0:0-65535=ep-all"), HOST4),
        (("-i", "0.0.0.0:0-65535=ep-all", "-i", "0.0.0.0:80=ep-one"), SECOND4),
    ):
        process = lab.spawn(GRAFT, *rules, "--", *python(code), "0.0.0.0_80", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == "('0.0.0.0', 80)\n"
        assert f" {shown}:" in lab.host("ss", "-tlnH").stdout
        process.stdin.close()
        process.wait(10)


def test_the_longest_egress_prefix_wins(lab, endpoints):
    endpoints(f"ep-net={HOST4}_dynamic", f"ep-host={SECOND4}_dynamic", f"ep-six={HOST6}_dynamic")
    for address in (CLIENT4, "2001:db8:77::2"):
        lab.spawn(*python(f"import socket,time; s=socket.create_server(('{address}',8203), family={10 if ':' in address else 2}); time.sleep(60)"), client=True)
    wait_for(lambda: len(lab.client("ss", "-tlnH", "sport = :8203").stdout.splitlines()) == 2, "the servers")
    to = (f"{CLIENT4}_8203", "2001:db8:77::2_8203")
    rules = ("-e", "10.0.0.0/8=ep-net", "-e", "::/0=ep-six")
    assert lab.graft(*rules, "--", *python(CONNECT), *to).stdout.split() == [HOST4, HOST6]
    more = ("-e", "0.0.0.0/0=ep-net", "-e", f"{CLIENT4}/32=ep-host", "-e", "10.0.0.0/8=ep-net")
    assert lab.graft(*more, "--", *python(CONNECT), *to).stdout.split() == [SECOND4, "ENETUNREACH"]
    assert lab.graft("-e", "192.0.2.0/24=ep-net", "--", *python(CONNECT), to[0]).stdout == "ENETUNREACH\n"


def test_a_fixed_source_port(lab, endpoints):
    endpoints(f"ep-port={SECOND4}_8204")
    code = "import socket; s=socket.create_server(('10.77.0.2',8205)); c,a=s.accept(); c.sendall(repr(a).encode()); c.close()"
    lab.spawn(*python(code), client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :8205").stdout, "the server")
    got = lab.graft("-e", "0.0.0.0/0=ep-port", "--", *python("import socket; print(socket.create_connection(('10.77.0.2',8205),10).recv(99).decode())"))
    assert got.stdout == f"('{SECOND4}', 8204)\n", got.stderr


def test_datagrams_leave_by_prefix_and_replies_show_whom_was_asked(lab, endpoints):
    endpoints(f"ep-net={HOST4}_dynamic", f"ep-host={SECOND4}_dynamic", f"ep-six={HOST6}_dynamic")
    echo = "import socket\ns=socket.socket({0},2); s.bind(('{1}',8206))\nwhile True:\n d,a=s.recvfrom(99); s.sendto(a[0].encode(), a)"
    lab.spawn(*python(echo.format(2, CLIENT4)), client=True)
    lab.spawn(*python(echo.format(10, "2001:db8:77::2")), client=True)
    wait_for(lambda: len(lab.client("ss", "-ulnH", "sport = :8206").stdout.splitlines()) == 2, "the servers")
    code = """
import socket
for family, to in ((2, '10.77.0.2'), (10, '2001:db8:77::2')):
    s = socket.socket(family, 2); s.settimeout(10)
    s.sendto(b'x', (to, 8206)); print(*s.recvfrom(99))
    s.sendmsg([b'x'], [], 0, (to, 8206)); d, _, _, a = s.recvmsg(99); print(d, a)
"""
    result = lab.graft("-e", "0.0.0.0/0=ep-net", "-e", f"{CLIENT4}/32=ep-host", "-e", "::/0=ep-six", "--", *python(code))
    assert result.stdout.splitlines() == [f"b'{SECOND4}' ('{CLIENT4}', 8206)"] * 2 + [f"b'{HOST6}' ('2001:db8:77::2', 8206, 0, 0)"] * 2, result.stderr


@pytest.mark.parametrize("connect", [False, True])
@pytest.mark.parametrize("where", ["127.0.0.1", HOST4])
def test_a_datagram_server_answers_whoever_asked(lab, endpoints, where, connect):
    """With -i alone, and published by graft run: also a client on the host's loopback."""
    endpoints(f"ep-udp={where}_8221")
    answer = "s.connect(a); s.send(d)" if connect else "s.sendto(d, a)"
    code = f"import socket; s=socket.socket(2,2); s.bind(('0.0.0.0',53)); d,a=s.recvfrom(99); {answer}"
    ask = python(f"import socket; s=socket.socket(2,2); s.settimeout(5); s.connect(('{where}',8221)); s.send(b'x'); print(s.recv(9))")
    for words in (("-i", "0.0.0.0:53=ep-udp", "--"), ("run", "-i", "0.0.0.0:53=ep-udp"), ("run", "-p", "8221:53/udp", "--egress", "none")):
        server = lab.spawn(GRAFT, *words, *python(code))
        lab.wait_listening(8221, udp=True)
        assert lab.host(*ask).stdout == "b'x'\n", words
        assert server.wait(10) == 0


def test_loopback_needs_an_endpoint_there(lab, endpoints):
    """From another namespace than the host's: ep-any leaves from any address, and reaches no host loopback."""
    ns = lab.client_ns
    endpoints("ep-any=0.0.0.0_dynamic", "ep-lo=127.0.0.1_dynamic", netns=ns)
    server = lab.spawn(*python("import socket,time; s=socket.create_server(('127.0.0.1',8207)); time.sleep(60)"))
    lab.wait_listening(8207)
    run = lambda *rules: lab.client(GRAFT, *rules, "--", *python(CONNECT), "127.0.0.1_8207", "0.0.0.0_8207").stdout.split()  # noqa: E731
    assert run("-e", "0.0.0.0/0=ep-any") == ["ENETUNREACH", "ENETUNREACH"]
    assert run("-e", "0.0.0.0/0=ep-any", "-e", "127.0.0.0/8=ep-lo") == ["127.0.0.1", "127.0.0.1"]
    assert run("-e", "10.0.0.0/8=ep-lo") == ["ENETUNREACH", "ENETUNREACH"]
    endpoints("ep-any=0.0.0.0_dynamic")
    assert lab.graft("-e", "0.0.0.0/0=ep-any", "--", *python(CONNECT), "127.0.0.1_8207").stdout == "127.0.0.1\n", "at home it could anyway"
    lab.end(server)


def test_a_wrapped_program_reaches_its_own_server_where_it_asked_for_it(lab, endpoints):
    """127.0.0.1:5000 of the program is a free port of the host's: its own client finds it."""
    endpoints("lo-in=127.0.0.1_dynamic", "lo-out=127.0.0.1_dynamic")
    code = "import socket; s=socket.create_server(('127.0.0.1',5000)); c=socket.create_connection(('127.0.0.1',5000),10); a,_=s.accept(); a.sendall(b'own'); print(c.recv(9), c.getpeername())"
    assert lab.graft("-i", "127.0.0.1:0-65535=lo-in", "-e", "127.0.0.0/8=lo-out", "--", *python(code)).stdout == "b'own' ('127.0.0.1', 5000)\n"


def test_verbose(lab, endpoints):
    endpoints(f"ep-in={HOST4}_8208", f"ep-out={SECOND4}_dynamic")
    result = lab.graft("-v", "-i", "0.0.0.0:80=ep-in", "-e", "10.0.0.0/8=ep-out", "--", *python(BIND + CONNECT.replace("sys.argv[1:]", f"['{CLIENT4}_9']")), "0.0.0.0_80", "0.0.0.0_81")
    assert result.stdout.split() == ["bound", "EADDRNOTAVAIL", "ECONNREFUSED"]
    assert result.stderr.splitlines() == [
        f"graft: python3: bind 0.0.0.0:80 -> ep-in ({HOST4}:8208)",
        "graft: python3: bind 0.0.0.0:81 refused: no ingress rule (EADDRNOTAVAIL)",
        f"graft: python3: connect {CLIENT4}:9 from ep-out ({SECOND4}:dynamic)",
    ]
    quiet = lab.graft("-i", "0.0.0.0:80=ep-in", "--", *python(BIND), "0.0.0.0_80")
    assert quiet.stderr == ""


def test_verbose_of_a_hostile_name(lab, endpoints):
    """A program may call itself what it likes: the line obeys nobody, and stays one line."""
    endpoints(f"ep-in={HOST4}_8219")
    code = f"import ctypes; ctypes.CDLL(None).prctl(15, b'\\x1b[2J\\nroot: ok\\xff')\n{BIND}"
    result = lab.graft("-v", "-i", "0.0.0.0:80=ep-in", "--", *python(code), "0.0.0.0_80")
    assert result.stdout.split() == ["bound"]
    (line,) = result.stderr.splitlines()
    assert line.isprintable()
    assert line.startswith("graft: \\x1b[2J\\x0aroot: ok")


def test_the_environment_is_upstreams(lab, endpoints):
    endpoints(f"ep-in={HOST4}_8209", f"ep-b={HOST4}_8210", f"ep-out={SECOND4}_dynamic")
    env = {**lab.env, "GRAFT_INGRESS_CONVERT": "0.0.0.0:80=ep-in 0.0.0.0:81=ep-b", "GRAFT_EGRESS_CONVERT": "10.0.0.0/8=ep-out", "GRAFT_VERBOSE": "1"}
    result = lab.graft("--", *python(BIND), "0.0.0.0_80", "0.0.0.0_81", "0.0.0.0_82", env=env)
    assert result.stdout.split() == ["bound", "bound", "EADDRNOTAVAIL"]
    assert len(result.stderr.splitlines()) == 3
    options = lab.graft("-i", "0.0.0.0:82=ep-b", "--", *python(BIND), "0.0.0.0_80", "0.0.0.0_82", env={**env, "GRAFT_VERBOSE": "0"})
    assert (options.stdout.split(), options.stderr) == (["EADDRNOTAVAIL", "bound"], ""), "an option stands for the variable"
    bad = lab.graft("--", "true", env={**env, "GRAFT_INGRESS_CONVERT": "0.0.0.0:80=ep-in 0.0.0.0:8x=ep-b"})
    assert (bad.returncode, bad.stderr) == (2, "graft: GRAFT_INGRESS_CONVERT, rule 2: ingress rule '0.0.0.0:8x=ep-b', character 9: '8x' is not a port (a number from 0 to 65535)\n")


USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def wrapped_as_user(lab, ns, rules, code, *arguments):
    return as_user(lab, ns, *rules, "--", *python(code), *arguments)


def as_user(lab, ns, *words):
    """graft by an unprivileged user: from a place that it may read."""
    import shutil

    tree = lab.work / "tree"
    if not tree.exists():
        shutil.copytree(ROOT / "graft", tree / "graft")
        click = next((ROOT / ".venv/lib").glob("python3*/site-packages"))
        for package in ("click", "msgspec", "psutil"):
            shutil.copytree(click / package, tree / package)
    main = f"import sys; sys.path.insert(0, '{tree}'); from graft.commands.main import main; sys.exit(main())"
    command = ("nsenter", f"--net=/run/netns/{ns}", *USER, "/usr/bin/python3", "-I", "-c", main)
    return subprocess.run(
        [str(w) for w in (*command, *words)], capture_output=True, text=True, env={**lab.env, "HOME": "/"}, cwd="/", timeout=60
    )


def test_an_unprivileged_user_wraps_with_its_namespaces_endpoints(lab, endpoints):
    endpoints(f"ep-mine={HOST4}_82", netns=lab.client_ns)
    endpoints(f"ep-hosts={HOST4}_8211")
    result = wrapped_as_user(lab, lab.client_ns, ("-i", "0.0.0.0:80=ep-mine"), BIND, "0.0.0.0_80", "0.0.0.0_81")
    assert result.stdout.split() == ["bound", "EADDRNOTAVAIL"], result.stderr
    other = wrapped_as_user(lab, lab.client_ns, ("-i", "0.0.0.0:80=ep-hosts"), BIND, "0.0.0.0_80")
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr == "graft: rule '0.0.0.0:80=ep-hosts' names an unknown endpoint 'ep-hosts' (add it with 'graft endpoint add')\n"


def test_an_unprivileged_user_adds_no_endpoint(lab):
    lab.graft("endpoint", "show", check=True)
    denied = subprocess.run(
        [*("nsenter", f"--net=/run/netns/{lab.host_ns}"), *USER, "/usr/bin/python3", "-I", "-c", f"import socket; s=socket.socket(1); s.connect('{lab.run_dir}/graftd.sock')"],
        capture_output=True, text=True,
    )
    assert "PermissionError" in denied.stderr


def test_an_unprivileged_user_sees_its_own_table(lab, endpoints):
    endpoints(f"ep-seen={HOST4}_83", netns=lab.client_ns)
    endpoints(f"ep-hosts={HOST4}_84")
    assert as_user(lab, lab.client_ns, "endpoint", "show").stdout == f"ep-seen type ipv4 addr {HOST4} port 83\n"
    assert as_user(lab, lab.client_ns, "endpoint", "show", "ep-seen").stdout.startswith("ep-seen ")
    assert as_user(lab, lab.client_ns, "endpoint", "show", "ep-hosts").returncode == 1
    assert f"no container named '{lab.host_ns}'" in as_user(lab, lab.client_ns, "endpoint", "show", "--netns", lab.host_ns).stderr
    assert "endpoint 'ep-seen' does not exist" in as_user(lab, lab.client_ns, "endpoint", "del", "ep-seen").stderr
    assert as_user(lab, lab.client_ns, "endpoint", "show", "ep-seen").returncode == 0


def test_a_deleted_endpoint_stops_new_binds_and_keeps_open_sockets(lab, endpoints):
    endpoints(f"ep-del={HOST4}_8212")
    code = """
import errno, socket
s = socket.create_server(('0.0.0.0', 80)); print('up', flush=True); input()
try: socket.socket().bind(('0.0.0.0', 80))
except OSError as e: print(errno.errorcode[e.errno], flush=True)
c, _ = s.accept(); c.sendall(b'still here'); c.close()
"""
    process = lab.spawn(GRAFT, "-i", "0.0.0.0:80=ep-del", "--", *python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "up\n"
    lab.graft("endpoint", "del", "ep-del", check=True)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "EADDRNOTAVAIL\n"
    assert lab.client(*python(f"import socket; print(socket.create_connection(('{HOST4}',8212),10).recv(99).decode())")).stdout == "still here\n"


def test_a_pipeline_in_a_shell(lab, endpoints):
    endpoints("lo-in=127.0.0.1_8213", "lo-out=127.0.0.1_dynamic")
    serve = python("import socket,sys; s=socket.create_server(('0.0.0.0',80)); c,_=s.accept(); sys.stdout.buffer.write(c.makefile('rb').read())")
    send = python("import socket,sys,time\nfor _ in range(200):\n  try: s=socket.create_connection(('127.0.0.1',8213)); break\n  except OSError: time.sleep(.05)\ns.sendall(sys.stdin.buffer.read())")
    script = "printf 'b\\na\\nc\\n' | sort | \"$0\" -I -c \"$1\" & \"$0\" -I -c \"$2\" | tr a-z A-Z; wait"
    result = lab.graft("-i", "0.0.0.0:80=lo-in", "-e", "127.0.0.0/8=lo-out", "--", "bash", "-c", script, "/usr/bin/python3", send[-1], serve[-1])
    assert result.stdout == "A\nB\nC\n", result.stderr


def test_nested_wrappers(lab, endpoints):
    """The inner one's rules hold inside, the outer one's after it; also for what it leaves behind, and deeper."""
    endpoints(f"ep-a={HOST4}_8214", f"ep-b={HOST4}_8215")
    bind = (*python(BIND), "0.0.0.0_80", "0.0.0.0_81")
    inner = (GRAFT, "-i", "0.0.0.0:81=ep-b", "--")
    assert lab.graft("-i", "0.0.0.0:80=ep-a", "--", *bind).stdout.split() == ["bound", "EADDRNOTAVAIL"]
    assert lab.graft("-i", "0.0.0.0:80=ep-a", "--", *inner, *bind).stdout.split() == ["EADDRNOTAVAIL", "bound"]
    assert lab.graft("-i", "0.0.0.0:80=ep-a", "--", *inner, GRAFT, "-i", "0.0.0.0:80=ep-a", "--", *bind).stdout.split() == ["bound", "EADDRNOTAVAIL"]
    script = '"$0" -i 0.0.0.0:81=ep-b -- "$1" -I -c "$2" 0.0.0.0_80 0.0.0.0_81; "$1" -I -c "$2" 0.0.0.0_80 0.0.0.0_81'
    both = lab.graft("-i", "0.0.0.0:80=ep-a", "--", "bash", "-c", script, GRAFT, "/usr/bin/python3", BIND).stdout
    assert both.split() == ["EADDRNOTAVAIL", "bound", "bound", "EADDRNOTAVAIL"]
    daemonized = f"import os,sys\nif os.fork(): os.wait(); sys.exit()\nos.setsid()\nif os.fork(): os._exit(0)\nfor f in range(3, 99):\n  try: os.close(f)\n  except OSError: pass\nos.execve('/usr/bin/python3', ['x', '-I', '-c', {BIND!r}, '0.0.0.0_80', '0.0.0.0_81'], {{}})"
    assert lab.graft("-i", "0.0.0.0:80=ep-a", "--", *inner, *python(daemonized)).stdout.split() == ["EADDRNOTAVAIL", "bound"], "without environment, session, parent and descriptors"


def test_a_wrapper_inside_graft_run(lab, endpoints):
    """The container's endpoints by the wrapper's rules; the container's own egress policy holds as well."""
    endpoints(f"ep-a={HOST4}_8216", f"ep-out={SECOND4}_dynamic")
    lab.spawn(*python(f"import socket,time; s=socket.create_server(('{CLIENT4}',8217)); time.sleep(60)"), client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :8217").stdout, "the server")
    container = ("run", "-i", "0.0.0.0:1=ep-a", "-e", "10.0.0.0/8=ep-out")
    inside = (*container, GRAFT, "-v", "-i", "0.0.0.0:80=ep-a", "-e", "0.0.0.0/0=ep-out", "--")
    result = lab.graft(*inside, *python(BIND + CONNECT.replace("sys.argv[1:]", f"['{CLIENT4}_8217', '192.0.2.9_80']")), "0.0.0.0_80", "127.0.0.1_80")
    assert result.stdout.split() == ["bound", "EADDRNOTAVAIL", SECOND4, "ENETUNREACH"], result.stderr
    assert f"bind 0.0.0.0:80 -> ep-a ({HOST4}:8216)" in result.stderr
    lab.refused((GRAFT, *container, GRAFT, "-i", "0.0.0.0:80=nope", "--", "true"), 1, "unknown endpoint 'nope'")


def test_a_nested_wrapper_ends(own_lab):
    """Its tenant goes although no listener tells of it."""
    own_lab.graft("endpoint", "add", "ep-a", "type", "ipv4", "addr", HOST4, "port", "8218", check=True)
    own_lab.spawn_graft("--name", "outer", "-i", "0.0.0.0:1=ep-a", "bash", "-c", f"{GRAFT} -i 0.0.0.0:80=ep-a -- true; sleep 60")
    wait_for(lambda: len(own_lab.containers()) == 2, "the wrapper")
    wait_for(lambda: own_lab.containers() == ["outer"], "its end", 30)


def test_netns_option(lab, endpoints):
    """graft --netns X endpoint ..., and a wrapper there."""
    endpoints_words = ("endpoint", "add", "ep-far", "type", "ipv4", "addr", HOST4, "port", "8219")
    lab.graft("--netns", lab.client_ns, *endpoints_words, check=True)
    assert lab.graft("endpoint", "show").stdout == ""
    assert lab.graft(f"--netns={lab.client_ns}", "endpoint", "show").stdout == f"ep-far type ipv4 addr {HOST4} port 8219\n"
    wrapped = lab.graft("--netns", lab.client_ns, "-i", "0.0.0.0:80=ep-far", "--", *python(BIND), "0.0.0.0_80")
    assert wrapped.stdout == "bound\n", wrapped.stderr
    lab.graft("--netns", lab.client_ns, "endpoint", "del", "ep-far", check=True)
    lab.refused((GRAFT, "--netns", "x", "doctor"), 2, "--netns does not go with 'doctor'")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("-i", "0.0.0.0:80=nope", "--", "true"), 1, "names an unknown endpoint 'nope'"),
        (("-e", "0.0.0.0/0=nope", "--", "true"), 1, "names an unknown endpoint 'nope'"),
        (("-i", "0.0.0.0:80", "--", "true"), 2, "-i, rule 1: ingress rule '0.0.0.0:80', character 11: lacks '='"),
        (("-i", "0.0.0.0:1=a", "-i", "0.0.0.0=a", "--", "true"), 2, "-i, rule 2: ingress rule '0.0.0.0=a', character 8: lacks ':'"),
        (("-i", "0.0.0.0:1-99999=a", "--", "true"), 2, "character 9: '99999' is not a port"),
        (("-i", "0.0.0.0:9-1=a", "--", "true"), 2, "runs backwards"),
        (("-i", "0.0.0.0:1=", "--", "true"), 2, "character 11: endpoint name is empty"),
        (("-i", "0.0.0.0:1=a-16-byte-name--", "--", "true"), 2, "character 11: endpoint name 'a-16-byte-name--' is 16 bytes long"),
        (("-e", "10.0.0.0/33=a", "--", "true"), 2, "-e, rule 1: egress rule '10.0.0.0/33=a', character 10: '33' is not a prefix length"),
        (("-e", "ten/8=a", "--", "true"), 2, "character 1: 'ten' is not an IP address"),
        (("-e", "10.0.0.0/8=a", "-e", "10.0.0.0/8=b", "--", "true"), 2, "repeats the prefix of '10.0.0.0/8=a'"),
        (("-i", "0.0.0.0:1-9=a", "-i", "0.0.0.0:1-9=b", "--", "true"), 2, "repeats the range of '0.0.0.0:1-9=a'"),
        (("-i", "0.0.0.0:1=a"), 2, "no program is given"),
        (("--",), 2, "no program is given"),
        (("--", "no-such-program"), 127, "command 'no-such-program' not found"),
        (("--", "/etc/passwd"), 126, "is not executable"),
        (("-x", "--", "true"), 2, "No such option"),
    ],
)
def test_bad_input(lab, words, status, says):
    lab.graft("endpoint", "show", check=True)
    result = lab.graft(*words)
    assert (result.returncode, result.stderr.count("\n")) == (status, 1), result.stderr
    assert says in result.stderr
    assert lab.containers() == []


def test_status_and_signals_are_the_programs(lab):
    assert lab.graft("--", "sh", "-c", "exit 7").returncode == 7
    assert lab.graft("--", "sh", "-c", "kill -TERM $$").returncode == -15
    listed = lab.spawn(GRAFT, "--", "sleep", "60")
    wait_for(lambda: lab.containers(), "the wrapper")
    assert re.fullmatch(r"sleep-\d+", lab.containers()[0])
    lab.end(listed)


def test_upstreams_way_without_dashes(lab, endpoints):
    endpoints(f"ep-a={HOST4}_8220")
    assert lab.graft("-i", "0.0.0.0:80=ep-a", *python(BIND), "0.0.0.0_80").stdout == "bound\n"


def test_a_large_table_costs_nothing(own_lab):
    """10,000 endpoints and rules against 2, in pairs: bind and connect cost the same within a tenth."""
    need("clang")
    from graft.bench.tables import compare

    worst = 9.0
    for _ in range(3):  # the machine is shared
        figures = compare(own_lab, 9)
        worst = max(f["ratio"] for f in figures.values())
        if worst < 1.1:
            break
    assert worst < 1.1, figures
