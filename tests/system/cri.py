"""containerd with its CRI plugin, an instance of its own, and a client of that: Kubernetes' runtime.v1 over gRPC.

The messages are those parts of kubernetes/cri-api's api.proto that the tests need; `name=NUMBER:type`, where no type
is a string, i an integer, b bytes, map a map of strings, * repeated.
"""

import hashlib
import io
import json
import os
import signal
import socket
import struct
import subprocess
import tarfile
import time
import urllib.parse
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from graft.bench.lab import TIMEOUT, Lab, wait_for
from graft.engines import install
from graft.engines.install import CRI_TABLES
from graft.kernel import linux
from tests.system.engines import ROOT, Engine, alone, engine_version, image

MESSAGES = """
VersionRequest version=1
VersionResponse version=1 runtime_name=2
RunPodSandboxRequest config=1:PodSandboxConfig runtime_handler=2
RunPodSandboxResponse pod_sandbox_id=1
StopPodSandboxRequest pod_sandbox_id=1
StopPodSandboxResponse
RemovePodSandboxRequest pod_sandbox_id=1
RemovePodSandboxResponse
PodSandboxStatusRequest pod_sandbox_id=1
PodSandboxStatusResponse status=1:PodSandboxStatus
PodSandboxStatus id=1 state=3:i network=5:PodSandboxNetworkStatus
PodSandboxNetworkStatus ip=1
ListPodSandboxRequest
ListPodSandboxResponse items=1:PodSandbox*
PodSandbox id=1
PodSandboxConfig metadata=1:PodSandboxMetadata hostname=2 log_directory=3 dns_config=4:DNSConfig
  port_mappings=5:PortMapping* annotations=7:map linux=8:LinuxPodSandboxConfig
DNSConfig servers=1:* searches=2:* options=3:*
PodSandboxMetadata name=1 uid=2 namespace=3
PortMapping protocol=1:i container_port=2:i host_port=3:i host_ip=4
LinuxPodSandboxConfig cgroup_parent=1 security_context=2:SecurityContext
SecurityContext namespace_options=1:NamespaceOption seccomp=9:SecurityProfile
NamespaceOption network=1:i pid=2:i
SecurityProfile profile_type=1:i
CreateContainerRequest pod_sandbox_id=1 config=2:ContainerConfig sandbox_config=3:PodSandboxConfig
CreateContainerResponse container_id=1
ContainerConfig metadata=1:ContainerMetadata image=2:ImageSpec command=3:* mounts=7:Mount* log_path=11
  linux=15:LinuxContainerConfig
ContainerMetadata name=1
ImageSpec image=1
Mount container_path=1 host_path=2 readonly=3:i
LinuxContainerConfig security_context=2:ContainerSecurityContext
ContainerSecurityContext namespace_options=3:NamespaceOption readonly_paths=14:* seccomp=15:SecurityProfile
StartContainerRequest container_id=1
StartContainerResponse
ExecSyncRequest container_id=1 cmd=2:* timeout=3:i
ExecSyncResponse stdout=1:b stderr=2:b exit_code=3:i
PortForwardRequest pod_sandbox_id=1 port=2:i*
PortForwardResponse url=1
ImageStatusRequest image=1:ImageSpec
ImageStatusResponse image=1:ImageSpec
"""
PACKAGE = "runtime.v1"
Field = descriptor_pb2.FieldDescriptorProto
KINDS = {"": Field.TYPE_STRING, "i": Field.TYPE_INT64, "b": Field.TYPE_BYTES}

# containerd's own: its places, and the plugins that this machine has something for
PLACES_OF_CONTAINERD = """
version = {version}
root = "{root}/data"
state = "{root}/state"
required_plugins = ["io.containerd.grpc.v1.cri"]
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.restart",
  "io.containerd.internal.v1.opt"]
[grpc]
  address = "{root}/sock"
"""
CONFIG = PLACES_OF_CONTAINERD + """
{images}
[plugins."{cri}"]
  {pause}
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."{cri}".cni]
    {place}
    conf_dir = "{root}/net"
  [plugins."{cri}".containerd]
    {snapshotter}
    default_runtime_name = "runc"
    [plugins."{cri}".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."{cri}".containerd.runtimes.runc.options]
        Root = "{root}/runc"
"""
IMAGES = """
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "native"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "localhost/host:1"
"""
BIN_DIRS = (2, 1)  # the first containerd that has a list of them


