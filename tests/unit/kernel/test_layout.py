"""Every structure, enumerator and constant of the C headers is what Python has, or is listed as C's alone.

The headers are read, so that a new name in one of them fails here until Python knows it, or C_ONLY says why not.
The numbers are a C compiler's.
"""

import re
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import graft
from graft.kernel import denials, direct, holders, linux, listening, programs, reports, stamps, traffic, traps
from graft.process import cage
from graft.rules import endpoint, slices, sysctl, tables
from graft.tenants import leads, tenant
from graft.trap import deputy, family, journal, listener, spent

ROOT = Path(__file__).parents[3]
HEADERS = ("csrc/abi.h", "csrc/sup.h", "csrc/deputy.h", "include/graft.h")

OPS = {f"OP_{name.upper()}": value for value, name in enumerate(denials.OPS)}
REASONS = {
    name: denials.REASONS.index(text)
    for name, text in {
        "REASON_NO_RULE": "no ingress rule",
        "REASON_NO_EGRESS": "outside the egress rules",
        "REASON_PRIVATE_SOURCE": "bound to the private loopback",
        "REASON_WRONG_SOURCE": "bound to another address than the egress rule's",
        "REASON_DUAL_STACK": "two host addresses for one dual-stack socket",
        "REASON_NOT_LISTENING": "nobody of this container listens there",
        "REASON_OPTION": "forbidden socket option",
        "REASON_UNBOUND_LISTEN": "listen() on an unbound socket",
        "REASON_SLICE": "another's private loopback",
        "REASON_NO_TENANT": "the container's policy is gone",
        "REASON_UNSTAMPED": "an accepted socket put to another use",
        "REASON_PLACE": "the endpoint is in another namespace than the socket",
        "REASON_NO_DEFAULT": "no endpoint 'default-source'",
        "REASON_TAKEN": "another container is bound there",
        "REASON_NETWORK": "an address of a network that the container is not in",
        "REASON_BUDGET": "more queries than a container may send",
        "REASON_PORTS": "no port is left that the kernel may choose",
        "REASON_CAPABILITY": "no capability for a port as low as this",
        "REASON_RESERVED": "a port that the node needs",
        "REASON_KIND": "a kind of socket that is made elsewhere",
        "REASON_MOVED": "a process moved out of its container's cgroup",
        "REASON_SOCKETS": "more sockets than a container may have",
        "REASON_NOT_ALLOWED": "a destination that it is not allowed",
        "REASON_NO_ENDPOINT": "a name's address, and no endpoint to go to",
        "REASON_MET": "a peer beside others that the socket has had",
        "REASON_LEARNT": denials.LEARNT,
        "REASON_CONVERTED": denials.CONVERTED,
        "REASON_ALLOWED": denials.ALLOWED,
    }.items()
}
# names that both sides have
SAME = {
    stamps: "GRAFT_LEVEL GRAFT_PROBE STAMP_INGRESS STAMP_CONNECTED STAMP_FAMILY STAMP_NAMED STAMP_PERMIT "
    "STAMP_SOURCE STAMP_STAYS STAMP_LATE STAMP_WAITS",
    slices: "SLICE4_NET SLICE4_MASK SLICE_SHIFT SLICE_DYNAMIC SLICE_PORT_BASE SLICE_COUNT SLICE_GROUP SLICE_LOOPBACKS "
    "NAMES4_NET NAMES4_MASK",
    tables: "TENANT_EGRESS TENANT_STRICT TENANT_REPLIES TENANT_HOME TENANT_VERBOSE TENANT_SERVES4 TENANT_SERVES6 "
    "TENANT_ABROAD TENANT_DIRECT TENANT_PLAIN TENANT_ALLOW TENANT_LEARN TENANT_NAMES TENANT_WATCHED TENANT_PACED ALLOWED_FIXED_BITS RESOLVER6_INDEX PLACE_UNIX PLACE_NOWHERE HOLDER_LOCAL HOLDER_DEVICE "
    "INGRESS_FIXED_BITS EGRESS_FIXED_BITS LED_FIXED_BITS SERVICE_PLAIN SERVICE_NAMED",
    journal: "SUP_FORWARD SUP_IDLE SUP_BIND SUP_BESIDE SLOT_FREE SLOT_HELD SLOT_FORWARDED",
    linux: "AF_GRAFT IPPROTO_GRAFT",
    reports: "REPORTS_ALL",
    spent: "SUP_SPENT SUP_SPENT_FIRST",
    sysctl: "NUMBERS_FIRST NUMBERS_WORDS SUP_KIND_INET6 SUP_KIND_DGRAM",
    deputy: "DEPUTY_CONNECT DEPUTY_SENDTO DEPUTY_PATH",
    family: "GRAFT_SO_DELAYED GRAFT_SO_DELAYED_EXECUTE GRAFT_SO_DELAYED_RESULT GRAFT_SO_TRANSPARENT "
    "GRAFT_NAME_TRANSPARENT",
}
VALUES = {name: getattr(module, name) for module, names in SAME.items() for name in names.split()}
VALUES |= OPS
VALUES |= REASONS
VALUES |= {
    "GRAFT_ABI": programs.ABI,
    "GRAFT_EXEMPT": stamps.OWN_TENANT,
    "GRAFT_OWNERS": tenant.OWNER_BASE,
    "GRAFT_PREPARED": int.from_bytes(stamps.PREPARED, "little"),
    "SLICE6_WORD0": int.from_bytes(slices.SLICE6_PREFIX[:4], "big"),
    "SLICE6_WORD1": int.from_bytes(slices.SLICE6_PREFIX[4:], "big"),
    "NAMES6_WORD1": int.from_bytes(slices.NAMES6_PREFIX[4:], "big"),
    "ENDPOINT_OF_USER": tables.ENDPOINT_OF_USER,
    "GRAFT_DEFAULT": tables.DEFAULT,
    "GRAFT_INET": tables.INET,
    "GRAFT_INET6": tables.INET6,
    "FAMILY_QUEUE": family.QUEUE_MAX,
    "FAMILY_VALUE": family.VALUE_MAX,
    "NUMBERS_KINDS": programs.NUMBERS_KINDS,
    "NUMBERS_ALL": sysctl.NUMBERS_WORDS * programs.NUMBERS_KINDS,
    "OWNED_WORDS": holders.OWNED_WORDS,
    "LED_WORDS": 65536 // leads.WORD,
    "ASKERS_SETS": programs.ASKERS_SETS,
    "ASKERS_WAYS": programs.ASKERS_WAYS,
    "ASKERS_ALL": programs.ASKERS_SETS * programs.ASKERS_WAYS,
    "SUP_ABI": journal.SHARED_ABI,
    "SUP_SLOTS": journal.SLOTS,
    "PF_GRAFT": linux.AF_GRAFT,
    "DEPUTY_ID": cage.NOBODYS,
    "DEPUTY_DATA": family.DATAGRAM_MAX,
    "AF_GRAFT_EPNAME_MAX": endpoint.NAME_MAX + 1,
    "IFNAMSIZ": endpoint.NAME_MAX + 1,
    "UNIX_PATH_MAX": endpoint.UNIX_PATH_MAX + 1,
    "GRAFT_SSO_TRANS_SIZE": family.SSO_TRANS_SIZE,
}
C_ONLY = {
    "SLICE_PORT_BITS": "slices.slice_address() shifts by it; test_slices compares the addresses",
    "STAMP_PRIVATE": "set and read by bind.bpf.h and show.bpf.h",
    "STAMP_EPHEMERAL": "set and read by bind.bpf.h and connect.bpf.h",
    "STAMP_V6ONLY": "set and read by bind.bpf.h",
    "STAMP_VOUCHED": "set and read by options.bpf.h",
    "STAMP_REUSEADDR": "set and read by options.bpf.h and bind.bpf.h",
    "STAMP_REUSEPORT": "set and read by options.bpf.h and bind.bpf.h",
    "STAMP_COUNTED": "set and read by options.bpf.h",
    "STAMP_BROADCAST": "set by options.bpf.h, read by receive.bpf.h",
    "SERVED_MAX": "read by numbers.bpf.h",
    "SLICE_OWN": "read by slice.bpf.h; test_listeners.py looks at the places",
    "LISTENER_SLOTS": "read by listeners.bpf.h",
    "UDP_PORTS_MAX": "read by listeners.bpf.h",
    "LISTENERS_MAX": "read by listeners.bpf.h; test_bounds.py fills the table",
    "HELD_PORT": "set and read by numbers.bpf.h",
    "HELD_DYNAMIC": "set by bind.bpf.h, read by numbers.bpf.h",
    "HELD_DYNAMIC6": "set and read by numbers.bpf.h",
    "HELD_BOTH": "set and read by numbers.bpf.h",
    "STAMP_LENT": "set by connect.bpf.h, read by show.bpf.h",
    "STAMP_NO_PORT": "set and read by options.bpf.h, read by bind.bpf.h",
    "CLAIMS_MAX": "read by claims.bpf.h",
    "CLAIM_AT": "read by claims.bpf.h",
    "CLAIM_ALL4": "read by claims.bpf.h",
    "CLAIM_ALL6": "read by claims.bpf.h",
    "CLAIM_UDP": "read by claims.bpf.h, set by bind.bpf.h",
    "STAMP_ABROAD": "set by bind.bpf.h; is_server() reads it",
    "STAMP_SENT": "set and read by met.bpf.h",
    "STAMP_SENT_MORE": "set and read by met.bpf.h",
    "STAMP_HAD6": "set and read by met.bpf.h",
    "STAMP_HAD4": "set and read by met.bpf.h",
    "ABROAD_MEMBERS": "read by abroad.bpf.h",
    "GRAFT_USED": "read by numbers.bpf.h",
    "MET_MAX": "read by met.bpf.h",
    "TOLD_MAX": "read by send.bpf.h and show.bpf.h",
    "ASKED_LOCALS": "read by answer.bpf.h",
    "ASKED_SETS": "read by answer.bpf.h",
    "ASKED_WAYS": "read by answer.bpf.h",
    "ASKED_ALL": "read by answer.bpf.h",
    "PEERS_BITS": "read by receive.bpf.h",
    "PEERS_WORDS": "read by receive.bpf.h",
    "SUP_CHANNEL": "between graft-sup and the preload library",
    "SUP_KINDS": "between graft-sup and the preload library",
    "SUP_BATCH": "between graft-sup and the preload library",
    "GRAFT_VERSION": "a text; test_the_header_has_graftds_version compares it",
}

