"""Real servers in a namespace with only lo: nginx, redis, memcached, Java's HTTP server."""

import json
import re
from functools import partial

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, HOST4, HOST6, ROOT, wait_for
from tests.conftest import need, python

NGINX = """
daemon off; worker_processes {workers}; pid {dir}/nginx.pid; error_log {dir}/error.log info; {user}
events {{ worker_connections 512; }}
http {{
    access_log {dir}/access.log;
    client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
    server {{ {listen} {location} }}
}}
"""


def nginx(lab, name, *options, listen="listen 80; listen [::]:80;", location="", workers=2):
    directory = lab.work / name
    directory.mkdir(exist_ok=True)
    (directory / "access.log").unlink(missing_ok=True)
    config = directory / "nginx.conf"
    location = location or f"root {directory};"
    (directory / "index.html").write_text(name)
    config.write_text(NGINX.format(dir=directory, workers=workers, listen=listen, location=location, user=""))
    process = lab.spawn_graft("--name", name, *options, "nginx", "-c", config)
    wait_for(lambda: (directory / "nginx.pid").exists(), "nginx")
    return directory, process


def logged(directory, client):
    return f"{client} - -" in (directory / "access.log").read_text()


def requests(load):
    """How many wrk made."""
    found = re.search(r"(\d+) requests in", load.stdout)
    assert found, load.stdout
    return int(found[1])


def get(lab, url, *, client=True):
    return (lab.client if client else lab.host)("curl", "-sS", "--max-time", "5", url)


def test_nginx_on_both_families_with_the_clients_address(lab):
    need("nginx", "wrk", "curl")
    directory, _ = nginx(lab, "web", "-p", "8080:80")
    for host, client in ((HOST4, CLIENT4), (f"[{HOST6}]", CLIENT6)):
        result = get(lab, f"http://{host}:8080/")
        assert result.stdout == "web", result.stderr
        wait_for(partial(logged, directory, client), client)
    for host in (HOST4, f"[{HOST6}]"):
        load = lab.client("wrk", "-t2", "-c20", "-d1s", f"http://{host}:8080/")
        assert requests(load) > 500, load.stdout
        assert "Socket errors" not in load.stdout
        assert "Non-2xx" not in load.stdout
    short = lab.client("wrk", "-t1", "-c10", "-d1s", "-H", "Connection: close", f"http://{HOST4}:8080/")
    assert requests(short) > 200, short.stdout
    assert not re.search(r"\[(alert|crit|emerg|error)\]", (directory / "error.log").read_text())


def test_the_namespace_has_only_lo(lab):
    nginx(lab, "bare", "-p", "8080:80")
    pid = json.loads(lab.graft("ps", "-j").stdout)[0]["pid"]
    links = lab.host("nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-j", "link").stdout
    assert [link["ifname"] for link in json.loads(links)] == ["lo"]


def test_nginx_proxies_to_another_container(lab):
    """The proxy registers its socket with epoll before it connects."""
    need("nginx")
    nginx(lab, "backend", "-p", "10.77.0.3:8081:80", location="return 200 $remote_addr;")
    location = "location / { proxy_pass http://10.77.0.3:8081; }"
    nginx(lab, "frontend", "-p", "8080:80", location=location)
    assert get(lab, f"http://{HOST4}:8080/").stdout == HOST4
    load = lab.client("wrk", "-t1", "-c10", "-d1s", f"http://{HOST4}:8080/")
    assert requests(load) > 100, load.stdout
    assert "Non-2xx" not in load.stdout


def test_nginx_reload_and_reuseport(lab):
    need("nginx")
    listen = "listen 80 reuseport; listen [::]:80 reuseport;"
    directory, process = nginx(lab, "reload", "-p", "8080:80", listen=listen)
    assert get(lab, f"http://{HOST4}:8080/").stdout == "reload"
    (directory / "index.html").write_text("again")
    process.send_signal(1)
    wait_for(lambda: get(lab, f"http://{HOST4}:8080/").stdout == "again", "the reload")


