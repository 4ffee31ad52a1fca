"""A pod's pause container has no graft-sup before its first call, and that call is not lost, whatever dies before it."""

import json
import select
import subprocess

import pytest

from graft.bench.lab import wait_for
from tests.conftest import kill, need, python
from tests.system.engines import RUNTIME, image
from tests.system.told import Told

SANDBOX = {"io.kubernetes.cri.container-type": "sandbox"}
CRIO = {"io.kubernetes.cri-o.ContainerType": "sandbox"}
CONTAINER = {"io.kubernetes.cri.container-type": "container"}
STEPS = """
import errno, socket, sys
print('up', flush=True)
for line in sys.stdin:
    try:
        s = socket.socket()
        if line.strip() == 'listen': s.listen()
        print('OK', flush=True)
    except OSError as e: print(errno.errorcode[e.errno], flush=True)
"""


class Container(Told):
    """A container of runc's, with graft's runtime, that makes a socket when it is told."""

    def __init__(self, lab, directory, name, annotations, joins=""):
        self.name = f"{lab.tag}-{name}"
        self.bundle = directory / name
        (self.bundle / "rootfs").mkdir(parents=True)
        subprocess.run(("tar", "-C", self.bundle / "rootfs", "-xf", image(directory / "image.tar")), check=True)
        subprocess.run(("runc", "spec"), cwd=self.bundle, check=True)
        config = json.loads((self.bundle / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": list(python(STEPS)), "rlimits": []}
        mounts = [m for m in config["mounts"] if m["destination"] != "/sys/fs/cgroup"]
        bound = [{"destination": p, "type": "bind", "source": p, "options": ["rbind", "ro"]} for p in ("/usr", "/etc")]
        config["mounts"] = [*mounts, *bound]
        config["annotations"] = annotations
        for namespace in config["linux"]["namespaces"]:
            if namespace["type"] == "network" and joins:
                namespace["path"] = joins
        (self.bundle / "config.json").write_text(json.dumps(config))
        argv = (RUNTIME, "--graft-runtime=runc", f"--graft-run-dir={lab.run_dir}", "run", "--bundle", self.bundle, self.name)
        self.process = lab.spawn(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == "up\n"

    def waits(self):
        """Is there no answer for a while?"""
        return not select.select([self.process.stdout], [], [], 0.5)[0]


@pytest.fixture
def machine(own_lab):
    need("runc")
    own_lab.graft("endpoint", "show", check=True)
    return own_lab


def netns_of(lab):
    (row,) = json.loads(lab.graft("ps", "-j", check=True).stdout)
    return row["netns_path"]


@pytest.mark.parametrize("annotations", [SANDBOX, CRIO], ids=["containerd", "CRI-O"])
def test_no_helper_before_its_first_call(machine, tmp_path, annotations):
    pause = Container(machine, tmp_path, "pause", annotations)
    main = Container(machine, tmp_path, "main", CONTAINER, joins=netns_of(machine))
    (helper,) = wait_for(machine.helper_pids, "main's graft-sup")
    assert main.does("socket") == "OK"
    assert machine.helper_pids() == [helper]
    assert pause.does("socket") == "OK"
    wait_for(lambda: len(machine.helper_pids()) == 2, "its own graft-sup")
    assert [pause.does(word) for word in ("socket", "listen")] == ["OK", "OK"]
    main.end()
    pause.end()
    wait_for(lambda: not machine.containers(), "their end")


def test_graftd_is_killed_before_its_first_call(machine, tmp_path):
    """By the keeper's copy of the listener."""
    pause = Container(machine, tmp_path, "pause", SANDBOX)
    wait_for(machine.containers, "the container")  # runc hands its listener over, and waits for no answer
    kill(machine.daemon_pid())
    assert pause.does("socket") == "OK"
    wait_for(machine.helper_pids, "its graft-sup")
    assert [pause.does(word) for word in ("socket", "listen")] == ["OK", "OK"]
    pause.end()


def test_graftd_and_keeper_are_killed_before_its_first_call(machine, tmp_path):
    """By the copy that the other container's graft-sup keeps, twice; then by its own."""
    pause = Container(machine, tmp_path, "pause", SANDBOX)
    main = Container(machine, tmp_path, "main", CONTAINER, joins=netns_of(machine))
    wait_for(machine.helper_pids, "main's graft-sup")
    assert main.does("socket") == "OK"  # graftd has done with starting it
    for _ in range(2):
        kill(machine.guard_pid(), machine.keeper_pid(), machine.daemon_pid())
        wait_for(lambda: not machine.daemon_pid(), "graftd's end")
        machine.graft("run", "true", check=True)
        wait_for(lambda: len(machine.helper_pids()) == 1, "the end of the other's")
    kill(machine.guard_pid(), machine.keeper_pid(), machine.daemon_pid())
    wait_for(lambda: not machine.daemon_pid(), "graftd's end")
    pause.say("listen")
    assert pause.waits()
    machine.graft("run", "true", check=True)
    assert pause.hear() == "OK"
    wait_for(lambda: len(machine.helper_pids()) == 2, "its own graft-sup")
    kill(machine.guard_pid(), machine.keeper_pid(), machine.daemon_pid())
    wait_for(lambda: not machine.daemon_pid(), "graftd's end")
    assert pause.does("socket") == "OK"
    machine.graft("run", "true", check=True)
    assert [one.does("listen") for one in (pause, main)] == ["OK", "OK"]
    main.end()
    assert pause.does("socket") == "OK"
    pause.end()
    wait_for(lambda: not machine.containers(), "their end")
