"""`graft dashboard`: the token, and the page in a browser, clicked through."""

import json
import signal
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, wait_for
from tests.conftest import need, python
from tests.system.browser import browser

TALK = """
import socket, sys, time
try: socket.socket().bind(('203.0.113.1', 5))
except OSError: pass
c = socket.create_connection((sys.argv[1], 8497))
while True: c.sendall(b'x' * 1000); time.sleep(.05)
"""
SERVE = "import socket\ns = socket.create_server(('', 80)); print('ready', flush=True); a, _ = s.accept()\nwhile a.recv(1 << 16): pass\n"
# a state as graftd tells it, of many containers that talk to each other
MANY = """(() => {
  const one = view.state.containers[0];
  const containers = Array.from({length: 200}, (_, n) => ({...one, id: 1000 + n, name: `many-${n}`}));
  const links = containers.map((c, n) => ({from: c.name, to: `many-${(n * 7) % 200}`, connections: 1, sent: n, received: n}));
  window.fetch = async () => ({ok: true, json: async () => ({containers, links, log: view.state.log})});
})()"""


@pytest.fixture
def page(lab):
    """Two containers, one of which talks to the other and was refused something; the dashboard's address."""
    server = lab.spawn_graft("--name", "db", "-p", "8497:80", *python(SERVE), stdout=subprocess.PIPE)
    assert server.stdout.readline() == "ready\n"
    client = lab.spawn_graft("--name", "app", *python(TALK), HOST4)
    wait_for(lambda: lab.graft("sockets").stdout.count(" ESTAB ") == 2, "the connection")
    process = lab.spawn(GRAFT, "dashboard", stdout=subprocess.PIPE)
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:9436/?token=")
    yield address
    process.send_signal(signal.SIGINT)
    assert process.wait(10) in (130, -signal.SIGINT)
    plain = address.partition("?")[0]
    wait_for(lambda: lab.host("curl", "-s", plain).returncode == 7, "the page's end")
    lab.end(client)
    lab.end(server)


def test_refusals(lab):
    lab.refused((GRAFT, "dashboard", "--at-public"), 2, "--at-public goes with --at")


def ask(lab, address, *options):
    done = lab.host("curl", "-sS", "-m", "10", "-w", "\n%{http_code}", *options, address)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def cookie_of(lab, address):
    """NAME=VALUE of the cookie that a browser gets for the address with the token."""
    head = ask(lab, address, "-i")[1]
    return next(line.split()[1].rstrip(";") for line in head.splitlines() if line.startswith("Set-Cookie: "))


def test_two_pages_in_one_browser(lab, page, tmp_path):
    """Browsers keep no cookies of one port from another: the second page, of this host or by ssh of another, ended the first."""
    second = lab.spawn(GRAFT, "dashboard", "--at", "127.0.0.1:9437", stdout=subprocess.PIPE)
    jar = ("-b", str(tmp_path / "jar"), "-c", str(tmp_path / "jar"))
    addresses = (page, second.stdout.readline().strip())
    for address in addresses:
        assert ask(lab, address, *jar)[0] == 303
    for address in addresses:
        assert ask(lab, address.partition("?")[0] + "state", *jar)[0] == 200
    lab.end(second)


def test_who_has_no_token_sees_nothing(lab, page):
    plain = page.partition("?")[0]
    for path in ("", "state", "dashboard.js", "dashboard.css", "nothing", "?token=", "?token=wrong", "state?token=wrong"):
        status, body = ask(lab, plain + path)
        assert (status, body) == (401, "open the address that 'graft dashboard' has printed\n"), path
    assert ask(lab, plain + "state", "-H", "Cookie: graft-dashboard=wrong")[0] == 401
    assert ask(lab, plain + "state", "-H", "Cookie: \x01;;=")[0] in (400, 401)
    token = urlsplit(page).query.removeprefix("token=")
    assert len(token) >= 32
    cookie = cookie_of(lab, page)
    assert ask(lab, plain + "state", "-H", f"Cookie: {cookie}x")[0] == 401
    status, body = ask(lab, plain + "state", "-H", f"Cookie: x[y]=a b; ;=;{cookie}; graft-dashboard-0=1")
    assert status == 200
    state = json.loads(body)
    assert {one["name"] for one in state["containers"]} == {"app", "db"}
    (link,) = state["links"]
    assert (link["from"], link["to"], link["connections"]) == ("app", "db", 1)
    assert link["sent"] > 0
    assert state["log"][-1]["container"] == "app"
    head = ask(lab, plain, "-i", "-H", f"Cookie: {cookie}")[1]
    assert "default-src 'none'" in head
    assert ask(lab, plain + "state", "-X", "POST", "-H", f"Cookie: {cookie}")[0] == 405
    assert lab.client("curl", "-s", "-m", "3", f"http://{HOST4}:9436/").returncode == 7
    assert CLIENT4 not in head


