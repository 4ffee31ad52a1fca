"""Whose bundle it is, and what its settings ask for."""

import hashlib
import json
import os

import pytest

from graft.engines import bundle, container
from graft.errors import GraftError, Refused

ID = "0123456789abcdef" * 4
LIBPOD = {"io.container.manager": "libpod"}


def libpod(path, storage=None, **more):
    mounts = [{"destination": "/dev/shm", "source": f"{storage}/{ID}/userdata/shm" if storage else "/dev/shm"}]
    return {"annotations": LIBPOD | more, "linux": {"cgroupsPath": path}, "mounts": mounts}


@pytest.mark.parametrize(
    "path",
    [
        f"/libpod_parent/libpod-{ID}",
        f"machine.slice:libpod:{ID}",
        f"/user.slice/libpod-payload-{ID}",
        f"/machine.slice/libpod-{ID}.scope",
    ],
)
def test_podmans_id(path):
    found = bundle.identify(libpod(path), "")
    assert (found.engine, found.id, found.name) == ("podman", ID, ID[:12])


def test_podman_without_a_cgroup(tmp_path):
    with pytest.raises(Refused, match="has no id"):
        bundle.identify(libpod(""), "")
    storage = tmp_path / "vfs-containers"
    storage.mkdir()
    (storage / "containers.json").write_text(json.dumps([{"id": ID, "names": ["web"], "image": "i1"}]))
    assert bundle.identify(libpod("", storage), "").name == "web"


@pytest.mark.parametrize("file", ["containers.json", "volatile-containers.json"])
def test_podman_with_rm(tmp_path, file):
    """containers/storage has containers of --rm in another file: their names, and the image whose annotations they have."""
    storage = tmp_path / "overlay-containers"
    storage.mkdir()
    (storage / file).write_text(json.dumps([{"id": ID, "names": ["web"], "image": "i1"}]))
    config = libpod(f"/libpod-{ID}", storage, graft="on")
    manifest = tmp_path / "overlay-images/i1/manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    assert bundle.identify(config, "").name == "web"
    manifest.write_text(json.dumps({"annotations": {"graft": "on"}}))
    with pytest.raises(Refused, match="annotation 'graft' comes from the image"):
        bundle.identify(config, "")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pod-web", {"graft": "8080:80", "graft.egress": "none"}),
        ("web", {"graft": "8080:80", "graft.egress": "none"}),
        ("pod-db", {"graft.egress": "none", "graft.limit": "sockets=9"}),
        ("pod-other", {"graft.egress": "none"}),
    ],
)
def test_what_a_pod_asks_for_one_of_its_containers(tmp_path, name, settings):
    """As `podman generate kube` writes it, and `podman kube play` hands it to each of them."""
    storage = tmp_path / "vfs-containers"
    storage.mkdir()
    (storage / "containers.json").write_text(json.dumps([{"id": ID, "names": [name]}]))
    config = libpod(f"/libpod-{ID}", storage)
    config["annotations"] |= {"graft/web": "8080:80", "graft.egress": "none", "graft.limit/db": "sockets=9", "grafted/web": "x"}
    assert bundle.identify(config, "").settings == settings


def test_a_pod_that_asks_for_another_container_alone(tmp_path):
    storage = tmp_path / "vfs-containers"
    storage.mkdir()
    (storage / "containers.json").write_text(json.dumps([{"id": ID, "names": ["pod-db"], "image": "i1"}]))
    manifest = tmp_path / "vfs-images/i1/manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    config = libpod(f"/libpod-{ID}", storage)
    config["annotations"]["graft/web"] = "on"
    assert bundle.is_unasked(bundle.identify(config, ""), "")
    assert not bundle.is_unasked(bundle.identify(config, ""), ID)  # graft is Podman's runtime
    config["annotations"]["graft/db"] = "on"
    assert not bundle.is_unasked(bundle.identify(config, ""), "")
    manifest.write_text(json.dumps({"annotations": {"graft/db": "on"}}))
    with pytest.raises(Refused, match="annotation 'graft/db' comes from the image"):
        bundle.identify(config, "")


def test_an_image_that_cannot_be_read(tmp_path):
    storage = tmp_path / "overlay-containers"
    storage.mkdir()
    (storage / "containers.json").write_text(json.dumps([{"id": ID, "names": ["web"], "image": "i1"}]))
    config = libpod(f"/libpod-{ID}", storage, graft="on")
    with pytest.raises(Refused, match="overlay-images/i1/manifest: No such file"):
        bundle.identify(config, "")
    manifest = tmp_path / "overlay-images/i1/manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"annotations": {"graft": "on"}}))
    with pytest.raises(Refused, match="annotation 'graft' comes from the image"):
        bundle.identify(config, "")
    manifest.write_text("{}")
    assert bundle.identify(config, "").settings == {"graft": "on"}


