"""Where graftd lives on the host: its cgroup2, its bpffs directory, its run directory."""

import contextlib
import os
from pathlib import Path

from graft.errors import Failure, Refused, from_oserror
from graft.kernel import linux
from graft.kernel.mounts import reachable

BPFFS = Path("/sys/fs/bpf")


def run_dir() -> Path:
    """The directory of graftd's sockets and state. GRAFT_RUN_DIR moves a whole instance, as the tests do."""
    return Path(os.environ.get("GRAFT_RUN_DIR", "/run/graft"))


def pin_dir() -> Path:
    """The directory of bpffs in which this instance pins its maps and links."""
    return BPFFS / run_dir().name


def cgroup2_root() -> Path:
    """The mount point of cgroup2: /sys/fs/cgroup, or another beside cgroup v1. Raises Failure if there is none."""
    for mount in reachable("cgroup2"):
        if mount.root == "/":
            return Path(mount.place)
    raise no_cgroup2()


def no_cgroup2() -> Failure:
    """What is to be done where none is mounted."""
    return Failure(
        "no cgroup2 is mounted",
        hint="mount -t cgroup2 none /sys/fs/cgroup/unified; 'ip netns exec' hides it: start graftd outside",
    )


def delegate() -> None:
    """Let no process of a cgroup namespace move one into, or out of, a cgroup that the namespace does not show.

    That is the mount option `nsdelegate` (cgroups(7), "Cgroup delegation: delegating to a cgroup namespace"), which
    systemd sets. Without it root of a direct container leaves its cgroup by the root directory of any process that it
    may look at, whatever is mounted over its own. Raises Refused, OSError.
    """
    root = cgroup2_root()
    found = _super_options(root)
    if "nsdelegate" in found:
        return
    kept = os.statvfs(root).f_flag & (linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    kept |= linux.MS_RELATIME
    linux.mount("none", str(root), None, linux.MS_REMOUNT | kept, ",".join([*found, "nsdelegate"]))
    if "nsdelegate" not in _super_options(root):
        raise Refused(
            f"{root} is mounted without nsdelegate: a direct container could leave its cgroup",
            hint=f"on the host: mount -o remount,nsdelegate {root}",
            code="EPERM",
        )


def _super_options(root: Path) -> list[str]:
    """The options of the cgroup2 mounted at @root that are the file system's own."""
    for mount in reachable("cgroup2"):
        if mount.place == str(root):
            return [word for word in mount.options if word not in ("rw", "ro")]
    return []


def relay_cgroup(root: Path) -> Path:
    """The cgroup of this instance's graft-relays in the cgroup2 mounted at @root.

    It is not in graftd's, which has the greatest weight, and ends with the service: they carry bytes of containers.
    """
    return root / f"{run_dir().name}-relay"


def own_cgroup(root: Path) -> Path:
    """The directory of this process's cgroup, in the cgroup2 mounted at @root. Raises Failure if it has none."""
    path = cgroup_of(os.getpid())
    if not path:
        raise Failure("this process has no cgroup in cgroup2")
    return root / path.lstrip("/")


def cgroup_of(pid: int) -> str:
    """The path of a process's cgroup below the root of cgroup2, as graftd's cgroup namespace has it; "" of none.

    Raises OSError if the process has ended.
    """
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:].removesuffix(" (deleted)")
    return ""


def enter_cgroup(root: Path, *, managed: bool, program: str) -> Path:
    """Enter the cgroup in which graftd makes sockets, and return it. Raises Failure.

    Under a service manager (@managed) that is the service's own; otherwise graftd makes one. If a process of the name
    @program is there, it is another graftd's, in another netns and with another /run: the pins would be shared, too.
    """
    if managed:
        return own_cgroup(root)
    path = root / run_dir().name
    try:
        path.mkdir(exist_ok=True)
        other = next((pid for pid in (path / "cgroup.procs").read_text().split() if linux.comm(pid) == program), "")
        if other:
            raise Failure(
                f"the graftd with pid {other} has the cgroup {path}", hint="give this one another GRAFT_RUN_DIR"
            )
        (path / "cgroup.procs").write_text("0")
    except OSError as error:
        raise from_oserror(f"enter the cgroup {path}", error, hint="'graft doctor' says what is missing") from None
    with contextlib.suppress(OSError):  # works only with the cpu controller on; many containers wait for graftd
        (path / "cpu.weight").write_text("10000")
    return path


def leave_cgroup(root: Path, *, remove: bool) -> None:
    """Move this process to the root cgroup. @remove: remove graftd's cgroup, and with it the policy."""
    (root / "cgroup.procs").write_text("0")
    if remove:
        with contextlib.suppress(OSError):
            (root / run_dir().name).rmdir()


def join_cgroups(pid: int, model: int) -> None:
    """Put the process @pid into the CPU and memory cgroups of the process @model, so that its work is charged there.

    Only cgroup v1 allows that. In cgroup v2 a process has one cgroup: it would leave graftd's, and graftd's BPF
    programs would not run for the sockets that it makes. Best effort: errors are ignored.
    """
    roots = {}
    for mount in reachable("cgroup"):
        if mount.root == "/":
            roots.update(dict.fromkeys(mount.options, Path(mount.place)))
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{model}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for name in {"cpu", "memory"}.intersection(controllers.split(",")) & roots.keys():
                with contextlib.suppress(OSError):
                    (roots[name] / path.lstrip("/") / "cgroup.procs").write_text(str(pid))


def check_run_dir(directory: Path) -> None:
    """Raise Refused if users other than root may change what is in the run directory."""
    found = directory.stat()
    if found.st_uid or found.st_mode & 0o022:
        raise Refused(
            f"{directory} must be writable by root only (uid {found.st_uid}, mode {found.st_mode & 0o777:o})",
            hint=f"remove it, or: chown root {directory}; chmod 755 {directory}",
            code="EPERM",
        )


def mount_bpffs() -> None:
    """Mount bpffs at /sys/fs/bpf, unless it is mounted there. Raises OSError."""
    if not os.path.ismount(BPFFS):
        linux.mount("bpf", str(BPFFS), "bpf", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
