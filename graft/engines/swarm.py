"""Docker's managed plugin graft:swarm, without which swarm schedules nothing on networks of graft's.

swarm refuses drivers that are legacy plugins, such as graftd's socket in /run/docker/plugins. A managed plugin is a
container of dockerd's own. This one has nothing but graft-plugin (csrc/plugin.c), which links the plugin's socket to
graftd's.

It has a tag of its own. A plugin `graft`, which is `graft:latest`, would stand before graftd's socket: dockerd looks
for managed plugins first (moby, plugin/store.go), and would not find the driver `graft` of networks that it has.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from graft.engines.install import HERE
from graft.errors import Failure

PLUGIN = "graft:swarm"
PROGRAM = HERE / "graft-plugin"
SOCKET = "graft.sock"
SECONDS = 120  # for dockerd to answer; it tries a plugin's socket for some 10


def description(socket: Path) -> dict[str, object]:
    """config.json of the plugin (docs/extend/config.md of Docker). @socket: graftd's, as dockerd sees it."""
    return {
        "description": "networks of graft's for services of swarm",
        "documentation": "docs/several-hosts.md of graft",
        "entrypoint": ["/graft-plugin", str(socket), f"/run/docker/plugins/{SOCKET}"],
        "interface": {"types": ["docker.networkdriver/1.0", "docker.ipamdriver/1.0"], "socket": SOCKET},
        "network": {"type": ""},
        "linux": {},
    }


def _docker(*words: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(("docker", *words), capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"docker {' '.join(words)}: {error}") from None


def _order(*words: str) -> None:
    done = _docker(*words)
    if done.returncode:
        raise Failure(
            f"docker {' '.join(words)}: {(done.stderr or done.stdout).strip()}", hint="dockerd's log has more"
        )


def state() -> str:
    """What dockerd has of the plugin: "enabled", "disabled", or "" for nothing. Raises Failure."""
    done = _docker("plugin", "ls", "--format", "{{.Name}} {{.Enabled}}")
    if done.returncode:
        raise Failure(f"docker plugin ls: {done.stderr.strip()}", hint="is dockerd running?")
    found = dict(line.split() for line in done.stdout.splitlines())
    return {"true": "enabled", "false": "disabled"}.get(found.get(PLUGIN, ""), "")


def add(run_directory: Path) -> None:
    """Create the plugin, unless it is there, and enable it. What it was before is so again if that fails.

    @run_directory: graftd's. Raises Failure.
    """
    from graft.engines.docker import PLUGINS

    before = state()
    if before == "enabled":
        return
    if not before:
        _create(PLUGINS / f"{run_directory.name}.sock")
    try:
        _order("plugin", "enable", PLUGIN)
    except Failure:
        if not before:
            _docker("plugin", "rm", "-f", PLUGIN)
        raise


def _create(socket: Path) -> None:
    if not PROGRAM.exists():
        raise Failure("graft-plugin is not built", hint="run 'make build'", code="ENOENT")
    with tempfile.TemporaryDirectory(prefix="graft-plugin-") as directory:
        root = Path(directory, "rootfs")
        root.mkdir()
        shutil.copy(PROGRAM, root)
        Path(directory, "config.json").write_text(json.dumps(description(socket)))
        _order("plugin", "create", PLUGIN, directory)


def remove() -> None:
    """Remove the plugin, if there is one. Raises Failure, for instance while a network uses it."""
    before = state()
    if before == "enabled":
        _order("plugin", "disable", PLUGIN)
    if before:
        _order("plugin", "rm", PLUGIN)