ADDRESSES = {"local", "local_real", "peer", "peer_real", "addr", "real"}  # members that are a struct graft_addr
# C structure: Python's, the members that it packs, what follows them in C: (member, its offset in Python)
STRUCTS: dict[str, tuple[struct.Struct, str, dict[str, int]]] = {
    "graft_config": (programs.CONFIG, "host_cookie abi watched counts", {}),
    "graft_direct": (direct.VALUE, "tenant low", {}),
    "graft_tenant": (programs.TENANT, "netns_cookie slice flags parent own4 own6", {}),
    "graft_holder": (tables.OWNER, "tenant network flags number", {}),
    "graft_owned": (struct.Struct("="), "", {"bits": 0}),
    "graft_loopbacks": (struct.Struct("="), "", {"ip": 0}),
    "graft_listener_key": (listening.TABLE_KEY, "tenant ip port slot", {}),
    "graft_led_key": (tables.LED_KEY, "prefixlen ip port_be pad", {}),
    "graft_led": (tables.LED, "tenant ip first inside", {}),
    "graft_listening": (listening.TABLE, "used udp slots", {}),
    "graft_usage": (programs.USAGE, "sockets udp sockets_max udp_max", {}),
    "graft_probe": (stamps.PROBE, "tenant over", {}),
    "graft_stamp": (stamps.STAMP, "tenant flags place local local_real peer peer_real", {}),
    "graft_family": (family.HEAD, "name flags count", {"queue": family.HEAD.size}),
    "graft_family.queue[0]": (family.WAITING, "level name result length done value", {}),
    "graft_ingress_key": (tables.INGRESS_KEY, "prefixlen tenant proto family zero ip port_be pad", {}),
    "graft_ingress": (tables.INGRESS_VALUE, "ip port first span place exclusive", {}),
    "graft_egress_key": (tables.EGRESS_KEY, "prefixlen tenant family ip", {}),
    "graft_egress": (tables.EGRESS_VALUE, "ip port place", {}),
    "graft_allowed_key": (tables.ALLOWED_KEY, "prefixlen tenant port ip", {}),
    "graft_pinned_key": (tables.PINNED_KEY, "tenant port ip", {}),
    "graft_endpoint_key": (tables.ENDPOINT_KEY, "tenant ip", {}),
    "graft_endpoint": (tables.ENDPOINT, "ip port place", {}),
    "graft_service_key": (tables.SERVICE_KEY, "tenant port pad ip", {}),
    "graft_ports": (programs.PORTS, "used max served", {}),
    "graft_numbers": (programs.NUMBERS, "next pad", {"taken": 8}),
    "graft_askers": (programs.ASKERS, "key hash", {}),
    "graft_client_key": (programs.CLIENT_KEY, "proto port", {}),
    "graft_served_key": (programs.SERVED_KEY, "ip port", {}),
    "graft_served": (programs.SERVED, "tenant port", {}),
    "graft_counter_key": (programs.COUNTER_KEY, "tenant op reason", {}),
    "graft_denial": (denials.DENIAL, "tenant op reason error proto addr real comm when pid pad", {}),
    "graft_traffic": (traffic.TRAFFIC, "accepted connected received sent segments_received segments_sent", {}),
    "graft_datagrams": (traffic.DATAGRAMS, "bytes_received bytes_sent received sent", {}),
    "graft_reports": (reports.REPORTS, "window refused allowed dropped", {}),
    "graft_leash": (direct.LEASH, "cgroup notification tenant pad", {}),
    "sup_slot": (journal.SLOT, "state answer inode", {"call": journal.SLOT.size, "pad": 96}),
    "sup_shared": (
        journal.SHARED,
        "abi tenant reuse_uid home netns flags maker calls ns number trusted token maker_gid",
        {"spent": journal.SHARED.size, "slots": journal.SHARED_SIZE},
    ),
    "deputy_order": (deputy.ORDER, "uid gid call flags path_length data_length path", {}),
    "deputy_answer": (deputy.ANSWER, "value error unused", {}),
    "sockaddr_gr": (struct.Struct("=H16s"), "sgr_family sgr_epname", {}),
    "graft_sso_result": (family.RESULT, "level optname ret", {}),
    "graft_sso_trans": (family.TRANS, "level optname optlen", {"optval": family.TRANS.size}),
}
STRUCTS_C_ONLY = {
    "graft_addr": "a part of other structures",
    "graft_dynamic_key": "written and read by programs alone",
    "graft_held": "written and read by programs alone",
    "graft_claim_key": "written and read by programs alone",
    "graft_claim": "written and read by programs alone",
    "graft_claimed": "written and read by programs alone",
    "graft_udp_key": "written and read by programs alone",
    "graft_udp_place": "written and read by programs alone",
    "graft_abroad_key": "written and read by programs alone",
    "graft_abroad": "written and read by programs alone",
    "graft_abroad_place": "written and read by programs alone",
    "graft_peers": "written and read by programs alone",
    "graft_met": "written and read by programs alone",
    "graft_told": "written and read by programs alone",
    "graft_told.of[0]": "likewise",
    "graft_asked": "likewise",
    "graft_asked.locals[0]": "likewise",
}


