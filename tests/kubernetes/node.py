"""A node: containerd with the handlers `graft` and `runc`, in a mount namespace of its own.

kubelet and kube-proxy live there as well. What they write outside of their directories (sysctls of the whole machine,
/var/lib/kubelet, /var/log/pods, /var/lib/cni) are files and directories of the laboratory's, bound over the machine's.
"""

import contextlib
import json
import subprocess
from pathlib import Path

from graft.bench.lab import Lab, wait_for
from tests.system.cri import PLACES_OF_CONTAINERD, Containerd

PODS, GRAFT_PODS, BRIDGE_PODS, SERVICES = "10.78.0.0/16", "10.78.0.0/24", "10.78.1.0/24", "10.79.0.0/24"
SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
PLACES = ("var/lib/kubelet", "var/lib/cni", "var/log/pods", "var/log/containers")

CONFIG = PLACES_OF_CONTAINERD + """
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/host:1"
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{root}/cni"
    conf_dir = "{root}/bridge"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "{root}/runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.graft]
      runtime_type = "io.containerd.runc.v2"
      pod_annotations = ["graft", "graft.*"]
      container_annotations = ["graft", "graft.*"]
      cni_conf_dir = "{root}/net"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.graft.options]
        BinaryName = "{wrapper}"
        Root = "{root}/runc"
"""


class Node(Containerd):
    """containerd of a node, and the namespace in which all of the node's daemons are."""

    within = ""  # its cgroups are the machine's

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.socket = f"{directory}/sock"
        self.holder = lab.spawn("unshare", "--mount", "--propagation", "private", "sleep", "1000000")
        self.private = lab.work / "machine"
        self.made: list[Path] = []  # directories that the machine lacked
        wait_for(lambda: Path(f"/proc/{self.holder.pid}/comm").read_text() == "sleep\n", "the mount namespace")
        self._bind()
        super().__init__(lab, directory)

    def _bind(self) -> None:
        for name in SYSCTLS:
            place = self.private / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(Path("/proc/sys", name).read_text())
            self._mount(place, f"/proc/sys/{name}")
        for name in PLACES:
            (self.private / name).mkdir(parents=True)
            if not Path("/", name).is_dir():
                Path("/", name).mkdir(parents=True)
                self.made.append(Path("/", name))
            self._mount(self.private / name, f"/{name}")

    def stop(self) -> None:
        super().stop()
        for place in self.made:
            with contextlib.suppress(OSError):  # something of the machine's is there by now
                place.rmdir()

    def _mount(self, source: Path, target: str) -> None:
        self._enter("mount", "--bind", str(source), target)

    def _enter(self, *argv: str) -> None:
        subprocess.run((*self.inside(), *argv), check=True, timeout=20)

    def inside(self) -> tuple[str, ...]:
        return ("nsenter", "-m", "-t", str(self.holder.pid))

    def configuration(self) -> str:
        for name in ("bridge", "portmap"):
            (self.root / "cni" / name).symlink_to(f"/usr/lib/cni/{name}")
        (self.root / "bridge").mkdir()
        for directory, name, plugins in (
            ("bridge", "bridge", [bridge(self.root / "ipam"), {"type": "portmap", "capabilities": {"portMappings": True}}]),
            ("net", "graft", [_graft(self.root)]),
        ):
            document = {"cniVersion": "1.0.0", "name": f"{self.network}-{name}", "plugins": plugins}
            (self.root / directory / f"{name}.conflist").write_text(json.dumps(document))
        return CONFIG.format(version=2, root=self.root, wrapper=self.wrapper())


def bridge(data: Path | str) -> dict[str, object]:
    """The plugin of pods that are not graft's; their addresses are kept in the directory @data."""
    routes = [{"dst": "0.0.0.0/0"}]
    ipam = {"type": "host-local", "subnet": BRIDGE_PODS, "dataDir": str(data), "routes": routes}
    return {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": ipam}


def _graft(root: Path) -> dict[str, object]:
    ipam = {"type": "host-local", "subnet": GRAFT_PODS, "dataDir": str(root / "ipam")}
    capabilities = {"portMappings": True}
    return {"type": "graft-cni", "capabilities": capabilities, "resolver": False, "network": PODS, "ipam": ipam}
