"""`graft rule move` between Docker's containers: what Docker has published once goes to another one, and back to nobody."""

import json

import pytest

from graft.bench.lab import wait_for
from tests.system.engines import reach

pytestmark = pytest.mark.usefixtures("no_container_is_left")
SERVE = "import http.server as h\nclass H(h.BaseHTTPRequestHandler):\n def do_GET(s): s.send_response(200); s.end_headers(); s.wfile.write(b'{name}')\n log_message = lambda *a: None\nh.HTTPServer(('', 80), H).serve_forever()"


def serve(docker, name, gnet, *options):
    docker.run(*("-d", "--name", name, "--network", gnet, *options), argv=("python3", "-c", SERVE.format(name=name)))


def published(host):
    return {one["name"]: one["publish"] for one in json.loads(host.graft("ps", "-j").stdout)}


def test_a_published_port(docker, host, gnet):
    serve(docker, "blue", gnet, "-p", "8720:80")
    serve(docker, "green", gnet)
    wait_for(lambda: reach(host, 8720) == "blue", "blue")
    words = ("rule", "move", "-p", "8720:80", "--from", "blue", "--to", "green", "--wait", "20")
    assert host.graft(*words).stderr == ""
    assert reach(host, 8720) == "green"
    assert published(host) == {"blue": [], "green": ["8720:80/tcp"]}
    docker("rm", "-f", "blue")
    assert reach(host, 8720) == "green"
    serve(docker, "red", gnet)
    wait_for(lambda: "red" in published(host), "red")
    host.graft("rule", "move", "-p", "8720:80", "--from", "green", "--to", "red", "--wait", "20", check=True)
    assert reach(host, 8720) == "red"
    docker("rm", "-f", "red")
    wait_for(lambda: "red" not in published(host), "its end")
    serve(docker, "blue", gnet, "-p", "8720:80")
    wait_for(lambda: reach(host, 8720) == "blue", "the port is free again")
