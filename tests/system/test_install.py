"""make install and make uninstall: into a directory, as a package is made, and what is there then works."""

import os
import subprocess
from pathlib import Path

import pytest

from graft import __version__
from tests.conftest import need

ROOT = Path(__file__).parent.parent.parent
PAGES = {f"{name}({section})": f"man{section}/{name}.{section}" for name, section in (
    ("graft", 1), ("graftd", 8), ("graft.toml", 5), ("ip-graft", 8), ("graft-runtime", 8), ("graft-cni", 8), ("graft-netavark", 8),
)}  # fmt: skip


def make(*words):
    return subprocess.run(("make", "--no-print-directory", *words), cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    need("go-md2man", "man")
    where = tmp_path_factory.mktemp("package")
    where.chmod(0o755)
    made = make("install", f"DESTDIR={where}")
    assert made.returncode == 0, made.stdout + made.stderr
    return where


def installed(package, command):
    """Run a shell command where the package is in place: in a mount namespace, over the machine's own files."""
    script = r"""
    mount -t tmpfs tmpfs /mnt
    for place in usr/local opt etc; do
        mkdir -p "/mnt/$place/upper" "/mnt/$place/work"
        [ ! -d "$PACKAGE/$place" ] || cp -a "$PACKAGE/$place/." "/mnt/$place/upper"
        mount -t overlay overlay -o "lowerdir=/$place,upperdir=/mnt/$place/upper,workdir=/mnt/$place/work" "/$place"
    done
    exec bash -euo pipefail -c "$COMMAND"
    """
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
    environment |= {"PACKAGE": str(package), "COMMAND": command}
    done = subprocess.run(
        ("unshare", "--mount", "bash", "-euo", "pipefail", "-c", script),
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(500)
def test_no_file_names_the_directory_of_the_package(package):
    """Neither programs nor compiled modules, whose path a traceback shows."""
    found = [p for p in package.rglob("*") if p.is_file() and not p.is_symlink() and str(package).encode() in p.read_bytes()]
    assert found == []


@pytest.mark.timeout(500)
def test_what_is_installed(package):
    found = {str(path.relative_to(package)) for path in package.rglob("*") if not path.is_dir()}
    outside = {path for path in found if not path.startswith("opt/graft/")}
    assert outside == {
        *(f"usr/local/bin/{name}" for name in ("graft", "graftd", "ip-graft", "graft-cni", "graft-netavark")),
        "usr/local/include/graft.h",
        *(f"usr/local/share/man/{page}" for page in PAGES.values()),
        *(f"usr/local/share/bash-completion/completions/{name}" for name in ("graft", "graftd")),
        *(f"usr/local/share/zsh/site-functions/_{name}" for name in ("graft", "graftd")),
        *(f"usr/local/share/fish/vendor_completions.d/{name}.fish" for name in ("graft", "graftd")),
        *(f"etc/systemd/system/{path.name}" for path in (ROOT / "contrib/systemd").iterdir()),
    }
    front = os.readlink(package / "usr/local/bin/graft")
    assert front.startswith("/opt/graft/lib/python3")
    assert front.endswith("/site-packages/graft/graft-front")
    assert os.access(package / front[1:], os.X_OK)
    for path in (package / "opt/graft/bin").iterdir():
        assert str(package).encode() not in path.read_bytes(), path
    units = "".join(path.read_text() for path in (package / "etc/systemd/system").iterdir())
    assert "ExecStart=/usr/local/bin/graftd" in units
    assert "@BINDIR@" not in units


def test_commands_and_completion_work(package):
    plugins = "echo '{}' | CNI_COMMAND=VERSION graft-cni; graft-netavark info"
    told = installed(package, f"graft --version; graftd --version; ip-graft -V; {plugins}")
    assert told.splitlines()[:3] == [f"{name} {__version__}" for name in ("graft", "graftd", "ip-graft")]
    assert "supportedVersions" in told
    assert "api_version" in told
    complete = """
    source /usr/local/share/bash-completion/completions/graft
    COMP_WORDS=(graft insp) COMP_CWORD=1
    _graft_completion graft
    echo "${COMPREPLY[@]}"
    """
    assert installed(package, complete).split() == ["inspect"]


@pytest.mark.parametrize("page", PAGES)
def test_man_finds_and_shows_the_page(package, page):
    name, section = page.removesuffix(")").split("(")
    shown = installed(package, f"realpath $(man -w {section} {name}) $(man -w {name}); man {section} {name}")
    *found, text = shown.split("\n", 2)  # Debian's /usr/local/man is a link to /usr/local/share/man
    assert found == 2 * [f"/usr/local/share/man/{PAGES[page]}"]
    assert f"graft {__version__}" in text
    assert "EXAMPLES" in text


def test_uninstall_on_the_machine_leaves_nothing(package, tmp_path):
    listing = "LC_ALL=C; find /usr/local /opt /etc ! -type d | sort"
    before = installed(tmp_path, listing)  # nothing is there; what is mounted below these places is not seen either
    assert installed(package, f"make -s uninstall >&2; {listing}") == before


def test_uninstall_is_refused_while_an_engine_names_graft(package):
    configured = """
    mkdir -p /etc/docker
    echo '{"runtimes": {"graft": {"path": "/opt/graft/lib/graft-runtime"}}}' >/etc/docker/daemon.json
    ! make -s uninstall 2>&1
    graft --version
    """
    told = installed(package, configured)
    assert "/etc/docker/daemon.json names /opt/graft: 'graft uninstall docker|podman|containerd' first" in told
    assert f"graft {__version__}" in told


def test_what_is_no_graft_is_not_touched(tmp_path):
    (tmp_path / "opt/other").mkdir(parents=True)
    (tmp_path / "opt/other/file").write_text("mine")
    for verb in ("install", "uninstall"):  # a place that has been named by mistake
        done = make(verb, f"DESTDIR={tmp_path}", "PREFIX=/opt/other")
        assert done.returncode != 0
        assert "no graft" in done.stderr
    assert (tmp_path / "opt/other/file").read_text() == "mine"


@pytest.mark.timeout(500)
def test_uninstall_of_a_package_leaves_nothing(package):
    """The last test of this file: it takes the package away."""
    done = make("uninstall", f"DESTDIR={package}")
    assert done.returncode == 0, done.stderr
    assert list(package.iterdir()) == []