def test_docker_that_cannot_be_found():
    hooks = {"prestart": [{"path": "/proc/1/exe", "args": ["libnetwork-setkey", ID]}]}
    with pytest.raises(Refused, match="Docker's files about this container are not found"):
        bundle.identify({"hooks": hooks}, ID)


@pytest.mark.parametrize("mode", ["default", "bridge"])
@pytest.mark.parametrize(
    ("networks", "found"),
    [
        (["gnet"], "gnet"),
        (["default", "gnet"], "gnet"),
        (["bridge"], "network 'bridge' is not graft's"),
        (["gnet", "bridge"], "network 'bridge' is not graft's"),
        ([], "network 'bridge' is not graft's"),
        (["gnet", "ingress"], "swarm's routing mesh"),
        (["ingress"], "swarm's routing mesh"),
    ],
)
def test_the_network_of_a_service(tmp_path, networks, found, mode):
    """swarm leaves HostConfig.NetworkMode at its default, and names the network elsewhere."""
    directory = tmp_path / "containers" / ID
    directory.mkdir(parents=True)
    known = {"Name": "/web.1.x", "NetworkSettings": {"Networks": dict.fromkeys(networks)}}
    (directory / "config.v2.json").write_text(json.dumps(known))
    (directory / "hostconfig.json").write_text(json.dumps({"NetworkMode": mode}))
    config = {"mounts": [{"destination": "/etc/hosts", "source": f"{directory}/hosts"}]}
    if " " in found:
        with pytest.raises(Refused, match=found):
            bundle.identify(config, ID)
    else:
        assert bundle.identify(config, ID).network == found


def test_settings():
    settings = {
        "graft": "8080:80, 8443:443",
        "graft.egress": "none,10.0.0.0/8=out",
        "graft.endpoint.web": "81 127.0.0.1:82-84",
        "graft.ip": "10.1.2.3",
        "graft.family": "on",
    }
    asked = container.metadata_of(container.Container("podman", ID, "a b/ü", settings))
    request = asked.request
    assert request.publish == ("8080:80", "8443:443")
    assert request.ingress == ("0.0.0.0:81=web", "127.0.0.1:82-84=web")
    assert (request.egress_default, request.egress, request.ip) == ("none", ("10.0.0.0/8=out",), ("10.1.2.3",))
    assert asked.traps_addresses
    assert asked.name == "a_b__"
    assert container.metadata_of(container.Container("oci", ID, "7" * 80, {})).name == "7" * 51 + "-" + ID[:12]
    with pytest.raises(GraftError, match=r"annotation 'graft\.ip=x': 'x' is not an IP address"):
        container.metadata_of(container.Container("podman", ID, "n", {"graft.ip": "x"}))


@pytest.mark.parametrize("which", ["bounding", "effective", "inheritable", "permitted", "ambient"])
def test_a_capability_that_acts_on_nothing(which):
    sets = {"bounding": ["CAP_CHOWN"], "ambient": None}
    process = {"args": ["CAP_NET_ADMIN"], "capabilities": sets}
    bundle.check_capabilities(process, allowed=False)
    bundle.check_capabilities({}, allowed=False)
    sets[which] = ["CAP_KILL", "CAP_NET_ADMIN"]
    with pytest.raises(Refused, match="CAP_NET_ADMIN is of no use"):
        bundle.check_capabilities(process, allowed=False)
    bundle.check_capabilities(process, allowed=True)


def test_switches():
    for label, asked in (("on", True), ("off", False)):
        found = container.metadata_of(container.Container("podman", ID, "n", {"graft.netadmin": label}))
        assert found.netadmin == asked
    with pytest.raises(GraftError, match="neither on nor off"):
        container.metadata_of(container.Container("podman", ID, "n", {"graft.netadmin": "80"}))


def test_a_bundle_is_files_alone(tmp_path):
    path = tmp_path / "config.json"
    (tmp_path / "other").write_text("{}")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(Refused, match="Too many levels of symbolic links"):
        bundle.read(path)
    path.unlink()
    (tmp_path / "pipe").mkdir()
    with pytest.raises(Refused, match="pipe"):
        bundle.read(tmp_path / "pipe")
    for text in ("{", "", '"\\ud800"', "NaN", "[" * 100_000, '{"a": 1e999}'):
        path.write_text(text)
        with pytest.raises(Refused, match=str(path)):
            bundle.read(path)
    path.write_text('{"a": 1}')
    path.chmod(0o640)
    bundle.write(path, {"a": 2})
    assert (bundle.read(path), path.stat().st_mode & 0o777, len(list(tmp_path.iterdir()))) == ({"a": 2}, 0o640, 3)


