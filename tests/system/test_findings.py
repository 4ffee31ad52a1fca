"""What testers found by use, one test each, so that it stays mended."""

import json
import os
import signal
import subprocess
import time

from graft.bench.lab import GRAFT, HOST4, HOST6, wait_for
from tests.conftest import python

HOLD = "input()"


def rules(lab, name):
    return json.loads(lab.graft("rule", "show", name, "-j").stdout)


def test_a_publication_is_taken_back_by_its_own_address(lab):
    options = ("-p", f"{HOST4}:8082:82", "-p", f"[{HOST6}]:8082:82", "-p", "0.0.0.0:8181:80")
    process = lab.spawn_graft("--name", "exact", *options, *python(HOLD), stdin=-1)
    wait_for(lambda: lab.containers() == ["exact"], "the container")
    assert lab.graft("rule", "del", "exact", "-p", f"{HOST4}:8082:82").returncode == 0
    assert lab.graft("rule", "del", "exact", "-p", "0.0.0.0:8181:80").returncode == 0
    left = rules(lab, "exact")
    assert left["publish"] == [f"[{HOST6}]:8082:82/tcp"]
    assert [r["rule"] for r in left["ingress"]] == ["[::]:82=tcp6-8082"]
    process.stdin.close()


def test_deleting_is_all_or_none(lab):
    process = lab.spawn_graft("--name", "whole", "-p", "8182:80", *python(HOLD), stdin=-1)
    wait_for(lambda: lab.containers() == ["whole"], "the container")
    before = rules(lab, "whole")
    lab.refused((GRAFT, "rule", "del", "whole", "-p", "8182:80", "-p", "8182:80"), 1, "not published")
    assert rules(lab, "whole") == before
    lab.graft("endpoint", "add", "ep-w", "type", "ipv4", "addr", HOST4, "port", "99", check=True)
    assert lab.graft("rule", "add", "whole", "-i", "0.0.0.0:1=ep-w", "-i", "0.0.0.0:1=ep-w").returncode == 2
    assert rules(lab, "whole") == before
    assert lab.graft("rule", "add", "whole", "-i", "0.0.0.0:1=ep-w").returncode == 0, "from the host's table"
    lab.graft("endpoint", "del", "ep-w", check=True)
    process.stdin.close()


def test_udp_client_bound_to_port_0_talks_to_its_own_servers(lab):
    code = """
import socket
for family, loopback, wild in ((2, '127.0.0.1', '0.0.0.0'), (10, '::1', '::')):
    for server_address in (loopback, wild):
        s = socket.socket(family, 2); s.settimeout(3)
        if family == 10: s.setsockopt(41, 26, 1)
        s.bind((server_address, 5300 if server_address == loopback else 53))
        c = socket.socket(family, 2); c.settimeout(3); c.bind((wild, 0)); c.connect((loopback, s.getsockname()[1]))
        c.send(b'q'); data, peer = s.recvfrom(9); s.sendto(b'a', peer); print(c.recv(9), peer[0])
"""
    result = lab.graft("run", "-p", "5355:53/udp", *python(code))
    assert result.stdout.splitlines() == ["b'a' 127.0.0.1"] * 2 + ["b'a' ::1"] * 2, result.stderr


def test_a_full_run_directory(own_lab):
    """State cannot be written: graftd says so and goes on; nothing loses its supervisor."""
    own_lab.run_dir.mkdir()
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", own_lab.run_dir), check=True)
    try:
        code = "import socket, sys\nfor line in sys.stdin: socket.socket().close(); print('ok', flush=True)"
        long = own_lab.spawn_graft("--name", "long", *python(code), stdin=-1, stdout=-1)
        short = own_lab.spawn_graft("--name", "short", *python(HOLD), stdin=-1)
        wait_for(lambda: sorted(own_lab.containers()) == ["long", "short"], "both")
        with open(own_lab.run_dir / "filler", "wb") as filler:
            subprocess.run(("dd", "if=/dev/zero", "bs=1k"), stdout=filler, stderr=subprocess.DEVNULL)
        pid = own_lab.daemon_pid()
        short.stdin.close()
        wait_for(lambda: own_lab.containers() == ["long"], "the short one's end")
        long.stdin.write("\n")
        long.stdin.flush()
        assert long.stdout.readline() == "ok\n"
        assert own_lab.daemon_pid() == pid
        os.unlink(own_lab.run_dir / "filler")
        wait_for(lambda: "short" not in (own_lab.run_dir / "state.json").read_text(), "the state to be written")
        long.stdin.close()
        long.wait(10)
        wait_for(lambda: not own_lab.pins().exists(), "the idle exit", 15)
    finally:
        subprocess.run(("umount", "-l", own_lab.run_dir), check=True)


