"""The attack suite: each attack by each kind of hostile program, the refusal inside, and the host as it was.

An attack is a function of programs/attacks.py or attacks.c. What the host has (addresses, routes, rules, devices,
groups, firewall, listeners) is compared before and after each, and who has been at the host's servers is told by a
witness there. All of them run in both modes: in one a program's sockets are made for it, in the other it lives in the
host's netns and makes them itself.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graft.bench.lab import CLIENT4, HOST4, HOST6, SECOND4, SLOWNESS, laboratory, wait_for
from graft.commands import checks_host
from tests.attack.programs import attacks  # noqa: F401 - every attack registers itself
from tests.attack.programs.common import ATTACKS
from tests.conftest import EMULATED, need, need_root, python

PROGRAMS = Path(__file__).parent / "programs"
DOCKER = "chown,dac_override,fowner,fsetid,kill,setgid,setuid,setpcap,net_bind_service,net_raw,sys_chroot,mknod,audit_write,setfcap"


def capabilities(names):
    kept = ",".join(f"+{name}" for name in names.split(","))
    return ("setpriv", f"--bounding-set=-all,{kept}", "--no-new-privs")


PROFILES = {
    "root": capabilities(DOCKER),
    "admin": capabilities(f"{DOCKER},net_admin"),
    "userns": ("setpriv", "--no-new-privs", "unshare", "--user", "--map-root-user"),
    "user": ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--no-new-privs"),
}
MODES = ("trap", "direct")
# As in Docker's containers: else a port below 1024 is refused to the last two, before the policy is asked
LOW_PORTS = ("--sysctl", "net.ipv4.ip_unprivileged_port_start=0")
# What an attack comes to unless EXPECTED says otherwise: refused, or there is no such thing
REFUSED = {
    "EADDRNOTAVAIL", "ENETUNREACH", "ECONNREFUSED", "EPERM", "EACCES",
    "ENOPROTOOPT", "ENODEV", "EOPNOTSUPP", "ENOTTY",
}  # fmt: skip
EXPECTED = {
    "bind_a_port_of_the_hosts": {"OK"},  # on its own loopback: the host's listeners are compared
    "bind_again_after_disconnecting": REFUSED | {"OK"},  # at a port of the kernel's choice: likewise
    "v6only_after_autobind": {"OK", "EADDRNOTAVAIL"},  # the first where no rule names it: the loopback again
    "listen_without_bind": {"0.0.0.0"},
    "listen_without_bind_6": {"::"},
    "accepted_listens": {"EINVAL"},
    "listen_on_no_socket": {"ENOTSOCK"},
    "reuseport_with_the_host": {"NEVER"},
    "reuseport_with_another_container": REFUSED | {"OK"},  # on its own loopback, as above
    "descriptor_to_an_ungrafted_process": REFUSED | {"OK"},  # bound to nothing on the host, which has no listener more
    "udp_port_by_chance": {"NEVER"},
    "udp_port_by_chance_autobound": {"NEVER"},
    "fork_bomb_of_sockets": {"ENFILE"},
    "sockets_are_given_back": {"SERVED"},
    "hosts_loopback_by_udp": {"OK", "ECONNREFUSED"},  # to nobody: the witness has seen none
    "reconnect_after_disconnecting": {"OK", "ECONNREFUSED"},
    "race_bind": {"HELD"},
    "race_bind_shared": {"HELD"},
    "race_connect": {"HELD", "NEVER"},
    "race_connect_shared": {"HELD", "NEVER"},
    "race_sendto": {"HELD", "NEVER"},
    "killed_in_flight": {"SERVED"},
    "descriptors_in_flight": {"RIGHT"},
    "listener_of_ones_own": {"EBUSY"},
    "filter_on_top": {"OK"},  # binds to port 22 of its loopback, as above
    "filter_allows": {"OK"},
    "garbage": {"SERVED"},
    "flood_of_calls": {"SERVED"},
    "flood_of_connections": {"SERVED"},
    "descriptor_limit_of_nothing": {"EMFILE"},
    "netns_cookie": {"OWN"},
    "device_of_a_link_local_destination": {"NONE"},
    "ipv6_freebind_off": {"OK"},  # it is shown as 0, and the kernel does not see that
    "list_the_devices": {"lo"},
    "netlink_sees_only_lo": {"lo"},
    "netlink_changes_nothing": {"FAILED"},
}
EXPECTED |= {
    "accepted_lists_the_devices": {"lo"},
    "accepted_and_own_ones_do_not_differ": {"OWN"},
    "swap_reads_the_hardware_address": {"NEVER"},
    "swap_changes_the_flags": {"NEVER"},
    "swap_gives_the_namespace": {"NEVER"},
    "swap_under_no_socket": {"NEVER"},
    "swap_reads_under_no_socket": {"NEVER"},
}
OTHER_ABI = (
    "i386_socket", "i386_socketcall", "i386_bind", "i386_connect", "i386_listen", "i386_setsockopt", "i386_getsockopt",
    "x32_socket", "x32_setsockopt",
)  # fmt: skip
MESSAGES = (
    "agent_message_malformed", "agent_message_deep", "agent_message_huge", "agent_message_publishes",
    "agent_message_names_anothers_process", "forged_metadata",
)  # fmt: skip
EXPECTED |= {attack: {"ENOSYS"} for attack in OTHER_ABI} | {attack: {"REFUSED"} for attack in MESSAGES}
EXPECTED |= {  # doors.py; an ordinary user may not even connect
    "door_of_dockers_plugin": {"CLOSED", "EACCES", "ABSENT"},
    "door_of_dockers_plugin_by_a_child_that_ends": {"CLOSED", "EACCES", "ABSENT"},
    "door_of_the_supervisors": {"CLOSED", "EACCES"},
    "supervisors_socket": {"CLOSED", "EACCES", "EPIPE", "ECONNRESET"},
    "keepers_socket": {"ENOENT"},
    "flood_of_the_entrance": {"SERVED", "EPERM"},  # the latter without CAP_NET_RAW
    "connections_by_packets": {"SERVED", "EPERM", "EACCES"},
    "door_of_the_admin_by_a_passed_connection": {"EPERM", "EACCES"},
}
EXPECTED |= {f"v6only_of_{length}_bytes": {"HELD", "EADDRNOTAVAIL"} for length in (0, 1, 3)} | {
    "v6only_beside_the_bind": {"HELD"},
    "race_so_priority_over_a_page": {"HELD"},
    "race_v6only_over_a_page": {"HELD"},
    "tenants_number": {"ENOTSUP", "ENOPROTOOPT"},
    "udp_reuseaddr_of_no_length": {"EINVAL"},
    "udp_reuseaddr_of_one_byte": {"EINVAL"},
    "udp_reuseport_of_three_bytes": {"EINVAL"},
    "udp_port_by_chance_after_a_failed_bind": {"NEVER"},
}
EXPECTED |= {
    "packet_by_a_timestamp_of_a_socket": {"ALONE"},
    "packet_by_a_timestamp_of_a_message": {"ALONE", "NOTHING", "NEVER"},
    "protocol_smc": {"EPROTONOSUPPORT"},
}
EXPECTED |= {attack: {"ENOENT"} for attack in ("tcp_ulp_smc", "tcp_ulp_over_a_page", "tcp_ulp_that_begins_well")}
# As the kernel says it from 127.0.0.1 to elsewhere
EXPECTED |= {attack: REFUSED | {"EINVAL"} for attack in ("source_after_the_loopback", "source_by_bind")}
FAMILIES = ("family_vsock", "family_qipcrtr", "family_isdn", "family_rds", "family_smc", "family_vsock_to_the_hypervisor")
EXPECTED |= {attack: {"EAFNOSUPPORT"} for attack in FAMILIES}
# netns.py: "OWN" is what the container has of its own, "REFUSED" that each of several ways was refused
OWN = REFUSED | {"OWN"}
EXPECTED |= {
    "abstract_name_of_the_hosts_is_free": {"OK"},
    "abstract_name_by_autobind": {"OWN"},
    "socketpair_is_the_containers": {"OWN"},
    "socketpair_binds_to_the_hosts_name": {"OWN"},
    "socketpair_sends_to_the_hosts_name": {"OWN"},
    "socketpair_without_a_place": {"SERVED"},
    "socketpair_of_internet_families": {"REFUSED"},
    "every_family_is_the_containers": {"OWN"},
    "every_protocol_of_the_internet": {"OWN"},
    "registers_have_upper_halves": {"OWN"},
    "packet_sockets_of_every_kind_see_no_device": {"OWN"},
    "netlink_lists_the_hosts_listeners": {"OWN"},
    "netlink_destroys_the_hosts_listener": {"ENOENT", "EPERM"},
    "netlink_lists_the_hosts_unix_sockets": {"OWN"},
    "netlink_of_every_protocol": {"REFUSED"},
    "netlink_sends_uevents": OWN,
    "sysctls_of_the_hosts": {"REFUSED"},
    "sysctls_by_every_procfs": {"REFUSED"},
    "mount_over_net_is_taken_away": REFUSED | {"EINVAL"},
    "mount_over_sysctls_is_taken_away": REFUSED | {"EINVAL"},
    "mount_over_sys_is_taken_away": REFUSED | {"EINVAL"},
    "mounts_by_the_network": {"EPERM"},
    "sysfs_shows_the_hosts_devices": {"OWN"},
    "proc_net_shows_the_hosts": {"OWN"},
    "files_of_the_hosts_firewall": {"REFUSED"},
    "tun_tells_its_netns": {"REFUSED", "EACCES", "ENOENT"},  # the last: there is no such file
    "others_are_moved_into_the_cgroup": {"REFUSED"},
    "vfork_and_threads_stay": {"HELD"},
    "accepted_in_every_way_binds": {"REFUSED"},
    "accepted_in_every_way_connects": {"REFUSED"},
    "accepted_in_every_way_listens": {"REFUSED"},
    "accepted_in_every_way_opens_fast": {"REFUSED"},
    "accepted_in_every_way_has_a_stamp": {"REFUSED"},
    "fast_open_to_the_host": {"REFUSED"},
    "first_calls_race": {"HELD"},
    "first_calls_race_with_disconnects": {"HELD"},
    "sockets_of_ones_own_netns_reach_nothing": REFUSED | {"REFUSED"},
    "raw_sockets_of_ones_own_netns_reach_nothing": REFUSED | {"REFUSED"},
    "sockets_of_the_hosts_in_ones_own_netns": REFUSED | {"REFUSED"},
    "unix_sockets_of_ones_own_netns": {"OWN"},
    "listener_in_ones_own_netns_of_a_socket_of_the_hosts": REFUSED | {"OK"},
    "options_over_a_page": {"REFUSED"},
    "mptcp_of_every_form": {"REFUSED"},
    "accepted_and_made_are_told_apart_by_nobody_else": {"OWN"},
    "ppp_units": REFUSED | {"ENOENT"},  # no such device here
    "tun_of_every_form": REFUSED | {"ENOENT"},
    "i386_tun": REFUSED | {"ENOENT"},
}
# What is different in a direct container, by design
DIRECT: dict[str, set[str]] = {
    "packet_by_a_timestamp_of_a_message": {"PACKET"},  # net.core.tstamp_allow_data=0 is against it (docs/security.md)
    "i386_socketpair": {"ENOSYS"},
    "filter_on_top": {"EBADF"},  # nothing of graft's is before the filter's own answer, ENOSYS
    "connections_by_packets": {"EROFS", "EPERM", "EACCES"},  # it begins with a sysctl of the netns, and /proc/sys/net is read-only there
}
def has_unchecked_peers():
    """May anybody put a device into any netns, with this kernel (CVE-2026-31692)? `graft doctor` says so."""
    try:
        checks_host.peers()
    except checks_host.Lack:
        return True
    return False


# What is trapped has these of its own netns, or as root shares the host's files: whatever comes of them, the host is as
# before
NOT_IN_TRAP = {
    "tun_of_every_form", "i386_tun", "i386_socketpair", "sysctls_of_the_hosts", "sysctls_by_every_procfs", "sysctls_by_a_new_procfs",
    "others_are_moved_into_the_cgroup",
}  # fmt: skip
# What root does beside the host's processes (docs/security.md, Known gaps); if it does not any more, it is to be taken out
# here
GAPS = {"files_of_the_hosts_firewall"}
# With CAP_NET_ADMIN over the host's netns a netlink socket of any netns names others (docs/security.md, Known gaps)
NOT_AS_ADMIN = {
    "netlink_names_the_netns_of_the_process", "device_moved_by_pid", "device_moved_by_init", "device_moved_by_descriptor",
}  # fmt: skip
# With the host's files in reach root may write to them, with graft or without; these are an ordinary user's
FILES = {"links_in_the_run_directory", "run_directory_is_not_ours"}
# They ask for thousands of families and protocols that there are not, and the kernel starts modprobe(8) for each
ASK_FOR_ALL = {"every_family_is_the_containers", "every_protocol_of_the_internet"}
MODPROBE = Path("/proc/sys/kernel/modprobe")
# Where the host may be spoken to these arrive, from the address that the route gives
MAY_ARRIVE = {
    "bind_twice", "source_by_pktinfo", "source_by_pktinfo_connected", "closed_to_the_host", "reuseport_with_the_host",
    "fast_open_to_the_host", "source_by_bind_no_port", "source_by_bind_to_an_address_of_the_hosts", "source_by_bind_to_a_port_there",
}  # fmt: skip


# Without egress a bind to port 0 gets a number of the container's own, which may be any
PRIVATE = {"udp_port_by_chance"}


class Container:
    """One of hostile programs, that tries what it is told."""

    def __init__(self, lab, profile, egress, place):
        options = ["--name", f"{profile}-{egress}", "--egress", egress, "--limit", "udp=512"]
        if egress == "host":
            options += ["-p", f"{8080 + place}:80", "-p", f"[::]:{8060 + place}:54/udp"]
        self.process = lab.spawn_graft(
            *options, *LOW_PORTS, *PROFILES[profile], *python(f"import sys; sys.path.insert(0, {str(lab.work)!r})\nfrom programs.attacks import main; main()"),
            HOST4, CLIENT4, SECOND4, HOST6, lab.other, lab.work / "attacks", stdin=-1, stdout=-1,
        )  # fmt: skip
        assert self.process.stdout.readline() == "up\n"

    def tries(self, attack):
        self.process.stdin.write(attack + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def ask(program):
    """What a program of the host's tells when it gets a line: witness.py, onlooker.py."""
    program.stdin.write("\n")
    program.stdin.flush()
    return json.loads(program.stdout.readline())


