"""graft-runtime with runc and crun: any seccomp profile loads, and does what it did; what is wrong is refused."""

import json
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from graft.bench.lab import wait_for
from tests.conftest import need
from tests.profiles import allow, profile
from tests.system.engines import RUNTIME, image

PROBE = """
import errno, os, socket
for family in range(46):
    for kind in (1, 2, 3):
        try:
            s = socket.socket(family, kind)
            print(family, kind, 'grafted' if os.fstat(s.fileno()).st_uid >= 0x70000000 else 'ok')
            s.close()
        except OSError as error:
            print(family, kind, errno.errorcode[error.errno])
"""
NASTY = {
    "unix only": ("socket", allow(["socket"], (0, "EQ", 1))),
    "no raw": ("socket", allow(["socket"], (1, "NE", 3))),
    "ranges": ("socket", allow(["socket"], (0, "GE", 2), (1, "LT", 3))),
}


@pytest.fixture(scope="module")
def bundle(lab, tmp_path_factory):
    need("runc", "crun")
    directory = tmp_path_factory.mktemp("bundle")
    (directory / "rootfs").mkdir()
    subprocess.run(("tar", "-C", directory / "rootfs", "-xf", image(directory / "image.tar")), check=True)
    subprocess.run(("runc", "spec"), cwd=directory, check=True)
    lab.graft("endpoint", "show", check=True)
    return directory