# It gives each pod a share of the CPU, which is not to be had where cgroup2 has no such controller
WITHOUT_SHARES = """#!/bin/sh
for word; do
    [ "$before" != --bundle ] || /usr/bin/python3 -I -c '
import json, sys
config = json.load(open(sys.argv[1]))
config["linux"].pop("resources", None)
json.dump(config, open(sys.argv[1], "w"))' "$word/config.json"
    before=$word
done
"""


def _configuration(root: Path) -> str:
    """containerd's, in the newest version that the installed one knows, before graft is installed."""
    table: dict[str, str] = {"images": "", "pause": "", "snapshotter": ""}
    table["place"] = f'bin_dir = "{root}/cni"'
    if engine_version("containerd") < (2, 0):
        table |= {"pause": 'sandbox_image = "localhost/host:1"', "snapshotter": 'snapshotter = "native"'}
        return CONFIG.format(version=2, root=root, cri=CRI_TABLES[2], **table)
    if engine_version("containerd") >= BIN_DIRS:
        table["place"] = f'bin_dirs = ["{root}/cni"]'
    return CONFIG.format(version=3, root=root, cri=CRI_TABLES[3], **(table | {"images": IMAGES}))


def cni(lab: Lab, command: str, config: str | dict[str, Any], **environment: str) -> tuple[int, Any]:
    """graft-cni as a runtime calls it: its status, and the JSON that it printed."""
    env = {
        "PATH": os.environ["PATH"],
        "GRAFT_RUN_DIR": str(lab.run_dir),
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "abc",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/usr/lib/cni",
        **environment,
    }
    text = config if isinstance(config, str) else json.dumps(config)
    done = subprocess.run(
        lab.in_host(ROOT / "bin/graft-cni"), input=text, capture_output=True, text=True, env=env, timeout=20
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="cri.proto", package=PACKAGE, syntax="proto3")
    for line in MESSAGES.replace("\n  ", " ").strip().splitlines():
        name, *fields = line.split()
        message = file.message_type.add(name=name)
        for field in fields:
            label, _, rest = field.partition("=")
            number, _, kind = rest.partition(":")
            entry = message.field.add(name=label, number=int(number), label=Field.LABEL_OPTIONAL)
            if kind.endswith("*") or kind == "map":
                entry.label = Field.LABEL_REPEATED
            kind = kind.rstrip("*")
            if kind == "map":
                pair = message.nested_type.add(name="".join(p.title() for p in label.split("_")) + "Entry")
                pair.options.map_entry = True
                for at, part in enumerate(("key", "value"), 1):
                    pair.field.add(name=part, number=at, label=Field.LABEL_OPTIONAL, type=Field.TYPE_STRING)
                entry.type, entry.type_name = Field.TYPE_MESSAGE, f".{PACKAGE}.{name}.{pair.name}"
            elif kind in KINDS:
                entry.type = KINDS[kind]
            else:
                entry.type, entry.type_name = Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))