class Declared(NamedTuple):
    """What a header has: names of constants, and of the members of each structure."""

    constants: set[str]
    structs: dict[str, list[str]]


def declared(text: str) -> Declared:
    """Read a header."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    constants = set(re.findall(r"^#define (\w+)[ \t]+\S", text, flags=re.MULTILINE))
    for body in re.findall(r"\benum\s+\w*\s*\{(.*?)\}", text, flags=re.DOTALL):
        constants |= {entry.split("=")[0].strip() for entry in body.split(",") if entry.strip()}
    structs = {}
    for name, body in re.findall(r"^struct (\w+) \{\s*\n(.*?)^\}", text, flags=re.DOTALL | re.MULTILINE):
        for inner, array in re.findall(r"struct \{\n(.*?)\} (\w+)\[", body, flags=re.DOTALL):
            structs[f"{name}.{array}[0]"] = members(inner)
        structs[name] = members(re.sub(r"struct \{\n.*?\} ", "struct inner ", body, flags=re.DOTALL))
    return Declared(constants, structs)


def members(body: str) -> list[str]:
    """The names that a structure declares, in order."""
    names = [re.search(r"(\w+)\s*(\[\w*\])?\s*$", line) for line in body.split(";") if line.strip()]
    assert all(names), body
    return [name[1] for name in names if name]


@pytest.fixture(scope="module")
def headers() -> Declared:
    """All of them as one."""
    each = [declared((ROOT / name).read_text()) for name in HEADERS]
    return Declared(
        set().union(*(header.constants for header in each)),
        {name: names for header in each for name, names in header.structs.items()},
    )


@pytest.fixture(scope="module")
def compiled(headers: Declared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler says: NAME, sizeof STRUCT, STRUCT.MEMBER (offset), sizeof STRUCT.MEMBER."""
    wanted = {name: name for name in headers.constants}
    for name, names in headers.structs.items():
        outer, _, inner = name.partition(".")
        whole = f"*(struct {outer} *)0"
        begins = f"offsetof(struct {outer}, {inner})" if inner else "0"
        path = f"{inner}." if inner else ""
        wanted[f"sizeof {name}"] = f"sizeof(({whole}).{inner})" if inner else f"sizeof({whole})"
        for member in names:
            wanted[f"{name}.{member}"] = f"offsetof(struct {outer}, {path}{member}) - {begins}"
            wanted[f"sizeof {name}.{member}"] = f"sizeof(({whole}).{path}{member})" if member != "optval" else "0"
    lines = [f'printf("%lld {key}\\n", (long long)({expression}));' for key, expression in wanted.items()]
    includes = ["<stdio.h>", "<stddef.h>", "<linux/types.h>", *(f'"{ROOT / name}"' for name in HEADERS)]
    directory = tmp_path_factory.mktemp("layout")
    source = directory / "layout.c"
    source.write_text(
        "".join(f"#include {name}\n" for name in includes) + f"int main(void)\n{{\n{chr(10).join(lines)}\n}}\n"
    )
    subprocess.run(["gcc", source, "-o", directory / "layout"], check=True)
    output = subprocess.run([directory / "layout"], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for value, _, key in (line.partition(" ") for line in output.splitlines())}


