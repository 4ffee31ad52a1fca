"""Plans of `graft install` and `graft uninstall`: which files of an engine change, before and after.

A plan is made and shown before anything is written. The first time that an existing file is changed, a copy is kept
beside it as NAME.before-graft. To uninstall removes what graft wrote, and keeps what others have written since.

Docker      /etc/docker/daemon.json gets a runtime (dockerd(8))
Podman      a hook (oci-hooks(5)); a network, of CNI or of netavark, with the plugin; a drop-in of containers.conf(5)
            that turns port reservation off, because conmon would hold the ports that the container's own sockets are
            to bind
containerd  config.toml gets, between two marks, a runtime handler with CNI networks of its own
"""

import contextlib
import difflib
import hashlib
import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from graft.errors import Failure, Refused, UsageError
from graft.kernel.routes import networks_of_the_host

HERE = Path(__file__).parents[1]
BACKUP = ".before-graft"
NAME = "graft"
BEGIN, END = "# graft: begin (graft uninstall containerd takes this out)", "# graft: end"
CAPABILITIES = {"portMappings": True, "aliases": True, "ips": True}  # of graft-cni
PODMAN_NETWORK = "/etc/cni/net.d/88-graft.conflist"
NETAVARK_NETWORK = "/etc/containers/networks/graft.json"
NETAVARK_PLUGIN = (
    "/usr/local/lib/netavark/graft"  # of netavark_plugin_dirs (containers.conf(5)); its name is the driver's
)
CNI_PLACES = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")
NETAVARK_PLUGINS = (4, 5)  # the first Podman whose netavark (1.5) has plugins
LEAST = {"docker": (20, 10), "podman": (4, 0), "containerd": (1, 6)}
PROGRAMS = {"docker": "dockerd", "podman": "podman", "containerd": "containerd"}
PACKAGES = {**PROGRAMS, "docker": "docker.io"}  # of Debian; its `docker` is another thing
RUNC = "io.containerd.runc.v2"  # the shim, which starts whatever BinaryName says
# what graft's handler has of its own; a name, or tables within, are nobody's to copy
HANDLER = (
    "runtime_type", "pod_annotations", "container_annotations", "cni_conf_dir", "cni_max_conf_num", "options",
    "runtime_path", "runtime_engine", "runtime_root",
)  # fmt: skip
CRI_TABLES = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}


class Change(NamedTuple):
    """A change of one file. @before, @after: its text, None for no file; with @link, a symbolic link's target."""

    path: Path
    before: str | None
    after: str | None
    link: bool = False

    @property
    def diff(self) -> str:
        """The change as diff(1) -u shows it; of a link, one line."""
        before, after = ((text or "").splitlines(keepends=True) for text in (self.before, self.after))
        if self.link:
            return f"{'link' if self.after else 'remove'} {self.path}{f' -> {self.after}' if self.after else ''}\n"
        old = str(self.path) if self.before is not None else "/dev/null"
        new = str(self.path) if self.after is not None else "/dev/null"
        lines = difflib.unified_diff(before, after, old, new)
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)

    def make(self) -> None:
        """Write, link or remove the file. A file is replaced atomically and keeps its mode. Raises Failure."""
        try:
            if self.after is None:
                self.path.unlink(missing_ok=True)
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.link:
                self.path.unlink(missing_ok=True)
                self.path.symlink_to(self.after)
                return
            kept = self.path.with_name(self.path.name + BACKUP)
            if self.before is not None and not kept.exists():
                shutil.copy2(self.path, kept)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_text(self.after)
            if self.before is not None:
                shutil.copymode(self.path, temporary)
            temporary.replace(self.path)
        except OSError as error:
            raise Failure(f"{self.path}: {error.strerror}") from None


class Plan(NamedTuple):
    """The changes, the command by which the engine reads them (empty: it needs none), and what that command does.

    @found: the engine's configuration, in words.
    """

    changes: list[Change]
    reload: list[str]
    note: str
    found: str = ""