def test_redis(lab):
    need("redis-server", "redis-benchmark", "redis-cli")
    lab.spawn_graft(
        "--name", "redis", "-p", "6380:6379", "redis-server", "--save", "", "--protected-mode", "no", stdout=-3
    )
    lab.wait_listening(6380)
    outside = lab.client("redis-benchmark", "-h", HOST4, "-p", "6380", "-n", "5000", "-q", "-t", "set,get")
    assert outside.stdout.count("requests per second") == 2, outside.stdout + outside.stderr
    pid = json.loads(lab.graft("ps", "-j").stdout)[0]["pid"]
    inside = lab.graft("run", "--netns", pid, "redis-cli", "-h", "127.0.0.1", "-p", "6379", "set", "key", "value")
    assert inside.stdout == "OK\n"
    clients = lab.graft("run", "--netns", pid, "redis-cli", "client", "list").stdout
    assert re.search(r" addr=127\.0\.0\.1:\d+ laddr=127\.0\.0\.1:6379 ", clients), clients
    assert lab.client("redis-cli", "-h", HOST4, "-p", "6380", "get", "key").stdout == "value\n"


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_memcached(lab, kind):
    need("memcached")
    lab.spawn_graft(
        "--name", "mc", "-p", f"11300:11211/{kind}", "memcached", "-u", "nobody", "-U", "11211", "-l", "0.0.0.0"
    )
    lab.wait_listening(11300, udp=kind == "udp")
    frame = "bytes(4) + b'\\0\\1\\0\\0' +" if kind == "udp" else ""
    code = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_{"DGRAM" if kind == "udp" else "STREAM"}); s.settimeout(3)
s.connect(({HOST4!r}, 11300))
s.send({frame} b'set k 0 0 5\\r\\nhello\\r\\n'); print(s.recv(999))
s.send({frame} b'get k\\r\\n'); print(s.recv(999))
"""
    result = lab.client(*python(code))
    assert "STORED" in result.stdout, result.stderr
    assert "hello" in result.stdout


def test_java(lab):
    need("java", "javac")
    lab.host("javac", "-d", lab.work, ROOT / "tests/programs/HttpServe.java", check=True)
    lab.spawn_graft("-p", "8080:80", "java", "-cp", lab.work, "HttpServe")
    lab.wait_listening(8080)
    assert get(lab, f"http://{HOST4}:8080/").stdout.split() == ["lo"]
    assert get(lab, f"http://[{HOST6}]:8080/").stdout.split() == ["lo"]


def test_cpython_servers_of_the_standard_library(lab):
    """A thread a connection, chunked bodies: 200 requests against http.server, published on IPv4 alone."""
    lab.spawn_graft("-p", "0.0.0.0:8080:80", "/usr/bin/python3", "-m", "http.server", "80", stderr=-3, stdout=-3)
    lab.wait_listening(8080)
    code = f"import urllib.request as u\nfor i in range(200): u.urlopen('http://{HOST4}:8080/').read()\nprint('done')"
    assert lab.client(*python(code)).stdout == "done\n"


def test_dnsmasq_with_its_wildcard_listener(lab):
    """It asks for the name of the device that a query came in by, by the host's index."""
    options = ("-d", "-C", "/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--address=/x.test/1.2.3.4", "-x", "")
    lab.spawn_graft("-p", "5354:53/udp", "-p", "5354:53/tcp", "dnsmasq", *options, stderr=-3)
    lab.wait_listening(5354)
    query = "b'\\x12\\x34\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\1x\\4test\\0\\0\\1\\0\\1'"
    code = f"import socket; s = socket.socket(2, 2); s.settimeout(3); s.connect(({HOST4!r}, 5354)); s.send({query}); print(s.recv(512)[-4:])"
    assert lab.client(*python(code)).stdout == "b'\\x01\\x02\\x03\\x04'\n"