class World:
    """The laboratory, what the host is like, and who has seen whom."""

    def __init__(self, lab, mode):
        self.lab, self.mode = lab, mode
        lab.env["GRAFT_DIRECT"] = "on" if mode == "direct" else "off"
        lab.host("sysctl", "-q", "net.ipv4.ip_local_port_range=39500 41499", check=True)  # 40000 comes up soon
        listed = ("-p", "tcp", "--dport", "1", "-m", "recent", "--name", lab.tag, "--set")
        lab.host("iptables", "-A", "INPUT", *listed, check=True)
        shutil.copytree(PROGRAMS, lab.work / "programs", ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(("gcc", "-O1", "-pthread", PROGRAMS / "attacks.c", "-o", lab.work / "attacks"), check=True)
        self.witness = lab.spawn("/usr/bin/python3", "-I", lab.work / "programs" / "witness.py", HOST4, stdin=-1, stdout=-1)
        assert self.witness.stdout.readline() == "up\n"
        self.onlooker = lab.spawn("/usr/bin/python3", "-I", lab.work / "programs" / "onlooker.py", lab.tag, stdin=-1, stdout=-1)
        code = (
            "import socket; l = [socket.socket() for _ in range(2)]\n"
            "[s.setsockopt(1, 15, 1) for s in l]; l[0].bind(('0.0.0.0', 80)); l[1].bind(('127.0.0.1', 5000))\n"
            "[s.listen() for s in l]; print('up', flush=True); input()"
        )
        other = lab.spawn_graft("--name", "other", "-p", "9300:80", sys.executable, "-c", code, stdin=-1, stdout=-1)
        other.stdout.readline()
        told = lab.host("ss", "-tlnH").stdout.split()
        lab.other = next(word for word in told if word.startswith("127.") and not word.startswith("127.0.0.1:"))
        self.containers: dict[tuple[str, str], Container] = {}
        wait_for(lambda: "tentative" not in lab.host("ip", "address").stdout, "the link's own addresses")
        self.last = self.state()

    def container(self, profile, egress):
        """The one of this profile, from its first attack on: in emulation a start takes half a minute."""
        if (profile, egress) not in self.containers:
            place = 2 * list(PROFILES).index(profile) + (egress == "host")
            self.containers[profile, egress] = Container(self.lab, profile, egress, place)
            self.last = self.state()  # with its publications
        return self.containers[profile, egress]

    def state(self):
        """The host, but for what its containers have."""
        return ask(self.onlooker)

    def expected(self, attack):
        """What an attack may come to in this mode; None: anything."""
        if self.mode == "trap" and attack in NOT_IN_TRAP:
            return None
        if attack == "device_of_ones_own_to_the_host" and has_unchecked_peers():
            return {"OK"}  # of what is trapped into its own; of a direct container into the host's (docs/security.md)
        return (DIRECT.get(attack) if self.mode == "direct" else None) or EXPECTED.get(attack, REFUSED)

    def visitors(self):
        return ask(self.witness)


@pytest.fixture(scope="module", params=MODES)
def world(request):
    need_root()
    need("gcc", "setpriv", "unshare", "nft", "iptables")
    with laboratory("attack") as lab:
        one = World(lab, request.param)
        yield one


def names():
    """Every attack there is, from the programs themselves."""
    compiled = [
        part.split(")")[0] for part in (PROGRAMS / "attacks.c").read_text().split("attacks[] = {")[1].split("A(")[2:]
    ]
    return [*ATTACKS, *compiled]


@contextlib.contextmanager
def families_loaded():
    """All that the kernel has, and none is looked for meanwhile: in emulation that takes ten minutes for an attack.

    Elsewhere nothing is done: the kernel that is emulated is nobody's.
    """
    if SLOWNESS < EMULATED:
        yield
        return
    aliases = Path("/lib/modules", os.uname().release, "modules.alias").read_text()
    subprocess.run(("modprobe", "-aq", *re.findall(r"^alias (net-pf-\S+)", aliases, re.M)), check=False)  # some want a device
    before = MODPROBE.read_text()
    MODPROBE.write_text("\n")
    try:
        yield
    finally:
        MODPROBE.write_text(before)


@pytest.mark.parametrize(
    ("attack", "profile"),
    [
        (a, p)
        for a in names()
        for p in PROFILES
        if (p == "user" or a not in FILES) and (p != "admin" or a not in NOT_AS_ADMIN)
    ],
)
def test_attack(world, attack, profile):
    containers = {egress: world.container(profile, egress) for egress in ("none", "host")}
    before = world.last
    gap = attack in GAPS and profile != "user"
    for egress, container in containers.items():
        with families_loaded() if attack in ASK_FOR_ALL else contextlib.nullcontext():
            told = container.tries(attack)
        if gap:
            assert told not in EXPECTED[attack], "a gap that is no longer there"
            continue
        open_here = egress == "host" and (attack.startswith("closed_") or attack in MAY_ARRIVE)
        open_here |= egress == "none" and attack in PRIVATE
        expected = world.expected(attack)
        assert open_here or expected is None or told in expected, f"with egress {egress}"
        visitors = world.visitors()
        assert not visitors or open_here, f"with egress {egress}"
        assert {source for _, source in visitors} <= {HOST4}
    if gap:
        world.lab.host("sh", "-c", f"echo / >/proc/net/xt_recent/{world.lab.tag}", check=True)
    world.last = world.state()
    assert world.last == before


def test_there_are_enough():
    assert len(names()) >= 100