def packed(layout: struct.Struct) -> list[tuple[int, int]]:
    """Offset and size of each field that a struct.Struct without alignment packs; padding is a field."""
    assert layout.format.startswith("=")
    fields = []
    at = 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        times, size = (1, int(count or 1)) if code in "sx" else (int(count or 1), struct.calcsize("=" + code))
        for _ in range(times):
            fields.append((at, size))
            at += size
    assert at == layout.size
    return fields


def in_c(name: str, names: list[str], compiled: dict[str, int], headers: Declared) -> list[tuple[int, int]]:
    """Offset and size of each of a structure's members, an address being two."""
    fields = []
    for member in names:
        at, size = compiled[f"{name}.{member}"], compiled[f"sizeof {name}.{member}"]
        if member in ADDRESSES:
            parts = [f"graft_addr.{part}" for part in headers.structs["graft_addr"]]
            fields += [(at + compiled[part], compiled[f"sizeof {part}"]) for part in parts]
        else:
            fields.append((at, size))
    return fields


def test_the_header_has_graftds_version():
    assert f'#define GRAFT_VERSION "{graft.__version__}"' in (ROOT / "include/graft.h").read_text()


def test_every_constant_is_known(headers: Declared):
    """Nobody adds a flag, a reason or a state to a header that Python does not know of."""
    assert headers.constants == VALUES.keys() | C_ONLY.keys()
    assert not VALUES.keys() & C_ONLY.keys()


