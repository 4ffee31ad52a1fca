"""A cluster of one node in a laboratory: etcd, the control plane, kubelet, kube-proxy, and a client of their API."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graft.bench.lab import HOST4, TIMEOUT, Lab, wait_for
from tests.kubernetes.machine import Machine
from tests.kubernetes.node import PODS, SERVICES, Node

Document = dict[str, Any]
API = "https://127.0.0.1:6443"
ETCD = "http://127.0.0.1:2379"
IMAGE = "localhost/host:1"
BACK_ENDS = ("nft", "legacy")  # of Debian's iptables, which kube-proxy calls by name
DIRECT = {"graft.direct": "on"}  # an annotation
QUICK = {"dnsPolicy": "Default", "automountServiceAccountToken": False}  # what costs time and is not graft's matter
# What a pod serves: who it is, and who asks. /slow answers late, /off makes it fail from then on
SERVER = """
import http.server, signal, socket, sys, threading, time
off = []
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.0'
    def do_GET(self):
        if self.path == '/slow': time.sleep(1)
        if self.path == '/off': off.append(1)
        body = f'{socket.gethostname()} {self.client_address[0]}'.encode()
        self.send_response(500 if off else 200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *told): pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = False
server = Server((sys.argv[2] if len(sys.argv) > 2 else '', int(sys.argv[1])), Handler)
signal.signal(signal.SIGTERM, lambda *told: threading.Thread(target=server.shutdown).start())
server.serve_forever()
server.server_close()
"""


def server(port: int, address: str = "") -> list[str]:
    """The command of a container that serves HTTP."""
    return ["/usr/bin/python3", "-I", "-c", SERVER, str(port), *([address] if address else [])]


def container(name: str, command: Iterable[str], **more: Any) -> Document:
    """A container with the node's programs."""
    mounts = [{"name": at, "mountPath": f"/{at}", "readOnly": True} for at in ("usr", "etc")]
    return {"name": name, "image": IMAGE, "command": list(command), "volumeMounts": mounts, **more}


def web(name: str = "main", port: int = 80, **more: Any) -> Document:
    """A container that serves HTTP, ready when it does."""
    probe = {"httpGet": {"path": "/", "port": port}, "periodSeconds": 1}
    return container(name, server(port), **{"ports": [{"containerPort": port}], "readinessProbe": probe, **more})


def idle(name: str = "idle") -> Document:
    """A container that does nothing, but what is executed in it."""
    return container(name, ["/busybox", "sleep", "100000"])


def pod_spec(*containers: Document, graft: bool = True, **more: Any) -> Document:
    """The spec of a pod, of graft's or of the bridge's."""
    volumes = [{"name": at, "hostPath": {"path": f"/{at}"}} for at in ("usr", "etc")]
    runtime = {"runtimeClassName": "graft"} if graft else {}
    basis = {"containers": list(containers), "volumes": volumes, "terminationGracePeriodSeconds": 1, **QUICK}
    return {**basis, **runtime, **more}


def pod(
    name: str, *containers: Document, labels: Document | None = None, notes: Document | None = None, **spec: Any
) -> Document:
    """A pod; @notes are its annotations, the rest as in pod_spec()."""
    metadata = {"name": name, "labels": {"app": name, **(labels or {})}, "annotations": notes or {}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_spec(*containers, **spec)}


def service(name: str, port: int, target: int, protocols: Iterable[str] = ("TCP",), **spec: Any) -> Document:
    """A Service of the pods that have the label app=@name."""
    ports = [{"name": one.lower(), "protocol": one, "port": port, "targetPort": target} for one in protocols]
    basis = {"selector": {"app": name}, "ports": ports}
    metadata = {"name": name, "labels": {"made": "here"}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {**basis, **spec}}


