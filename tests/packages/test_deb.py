"""The package `graft` on empty Debian systems 12 and 13 under a real systemd: installed, used, upgraded and back, removed."""

import json
import time
from functools import partial

from graft import __version__
from graft.bench.lab import wait_for
from tests.endurance.torture import CLIENT, CLIENTS, CONTAINERS, ECHO, PATIENCE
from tests.packages.system import CLIENT as NEIGHBOUR
from tests.packages.system import HOST, listing

NGINX = "nginx -g 'daemon off;'"
ENTER = "nsenter --net=/run/netns/client"
# of the installed documents: how many links each has to other files, and those that lead nowhere
LINKS = r"""
import json, pathlib, re
pages = pathlib.Path("/usr/share/doc/graft").rglob("*.md")
links = [page.parent / link for page in pages for link in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text())]
print(json.dumps([len(links), [str(link) for link in links if not link.exists()]]))
"""
RESERVE = "from socket import *; s = socket(); s.connect(('192.0.2.1', 9))"


def containers(system) -> list[str]:
    return [row["name"] for row in json.loads(system.told("graft ps -j"))]


class Load:
    """Containers that open connections all the time, a server in one that is asked from outside, and what they hold.

    Nothing here asks graftd but the containers themselves. Their connections are many to one address, so that ports in
    TIME_WAIT have to be used again.
    """

    def __init__(self, system) -> None:
        self.system = system
        self.units = [f"c{n}" for n in range(CONTAINERS)]
        system.told("sysctl -q net.ipv4.tcp_tw_reuse=1")
        slower = CLIENT.replace("sleep(0.002)", "sleep(0.02)")
        assert slower != CLIENT
        system.write("/root/echo.py", ECHO)
        system.write("/root/client.py", slower.replace("ADDRESS", repr(NEIGHBOUR)).replace("COUNT", str(CLIENTS // CONTAINERS)))
        system.write("/root/outside.py", slower.replace("ADDRESS", repr(HOST)).replace("COUNT", "4"))
        system.start("neighbour", f"exec {ENTER} python3 /root/echo.py")
        wait_for(lambda: self._listens(f"{ENTER} ss -tlnH sport = :9000"), "the neighbour's server")
        for unit in self.units:
            system.start(unit, f"exec graft run --name {unit} python3 /root/client.py")
        system.start("server", "exec graft run --name server -p 9000:9000 python3 /root/echo.py")
        wait_for(lambda: self._listens("ss -tlnH sport = :9000"), "the server", 30)
        system.start("outside", f"exec {ENTER} python3 /root/outside.py")
        for unit in (*self.units, "outside"):
            wait_for(partial(self._is_up, unit), f"{unit} is up", 30)
        time.sleep(1)

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self.system.run(f"systemctl stop server neighbour outside {' '.join(self.units)}")

    def _listens(self, command: str) -> bool:
        return bool(self.system.run(command).stdout)

    def _is_up(self, unit: str) -> bool:
        return "up" in self.system.run(f"cat /root/{unit}.out").stdout

    def _has_ended(self, unit: str) -> bool:
        return bool(self.system.property(unit, "ActiveState") == "inactive")

    def end(self) -> dict[str, float]:
        """Stop the clients. No call of theirs has failed or hung, and what they held open all the time is open."""
        names = (*self.units, "outside")
        for unit in names:
            self.system.told(f"systemctl kill -s TERM {unit}")
        for unit in names:
            wait_for(partial(self._has_ended, unit), f"{unit}'s end", 30)
        texts = {unit: self.system.told(f"cat /root/{unit}.out") for unit in names}
        reports = [json.loads(line) for text in texts.values() for line in text.splitlines() if line.startswith("{")]
        assert len(reports) == CLIENTS + 4, texts
        assert [report["told"] for report in reports if report["failed"]] == []
        assert all(report["held"] for report in reports), "an open connection was touched"
        slowest = max(report["slowest"] for report in reports)
        assert slowest < PATIENCE
        return {"calls": sum(report["calls"] for report in reports), "slowest": slowest}


def test_the_first_container(installed):
    """What the README says, as typed: from `apt install` to nginx that the neighbour reaches."""
    told = installed.told("systemctl status --no-pager graftd.socket graftd-agent.socket")
    assert told.count("Active: active (listening)") == 2
    assert installed.property("graftd.service", "ActiveState") == "inactive"  # it is started by who asks for it
    assert installed.told("graft --version; graftd --version; ip-graft -V") == "".join(f"{name} {__version__}\n" for name in ("graft", "graftd", "ip-graft"))
    doctor = installed.told("graft doctor")
    assert "FAIL" not in doctor
    assert installed.property("graftd.service", "ActiveState") == "active"
    installed.told("apt-get -y -q install --no-install-recommends nginx-light curl")
    installed.told("systemctl disable --now nginx")
    installed.start("web", f"exec graft run --name web -p 8080:80 {NGINX}")
    wait_for(lambda: installed.run(f"{ENTER} curl -sf http://{HOST}:8080/").returncode == 0, "nginx")
    assert NEIGHBOUR in installed.told("cat /var/log/nginx/access.log")
    assert "8080:80/tcp" in installed.told("graft ps")
    wait_for(lambda: 'Status: "1 container: web"' in installed.told("systemctl status --no-pager graftd"), "the status")
    installed.told("systemctl stop web")
    assert installed.told("python3 -c 'import graft; print(graft.create_server)'").startswith("<function")
    plugins = installed.told("echo '{}' | CNI_COMMAND=VERSION graft-cni; graft-netavark info")
    assert "supportedVersions" in plugins
    assert "api_version" in plugins
    for path in ("bash-completion/completions/graft", "zsh/vendor-completions/_graft", "fish/vendor_completions.d/graft.fish"):
        assert "_GRAFT_COMPLETE" in installed.told(f"cat /usr/share/{path}")
        assert "_GRAFTD_COMPLETE" in installed.told(f"cat /usr/share/{path.replace('graft', 'graftd')}")
    installed.write("/root/links.py", LINKS)
    links, dangling = json.loads(installed.told("python3 /root/links.py"))
    assert links > 100
    assert dangling == []
    assert "graft bench is not installed (apt install ./graft-bench_*.deb)" in installed.run("graft bench --list").stderr


def test_endpoints_of_files(installed):
    """The unit's sandbox lets graftd bind in directories that it may not follow links into."""
    serve = "python3 -c 'import socket; socket.create_server((\"0.0.0.0\", 6379)); print(\"serves\")'"
    installed.told("graft endpoint add cache type local; graft endpoint add file type unix path /run/file.sock")
    for name in ("cache", "file"):
        assert installed.told(f"graft run -i 0.0.0.0:6379={name} {serve}") == "serves\n"


def test_a_member_of_the_group(installed):
    """May give orders, as root does; a container is their own, as everybody's."""
    installed.told("useradd -m alice; usermod -aG graft alice")
    alice = "setpriv --reuid alice --regid alice --init-groups"
    assert installed.told(f"{alice} graft run --name mine id -u").strip() == installed.told("id -u alice").strip()
    assert "MISSING" not in installed.run(f"{alice} graft doctor").stdout
    installed.told(f"{alice} graft endpoint add ofalice type ipv4 addr 10.77.0.1 port dynamic")
    assert "ofalice" in installed.told("graft endpoint show")


def test_the_sockets_wait_for_a_graftd_of_somebody_elses(installed):
    """One that a command has started goes on answering; systemd's would take its files, and could not start."""
    installed.told("systemctl stop graftd.socket graftd-agent.socket graftd")
    installed.start("background", "exec graft run --name background sleep 1000")
    wait_for(lambda: containers(installed) == ["background"], "the container")
    for unit in ("graftd.socket", "graftd-agent.socket"):
        assert installed.run(f"systemctl start {unit}").returncode != 0
        assert "end it first (graftd --stop)" in installed.told(f"journalctl -u {unit} --no-pager")
    assert containers(installed) == ["background"]
    installed.told("systemctl stop background; graftd --stop; systemctl reset-failed; systemctl start graftd.socket graftd-agent.socket")
    assert containers(installed) == []
    assert installed.property("graftd.service", "ActiveState") == "active"


def test_the_journal_has_fields(installed):
    installed.run(f'graft run --name curious --egress none python3 -c "{RESERVE}"')
    wait_for(lambda: installed.journal("-u", "graftd", "VERDICT=refused"), "the line of what is refused")
    (refused,) = installed.journal("VERDICT=refused", "CONTAINER=curious")
    assert refused["MESSAGE"].startswith("container curious: python3[")
    assert "connect tcp 192.0.2.1:9: refused ENETUNREACH" in refused["MESSAGE"]
    wanted = {"OPERATION": "connect", "ADDRESS": "192.0.2.1:9", "ERRNO": "101", "SYSLOG_IDENTIFIER": "graftd", "_SYSTEMD_UNIT": "graftd.service"}
    assert {name: refused[name] for name in wanted} == wanted
    ended = installed.journal("CONTAINER=curious", "PRIORITY=6")
    assert "container curious ended" in [line["MESSAGE"] for line in ended]


def test_hardening_is_as_rated(installed):
    told = installed.told("systemd-analyze security --no-pager graftd.service")
    assert float(told.rpartition("graftd.service: ")[2].split()[0]) <= 5.4, told


def test_restart_and_crash_under_load(installed):
    """systemd's descriptor store: over `systemctl restart`, over a crash, and over a graftd that hangs (WatchdogSec)."""
    installed.told("mkdir -p /run/systemd/system/graftd.service.d")
    installed.write("/run/systemd/system/graftd.service.d/watchdog.conf", "[Service]\nWatchdogSec=4\n")
    installed.told("systemctl daemon-reload")
    with Load(installed) as load:
        assert int(installed.property("graftd", "NFileDescriptorStore")) > 5 * CONTAINERS
        wait_for(lambda: installed.property("graftd", "StatusText").startswith("5 containers: "), "the status")

        def another(before: str) -> bool:
            state = installed.property("graftd", "ActiveState"), installed.property("graftd", "MainPID")
            return state[0] == "active" and state[1] not in ("0", before)

        for signal in ("", "KILL", "SEGV", "STOP"):
            before = installed.property("graftd", "MainPID")
            installed.told(f"systemctl kill --kill-whom=main -s {signal} graftd" if signal else "systemctl restart graftd")
            wait_for(partial(another, before), f"another graftd after {signal or 'restart'}", 30)
            time.sleep(1)
        assert installed.property("graftd", "NRestarts") == "3"
        assert "Watchdog timeout" in installed.told("journalctl -u graftd --no-pager")
        assert sorted(containers(installed)) == [*load.units, "server"]
        print("restart, crash, hang:", load.end())
    installed.told("rm -r /run/systemd/system/graftd.service.d; systemctl daemon-reload")


def test_upgrade_under_load_and_back(installed):
    """apt takes the next version, and the one before again, while containers call all the time."""
    installed.told("apt-get -y -q --allow-downgrades install /packages/old/graft_*.deb")
    before = installed.told("graftd --version")
    installed.told("graft endpoint add kept type ipv4 addr 10.77.0.1 port dynamic")
    with Load(installed) as load:
        inside = installed.told("pgrep -f [r]oot/client.py")
        for where in ("new", "old"):
            told = installed.told(f"apt-get -y -q --allow-downgrades install /packages/{where}/graft_*.deb")
            assert "Setting up graft" in told
            wait_for(lambda: len(containers(installed)) == CONTAINERS + 1, "the containers")
            rows = json.loads(installed.told("graft ps -j"))
            assert all(row["status"] == "running" for row in rows), rows
            assert "kept" in installed.told("graft endpoint show")
            assert (installed.told("graftd --version") == before) == (where == "old")
            assert installed.told("pgrep -f [r]oot/client.py") == inside  # nobody has been started again
            time.sleep(1)
        print("upgrade and back:", load.end())


def test_removal_is_refused_while_it_is_needed(installed):
    """By a container, which would lose its supervisor, or an engine whose next container would not start."""
    installed.start("busy", "exec graft run --name busy sleep 1000")
    wait_for(lambda: containers(installed) == ["busy"], "the container")
    told = installed.run("apt-get -y remove graft")
    assert told.returncode != 0
    assert "graft: not removed: containers run: busy (end them first)" in told.stdout + told.stderr
    assert containers(installed) == ["busy"]
    installed.told("systemctl stop busy; mkdir -p /etc/docker")
    installed.write("/etc/docker/daemon.json", '{"runtimes": {"graft": {"path": "/usr/lib/graft/graft/graft-runtime"}}}\n')
    told = installed.run("apt-get -y remove graft")
    installed.told("rm -r /etc/docker")
    assert "/etc/docker/daemon.json names it" in told.stdout + told.stderr
    assert installed.told("graft --version")


def test_purge_leaves_nothing(empty):
    """Of an installation that was used, with an endpoint, an address and a configuration of the administrator's."""
    depends = "dpkg-deb -f /packages/new/graft_*.deb Depends | tr , '\\n' | sed 's/(.*//; s/|.*//; s/:any//'"
    empty.told(f"apt-get -y -q install $({depends} | grep -v python3-msgspec) $(apt-cache show python3-msgspec >/dev/null 2>&1 && echo python3-msgspec) uidmap")
    before = listing(empty)
    empty.told("apt-get -y -q install /packages/new/graft_*.deb")
    empty.told("mkdir /etc/graft; echo 'reserved_ports = [22]' >/etc/graft/graftd.toml")
    empty.told("graft endpoint add kept type ipv4 addr 10.77.0.1 port dynamic; graft run --ip 10.77.0.9 true; graft run --direct true")
    empty.told("systemctl stop graftd.socket graftd-agent.socket graftd; graft endpoint add later type ipv4 addr 10.77.0.2 port dynamic")
    assert empty.run("pgrep -x graftd").returncode == 0  # started by the command, and not by systemd
    removed = empty.told("apt-get -y -q remove graft")
    assert empty.run("pgrep -f [g]raft-keeper || pgrep -x graftd").returncode != 0
    assert "WARNING" not in removed
    left = {line.split()[0] for line in listing(empty) - before}  # what the administrator has written or decided
    kept = ("/etc/graft", "/etc/systemd/system/sockets.target.wants", "/var/lib/systemd/deb-systemd-helper", "/var/lib/dpkg/info/graft", "graft:")
    assert not {line for line in left if not line.startswith(kept)}
    empty.told("apt-get -y -q purge graft")
    after = listing(empty)
    assert (after - before, before - after) == (set(), set())