def test_every_constant_is_the_same(compiled: dict[str, int]):
    assert {name: compiled[name] for name in VALUES} == VALUES


def test_every_operation_and_reason_has_a_name(headers: Declared):
    assert {name for name in headers.constants if name.startswith("OP_")} == OPS.keys()
    assert {name for name in headers.constants if name.startswith("REASON_")} == REASONS.keys()
    assert len(denials.REASONS) == len(REASONS)


def test_every_structure_is_known(headers: Declared):
    assert headers.structs.keys() == STRUCTS.keys() | STRUCTS_C_ONLY.keys()


@pytest.mark.parametrize("name", STRUCTS)
def test_every_structure_is_the_same(name: str, headers: Declared, compiled: dict[str, int]):
    layout, text, rest = STRUCTS[name]
    names = text.split()
    assert headers.structs[name] == names + list(rest)
    assert in_c(name, names, compiled, headers) == packed(layout)
    for member, offset in rest.items():
        assert compiled[f"{name}.{member}"] == offset, member
    if not rest:
        assert compiled[f"sizeof {name}"] == layout.size


def test_sizes_that_python_computes(compiled: dict[str, int]):
    assert compiled["sizeof graft_family"] == stamps.FAMILY_SIZE
    assert compiled["sizeof graft_numbers"] == programs.NUMBERS_SIZE
    assert compiled["sizeof sup_slot"] == journal.SLOT_SIZE
    assert compiled["sizeof sup_slot.call"] == listener.NOTIFICATION.size
    assert compiled["sizeof sup_shared"] == journal.SHARED_SIZE + journal.SLOTS * journal.SLOT_SIZE
    assert compiled["sizeof sockaddr_gr"] == traps.SOCKADDR_GR


