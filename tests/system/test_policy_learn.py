"""What else belongs to lists of destinations: --learn, bad input, containers by name, a port for names that is taken; in both modes."""

import subprocess
from pathlib import Path

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, wait_for
from tests.conftest import python
from tests.system.outside import CALLS_ONCE, GREETER, NONAME, greeting, outsides

REFUSED = "ENETUNREACH"


@pytest.fixture
def outside(lab):
    yield from greeting(lab)


def test_learn(outside, lab):
    """Everything is let through, and the policy that is printed at the end allows just that."""
    code = CALLS_ONCE + "socket.getaddrinfo('six.test', 80)\nsys.exit(7)"
    outside.write({"same.test": {"A": [CLIENT4]}})
    targets = ("www.test:8000", "same.test:8000", f"{HOST4}:8009")
    done = outside.run(*python(code), *targets, options=("--learn",))
    assert (done.returncode, done.stdout) == (7, "ok\nok\n111\n"), done.stderr
    assert done.stderr == (
        "# what this run has reached; as a file: graft run --policy FILE\n"
        f'allow = [\n    "{HOST4}:8009",\n    "same.test:8000",\n    "www.test:8000",\n]\n'
        "# looked up, and not connected to: six.test\n"
    )
    file = lab.work / "learnt.toml"
    file.write_text(done.stderr)
    again = outside.run(*python(CALLS_ONCE), *targets, "www.test:8001", options=("--policy", file))
    assert again.stdout == "ok\nok\n111\n101\n"
    assert lab.graft("policy", "check", file).stdout == (
        f"address         {HOST4}:8009\nname            same.test:8000\nname            www.test:8000\n"
        f"{file}: 3 destinations; everything else is refused\n"
    )


SORTS = """
import socket
for port, kind in ((0, 2), (9, 2), (65535, 2), (8001, 1), (8000, 2)):
    s = socket.socket(type=kind); s.connect(('www.test', port))
"""


def test_programs_that_sort_addresses(outside, lab):
    """They connect UDP sockets, and send nothing: the list is one that is taken, without what nobody needs."""
    done = outside.run(*python(SORTS), options=("--learn",))
    comment = "# by UDP alone, as programs do to sort addresses, and send nothing: www.test:"
    assert done.stderr == (
        '# what this run has reached; as a file: graft run --policy FILE\nallow = [\n    "www.test:8000",\n    "www.test:8001",\n]\n'
        f"{comment}65535\n{comment}9\n"
    )
    file = lab.work / "sorts.toml"
    file.write_text(done.stderr)
    assert "2 destinations" in lab.graft("policy", "check", file, check=True).stdout