def test_a_cookie_of_nobody_takes_no_time(lab, page):
    """graftd's loop reads it, before it knows who asks: a cookie in quotes took a quarter of a second."""
    plain = page.partition("?")[0]
    ticks = lambda: sum(map(int, Path(f"/proc/{lab.daemon_pid()}/stat").read_text().rpartition(")")[2].split()[11:13]))  # noqa: E731
    taken = []
    for cookie in ("a" * 16000, '"' + '\\"' * 7990 + '"'):
        before = ticks()
        for _ in range(8):
            assert ask(lab, plain + "state", "-H", f"Cookie: graft-dashboard={cookie}")[0] == 401
        taken.append(ticks() - before)
    assert taken[1] < 3 * taken[0] + 50, taken



def test_clicked_through(lab, page, tmp_path):
    need("chromium")
    with browser(lab) as b:
        b.open(page)
        b.wait("document.querySelectorAll('#containers tbody tr').length === 2")
        assert b.value("location.search") == "", "the token is not in the address"
        assert b.value("document.cookie") == "", "and no script gets it"
        assert b.value("document.querySelector('#summary').textContent") == "2 containers, 2 open connections"
        b.wait("document.querySelector('path.link[data-from=app][data-to=db]:not(.idle)')")
        assert b.value("document.querySelectorAll('.node').length") == 3
        assert b.value("document.querySelector('.node[data-name=app]').classList.contains('bad')")
        assert "203.0.113.1:5: EADDRNOTAVAIL, no ingress rule" in b.value("document.querySelector('#log li').textContent")
        b.click(".node[data-name=db]")
        b.wait("!document.querySelector('#details').hidden")
        assert b.value("document.querySelector('#details h2').textContent") == "db"
        assert "8497:80/tcp" in b.value("document.querySelector('#details').textContent")
        assert b.value("document.querySelectorAll('#log li').length") == 0, "db was refused nothing"
        b.click("tr[data-name=app]")
        b.wait("document.querySelector('#details h2').textContent === 'app'")
        assert "no ingress rule (1)" in b.value("document.querySelector('#details').textContent")
        b.click("tr[data-name=app]")
        b.wait("document.querySelector('#details').hidden")
        b.value("(i => { i.value = 'ap'; i.dispatchEvent(new Event('input')); })(document.querySelector('#filter'))")
        assert b.value("document.querySelectorAll('#containers tbody tr').length") == 1
        assert b.complaints() == []
        b.picture(tmp_path / "dashboard.png")
        assert (tmp_path / "dashboard.png").stat().st_size > 10_000


@pytest.mark.alone
def test_a_click_among_200_containers(lab, page):
    need("chromium")
    with browser(lab) as b:
        b.open(page)
        b.wait("document.querySelectorAll('#containers tbody tr').length === 2")
        b.value(MANY)
        b.wait("document.querySelectorAll('#containers tbody tr').length === 200")
        took = b.value(
            "(() => { const began = performance.now(); document.querySelector('tr[data-name=many-77]').click();"
            " document.body.getBoundingClientRect(); return performance.now() - began; })()"
        )
        assert b.value("document.querySelector('#details h2').textContent") == "many-77"
        print(f"a click among 200 containers: {took:.0f} ms")
        assert took < 100


def test_what_is_refused(lab):
    keeps = lab.spawn_graft("--name", "keeps", "sleep", "30")
    wait_for(lambda: "keeps" in lab.graft("ps").stdout, "the container")
    lab.refused((GRAFT, "dashboard", "--at", "0.0.0.0:9436"), 2, "--at 0.0.0.0:9436 is not on the loopback")
    lab.refused((GRAFT, "dashboard", "--at", "nonsense"), 2, "is no address")
    lab.refused((GRAFT, "dashboard", "--at", "127.0.0.1:99999"), 2, "--at '127.0.0.1:99999': '99999' is not a port")
    lab.refused((GRAFT, "dashboard", "--at", "/nowhere/page"), 125, "No such file or directory (name an address or a directory of")
    holder = lab.spawn(*python("import socket; s = socket.create_server(('127.0.0.1', 9437)); print(flush=True); input()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    lab.refused((GRAFT, "dashboard", "--at", "127.0.0.1:9437"), 125, "127.0.0.1:9437: Address already in use")
    lab.end(holder)
    lab.end(keeps)