def test_offsets_that_python_writes_to(compiled: dict[str, int]):
    assert compiled["sup_shared.flags"] == journal.FLAGS_OFFSET
    assert compiled["sup_shared.calls"] == journal.COUNTED_OFFSET
    assert compiled["sup_shared.number"] == journal.NUMBER_OFFSET
    assert compiled["sup_shared.token"] == journal.TOKEN_OFFSET
    assert compiled["sup_slot.answer"] == journal.INJECTION_OFFSET


def test_slices(compiled: dict[str, int]):
    """Where a port of the loopback is, computed from the header's numbers."""
    bits, base = compiled["SLICE_PORT_BITS"], compiled["SLICE_PORT_BASE"]
    assert compiled["SLICE4_MASK"] == 0xFFFFFFFF << (32 - 10) & 0xFFFFFFFF
    assert compiled["SLICE_COUNT"] == 1 << (22 - compiled["SLICE_SHIFT"])
    assert base + (1 << bits) == 65536
    for port in (1, 80, 4095, 4096, 61440, 65535):
        address, real = slices.slice_address(7, port)
        ip = compiled["SLICE4_NET"] | 7 << compiled["SLICE_SHIFT"] | port >> bits
        assert (int.from_bytes(address.raw[12:], "big"), real) == (ip, base | port & (1 << bits) - 1)


def test_the_maps_are_those_that_are_pinned():
    text = (ROOT / "csrc/maps.bpf.h").read_text()
    assert set(re.findall(r'^\} (\w+) SEC\("\.maps"\)(?: =.*)?;', text, flags=re.MULTILINE)) == set(programs.MAPS)


def test_a_new_name_is_noticed():
    """The reader sees what is added at any place that a header has."""
    text = "\n".join((ROOT / name).read_text() for name in HEADERS)
    before = declared(text)
    more = text.replace("REASON_CONVERTED,", "REASON_CONVERTED, REASON_NEW,").replace(
        "SLOT_FREE,", "SLOT_NEW = 9,\n\tSLOT_FREE,"
    )
    more += "\n#define NEW 1\nenum {\n\tNEW_FLAG = 1 << 3 /* = 8 */\n};\nstruct new {\n\t__u32 a;\n};\n"
    more = more.replace("\t__u32 exclusive;", "\t__u32 exclusive;\n\t__u32 newer;")
    after = declared(more)
    assert after.constants - before.constants == {"REASON_NEW", "SLOT_NEW", "NEW", "NEW_FLAG"}
    assert after.structs["new"] == ["a"]
    assert after.structs["graft_ingress"] == [*before.structs["graft_ingress"], "newer"]
