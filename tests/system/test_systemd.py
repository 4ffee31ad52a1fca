"""Socket activation by systemd's own tool, and units that systemd accepts."""

import subprocess

from graft.bench.lab import GRAFTD, ROOT, wait_for
from graft.process import cage
from tests.conftest import need

UNITS = ("graftd.service", "graftd-bpffs.service", "graftd.socket", "graftd-agent.socket", "graftd-docker.socket")


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


def test_exposure(tmp_path):
    """What systemd thinks of the unit's hardening: 9.6 without any; most of what is left is what graftd is for."""
    need("systemd-analyze")
    text = (ROOT / "contrib/systemd/graftd.service").read_text().replace("@BINDIR@/graftd", "/bin/true")
    (tmp_path / "graftd.service").write_text(text)
    command = ("systemd-analyze", "security", "--offline=true", "--no-pager", str(tmp_path / "graftd.service"))
    told = subprocess.run(command, capture_output=True, text=True).stdout
    assert float(told.rpartition("graftd.service: ")[2].split()[0]) <= 5.4, told
    kept = {name.removeprefix("CAP_") for name in text.split() if name.removeprefix("CapabilityBoundingSet=").startswith("CAP_")}
    kept |= {w.removeprefix("CapabilityBoundingSet=CAP_") for w in text.split() if w.startswith("CapabilityBoundingSet=CAP_")}
    assert {name for name in kept if "=" not in name} == set(cage.CAPABILITIES)
