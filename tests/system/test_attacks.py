"""What an attacker found on the wrapper, the agent socket and the swap: refused, and the host untouched."""

import json
import os
import shutil
import subprocess
import time

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, HOST6, ROOT, wait_for
from tests.conftest import python

AGENT = """
import array, json, os, socket, struct, sys, time
def ask(message, fds=(), path=sys.argv[1]):
    s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(path)
    told = json.dumps(message).encode()
    sent = socket.send_fds(s, [told], fds)
    if told[sent:]: s.sendall(told[sent:])
    text = b''
    while piece := s.recv(65536): text += piece
    return json.loads(text) if text else {}
"""
LISTENER = f"""
sys.path.insert(0, {str(ROOT)!r})
from graft.kernel import linux
from graft.trap import filter
def listener():
    linux.no_new_privs(); return linux.seccomp_listener(filter.program(), wait_killable=False)
def hand_over(fd, **wish):
    state = dict(ociVersion='1', fds=['seccompFd'], pid=0, metadata=json.dumps(wish), state=dict(id='x', pid=0))
    return ask(state, [fd])
"""


@pytest.fixture
def package(lab):
    """The package where any user may read it."""
    tree = lab.work / "attack"
    shutil.copytree(ROOT / "graft", tree / "graft", dirs_exist_ok=True)
    return tree


def as_nobody(lab, code, package, *, netns=None):
    command = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *python(AGENT + code.replace(str(ROOT), str(package))))
    if netns:
        command = ("nsenter", f"--net={netns}", *command)
    return lab.host(*command, lab.run_dir / "agent.sock")


