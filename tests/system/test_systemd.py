"""Socket activation by systemd's own tool, and units that systemd accepts."""

import subprocess

from graft.bench.lab import GRAFTD, ROOT, wait_for
from tests.conftest import need

UNITS = ("graftd.service", "graftd.socket", "graftd-agent.socket", "graftd-docker.socket")


def test_socket_activation(own_lab):
    need("systemd-socket-activate")
    lab = own_lab
    lab.run_dir.mkdir()
    sockets = ("-l", lab.run_dir / "graftd.sock", "-l", lab.run_dir / "agent.sock", "--fdname=admin:agent")
    lab.spawn("systemd-socket-activate", f"--setenv=GRAFT_RUN_DIR={lab.run_dir}", *sockets, GRAFTD, stderr=-3)
    wait_for((lab.run_dir / "agent.sock").exists, "the sockets")
    result = lab.graft("run", "--name", "activated", "echo", "works")
    assert result.stdout == "works\n", result.stderr
    wait_for(lambda: lab.containers() == [], "the end")


def test_units(tmp_path):
    need("systemd-analyze")
    for unit in UNITS:
        text = (ROOT / "contrib/systemd" / unit).read_text().replace("@BINDIR@", "/bin").replace("/bin/graftd", "/bin/true")
        (tmp_path / unit).write_text(text)
    names = [str(tmp_path / unit) for unit in UNITS]
    result = subprocess.run(("systemd-analyze", "verify", "--man=no", *names), capture_output=True, text=True)
    ours = [line for line in (result.stdout + result.stderr).splitlines() if "graftd" in line]
    assert ours == []
