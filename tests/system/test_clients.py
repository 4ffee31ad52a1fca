"""Real clients from a namespace with only lo: Go, iperf3, curl by a stub resolver, asyncio."""

import json

import pytest

from graft.bench.lab import CLIENT4, HOST4, HOST6, ROOT, Lab, wait_for
from tests.conftest import need, python


@pytest.mark.parametrize("keepalive", ["true", "false"])
def test_static_go_server_and_client(lab, httpgo, keepalive):
    lab.spawn_graft("--name", "go", "-p", "8080:80", httpgo, "serve", ":80")
    lab.wait_listening(8080)
    for url in (f"http://{HOST4}:8080/", f"http://[{HOST6}]:8080/"):
        outside = lab.client(httpgo, "get", url, "200", keepalive)
        assert outside.stdout == ("1\n" if keepalive == "true" else "200\n"), outside.stderr
    pid = json.loads(lab.graft("ps", "-j").stdout)[0]["pid"]
    for url in ("http://127.0.0.1:80/", "http://[::1]:80/", "http://localhost:80/"):
        inside = lab.graft("run", "--netns", pid, httpgo, "get", url, "100", keepalive)
        assert inside.returncode == 0, inside.stdout
    lab.spawn(httpgo, "serve", f"{CLIENT4}:9000", client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :9000").stdout, "the client's server")
    out = lab.graft("run", httpgo, "get", f"http://{CLIENT4}:9000/", "200", keepalive)
    assert out.returncode == 0, out.stdout


def test_go_asks_for_mptcp(lab, httpgo):
    """Protocol 262 becomes TCP, bound by the rules: no subflow of its own runs beside them."""
    code = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
print(s.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL))
s.setsockopt(1, 2, 1); s.bind(('0.0.0.0', 80)); s.listen(); print('ready', flush=True); print(s.accept()[1][0])
"""
    process = lab.spawn_graft("-p", "8080:80", *python(code), stdout=-1)
    assert [process.stdout.readline(), process.stdout.readline()] == ["6\n", "ready\n"]
    connect = f"import socket; socket.socket(2, 1, 262).connect(({HOST4!r}, 8080))"
    assert lab.client(*python(connect)).returncode == 0
    assert process.stdout.readline() == f"{CLIENT4}\n"


@pytest.mark.parametrize("options", [(), ("-R",), ("-P", "4"), ("-u", "-b", "200M"), ("-u", "-b", "100M", "-R")])
@pytest.mark.parametrize("address", [HOST4, HOST6])
def test_iperf3_server(lab, options, address):
    need("iperf3")
    lab.spawn_graft("-p", "5201:5201", "-p", "5201:5201/udp", "iperf3", "-s", stdout=-3)
    lab.wait_listening(5201)
    result = lab.client("iperf3", "-c", address, "-t", "1", "-J", *options)
    report = json.loads(result.stdout)
    assert "error" not in report, report
    end = report["end"]
    received = end.get("sum_received") or end["sum"]
    assert received["bits_per_second"] > 5e7


@pytest.mark.parametrize("options", [(), ("-R",), ("-u", "-b", "200M")])
def test_iperf3_client(lab, options):
    need("iperf3")
    lab.spawn("iperf3", "-s", client=True, stdout=-3)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :5201").stdout, "iperf3")
    report = json.loads(lab.graft("run", "iperf3", "-c", CLIENT4, "-t", "1", "-J", *options).stdout)
    assert "error" not in report, report


def test_curl_by_name_through_a_stub_resolver(tmp_path):
    """resolv.conf names 127.0.0.53, as systemd-resolved has it; dnsmasq of the host listens there."""
    need("dnsmasq", "curl", "unshare")
    lab = Lab("dns")
    try:
        resolv = lab.work / "resolv.conf"
        resolv.write_text("nameserver 127.0.0.53\noptions timeout:2 attempts:1\n")
        nsswitch = lab.work / "nsswitch.conf"
        nsswitch.write_text("hosts: dns\n")
        stub = ("dnsmasq", "-k", "-a", "127.0.0.53", "-z", "-h", "-R", "-C", "/dev/null", "-x", "")
        lab.spawn(*stub, "-A", f"/web.example/{CLIENT4}", "--user=root", stderr=-3)
        lab.spawn("/usr/bin/python3", "-m", "http.server", "80", client=True, stdout=-3, stderr=-3)
        wait_for(lambda: lab.client("ss", "-tlnH", "sport = :80").stdout, "http.server")
        script = (
            f"mount --bind {resolv} /etc/resolv.conf && mount --bind {nsswitch} /etc/nsswitch.conf && "
            f'exec {ROOT}/bin/graft run "$@"'
        )
        wrapped = ("unshare", "-m", "sh", "-c", script, "sh")
        fetched = lab.host(*wrapped, "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://web.example/")
        assert fetched.stdout == "200", fetched.stderr
        closed = lab.host(*wrapped, "--egress", "none", "curl", "-sS", "http://web.example/")
        assert closed.returncode == 6
        other = python("import socket; socket.create_connection(('127.0.0.53', 54))")
        assert "Refused" in lab.host(*wrapped, *other).stderr
    finally:
        left = lab.close()
    assert not left


ASYNCIO = """
import asyncio, sys
async def serve(reader, writer):
    writer.write(await reader.read(99)); await writer.drain(); writer.close()
class Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport): self.transport = transport
    def datagram_received(self, data, peer): self.transport.sendto(data.upper(), peer)
class Answers(asyncio.DatagramProtocol):
    def __init__(self): self.answer = asyncio.get_running_loop().create_future()
    def datagram_received(self, data, peer): self.answer.done() or self.answer.set_result((data, peer))
async def main():
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(serve, None, 7000)
    await loop.create_datagram_endpoint(Datagrams, ('127.0.0.1', 7001))
    async def one(i):
        reader, writer = await asyncio.open_connection(('127.0.0.1', '::1')[i % 2], 7000)
        writer.write(b'x%d' % i); await writer.drain()
        assert await reader.read() == b'x%d' % i; writer.close()
    await asyncio.gather(*(one(i) for i in range(100)))
    transport, answers = await loop.create_datagram_endpoint(Answers, remote_addr=('127.0.0.1', 7001))
    transport.sendto(b'shout')
    print(await asyncio.wait_for(answers.answer, 3))
    transport, answers = await loop.create_datagram_endpoint(Answers, ('0.0.0.0', 0))
    transport.sendto(b'again', ('127.0.0.1', 7001))
    print(await asyncio.wait_for(answers.answer, 3))
asyncio.run(main())
"""


def test_asyncio_server_and_client(lab):
    result = lab.graft("run", *python(ASYNCIO))
    assert result.stdout == "(b'SHOUT', ('127.0.0.1', 7001))\n(b'AGAIN', ('127.0.0.1', 7001))\n", result.stderr