def call_of_a_bystander(lab):
    """The longest socket() of a container, in seconds, until somebody asks; a process for longest()."""
    code = """
import select, socket, time
worst = 0
while not select.select([0], [], [], 0.01)[0]:
    began = time.monotonic(); s = socket.socket(); s.listen(); s.close(); worst = max(worst, time.monotonic() - began)
print(worst)
"""
    return lab.spawn_graft("--name", "bystander", *python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def longest(bystander):
    time.sleep(3)
    return float(bystander.communicate(timeout=20)[0])


def test_a_publication_is_no_way_out(lab):
    """Its address is there to bind to: neither a wrapper's rule nor the API leaves through it."""
    lab.spawn(*python("import socket; s = socket.create_server(('127.0.0.1', 8701)); s.accept()"))
    wait_for(lambda: lab.listening(8701), "the host's own server")
    code = f"""
import subprocess, sys
r = subprocess.run([{str(GRAFT)!r}, '-e', '127.0.0.0/8=tcp-8700', '--', 'true'], capture_output=True, text=True)
print(r.returncode, 'to bind to' in r.stderr)
sys.path.insert(0, {str(ROOT)!r})
import graft
try: graft.connect('tcp-8700'); print('connected')
except OSError as e: print(type(e).__name__, e)
"""
    inside = ("run", "-p", "127.0.0.1:8700:80", "--egress", "none", *python(code))
    result = lab.graft(*inside)
    first, second = result.stdout.splitlines()[:2] if result.returncode == 0 else (result.stdout, result.stderr)
    assert first == "1 True", result.stderr
    assert "connected" not in second


def test_a_swapped_socket_sees_no_abstract_name_of_the_host(lab):
    """A unix endpoint's socket lives in the container's netns: the host's abstract sockets are not there."""
    lab.spawn(*python("import socket, time; s = socket.socket(socket.AF_UNIX); s.bind('\\0graft-attack'); s.listen(); time.sleep(60)"))
    wait_for(lambda: "@graft-attack" in lab.host("ss", "-xlH").stdout, "the host's abstract socket")
    lab.graft("endpoint", "add", "ep-u", "type", "unix", "path", f"{lab.work}/attack.sock", check=True)
    code = """
import ctypes, errno, fcntl, os, socket, struct
s = socket.socket(); s.bind(('0.0.0.0', 80))
libc = ctypes.CDLL(None, use_errno=True)
name = struct.pack('=H', socket.AF_UNIX) + b'\\0graft-attack'
print(libc.connect(s.fileno(), name, len(name)), errno.errorcode.get(ctypes.get_errno()))
room = ctypes.create_string_buffer(4000)
ifconf = bytearray(struct.pack('=i4xQ', 4000, ctypes.addressof(room)))
fcntl.ioctl(s.fileno(), 0x8912, ifconf)
print(sorted({room.raw[i:i + 16].split(b'\\0')[0].decode() for i in range(0, struct.unpack_from('=i', ifconf)[0], 40)}))
"""
    try:
        result = lab.graft("run", "-i", "0.0.0.0:80=ep-u", *python(code))
        assert result.stdout == "-1 ECONNREFUSED\n['lo']\n", result.stderr
    finally:
        lab.graft("endpoint", "del", "ep-u", check=True)


WAYS_TO_BE_CLOSED = {  # with `lingers()`, a socket that nobody else has, at the path sys.argv[1] of a socket of graftd's
    "received": """
s = connected(); socket.send_fds(s, [b'{'], [lingers()])
s.send(b'nonsense}'); s.close()
""",
    "cut off": """
s = connected(); null = os.open('/dev/null', os.O_RDONLY)
socket.send_fds(s, [b'{'], [null] * 9 + [lingers()]); print(s.recv(999).count(b'descriptors') and 'refused'); s.close()
""",
    "unread": """
s = connected(); fd = lingers(); s.sendall(b'}' * 150000)  # more than is read at once
socket.send_fds(s, [b'{'], [fd]); s.close()
""",
    "not let in": """
kept = [connected() for _ in range(64)]
for _ in range(9):
    fd = lingers(); s = connected()
    try: socket.send_fds(s, [b'{'], [fd]); s.close()
    except BrokenPipeError: pass  # it is closed already
""",
    "out of band": """
s = connected(); fd = lingers()
socket.send_fds(s, [b'{'], [fd], socket.MSG_OOB); s.send(b'nonsense}'); s.close()
""",
    "in a queue of queues": """
s = connected()
for _ in range(6):
    a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [lingers(), s.detach()]); s = b
    a.close()
s = connected(); socket.send_fds(s, [b'{'], [b.detach()]); s.close()
""",
}


@pytest.mark.alone
@pytest.mark.parametrize("way", WAYS_TO_BE_CLOSED)
def test_a_descriptor_that_takes_long_to_close(lab, package, way):
    """SO_LINGER of a socket that came with nonsense: graftd does not wait for it, wherever it is dropped."""
    lab.spawn(*python(f"import socket, time; s = socket.create_server(('{CLIENT4}', 8702)); c = s.accept(); time.sleep(60)"), client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :8702").stdout, "the peer")
    bystander = call_of_a_bystander(lab)
    wait_for(lambda: "bystander" in lab.containers(), "the bystander")
    code = f"""
import os
def lingers():
    t = socket.create_connection(('{CLIENT4}', 8702)); t.setblocking(False)
    try:
        while True: t.send(bytes(65536))
    except BlockingIOError: pass
    t.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('=ii', 1, 8))
    kept, queue = socket.socketpair()
    socket.send_fds(kept, [b'x'], [t.detach()])  # nobody has it but the message
    return socket.recv_fds(queue, 9, 1)[1][0]
def connected():
    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); return s
send = socket.send_fds
def send_and_forget(s, data, fds, flags=0):
    try: return send(s, data, fds, flags)
    except OSError:
        socket.socket(fileno=os.dup(fds[0])).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8)); raise
    finally: [os.close(fd) for fd in set(fds)]
socket.send_fds = send_and_forget
{WAYS_TO_BE_CLOSED[way]}
print('sent')
"""
    assert as_nobody(lab, code, package).stdout.endswith("sent\n")
    assert longest(bystander) < 1.0


def test_an_untrusted_listener_joins_no_trusted_container(lab, package):
    process = lab.spawn_graft("-p", "8703:90", "--name", "trusted", "sleep", "60")
    wait_for(lambda: "trusted" in lab.containers(), "the container")
    code = LISTENER + """
fd = listener()
print(hand_over(fd)['error']['code'])
"""
    inside = as_nobody(lab, code, package, netns=f"/proc/{process.pid}/ns/net")
    assert inside.stdout == "EPERM\n", inside.stderr
    outside = as_nobody(lab, code, package)
    assert outside.stdout == "EPERM\n", f"nor does it make a container of the host: {outside.stderr}"


@pytest.mark.alone
def test_a_storm_of_refused_sends(lab):
    """What the kernel tells of refusals is read a piece at a time."""
    storm = "import socket\ns = socket.socket(type=socket.SOCK_DGRAM)\nwhile True:\n try: s.sendto(b'x', ('10.77.0.2', 9))\n except OSError: pass"
    bystander = call_of_a_bystander(lab)
    wait_for(lambda: "bystander" in lab.containers(), "the bystander")
    lab.spawn_graft("--egress", "none", "--name", "storm", *python(storm))
    assert longest(bystander) < 1.0


def test_rules_without_end(own_lab):
    """They are refused, and leave the kernel's tables free for others."""
    tree = own_lab.work / "attack"
    shutil.copytree(ROOT / "graft", tree / "graft")
    own_lab.graft("--netns", own_lab.client_ns, "endpoint", "add", "ep-a", "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
    code = LISTENER + """
fd = listener()
rules = [f'1.{n >> 8}.{n & 255}.1:1-65534=ep-a' for n in range(9000)]
print(hand_over(fd, ingress=rules)['error']['code'], ask(dict(op='traps', ingress=rules))['error']['code'])
"""
    found = as_nobody(own_lab, code, tree, netns=f"/run/netns/{own_lab.client_ns}")
    assert found.stdout == "ENOSPC ENOSPC\n", found.stderr
    assert own_lab.graft("run", "-p", "8704:80", "true").returncode == 0


def test_tables_that_are_full_stay_as_they_were(own_lab):
    """Root fills them: what does not fit is taken out again, and others find room."""
    own_lab.graft("endpoint", "add", "ep-a", "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
    own_lab.spawn_graft("--name", "full", "-i", "1.0.0.0:1=ep-a", "sleep", "600")
    wait_for(lambda: "full" in own_lab.containers(), "the container")
    for part, status in ((range(9000), 0), (range(9000, 18000), 125)):
        words = [word for n in part for word in ("-i", f"1.{n >> 8}.{n & 255}.1:1-65534=ep-a")]
        added = own_lab.graft("rule", "add", "full", *words)
        assert added.returncode == status, added.stderr
    assert own_lab.graft("run", "-p", "8705:80", "true").returncode == 0


def test_permission_holds_in_its_own_namespace_alone(lab, package):
    """An endpoint of another namespace: its address here is another server's."""
    for words in (("ep-far", HOST4, "8706", "netns", lab.client_ns), ("ep-src", HOST4, "dynamic")):
        lab.graft("--netns", lab.client_ns, "endpoint", "add", words[0], "type", "ipv4", "addr", words[1], "port", *words[2:], check=True)
    code = """
import array
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.send(json.dumps(dict(op='open', type=1, bind='ep-src')).encode()); _, fds, _, _ = socket.recv_fds(s, 9999, 1)
print(ask(dict(op='permit', name='ep-far'), fds)['error']['code'])
null = os.open('/dev/null', os.O_RDONLY)
print({ask(dict(op='permit', name='ep-far'), [null])['error']['code'] for _ in range(40)})
"""
    try:
        before = len(os.listdir(f"/proc/{lab.daemon_pid()}/fd")) if lab.daemon_pid() else 0
        result = as_nobody(lab, code, package, netns=f"/run/netns/{lab.client_ns}")
        assert result.stdout.split("\n")[0] == "ENETUNREACH", result.stdout + result.stderr
        wait_for(lambda: len(os.listdir(f"/proc/{lab.daemon_pid()}/fd")) < before + 20, "descriptors closed")
    finally:
        for name in ("ep-far", "ep-src"):
            lab.graft("--netns", lab.client_ns, "endpoint", "del", name, check=True)


def test_a_loopback_source_stays_on_the_loopback(lab):
    """A socket that has been to its own loopback does not go on to the host with that source."""
    lab.spawn(*python(f"import socket, time; s = socket.create_server(('{HOST4}', 8707)); time.sleep(60)"))
    wait_for(lambda: lab.listening(8707), "the host's server")
    code = f"""
import errno, socket
own = socket.create_server(('127.0.0.1', 90))
s = socket.socket(); s.connect(('127.0.0.1', 90))
import ctypes; ctypes.CDLL(None).connect(s.fileno(), bytes(16), 16)
try: s.connect(('{HOST4}', 8707)); print('connected from', s.getsockname())
except OSError as e: print(errno.errorcode[e.errno])
"""
    assert lab.graft("run", *python(code)).stdout.startswith(f"connected from ('{HOST4}', ")


def test_names_that_would_forge_a_line(lab):
    """The command's name goes into the container's, without what a terminal takes for something else."""
    odd = lab.work / "a\nb\x1b[31m"
    odd.write_text("#!/bin/sh\nexec sleep 60\n")
    odd.chmod(0o755)
    process = lab.spawn(GRAFT, "run", odd)
    wait_for(lambda: lab.graft("ps", "-j").stdout.strip() != "[]", "the container")
    (entry,) = json.loads(lab.graft("ps", "-j").stdout)
    assert entry["name"].startswith("a_b__31m-")
    lab.end(process)


@pytest.mark.alone
def test_connections_of_a_containers_root(lab):
    """They share a limit, and do not keep the admin out."""
    code = f"""
import socket, time
held = []
for _ in range(600):
    s = socket.socket(socket.AF_UNIX)
    try: s.connect('{lab.run_dir}/agent.sock')
    except OSError: break
    held.append(s)
print('up', flush=True); time.sleep(4)
"""
    process = lab.spawn_graft("--name", "holder", *python(code), stdout=subprocess.PIPE)
    process.stdout.readline()
    began = time.monotonic()
    assert lab.graft("ps").returncode == 0
    assert time.monotonic() - began < 3


def rules(lab, name):
    return json.loads(lab.graft("rule", "show", name, "-j").stdout)


def test_a_source_route_does_not_lead_round_the_rules(lab):
    """IP_RETOPTS in a control message reaches no sendmsg hook; the packet is stopped on its way out."""
    server = lab.spawn(*python("import socket; s = socket.socket(2, 2); s.settimeout(2); s.bind(('0.0.0.0', 9055)); print(flush=True)\n"
                               "try: print(s.recv(9))\nexcept TimeoutError: print('nothing')"), client=True, stdout=-1)
    server.stdout.readline()
    code = """
import errno, socket
s = socket.socket(2, 2); s.bind(('0.0.0.0', 53))
route = bytes([1, 131, 7, 4]) + socket.inet_aton('10.77.0.2')
try: s.sendmsg([b'x'], [(0, 7, route)], 0, ('127.0.0.1', 9055)); print('sent')
except OSError as e: print(errno.errorcode[e.errno])
"""
    lab.graft("run", "--egress", "none", "-p", f"{HOST4}:5356:53/udp", *python(code), check=True)
    assert server.stdout.readline() == "nothing\n"


def test_a_source_of_another_host_is_not_used(lab):
    server = lab.spawn(*python("import socket; s = socket.socket(10, 2); s.settimeout(5); s.bind(('::', 9056)); print(flush=True)\n"
                               "print(s.recvfrom(9)[1][0], s.recvfrom(9)[1][0])"), client=True, stdout=-1)
    server.stdout.readline()
    code = """
import socket
info = (41, 50, socket.inet_pton(10, '2001:db8:dead::1') + bytes(4))
s = socket.socket(10, 2); s.sendmsg([b'x'], [info], 0, ('2001:db8:77::2', 9056))
s.connect(('2001:db8:77::2', 9056)); s.sendmsg([b'x'], [info])
"""
    assert lab.graft("run", *python(code)).returncode == 0
    assert server.stdout.readline() == f"{HOST6} {HOST6}\n"


def test_a_user_namespace_gives_no_orders(lab):
    """Out of the container's netns by a user namespace of its own, and back to the admin socket."""
    argv = (GRAFT, "run", "unshare", "--user", "--net", "--map-root-user", GRAFT, "ps")
    lab.refused(argv, 1, "another user namespace")