def test_a_namespace_that_cannot_be_seen(tmp_path):
    """What it joins cannot be judged then. A process of the engine's may have mounted it where graftd has not."""
    config = {"linux": {"namespaces": [{"type": "network", "path": f"{tmp_path}/net"}]}}
    with pytest.raises(Refused, match=r"the network namespace .*/net: No such file or directory"):
        bundle.identify(config, ID)
    (tmp_path / "net").write_text("")
    with pytest.raises(Refused, match=r"the network namespace .*/net: .* \(graftd has to see what the container joins\)"):
        bundle.identify(config, ID)
    (tmp_path / "net").unlink()
    (tmp_path / "net").symlink_to("/proc/self/ns/net")
    found = bundle.identify(config, ID, "/proc/self/root")
    assert (found.path, found.where[0]) == ("/proc/self/root/proc/self/ns/net", os.stat("/proc/self/ns/net").st_ino)
    assert bundle.identify({"linux": {"namespaces": [{"type": "network"}]}}, ID).where == (0, 0)


def test_sysctls_of_a_bundle():
    """Those of the network; the others are nothing to graft."""
    sysctls = {"net.core.somaxconn": "9", "kernel.msgmax": "65536", "net/ipv4/tcp_sack": "1"}
    metadata = container.metadata_of(container.Container("docker", ID, "n", {"graft.sysctl": "ignore"}))
    bundle.add_sysctls({"linux": {"sysctl": sysctls}}, metadata)
    assert metadata.request.sysctl == ("ignore", "net.core.somaxconn=9", "net/ipv4/tcp_sack=1")
    bundle.add_sysctls({}, metadata)
    assert len(metadata.request.sysctl) == 3
    with pytest.raises(GraftError, match=r"label 'graft\.sysctl=net\.core\.somaxconn=9': sysctls are the engine's to set"):
        container.metadata_of(container.Container("docker", ID, "n", {"graft.sysctl": "net.core.somaxconn=9"}))


def blob(store, document):
    """A document in containerd's content store, and its descriptor."""
    content = json.dumps(document).encode()
    digest = hashlib.sha256(content).hexdigest()
    path = store / "io.containerd.content.v1.content/blobs/sha256" / digest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {"digest": f"sha256:{digest}"}


@pytest.mark.parametrize("indexed", [True, False])
def test_an_image_in_containerds_store(tmp_path, indexed):
    """Docker's own containerd has it below the data root; an index names images of platforms that are not there."""
    store = tmp_path / "containerd/daemon"
    directory = tmp_path / "containers" / ID
    directory.mkdir(parents=True)
    image = blob(store, {"config": {"Labels": {"graft.publish": "22:22"}}})
    found = manifest = blob(store, {"config": image, "layers": []})
    if indexed:
        found = blob(store, {"manifests": [{"digest": f"sha256:{'0' * 64}"}, manifest]})
    known = {"Image": found["digest"], "Driver": "overlayfs", "Name": "/web", "Config": {"Labels": {"graft.publish": "22:22"}}}
    (directory / "config.v2.json").write_text(json.dumps(known))
    (directory / "hostconfig.json").write_text(json.dumps({"NetworkMode": "none"}))
    config = {"mounts": [{"destination": "/etc/hosts", "source": f"{directory}/hosts"}]}
    with pytest.raises(Refused, match=r"label 'graft\.publish' comes from the image"):
        bundle.identify(config, ID)
    known["Config"]["Labels"]["graft.publish"] = "23:23"
    (directory / "config.v2.json").write_text(json.dumps(known))
    assert bundle.identify(config, ID).settings == {"graft.publish": "23:23"}
    for digest in (f"sha256:{'1' * 64}", "sha256:../../../../../../etc/passwd", ""):
        (directory / "config.v2.json").write_text(json.dumps(known | {"Image": digest}))
        with pytest.raises(Refused, match="files about this container's image are not found"):
            bundle.identify(config, ID)


def test_dockers_hook_and_network(tmp_path):
    """Without the hook Docker joins the container to its network after `create`."""
    directory = tmp_path / "containers" / ID
    directory.mkdir(parents=True)
    (directory / "config.v2.json").write_text(json.dumps({"Name": "/web"}))
    config = {"mounts": [{"destination": "/etc/hosts", "source": f"{directory}/hosts"}]}
    hooks = {"prestart": [{"path": "/proc/1/exe", "args": ["libnetwork-setkey", ID]}]}
    for mode, network in (("none", ""), ("container:abc", ""), ("gnet", "gnet")):
        (directory / "hostconfig.json").write_text(json.dumps({"NetworkMode": mode}))
        assert bundle.docker_network(str(directory)) == network
        found = bundle.identify(config, ID)
        assert (found.network, found.hooked) == (network, False)
        assert bundle.identify(config | {"hooks": hooks}, ID).hooked
    assert bundle.docker_network("") == ""