class Cluster:
    """One node, `node`. Its parts are processes of the laboratory's, by name in `parts`."""

    def __init__(self, lab: Lab, programs: Path, machine: Machine | None = None) -> None:
        """@machine: the node, if it is to be a whole one."""
        self.lab = lab
        self.programs = programs
        self.root = lab.work / "kube"
        self.root.mkdir()
        self.parts: dict[str, subprocess.Popen[str]] = {}
        self.back_end = ""  # of kube-proxy, once it runs
        self.cgroup = f"{lab.tag}-kube"
        self._files()
        self.node = machine or Node(lab, lab.work / "node")
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _files(self) -> None:
        (self.root / "tokens").write_text("secret,admin,1,system:masters\n")
        key = ("openssl", "genrsa", "-out", self.root / "accounts.key", "2048")
        subprocess.run(key, check=True, capture_output=True, timeout=TIMEOUT)
        cluster = {"server": API, "insecure-skip-tls-verify": True}
        access = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": "secret"}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "admin"}}],
            "current-context": "lab",
        }
        (self.root / "access").write_text(json.dumps(access))
        kubelet = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "enforceNodeAllocatable": [],
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
            "failSwapOn": False,
            "kubeAPIQPS": 100,
            "kubeAPIBurst": 200,
            "eventRecordQPS": 0,
            "clusterDomain": "cluster.local",
            "resolvConf": "/etc/resolv.conf",
        }
        (self.root / "kubelet.json").write_text(json.dumps(kubelet))
        proxy = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(self.root / "access")},
            "mode": "iptables",
            "clusterCIDR": PODS,
            "hostnameOverride": "node",
            "oomScoreAdj": 0,
            "iptables": {"syncPeriod": "30s", "minSyncPeriod": "100ms"},
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }
        (self.root / "proxy.json").write_text(json.dumps(proxy))

    def _start(self) -> None:
        for hierarchy in Path("/sys/fs/cgroup").iterdir():
            if (hierarchy / "cgroup.procs").exists() and hierarchy.name != "unified":
                (hierarchy / self.node.within / self.cgroup).mkdir(exist_ok=True)
        self.lab.host("sysctl", "-qw", "net.ipv4.ip_forward=1", check=True)
        peers = ("--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380")
        clients = ("--listen-client-urls", ETCD, "--advertise-client-urls", ETCD)
        self._spawn("etcd", "etcd", "--data-dir", self.root / "etcd", *clients, *peers, "--initial-cluster", "default=http://127.0.0.1:2380")
        keys = self.root / "accounts.key"
        self._spawn(
            "kube-apiserver",
            self.programs / "kube-apiserver",
            f"--etcd-servers={ETCD}",
            f"--cert-dir={self.root}/certificates",
            "--bind-address=127.0.0.1",
            f"--advertise-address={HOST4}",
            f"--token-auth-file={self.root}/tokens",
            "--authorization-mode=AlwaysAllow",
            f"--service-account-key-file={keys}",
            f"--service-account-signing-key-file={keys}",
            "--service-account-issuer=lab",
            f"--service-cluster-ip-range={SERVICES}",
            "--allow-privileged=true",
            "--enable-admission-plugins=RuntimeClass",
            "--kubelet-preferred-address-types=InternalIP",
        )
        wait_for(lambda: self.kubectl("get", "--raw", "/readyz", check=False).returncode == 0, "the API", 60)
        access = f"--kubeconfig={self.root}/access"
        alone = ("--leader-elect=false", "--port=0", "--secure-port=0")
        authority = self.root / "certificates/apiserver.crt"
        manager = (f"--service-account-private-key-file={keys}", f"--root-ca-file={authority}")
        self._spawn("kube-controller-manager", self.programs / "kube-controller-manager", access, *alone, *manager)
        self._spawn("kube-scheduler", self.programs / "kube-scheduler", access, *alone)
        self.start_kubelet()
        self.start_proxy(BACK_ENDS[0])
        self.start_class()
        wait_for(self.is_ready, "the node", 60)
        wait_for(lambda: self.kubectl("get", "serviceaccount", "default", check=False).returncode == 0, "the account", 60)

    def start_class(self) -> None:
        """The RuntimeClass `graft`, as short as it may be."""
        metadata = {"name": "graft"}
        self.apply({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": metadata, "handler": "graft"})

    def start_kubelet(self) -> None:
        """Start kubelet."""
        self._spawn(
            "kubelet",
            *self.node.inside(),
            self.programs / "kubelet",
            f"--config={self.root}/kubelet.json",
            f"--kubeconfig={self.root}/access",
            f"--root-dir={self.root}/kubelet",
            f"--cert-dir={self.root}/kubelet-certificates",
            f"--volume-plugin-dir={self.root}/plugins",
            "--container-runtime=remote",
            f"--container-runtime-endpoint=unix://{self.node.socket}",
            f"--pod-infra-container-image={IMAGE}",
            "--hostname-override=node",
            f"--node-ip={HOST4}",
        )

    def start_proxy(self, back_end: str) -> None:
        """Start kube-proxy, whose iptables is that of a back end; rules of another one are removed."""
        if self.back_end:
            self.lab.end(self.parts.pop("kube-proxy"))
            self.lab.host(*self.node.inside(), *self._proxy("--cleanup"))  # it fails where the kernel has no IPVS
        self.back_end = back_end
        place = self.root / back_end
        if not place.exists():
            place.mkdir()
            for name in ("iptables", "ip6tables"):
                for command in (name, f"{name}-save", f"{name}-restore"):  # xtables(8): by the name that it is called by
                    (place / command).symlink_to(f"/usr/sbin/xtables-{back_end}-multi")
        self._spawn("kube-proxy", *self.node.inside(), *self._proxy())

    def _proxy(self, *options: str) -> tuple[str, ...]:
        path = f"PATH={self.root / self.back_end}:{os.environ['PATH']}"
        return ("env", path, str(self.programs / "kube-proxy"), f"--config={self.root}/proxy.json", *options)

    def rules(self, back_end: str, table: str) -> str:
        """The rules of a table of a back end's on the node."""
        return self.lab.host(f"iptables-{back_end}-save", "-t", table, check=True).stdout

    def _spawn(self, name: str, *argv: Any) -> None:
        with open(self.root / f"{name}.log", "a") as log:
            self.parts[name] = self.lab.spawn(*argv, stdout=log, stderr=log)

    def log(self, name: str, lines: int = 30) -> str:
        """The end of what a part has said."""
        return "\n".join((self.root / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])

    def is_ready(self) -> bool:
        """Is the node ready?"""
        dead = [name for name, process in self.parts.items() if process.poll() is not None]
        assert not dead, f"{dead[0]} has ended: {self.log(dead[0])}"
        path = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
        return self.kubectl("get", "node", "node", "-o", path, check=False).stdout == "True"

    # -- its API --

    def command(self, *argv: Any) -> list[str]:
        """The command line of kubectl, on the laboratory's host."""
        options = (f"--kubeconfig={self.root}/access", f"--cache-dir={self.root}/cache")
        return [str(self.programs / "kubectl"), *options, *map(str, argv)]

    def kubectl(self, *argv: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run kubectl. Asserts success, unless @check is false."""
        done = self.lab.host(*self.command(*argv), **options)
        assert not check or done.returncode == 0, f"kubectl {argv}: {done.stderr}{done.stdout}"
        return done

    def apply(self, *documents: Document) -> None:
        """Create or change objects."""
        items = {"apiVersion": "v1", "kind": "List", "items": list(documents)}
        self.kubectl("apply", "-f", "-", input=json.dumps(items))

    def get(self, *argv: Any) -> Document:
        """An object, or a list of some."""
        found: Document = json.loads(self.kubectl("get", *argv, "-o", "json").stdout)
        return found

    def pods(self, selector: str = "") -> list[Document]:
        """The pods, or those with these labels, that are not about to end."""
        items: list[Document] = self.get("pods", *(["-l", selector] if selector else []))["items"]
        return [item for item in items if "deletionTimestamp" not in item["metadata"]]

    def wait_ready(self, *names: str, timeout: float = 30.0) -> dict[str, str]:
        """Wait until these pods are ready; their addresses by name. Raises TimeoutError with what is told of them."""

        def ready() -> dict[str, str] | None:
            found = {item["metadata"]["name"]: item for item in self.pods()}
            there = [found[name] for name in names if name in found and is_ready(found[name])]
            return {one["metadata"]["name"]: one["status"]["podIP"] for one in there} if len(there) == len(names) else None

        try:
            addresses: dict[str, str] = wait_for(ready, f"{', '.join(names)} ready", timeout)
        except TimeoutError as error:
            told = self.kubectl("get", "pods", "-o", "wide").stdout + self.kubectl("get", "events").stdout
            raise TimeoutError(f"{error}:\n{told}") from None
        return addresses

    def start(self, *pods: Document, timeout: float = 30.0) -> dict[str, str]:
        """Create pods and wait until they are ready; their addresses by name."""
        self.apply(*pods)
        return self.wait_ready(*(one["metadata"]["name"] for one in pods), timeout=timeout)

    def serve(self, made: Document) -> Document:
        """Create or change a Service, and wait for kube-proxy's rules, without which a connection hangs; its spec."""
        self.apply(made)
        spec: Document = self.get("service", made["metadata"]["name"])["spec"]
        rule = re.compile(rf"-d {re.escape(spec['clusterIP'])}/32 .*-j KUBE-SVC")
        wait_for(lambda: rule.search(self.rules(self.back_end, "nat")), "kube-proxy's rules", 30)
        return spec

    def delete(self, kind: str, *names: str) -> None:
        """Delete objects and wait for their end."""
        self.kubectl("delete", kind, *names, "--ignore-not-found", "--wait=true")

    def clear(self) -> None:
        """Delete all workloads, and wait until their processes have ended; kubelet takes its time to tell the API."""
        self.kubectl("delete", "services", "-l", "made=here")
        self.kubectl("delete", "deployments,replicasets,pods", "--all", "--force", "--grace-period=0", "--wait=false")
        wait_for(lambda: not shims(self.node), "the end of all pods", 120)

    def exec(self, name: str, *argv: Any, container: str = "", check: bool = True) -> str:
        """What a command prints in a pod."""
        chosen = ("-c", container) if container else ()
        return self.kubectl("exec", name, *chosen, "--", *argv, check=check).stdout

    def events(self, name: str) -> str:
        """What is told of an object."""
        items = self.get("events", "--field-selector", f"involvedObject.name={name}")["items"]
        return "\n".join(item.get("message") or "" for item in items)

    def stop(self) -> None:
        """End everything; leave nothing."""
        for name in reversed(self.parts):
            self.lab.end(self.parts[name], signal.SIGKILL)
        self.node.stop()
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        assert not [at for at in mounted if at.startswith(str(self.root))]
        self.remove_cgroups()

    def remove_cgroups(self) -> None:
        """Remove the cgroups of pods, once they are empty."""
        for top in Path("/sys/fs/cgroup").glob(f"*/{self.cgroup}"):
            for _ in range(50):
                left = [path for path in (*top.rglob("*"), top) if path.is_dir()]
                for path in sorted(left, reverse=True):
                    with contextlib.suppress(OSError):
                        os.rmdir(path)
                if not top.exists():
                    break
                time.sleep(0.1)


def is_ready(item: Document) -> bool:
    """Is a pod ready?"""
    conditions = item["status"].get("conditions", ())
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def restarts(item: Document) -> int:
    """How often a pod's containers have been restarted."""
    return sum(one["restartCount"] for one in item["status"].get("containerStatuses", ()))


def shims(node: Node | Machine) -> list[int]:
    """The PIDs of the node's shims, which are the parents of pods."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if words[0].endswith(b"containerd-shim-runc-v2") and node.socket.encode() in words:
                found.append(int(entry.parent.name))
    return found