class Options(NamedTuple):
    """Options of `graft install`."""

    root: Path = Path("/")  # the directory that has /etc and /usr
    runtime: str = ""  # runc or crun: what graft-runtime executes; "": the installed one, or runc
    subnet: str = ""  # of the network, as CIDR; "": the installed one or the default
    swarm: bool = False  # make graft's runtime the default one, which services have
    network: str = ""  # of the pods of all nodes, as CIDR; "": the installed one, or the subnet alone


def _under(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {getattr(error, 'strerror', None) or error}", code="EIO") from None


def changed(path: Path, after: str | None) -> list[Change]:
    """The change that leaves @path with the text @after, or removes it; none if it is so. Raises Refused."""
    before = _text(path)
    return [] if before == after else [Change(path, before, after)]


def linked(path: Path, target: str | None) -> list[Change]:
    """The change that makes @path a link to @target, or removes it; none if it is so. Raises Refused."""
    before = os.readlink(path) if path.is_symlink() else None
    if before is None and path.exists():
        raise Refused(f"{path} exists and is not graft's", hint="move it away", code="EEXIST")
    return [] if before == target else [Change(path, before, target, link=True)]


def program(name: str) -> str:
    """Return the path of the program @name that belongs to this installation of graft. Raises Failure."""
    places = [HERE / name, HERE.parent / "bin" / name, Path(os.path.dirname(sys.executable)) / name]
    found = next((p for p in places if os.access(p, os.X_OK)), None)
    if found is None:
        raise Failure(f"{name} is not built", hint="run 'make build'", code="ENOENT")
    return str(found)


def check_version(engine: str) -> str:
    """Return the version of @engine, and where its program is.

    Raises Refused if it is not installed, or is older than the oldest version that graft supports.
    """
    command = PROGRAMS[engine]
    path = shutil.which(command)
    if path is None and os.geteuid() != 0:
        path = shutil.which(command, path="/usr/sbin:/sbin")  # which users do not have in PATH
    if path is None:
        raise Refused(f"{command} is not installed", hint=f"apt-get install {PACKAGES[engine]}", code="ENOENT")
    told = subprocess.run((path, "--version"), capture_output=True, text=True, timeout=20).stdout
    numbers = re.search(r"(\d+)\.(\d+)(\.\d+)*", told)
    if numbers is None:
        raise Refused(f"{command} --version prints no version: '{told.strip()}'", code="EPROTO")
    version = int(numbers[1]), int(numbers[2])
    if version < LEAST[engine]:
        least = ".".join(map(str, LEAST[engine]))
        raise Refused(
            f"{engine} {numbers[0]} is not supported", hint=f"{engine} {least} or later", code="EPROTONOSUPPORT"
        )
    return f"{numbers[0]} ({path})"


def _configuration(path: Path, text: str | None, what: str = "") -> str:
    return f"{path}{what}" if text is not None else f"no {path} yet"


# -- Docker --


def docker(options: Options, *, install: bool, path: Path | None = None) -> Plan:
    """Plan the runtime `graft` in daemon.json, for swarm as the default. Raises Refused, UsageError or Failure.

    @path: of the file; default: root's.
    """
    path = path or _under(options.root, "/etc/docker/daemon.json")
    text = _text(path)
    try:
        document = json.loads(text) if text and text.strip() else {}
    except ValueError as error:
        raise Refused(f"{path}: {error}", hint="fix it first", code="EINVAL") from None
    if not isinstance(document, dict) or not isinstance(document.get("runtimes", {}), dict):
        raise Refused(f"{path} is no configuration of dockerd", hint="fix it first", code="EINVAL")
    runtimes = dict(document.get("runtimes", {}))
    found = _configuration(path, text)
    if install:
        runtimes[NAME] = {"path": program("graft-runtime"), **_runtime_arguments(runtimes.get(NAME), options.runtime)}
    else:
        runtimes.pop(NAME, None)
    wanted = {**document, "runtimes": runtimes}
    if not runtimes:
        del wanted["runtimes"]
    if install and options.swarm:
        other = document.get("default-runtime", NAME)
        if other not in (NAME, "runc"):
            raise Refused(
                f"{path} has the default runtime '{other}'", hint="services get no other: remove it", code="EEXIST"
            )
        wanted["default-runtime"] = NAME
    if not install and document.get("default-runtime") == NAME:
        del wanted["default-runtime"]
    if wanted == {"runtimes": {}, **document} or wanted == document:
        return Plan([], ["systemctl", "reload", "docker"], "", found)
    kept = path.with_name(path.name + BACKUP)
    after = json.dumps(wanted, indent=2) + "\n" if wanted or kept.exists() else None
    return Plan(changed(path, after), ["systemctl", "reload", "docker"], "dockerd reads its runtimes again", found)


def _runtime_arguments(before: Any, runtime: str) -> dict[str, list[str]]:
    """The arguments of graft-runtime in daemon.json: those that were there, with @runtime if that is said."""
    found = before.get("runtimeArgs", []) if isinstance(before, dict) else []
    if runtime:
        found = [word for word in found if not str(word).startswith("--graft-runtime")]
        found += [f"--graft-runtime={runtime}"] if runtime != "runc" else []
    return {"runtimeArgs": found} if found else {}


# -- Podman --


def conflist(name: str, subnet: str, **options: Any) -> str:
    """A network of graft's for CNI; without a @subnet it gives no addresses. @options: of graft-cni."""
    ipam = {"ipam": {"type": "host-local", "subnet": subnet}} if subnet else {}
    plugin = {
        "type": "graft-cni",
        "capabilities": CAPABILITIES,
        **options,
        **ipam,
    }
    return json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": [plugin]}, indent=2) + "\n"


def network_list(path: Path, fresh: Callable[[], str], options: Options) -> str:
    """The text of the list of networks at @path, in which what others have written stays; @fresh if it is none.

    Of graft's own are the capabilities; --subnet and --network say the addresses again.
    """
    try:
        document = json.loads(_text(path) or "")
        plugin = _own_plugin(document)
    except (ValueError, KeyError, TypeError, StopIteration):
        return fresh()
    before = json.dumps(document)
    plugin["capabilities"] = CAPABILITIES
    if options.subnet and options.subnet not in _subnets(plugin):
        plugin["ipam"] = {"type": "host-local", "subnet": options.subnet}
    if options.network:
        plugin["network"] = options.network
    return (_text(path) or "") if json.dumps(document) == before else json.dumps(document, indent=2) + "\n"


def _own_plugin(document: Any) -> dict[str, Any]:
    """graft's plugin in a list. Raises KeyError, TypeError, StopIteration."""
    found: dict[str, Any] = next(p for p in document["plugins"] if p["type"] == "graft-cni")
    return found


def _subnets(plugin: dict[str, Any]) -> list[str]:
    """The subnets of host-local in a plugin of a list."""
    ipam = plugin.get("ipam") or {}
    ranges = [one for group in ipam.get("ranges") or [] for one in group]
    return [str(one["subnet"]) for one in (ipam, *ranges) if "subnet" in one]


def podman_hook(program: str, *argv: str) -> str:
    """The file of an OCI hook of Podman's, for the containers that have an annotation of graft's (oci-hooks(5))."""
    hook = {
        "version": "1.0.0",
        "hook": {"path": program, "args": argv},
        "when": {"annotations": {r"^graft([./].*)?$": ".*"}},
        "stages": ["precreate"],
    }
    return json.dumps(hook, indent=2) + "\n"


def podman_network(name: str, subnet: str) -> str:
    """A network of graft's as Podman with the netavark backend keeps it (`podman network inspect`).

    Without a @subnet it gives no addresses, and so no names.
    """
    subnets = [{"subnet": subnet, "gateway": str(ipaddress.ip_network(subnet)[1])}] if subnet else []
    document = {
        "name": name,
        "id": hashlib.sha256(name.encode()).hexdigest(),
        "driver": NAME,
        "created": "2026-01-01T00:00:00Z",
        "subnets": subnets,
        "ipv6_enabled": ":" in subnet,
        "internal": False,
        "dns_enabled": bool(subnet),
        "ipam_options": {"driver": "host-local" if subnet else "none"},
    }
    return json.dumps(document, indent=2) + "\n"


def _subnet(path: Path) -> str:
    """Return the subnet in the network of graft's at @path; "" if there is none."""
    try:
        document = json.loads(_text(path) or "")
        if "plugins" in document:
            return _subnets(_own_plugin(document))[0]
        return str(document["subnets"][0]["subnet"])
    except (ValueError, KeyError, IndexError, TypeError, StopIteration):
        return ""


def _default_subnet(text: str) -> str:
    """@text, a CIDR, if no network of the host's overlaps it. Raises Refused."""
    wanted, known = ipaddress.ip_network(text), list[ipaddress.IPv4Network | ipaddress.IPv6Network]()
    with contextlib.suppress(OSError):  # ip(8) is missing, as `graft doctor` says
        known = networks_of_the_host()
    for other in known:
        if other.version == wanted.version and other.overlaps(wanted):
            raise Refused(f"{text}, the default: this host has a route to {other}", hint="--subnet CIDR")
    return text


def _cni_place(root: Path) -> Path:
    return next((p for place in CNI_PLACES if (p := _under(root, place)).is_dir()), _under(root, CNI_PLACES[0]))


def backend() -> str:
    """The backend of Podman's networks, netavark or cni (`podman info`); "" if it is a netavark without plugins.

    Raises Failure.
    """
    command = ("podman", "info", "--format", "{{.Host.NetworkBackend}} {{.Version.Version}}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"podman info: {error}") from None
    found = re.match(r"(cni|netavark) (\d+)\.(\d+)", done.stdout)
    if done.returncode or found is None:
        raise Failure(f"podman info: {(done.stderr or done.stdout).strip()}")
    plugins = found[1] == "cni" or (int(found[2]), int(found[3])) >= NETAVARK_PLUGINS
    return found[1] if plugins else ""


def podman(options: Options, *, install: bool) -> Plan:
    """Plan Podman's hook, the network `graft`, and no port reservation. Raises Refused or Failure."""
    root = options.root
    runtime = program("graft-runtime")
    conf = "# conmon would hold the ports that the container's own sockets are to have\n[engine]\n"
    kinds = {"cni": PODMAN_NETWORK, "netavark": NETAVARK_NETWORK}
    kind = backend() if install else ""
    before = next(filter(None, (_subnet(_under(root, path)) for path in kinds.values())), "")
    subnet = options.subnet or before or (_default_subnet("10.97.0.0/16") if install else "")
    listed = network_list(_under(root, PODMAN_NETWORK), lambda: conflist(NAME, subnet), options)
    files: dict[str, str | None] = {
        "/usr/share/containers/oci/hooks.d/graft.json": podman_hook(runtime, "graft-hook"),
        PODMAN_NETWORK: listed if kind == "cni" else None,
        NETAVARK_NETWORK: podman_network(NAME, subnet) if kind == "netavark" else None,
        "/etc/containers/containers.conf.d/graft.conf": f"{conf}enable_port_reservation = false\n",
    }
    cni = program("graft-cni") if kind == "cni" or _containerd_uses(root) else None
    changes = linked(_cni_place(root) / "graft-cni", cni)
    netavark = program("graft-netavark") if kind == "netavark" else None
    changes += linked(_under(root, NETAVARK_PLUGIN), netavark)
    for name, text in files.items():
        changes += changed(_under(root, name), text if install else None)
    return Plan(changes, [], "", f"networks by {kind or 'a netavark without plugins'}")


def _containerd_uses(root: Path) -> bool:
    return BEGIN in (_text(_under(root, "/etc/containerd/config.toml")) or "")


# -- containerd --


def containerd(options: Options, *, install: bool) -> Plan:
    """Plan containerd's runtime handler `graft`, with its own CNI networks. Raises Refused, UsageError or Failure."""
    root = options.root
    path = _under(root, "/etc/containerd/config.toml")
    before = _text(path)
    without = _without_marks(path, before or "version = 2\n")
    document = _toml(path, without)
    version = document.get("version", 1)
    if version not in CRI_TABLES:
        known = " and ".join(map(str, CRI_TABLES))
        raise Refused(
            f"{path} has version {version}, and graft knows {known}",
            hint="convert it: containerd config migrate"
            if version == 1
            else "write a runtime for graft-runtime by hand",
            code="EPROTONOSUPPORT",
        )
    table = CRI_TABLES[version]
    cri = (document.get("plugins") or {}).get(table) or {}
    section = cri.get("containerd") or {}
    runtimes = section.get("runtimes") or {}
    if NAME in runtimes:
        raise Refused(f"{path} has a runtime '{NAME}' that graft did not write", hint="remove it", code="EEXIST")
    place = _bin_dir(cri.get("cni") or {})
    nets = "/etc/cni/graft.d"
    after: str | None = None if before is None else without
    if install:
        handler = _handler(table, nets, options.runtime, *_stood_in_for(section), alone=not runtimes)
        after = f"{without.rstrip()}\n\n{handler}"
        _toml(path, after)
    podman_uses = _under(root, PODMAN_NETWORK).exists()
    shared = podman_uses and _under(root, str(place)) == _cni_place(root)
    changes = linked(_under(root, str(place)) / "graft-cni", program("graft-cni") if install or shared else None)
    pods = _under(root, f"{nets}/10-graft.conflist")

    def fresh() -> str:
        more = {"network": options.network} if options.network else {}
        return conflist("graft-pods", options.subnet or _default_subnet("10.86.0.0/16"), resolver=False, **more)

    changes += changed(pods, network_list(pods, fresh, options) if install else None)
    changes += changed(path, after)
    return Plan(
        changes,
        ["systemctl", "restart", "containerd"],
        "containerd reads it at its start; pods keep running",
        _configuration(path, before, f" of version {version}"),
    )


def _bin_dir(cni: dict[str, Any]) -> Path:
    """Where containerd looks for CNI plugins: `bin_dirs` since 2.1, `bin_dir` before."""
    return Path(next(iter(cni.get("bin_dirs") or ()), "") or cni.get("bin_dir") or "/opt/cni/bin")


def _stood_in_for(section: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the runtime has that pods have without a RuntimeClass, and graft's handler has as well; its options.

    SystemdCgroup is one of them: without it a pod is outside of the slices that kubelet makes for it (kubeadm's
    default), and has none of its limits.
    """
    runtimes = section.get("runtimes") or {}
    base = runtimes.get(section.get("default_runtime_name") or "runc") or runtimes.get("runc") or {}
    if base.get("runtime_type", RUNC) != RUNC:
        return {}, {}
    options = {name: value for name, value in (base.get("options") or {}).items() if name != "BinaryName"}
    keys = {name: value for name, value in base.items() if name not in HANDLER and not isinstance(value, dict)}
    return keys, options


def _handler(
    table: str, nets: str, runtime: str, more: dict[str, Any], options: dict[str, Any], *, alone: bool
) -> str:
    """Return the lines for config.toml. Raises UsageError.

    @more, @options: further keys, and of its options. @alone: the file names no runtime yet. containerd drops its
    default runc as soon as the file names one, so that runc has to be written as well.
    """
    runtimes = f'plugins."{table}".containerd.runtimes'
    where = f"{runtimes}.{NAME}"
    default = f'[{runtimes}.runc]\n  runtime_type = "{RUNC}"\n' if alone else ""
    keys = "".join(f"  {name} = {json.dumps(value)}\n" for name, value in more.items())
    copied = "".join(f"    {name} = {json.dumps(value)}\n" for name, value in options.items())
    binary = program("graft-runtime")
    if runtime not in ("", "runc"):
        raise UsageError(f"containerd calls graft-runtime without options: its runtime is runc, not '{runtime}'")
    return f"""{BEGIN}
{default}[{where}]
  runtime_type = "{RUNC}"
  pod_annotations = ["graft", "graft.*"]
  container_annotations = ["graft", "graft.*"]
  cni_conf_dir = "{nets}"
{keys}  [{where}.options]
    BinaryName = "{binary}"
{copied}{END}
"""


def _without_marks(path: Path, text: str) -> str:
    first, last = text.find(BEGIN), text.find(END)
    if first < 0 and last < 0:
        return text
    if first < 0 or last < first:
        raise Refused(f"{path}: one of graft's two marks is missing", hint=f"'{BEGIN}' ... '{END}'", code="EINVAL")
    return text[:first].rstrip("\n") + "\n" + text[last + len(END) :].lstrip("\n")


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path}: {error}", hint="fix it first", code="EINVAL") from None


ENGINES: dict[str, Callable[..., Plan]] = {"docker": docker, "podman": podman, "containerd": containerd}