def oci_archive(layer: Path, to: Path, name: str = "localhost/host:1", path: str = "/usr/bin:/bin") -> None:
    """An OCI image layout of one layer. @path: PATH in its containers."""
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        media = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(content)}

    content = layer.read_bytes()
    told = blob(content, "layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": [f"PATH={path}"], "Entrypoint": ["/busybox", "sleep", "100000"]},
        "rootfs": {"type": "layers", "diff_ids": [told["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": [told],
    }
    entry = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"io.containerd.image.name": name}
    blobs["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    blobs["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    with tarfile.open(to, "w") as archive:
        for blob_name, data in blobs.items():
            info = tarfile.TarInfo(blob_name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


class Containerd(Engine):
    """containerd with the runtime handler `graft`."""

    def __init__(self, lab: Lab, directory: Path, *, cgroups: str = "") -> None:
        """@cgroups: as alone() has them."""
        super().__init__(lab, directory)
        for name in ("cni", "net", "log"):
            (self.root / name).mkdir()
        for name in ("host-local", "loopback"):
            (self.root / "cni" / name).symlink_to(f"/usr/lib/cni/{name}")
        plugin = self.root / "cni/graft-cni"
        plugin.write_text(f"#!/bin/sh\nGRAFT_RUN_DIR={lab.run_dir} exec {ROOT}/bin/graft-cni\n")
        plugin.chmod(0o755)
        ipam = {"type": "host-local", "subnet": "10.96.0.0/24", "dataDir": str(self.root / "ipam")}
        conf = {"type": "graft-cni", "capabilities": {"portMappings": True}, "resolver": False, "ipam": ipam}
        # libcni keeps what it was told under this name in /var/lib/cni
        self.network = lab.run_dir.name
        document = {"cniVersion": "1.0.0", "name": self.network, "plugins": [conf]}
        (self.root / "net/graft.conflist").write_text(json.dumps(document))
        self.cgroups = cgroups
        (self.root / "config.toml").write_text(self.configuration())
        self.channel = grpc.insecure_channel(f"unix:{self.root}/sock")
        self.start()
        archive = image(self.root / "image.tar")
        oci_archive(archive, self.root / "oci.tar")
        local = ["--local"] if engine_version("containerd") >= (2, 0) else []  # not by way of its configuration
        self("-n", "k8s.io", "images", "import", *local, "--snapshotter", "native", self.root / "oci.tar")
        wait_for(lambda: self._image(), "the image")

    def configuration(self) -> str:
        """What is in config.toml: what `graft install containerd` makes of it, with this laboratory's directories."""
        path = self.root / "etc/containerd/config.toml"
        path.parent.mkdir(parents=True)
        path.write_text(_configuration(self.root))
        plan = install.containerd(install.Options(self.root), install=True)
        text = next(str(change.after) for change in plan.changes if change.path == path)
        wrapper = self.wrapper()
        controllers = Path("/sys/fs/cgroup/unified/cgroup.controllers")
        if self.cgroups == "v2" and "cpu" not in controllers.read_text().split():
            wrapper.write_text(wrapper.read_text().replace("#!/bin/sh\n", WITHOUT_SHARES))
        for before, after in (("/etc/cni/graft.d", self.root / "net"), (install.program("graft-runtime"), wrapper)):
            assert text.count(f'"{before}"') == 1
            text = text.replace(before, str(after))
        return text

    def start(self) -> None:
        """Start containerd, and wait until it answers."""
        with open(self.root / "log/containerd", "a") as log:
            argv = (*self.inside(), "containerd", "--config", self.root / "config.toml")
            self.daemon = self.lab.spawn(*argv, stdout=log, stderr=log)
        wait_for(self._answers, "containerd", 30)

    def inside(self) -> tuple[str, ...]:
        """The command by which containerd gets where it lives, on the laboratory's host."""
        return tuple(alone(self.cgroups))

    def command(self, *argv: Any) -> list[str]:
        return ["ctr", "--address", f"{self.root}/sock", *map(str, argv)]

    def call(self, method: str, service: str = "RuntimeService", **fields: Any) -> dict[str, Any]:
        """One call; fields as JSON has them. Raises grpc.RpcError."""
        request = json_format.ParseDict(fields, _message(f"{method}Request")())
        function: Any = self.channel.unary_unary(
            f"/{PACKAGE}.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=_message(f"{method}Response").FromString,
        )
        answer: dict[str, Any] = json_format.MessageToDict(
            function(request, timeout=TIMEOUT), preserving_proto_field_name=True
        )
        return answer

    def _answers(self) -> bool:
        try:
            return bool(self.call("Version"))
        except grpc.RpcError:
            return False

    def _image(self) -> bool:
        return bool(self.call("ImageStatus", "ImageService", image={"image": "localhost/host:1"}))

    def pod(
        self, name: str, *, ports: list[dict[str, Any]] | None = None, servers: tuple[str, ...] = (), **annotations: str
    ) -> "Pod":
        """A sandbox; annotations are graft's, with '_' for the dot. @servers: the nameservers of its dnsConfig."""
        return Pod(self, name, ports or [], {k.replace("_", "."): v for k, v in annotations.items()}, servers)

    def stop(self) -> None:
        """End all pods and containerd; leave nothing."""
        for item in self.call("ListPodSandbox").get("items", ()):
            self.call("StopPodSandbox", pod_sandbox_id=item["id"])
            self.call("RemovePodSandbox", pod_sandbox_id=item["id"])
        self.channel.close()
        self.lab.end(self.daemon)
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"containerd-shim-runc-v2") and str(self.root).encode() + b"/sock" in words:
                os.kill(int(entry.parent.name), signal.SIGKILL)
        time.sleep(0.1)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in reversed([m for m in mounts if m.startswith(f"{self.root}/")]):
            subprocess.run(("umount", "-l", place), capture_output=True)
        for directory in Path("/sys/fs/cgroup").glob(f"*/{self.network}-pods"):
            for path in sorted((d for d in directory.rglob("*") if d.is_dir()), reverse=True):
                os.rmdir(path)
            os.rmdir(directory)
        for path in Path("/var/lib/cni/results").glob(f"{self.network}-*"):
            path.unlink()


class Pod:
    """A sandbox and its containers."""

    def __init__(
        self,
        engine: Containerd,
        name: str,
        ports: list[dict[str, Any]],
        annotations: dict[str, str],
        servers: tuple[str, ...] = (),
    ) -> None:
        self.engine = engine
        security = {"seccomp": {"profile_type": 0}, "namespace_options": {"pid": 1}}
        self.config = {
            "metadata": {"name": name, "uid": f"{engine.network}-{name}", "namespace": "default"},
            "hostname": name,
            "log_directory": str(engine.root / "log"),
            "port_mappings": ports,
            "annotations": annotations,
            **({"dns_config": {"servers": list(servers)}} if servers else {}),
            "linux": {"cgroup_parent": f"/{engine.network}-pods", "security_context": security},
        }
        made = engine.call("RunPodSandbox", config=self.config, runtime_handler="graft")
        self.id = made["pod_sandbox_id"]

    @property
    def ip(self) -> str:
        """The pod's address."""
        status = self.engine.call("PodSandboxStatus", pod_sandbox_id=self.id)["status"]
        return str(status["network"]["ip"])

    def container(self, name: str, *command: str) -> str:
        """Start a container with the host's programs; its id."""
        made = self.engine.call(
            "CreateContainer",
            pod_sandbox_id=self.id,
            sandbox_config=self.config,
            config={
                "metadata": {"name": name},
                "image": {"image": "localhost/host:1"},
                "command": list(command),
                "mounts": [
                    {"container_path": place, "host_path": place, "readonly": 1} for place in ("/usr", "/etc")
                ],
                "log_path": f"{self.config['hostname']}-{name}.log",
                "linux": {
                    "security_context": {
                        "seccomp": {"profile_type": 0},
                        "namespace_options": {"pid": 1},
                        "readonly_paths": ["/proc/sys"],  # as kubelet has them
                    }
                },
            },
        )
        number = str(made["container_id"])
        self.engine.call("StartContainer", container_id=number)
        return number

    def exec(self, container: str, *command: str) -> str:
        """Run a command in a container; its output. Asserts success."""
        import base64

        done = self.engine.call("ExecSync", container_id=container, cmd=list(command), timeout=20)
        out = base64.b64decode(done.get("stdout", "")).decode()
        assert not int(done.get("exit_code", 0)), out + base64.b64decode(done.get("stderr", "")).decode()
        return out

    def port_forward(self, port: int) -> "Forwarded":
        """What kubectl port-forward does, by WebSocket: a connection to a port of the pod's localhost."""
        url = self.engine.call("PortForward", pod_sandbox_id=self.id, port=[port])["url"]
        return Forwarded(self.engine.lab, url, port)

    def remove(self) -> None:
        """StopPodSandbox twice, as kubelet may, and RemovePodSandbox."""
        self.engine.call("StopPodSandbox", pod_sandbox_id=self.id)
        self.engine.call("StopPodSandbox", pod_sandbox_id=self.id)
        self.engine.call("RemovePodSandbox", pod_sandbox_id=self.id)


class Forwarded:
    """One port of a pod by its runtime's streaming server: RFC 6455, and k8s.io/kubelet/pkg/cri/streaming/portforward.

    Each message begins with its channel, 0 for data and 1 for an error. The first of a channel has the port.
    """

    def __init__(self, lab: Lab, url: str, port: int) -> None:
        at = urllib.parse.urlsplit(url)
        host = os.open(f"/run/netns/{lab.host_ns}", os.O_RDONLY)
        with linux.inside_netns(host):
            self.sock = socket.create_connection((at.hostname, at.port), TIMEOUT)
        os.close(host)
        self.stream = self.sock.makefile("rb")
        self.sock.sendall(
            f"GET {at.path}?port={port} HTTP/1.1\r\nHost: {at.netloc}\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            f"Origin: http://{at.netloc}\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n".encode()
        )
        status = self.stream.readline()
        assert b" 101 " in status, status
        while self.stream.readline() != b"\r\n":
            pass
        assert sorted(self._message() for _ in range(2)) == [bytes((n, *struct.pack("<H", port))) for n in (0, 1)]

    def send(self, data: bytes) -> None:
        """Send less than 126 bytes, under a mask of zeros."""
        self.sock.sendall(bytes((0x82, 0x80 | len(data) + 1, 0, 0, 0, 0, 0)) + data)

    def receive(self) -> tuple[int, bytes]:
        """One message: its channel, and what it says."""
        message = self._message()
        return message[0], message[1:]

    def close(self) -> None:
        """Leave the connection."""
        self.stream.close()
        self.sock.close()

    def _message(self) -> bytes:
        head = self.stream.read(2)
        assert head[0] == 0x82, head  # a whole binary message
        size = head[1] & 127
        if size > 125:
            size = int.from_bytes(self.stream.read(2 if size == 126 else 8), "big")
        return self.stream.read(size)