def test_a_container_whose_first_process_is_gone_can_be_joined(lab):
    lab.graft("run", "--name", "daemonized", "sh", "-c", "setsid sleep 20 & exit 0", stdout=-3, capture_output=False)
    assert lab.graft("run", "--netns", "daemonized", "echo", "inside").stdout == "inside\n"
    pid = json.loads(lab.graft("ps", "-j").stdout)[0]["pid"]
    os.kill(pid, signal.SIGKILL)


def test_one_namespace_has_one_egress(lab):
    process = lab.spawn_graft("--name", "open", *python(HOLD), stdin=-1)
    wait_for(lambda: lab.containers() == ["open"], "the container")
    argv = (GRAFT, "run", "--netns", "open", "--egress", "none", "true")
    joined = lab.refused(argv, 1, "runs with egress host")
    assert joined.stderr.count("\n") == 1
    assert lab.graft("run", "--netns", "open", "--egress", "host", "true").returncode == 0
    process.stdin.close()


def test_arguments_of_any_bytes_and_length(lab):
    enter = ["nsenter", f"--net=/run/netns/{lab.host_ns}", str(GRAFT), "run"]
    odd = subprocess.run([*enter, "printf", "%s", b"\xff\xfe"], env=lab.env, capture_output=True)
    assert odd.stdout == b"\xff\xfe", odd.stderr
    many = subprocess.run([*enter, "sh", "-c", "echo $#", *["é" * 20] * 9000], env=lab.env, capture_output=True)
    assert many.stdout == b"8999\n", many.stderr


def test_a_script_without_a_first_line(lab):
    script = lab.work / "script"
    script.write_text("echo from sh $1\n")
    script.chmod(0o755)
    assert lab.graft("run", script, "x").stdout == "from sh x\n"


def test_one_line_for_odd_input(lab):
    lab.graft("endpoint", "show", check=True)
    for words in (
        ("endpoint", "add", b"\xff", "type", "ipv4", "addr", "1.2.3.4", "port", "1"),
        ("run", "-p", "1" * 5000 + ":80", "true"),
        ("run", "-u", "²", "id"),
        ("run", "-u", "0:99999999999", "id"),
        ("run", "-u", "", "id"),
        ("run", "--name", "", "true"),
        ("run", "-p", "224.0.0.1:8077:80", "true"),
    ):
        argv = [w.decode(errors="surrogateescape") if isinstance(w, bytes) else w for w in words]
        result = subprocess.run(
            ["nsenter", f"--net=/run/netns/{lab.host_ns}", GRAFT, *argv], env=lab.env, capture_output=True, text=True
        )
        assert result.returncode in (1, 2), (words, result.stderr)
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("graft: ")
    for redirection in (">&-", ">/dev/full"):
        result = lab.host("sh", "-c", f"{GRAFT} ps {redirection}")
        assert "Traceback" not in result.stderr
        assert result.stderr.count("\n") <= 1, result.stderr


def test_an_early_interrupt_is_silent(lab):
    for delay in (0.005, 0.015, 0.025, 0.035):
        process = lab.spawn_graft("sleep", "60", stderr=-1)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
        assert "Traceback" not in said


def test_a_second_graftd_in_one_namespace_is_refused(lab):
    lab.graft("endpoint", "show", check=True)
    env = {**lab.env, "GRAFT_RUN_DIR": f"{lab.run_dir}-two"}
    lab.refused((GRAFT, "run", "true"), 125, "another graftd supervises this network namespace", env=env)
    subprocess.run(("rm", "-r", f"{lab.run_dir}-two"), check=True)


def test_dnsmasq_with_its_wildcard_listener(lab):
    """It asks for the name of the device that a query came in by, by the host's index."""
    options = ("-d", "-C", "/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--address=/x.test/1.2.3.4", "-x", "")
    lab.spawn_graft("-p", "5354:53/udp", "-p", "5354:53/tcp", "dnsmasq", *options, stderr=-3)
    lab.wait_listening(5354)
    query = "b'\\x12\\x34\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\1x\\4test\\0\\0\\1\\0\\1'"
    code = f"import socket; s = socket.socket(2, 2); s.settimeout(3); s.connect(({HOST4!r}, 5354)); s.send({query}); print(s.recv(512)[-4:])"
    assert lab.client(*python(code)).stdout == "b'\\x01\\x02\\x03\\x04'\n"


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
