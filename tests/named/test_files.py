"""Servers of files: FTP passive and active, TFTP, rsync, SMB."""

import pytest

from tests.named.place import Own

TEXT = "a file of this machine\n"
CURL = ("curl", "-sS", "--max-time", "20")


def shared(place):
    """A directory with a file, and a place for others."""
    folder = place.work / "files"
    folder.mkdir()
    (folder / "text").write_text(TEXT)
    upload = folder / "upload"
    upload.mkdir()
    upload.chmod(0o777)
    return folder


def fetched(place, url, *options, own6=True, active=False):
    """The file as the client, the host and the program's own machine get it; @url has HOST for the address.

    @active: the server connects back. What it connects to is the address that the client has towards it. A client
    inside has one of its own on the loopback alone, and one on the host has none towards a container's own address:
    the kernel takes that address itself for its source.
    """
    sides = [
        (place.client, (place.address4, *((f"[{place.address6}]",) if own6 else ()))),
        (place.inside, ("127.0.0.1",) if active else ("127.0.0.1", place.address4)),
    ]
    if not (active and isinstance(place, Own)):
        sides.append((place.beside, (place.address4,)))
    seen = {who(*CURL, *options, url.replace("HOST", address)) for who, addresses in sides for address in addresses}
    assert seen == {TEXT}
    return sorted(seen)


VSFTPD = """
listen=NO
listen_ipv6=YES
background=NO
anonymous_enable=YES
no_anon_password=YES
anon_root={files}
anon_upload_enable=YES
write_enable=YES
connect_from_port_20=YES
pasv_min_port=30000
pasv_max_port=30009
"""


@pytest.mark.tree
@pytest.mark.parametrize("way", ["passive", "active"])
def test_vsftpd(stage, way):
    """Active: the server connects from port 20, to the port that the client has told."""
    stage.need("vsftpd", "curl")

    def play(place):
        files = shared(place)
        (place.work / "conf").write_text(VSFTPD.format(files=files))
        place.start("sh", "-c", f"mkdir -p /run/vsftpd/empty; exec vsftpd {place.work}/conf", publish=("21", "30000-30009"))
        options = ("--ftp-port", "-") if way == "active" else ()
        seen = fetched(place, "ftp://HOST/text", *options, active=way == "active")
        for host in (place.address4, f"[{place.address6}]"):
            (place.work / "sent").write_text(f"for {way}\n")
            place.client(*CURL, *options, "-T", place.work / "sent", f"ftp://{host}/upload/")
            (sent,) = (files / "upload").iterdir()
            seen.append(sent.read_text())
            sent.unlink()
        return seen

    stage.same(play)


@pytest.mark.parametrize("way", ["passive", "active"])
def test_pyftpdlib(stage, way):
    stage.need("python3", "curl")

    def play(place):
        files = shared(place)
        server = ("python3", "-m", "pyftpdlib", "-p", "2121", "-r", "30000-30009", "-w", "-d", files)
        place.start(*server, publish=("2121", "30000-30009"))
        options = ("--ftp-port", "-") if way == "active" else ()
        return fetched(place, "ftp://HOST:2121/text", *options, own6=False, active=way == "active")

    stage.same(play)


@pytest.mark.tree
def test_atftpd(stage):
    """Each transfer has a socket of its own, at the address that was asked, port 0."""
    stage.need("atftpd", "curl")

    def play(place):
        files = shared(place)
        place.start("atftpd", "--daemon", "--no-fork", "--logfile", "-", "--user", "root", files, publish=("69/udp",))
        return fetched(place, "tftp://HOST/text", own6=False)

    stage.same(play)


def test_dnsmasq_tftp(stage):
    stage.need("dnsmasq", "curl")

    def play(place):
        options = ("-d", "-C", "/dev/null", "--port=0", "--enable-tftp", f"--tftp-root={shared(place)}", "--user=root")
        place.start("dnsmasq", *options, publish=("69/udp",))
        return fetched(place, "tftp://HOST/text")

    stage.same(play)


@pytest.mark.tree
def test_rsync(stage):
    stage.need("rsync")

    def play(place):
        files = shared(place)
        conf = f"use chroot = no\nuid = root\ngid = root\n[files]\npath = {files}\nread only = no\n"
        (place.work / "conf").write_text(conf)
        place.start("rsync", "--daemon", "--no-detach", f"--config={place.work}/conf", publish=("873",))
        seen = []
        for number, (who, host) in enumerate(
            (
                (place.client, place.address4),
                (place.client, f"[{place.address6}]"),
                (place.beside, place.address4),
                (place.inside, "localhost"),
                (place.inside, place.address4),
            )
        ):
            got = place.work / f"got{number}"
            who("rsync", "-a", f"rsync://{host}/files/text", got)
            who("rsync", "-a", got, f"rsync://{host}/files/upload/{number}")
            seen.append((got.read_text(), (files / "upload" / str(number)).read_text()))
        assert set(seen) == {(TEXT, TEXT)}
        return seen

    stage.same(play)


SAMBA = """
[global]
map to guest = Bad User
guest account = root
server role = standalone server
private dir = {work}/samba
lock directory = {work}/samba
state directory = {work}/samba
cache directory = {work}/samba
pid directory = {work}/samba
ncalrpc dir = {work}/samba/rpc
log file = {work}/smbd.log
load printers = no
printing = bsd
[files]
path = {files}
guest ok = yes
read only = no
"""


@pytest.mark.tree
def test_samba(stage):
    stage.need("smbd", "smbclient")

    def play(place):
        files = shared(place)
        (place.work / "samba").mkdir()
        (place.work / "conf").write_text(SAMBA.format(work=place.work, files=files))
        place.start("smbd", "-F", "--no-process-group", "-s", place.work / "conf", publish=("445",))
        seen: list[tuple[str, str]] = []
        for who, host in (
            (place.client, place.address4),
            (place.client, place.address6),
            (place.beside, place.address4),
            (place.inside, "localhost"),
        ):
            got = place.work / f"got{len(seen)}"
            who("smbclient", "-s", "/dev/null", "-N", f"//{host}/files", "-c", f"get text {got}; put {got} upload\\sent")
            seen.append((got.read_text(), (files / "upload/sent").read_text()))
            (files / "upload/sent").unlink()
        assert set(seen) == {(TEXT, TEXT)}
        return seen

    stage.same(play)