def podmans():
    """Podman's own default profile, as it is for a container without capabilities added."""
    rules = json.loads(Path("/usr/share/containers/seccomp.json").read_text())
    kept = []
    for rule in rules["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if includes.get("caps") or "amd64" not in (includes.get("arches") or ["amd64"]):
            continue
        if "amd64" not in (excludes.get("arches") or ()):
            kept.append({k: v for k, v in rule.items() if k in ("names", "action", "args", "errnoRet") and v is not None})
    errors = {"defaultErrnoRet": rules["defaultErrnoRet"]} if "defaultErrnoRet" in rules else {}
    return profile(*kept) | {"defaultAction": rules["defaultAction"]} | errors


def nasty(name):
    """Podman's profile with another word on one call."""
    call, rule = NASTY[name]
    base = podmans()
    kept = [{**r, "names": [n for n in r["names"] if n != call]} for r in base["syscalls"]]
    return base | {"syscalls": [*(r for r in kept if r["names"]), rule]}


def configure(bundle, seccomp, argv, **annotations):
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    process = config["process"]
    process["terminal"], process["args"], process["rlimits"] = False, list(argv), []
    process["noNewPrivileges"] = False
    mounts = [m for m in config["mounts"] if m["destination"] not in ("/usr", "/etc", "/sys/fs/cgroup")]
    bound = [{"destination": p, "type": "bind", "source": p, "options": ["rbind", "ro"]} for p in ("/usr", "/etc")]
    config["mounts"] = [*mounts, *bound]
    config["annotations"] = {k.replace("_", "."): v for k, v in annotations.items()}
    config["linux"].pop("seccomp", None)
    if seccomp:
        config["linux"]["seccomp"] = seccomp
    path.write_text(json.dumps(config))


def command(lab, runtime, *, grafted=True):
    words = [str(RUNTIME), f"--graft-runtime={runtime}", f"--graft-run-dir={lab.run_dir}"] if grafted else [runtime]
    if runtime == "crun" and Path("/sys/fs/cgroup/unified").is_dir():  # it refuses cgroup v1 beside v2
        return ["unshare", "-m", "sh", "-c", 'umount /sys/fs/cgroup/unified; exec "$@"', "sh", *words]
    return words


def argv_of_run(lab, bundle, runtime, *, grafted=True, name="r"):
    return [*command(lab, runtime, grafted=grafted), "run", "--bundle", bundle, f"{lab.tag}-{name}"]


def run(lab, bundle, runtime, *, grafted=True):
    return lab.host(*argv_of_run(lab, bundle, runtime, grafted=grafted), cwd=bundle, timeout=30)


def refused(lab, bundle, text, *, name="r"):
    lab.refused(argv_of_run(lab, bundle, "runc", name=name), 1, text, cwd=bundle, timeout=30)


def detached(lab, *argv):
    """What stays behind holds no pipe of ours."""
    null = subprocess.DEVNULL
    subprocess.run(lab.in_host(*argv), check=True, stdin=null, stdout=null, stderr=null, timeout=30)


BEYOND = {"21", "34", "40", "42", "43"}  # AF_RDS, AF_ISDN, AF_VSOCK, AF_QIPCRTR, AF_SMC (graft/kernel/traps.py)


@pytest.mark.parametrize("runtime", ["runc", "crun"])
@pytest.mark.parametrize("name", ["unconfined", "podman", *NASTY])
def test_profiles(lab, bundle, runtime, name):
    seccomp = None if name == "unconfined" else podmans() if name == "podman" else nasty(name)
    argv = ("/usr/bin/python3", "-I", "-c", PROBE)
    configure(bundle, seccomp, argv)
    plain = run(lab, bundle, runtime, grafted=False)
    configure(bundle, seccomp, argv)
    ours = run(lab, bundle, runtime)
    assert (plain.returncode, ours.returncode) == (0, 0), plain.stderr + ours.stderr
    before, after = plain.stdout.splitlines(), ours.stdout.splitlines()
    assert len(before) == len(after) == 46 * 3
    for was, now in zip(before, after, strict=True):
        family, kind, verdict = was.split()
        if verdict == "ok" and family in ("2", "10") and kind in ("1", "2"):
            verdict = "grafted"
        if verdict in ("ok", "ENODEV", "ESOCKTNOSUPPORT") and family in BEYOND:
            verdict = "EAFNOSUPPORT"
        if family != "4":  # AF_GRAFT's number
            assert now == f"{family} {kind} {verdict}"


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_exec_is_grafted(lab, bundle, runtime):
    configure(bundle, podmans(), ("/busybox", "sleep", "60"), graft_publish="8601:80")
    name = f"{lab.tag}-exec-{runtime}"
    detached(lab, *command(lab, runtime), "run", "-d", "--bundle", bundle, name)
    try:
        wait_for(lambda: name in lab.containers(), "the container")
        told = [c for c in json.loads(lab.graft("ps", "-j").stdout) if c["name"] == name]
        assert told[0]["publish"] == ["8601:80/tcp"]
        code = "import os,socket; s=socket.socket(); s.bind(('',80)); s.listen(); print(os.fstat(s.fileno()).st_uid >> 28)"
        done = lab.host(*command(lab, runtime), "exec", name, "/usr/bin/python3", "-I", "-c", code, timeout=20)
        assert done.stdout == "7\n", done.stderr
        assert len([c for c in lab.containers() if c == name]) == 1
    finally:
        lab.host(*command(lab, runtime), "delete", "--force", name)
    wait_for(lambda: name not in lab.containers(), "its end")


REFUSALS = [
    ({"graft_publish": "80"}, "annotation 'graft.publish=80': publication '80' names one port"),
    ({"graft_egress": "10.0.0.0/8"}, "annotation 'graft.egress=10.0.0.0/8': egress rule '10.0.0.0/8', character 11"),
    ({"graft_endpoint_nope": "80"}, "rule '0.0.0.0:80=nope' names an unknown endpoint 'nope'"),
    ({"graft_color": "red"}, "annotation 'graft.color=red': unknown setting"),
    ({"graft_ip": "127.0.0.9"}, "annotation 'graft.ip=127.0.0.9': 127.0.0.9 is a loopback address"),
    ({"graft_family": "perhaps"}, "annotation 'graft.family=perhaps': the value is neither on nor off"),
]


@pytest.mark.parametrize(("annotations", "message"), REFUSALS)
def test_refusals(lab, bundle, annotations, message):
    configure(bundle, None, ("/busybox", "true"), **annotations)
    before = (bundle / "config.json").read_bytes()
    log = bundle / "log.json"
    words = command(lab, "runc")
    done = lab.host(*words, "--log", log, "--log-format", "json", "create", "--bundle", bundle, f"{lab.tag}-bad")
    assert done.returncode == 1
    assert done.stderr.startswith(f"graft: {message}")
    assert json.loads(log.read_text().splitlines()[-1])["msg"] == done.stderr.strip()
    assert (bundle / "config.json").read_bytes() == before
    log.unlink()


def test_a_listener_of_its_own_is_refused(lab, bundle):
    configure(bundle, podmans() | {"listenerPath": "/run/other.sock"}, ("/busybox", "true"))
    refused(lab, bundle, "has a listener of its own")
    config = json.loads((bundle / "config.json").read_text())
    config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "network"]
    (bundle / "config.json").write_text(json.dumps(config))
    done = run(lab, bundle, "runc")
    config["linux"]["namespaces"].append({"type": "network"})
    (bundle / "config.json").write_text(json.dumps(config))
    assert "the container shares the host's network namespace" in done.stderr


