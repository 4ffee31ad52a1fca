"""Orders of engines: what a container that joins has of those before, and whose sandbox still waits for one."""

from graft import protocol
from graft.daemon.admin_engines import _waits
from graft.daemon.joining import as_begun
from graft.daemon.requests import must_be_saved
from graft.rules.request import Request
from graft.tenants.attachment import Attachment
from graft.tenants.tenant import Table, Tenant


def test_a_pod_has_the_policy_that_it_began_with():
    """kubelet makes a container anew with the annotations that the pod has by then."""
    running = Tenant(1, 1, "pod", Table(7, 8, "pid 9"))
    running.asked = Request(egress_default="none", allow=("pypi.org:443",), interface=("net1",), limits=("udp=7",), sysctl=("ignore",))
    asked = Request(egress_default="host", names="on", limits=("udp=9",), direct="on", resolver=("127.0.0.1",), publish=("80:80",), ip=("10.0.0.9",))
    kept = running.asked._replace(limits=(), publish=("80:80",))
    assert as_begun(running, asked) == kept
    running.cgroup = "/sys/fs/cgroup/pod"
    assert as_begun(running, asked) == kept._replace(direct="on")


def test_whose_sandbox_waits(tmp_path):
    """Docker's file is empty until the container's namespace is mounted there."""
    attachment = Attachment("docker/e", "net")
    assert not _waits(attachment), "no sandbox"
    attachment.sandbox = [str(tmp_path / "key"), f"/proc/1/root{tmp_path}/key"]
    assert _waits(attachment), "it is not there yet"
    (tmp_path / "key").touch()
    assert _waits(attachment)
    attachment.sandbox = [str(tmp_path / "gone"), "/proc/self/ns/net"]
    assert not _waits(attachment), "a container of another runtime has it"


def test_what_is_done_on_a_full_disk():
    assert not must_be_saved(protocol.Detach(version="1", key="k"))
    assert not must_be_saved(protocol.Ps(version="1"))
    assert must_be_saved(protocol.Attached(version="1", key="k")) is False
    assert must_be_saved(protocol.EndpointDel(version="1", names=["e"]))