def test_learning_passes_signals_and_statuses_on(lab):
    run = lab.spawn_graft("--learn", "sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep .1; done", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline() == "ready\n"
    run.terminate()
    assert run.wait(10) == 5
    killed = lab.graft("run", "--learn", "sh", "-c", "kill -9 $$")
    assert killed.returncode == -9
    assert "# this run has reached nothing: " in killed.stderr
    assert lab.graft("run", "--learn", "/nowhere").returncode == 127


def test_bad_input(lab):
    file = lab.work / "bad.toml"
    file.write_text('allow = ["pypi.org"]\nnames = []\n')
    for argv, says in (
        (("run", "--allow", "a.*.b", "true"), "graft: --allow: 'a.*.b' has a wildcard that is not the whole first label"),
        (("run", "--allow", "pypi.org:70000", "true"), "--allow: 'pypi.org:70000': '70000' is not a port (a number from 1 to 65535)"),
        (("run", "--allow", "-x", "true"), "--allow: '-x' is no name and no address"),
        (("run", "--allow", "a.b", "--egress", "none", "true"), "--egress none says nothing (omit one of them)"),
        (("run", "--policy", lab.work / "absent", "true"), "there is no such file"),
        (("run", "--policy", file, "true"), f"{file}, line 2: unknown key 'names'"),
        (("policy", "check", file), f"graft: {file}, line 2: unknown key 'names'"),
    ):
        done = lab.graft(*argv)
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_port_for_names_is_somebody_elses(own_lab):
    """A container that would have no names is not started."""
    ready = own_lab.spawn(*python("import socket; u = socket.socket(type=socket.SOCK_DGRAM); u.bind(('', 53)); print('ready', flush=True); u.recv(9)"), stdout=subprocess.PIPE)
    assert ready.stdout.readline() == "ready\n"
    done = own_lab.graft("run", "--allow", "www.test", "true")
    assert done.returncode == 125
    assert "127.0.0.11:53 is not to be had for names ('ss -lnp sport = :53' says who has it" in done.stderr
    assert own_lab.graft("run", "true").returncode == 0




def test_containers_by_name(lab):
    """--names: a container with --ip is NAME.graft, both ways; other names are asked for as ever; one that is not there is nobody's."""
    server = lab.spawn_graft("--name", "web", "--ip", "10.88.7.8", *python(GREETER), "80")
    wait_for(lambda: "web" in lab.containers(), "the server")
    code = """
import socket, time
for _ in range(100):
    try: s = socket.create_connection(('web.graft', 80), 5); break
    except ConnectionRefusedError: time.sleep(.05)
print(s.recv(99).decode(), socket.gethostbyaddr('10.88.7.8')[0])
for name in ('absent.graft', 'www.test'):
    try: print(socket.gethostbyname(name))
    except OSError as error: print(error.errno)
"""
    asks = ("run", "--names", *python(code))
    for one in outsides(lab):
        done = lab.graft(*asks)
        lines = done.stdout.splitlines()
        assert lines[:2] == ["10.88.7.8 web.graft", "-2"], done.stderr
        assert not any("graft" in line for line in one.queries())
        done = one.run(*python(code), allow=("web.graft:80", "www.test"))
        assert done.stdout.splitlines() == ["10.88.7.8 web.graft", "-2", CLIENT4], done.stderr
        refused = one.calls("web.graft:80", "10.88.7.8:80", allow=("www.test",))
        assert refused == {"web.graft:80": NONAME, "10.88.7.8:80": REFUSED}
    lab.end(server)


NSCD = """
mkdir -p /run/nscd && mount -t tmpfs none /run/nscd
python3 -c 'import socket
s = socket.socket(socket.AF_UNIX); s.bind("/run/nscd/socket"); s.listen()
while True:
    asking = s.accept()[0]; print("asked", flush=True); asking.close()' >asked &
server=$!
while ! test -S /run/nscd/socket; do sleep .05; done
getent hosts www.test; sleep .2; wc -l <asked; : >asked
for mode in "--allow www.test" "--direct --allow www.test" --learn; do
    "$GRAFT" run $mode --resolver 127.0.0.53 sh -c 'getent hosts www.test; exit 0' 2>/dev/null
done
"$GRAFT" run --name named --names --resolver 127.0.0.53 sleep 60 & sleep 1; "$GRAFT" run --netns named getent hosts www.test; kill $!
wc -l <asked
"$GRAFT" run getent hosts www.test
sleep .2; wc -l <asked
kill $server
"""


def test_name_services_of_the_host_are_asked_nothing(outside, lab, tmp_path):
    """The C library asks nscd, systemd-resolved and Avahi by sockets first: no address that they tell would be pinned."""
    lab.graft("run", "true", check=True)
    there = Path("/run/nscd").is_dir()
    lab.env["GRAFT"] = str(GRAFT)
    try:
        done = lab.host("unshare", "-m", "sh", "-c", NSCD, cwd=tmp_path)
    finally:
        del lab.env["GRAFT"]
        if not there:
            Path("/run/nscd").rmdir()
    before, *found, inside, after = done.stdout.split("\n")[:-1]
    assert int(before) > 0, "the host's programs ask there"
    assert found == [f"{CLIENT4}       www.test"] * 4, done.stderr
    assert inside == "0"
    assert int(after) > 0, "so do containers without a list"


def test_a_run_that_has_reached_nothing(own_lab):
    """An empty list is no policy: `graft policy check` names the option that it stands for."""
    done = own_lab.graft("run", "--learn", *python("import socket; socket.socket().bind(('', 80)); print('done')"))
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr == "# this run has reached nothing: graft run --egress none\n"