def test_without_graftd_nothing_is_created(lab, bundle, tmp_path):
    configure(bundle, None, ("/busybox", "true"))
    words = [RUNTIME, f"--graft-run-dir={tmp_path}"]
    done = lab.host(*words, "run", "--bundle", bundle, f"{lab.tag}-none")
    assert done.returncode == 1
    assert done.stderr == "graft: graftd is not running (start it: systemctl start graftd, or graftd as root)\n"
    assert lab.host(*words, "list", "-q").returncode == 0  # other verbs need no graftd


def test_two_at_once_do_not_get_one_port(lab, bundle):
    """A port is taken from create on, while the creating process lives."""
    configure(bundle, None, ("/busybox", "sleep", "20"), graft_publish="8602:80")
    name = f"{lab.tag}-first"
    words = command(lab, "runc")
    detached(lab, *words, "create", "--bundle", bundle, name)
    try:
        configure(bundle, None, ("/busybox", "true"), graft_publish="8602:81")
        refused(lab, bundle, f"host port is published by container '{name}'", name="second")
    finally:
        lab.host(*words, "delete", "--force", name)


@pytest.mark.alone
def test_create_takes_10_ms_more_at_most(lab, bundle):
    """What graft-runtime adds before it becomes runc: measured with `true` for a runtime, in pairs."""

    def seconds(argv):
        began = time.perf_counter()
        subprocess.run(argv, check=True)
        return time.perf_counter() - began

    configure(bundle, podmans(), ("/busybox", "true"))
    original = (bundle / "config.json").read_text()
    added = []
    ours = [RUNTIME, "--graft-runtime=/bin/true", f"--graft-run-dir={lab.run_dir}"]
    for _ in range(15):
        (bundle / "config.json").write_text(original)
        bare = seconds(["/bin/true", "create", "--bundle", bundle, "x"])
        added.append(seconds([*ours, "create", "--bundle", bundle, "x"]) - bare)
    assert statistics.median(added) < 0.010


def test_plugins_of_docker_are_no_containers(tmp_path):
    """dockerd starts its managed plugins by its default runtime, also before graftd, and with the host's network."""
    ours = [str(RUNTIME), "--graft-runtime=/bin/echo", f"--graft-run-dir={tmp_path}"]
    for verb in ("create", "restore"):
        words = ["--root", "/run/docker/runtime-runc/plugins.moby", verb, "--bundle", str(tmp_path), "x"]
        done = subprocess.run([*ours, *words], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, " ".join(words) + "\n"), done.stderr
    for root in ("/run/docker/runtime-runc/moby", "/plugins.moby/moby", "plugins.moby", "/x/plugins.moby.x"):
        done = subprocess.run([*ours, "--root", root, "create", "--bundle", str(tmp_path), "x"], capture_output=True, text=True)
        assert (done.returncode, "graftd is not running" in done.stderr) == (1, True), root


@pytest.mark.parametrize("text", ["{", "[]", '{"linux": 5}', '{"linux": {"namespaces": [{}]}}', '{"annotations": 1}'])
def test_a_bundle_that_is_none(lab, bundle, text):
    path = bundle / "config.json"
    before = path.read_text()
    path.write_text(text)
    done = lab.host(*command(lab, "runc"), "create", "--bundle", bundle, f"{lab.tag}-bad")
    assert (done.returncode, path.read_text()) == (1, text)
    assert len(done.stderr.splitlines()) == 1
    assert "config.json" in done.stderr
    assert done.stderr.startswith("graft: ")
    assert "does not answer" not in done.stderr
    path.write_text(before)


@pytest.mark.parametrize(
    ("annotations", "hint"),
    [({}, "(give it its own: --network none)"), ({"io.kubernetes.cri.container-type": "sandbox"}, "hostNetwork: true and take hostPort")],
)
def test_the_hosts_network(lab, bundle, annotations, hint):
    """It is refused, and the hint is for who made the container: a pod's author has no --network."""
    configure(bundle, None, ("/busybox", "true"))
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    before = config["linux"]["namespaces"]
    config["linux"]["namespaces"] = [n for n in before if n["type"] != "network"]
    path.write_text(json.dumps(config | {"annotations": annotations}))
    try:
        refused(lab, bundle, hint)
    finally:
        config["linux"]["namespaces"] = before
        path.write_text(json.dumps(config))
