"""csrc/abi.h and the Python side agree, as a C compiler sees the header."""

import subprocess
from pathlib import Path

from graft.kernel import denials, programs, stamps
from graft.rules import slices, tables
from graft.trap import family, journal

ROOT = Path(__file__).parent.parent.parent
PROGRAM = r"""
#include <stdio.h>
#include <stddef.h>
#include <linux/types.h>
#include "abi.h"
#include "sup.h"
#define SIZE(s) printf("sizeof " #s " %zu\n", sizeof(struct s))
#define OFFSET(s, m) printf(#s "." #m " %zu\n", offsetof(struct s, m))
#define VALUE(v) printf(#v " %lld\n", (long long)(v))
int main(void)
{
	SIZE(graft_usage); SIZE(graft_probe); OFFSET(graft_usage, udp); OFFSET(graft_usage, sockets_max); VALUE(GRAFT_LEVEL);
	VALUE(GRAFT_PROBE); OFFSET(sup_shared, number); OFFSET(sup_shared, token);
	SIZE(graft_config); SIZE(graft_tenant); SIZE(graft_holder); SIZE(graft_client_key); SIZE(graft_stamp); SIZE(graft_ingress_key); SIZE(graft_ingress);
	SIZE(graft_egress_key); SIZE(graft_egress); SIZE(graft_service_key); SIZE(graft_counter_key); SIZE(graft_denial); SIZE(graft_served_key); SIZE(graft_served); SIZE(graft_family);
	OFFSET(graft_ingress_key, tenant); OFFSET(graft_ingress_key, ip); OFFSET(graft_ingress_key, port_be);
	OFFSET(graft_denial, error); OFFSET(graft_denial, addr); OFFSET(graft_denial, comm); OFFSET(graft_stamp, flags);
	VALUE(GRAFT_ABI); VALUE(SLICE4_NET); VALUE(SLICE_SHIFT); VALUE(SLICE_DYNAMIC); VALUE(SLICE_PORT_BASE);
	VALUE(SLICE_COUNT); VALUE(INGRESS_FIXED_BITS); VALUE(EGRESS_FIXED_BITS); VALUE(TENANT_EGRESS);
	VALUE(TENANT_STRICT); VALUE(TENANT_REPLIES); VALUE(STAMP_V6ONLY); VALUE(OP_GUARD); VALUE(REASON_CONVERTED);
	VALUE(TENANT_HOME); VALUE(TENANT_VERBOSE); VALUE(PLACE_UNIX); VALUE(FAMILY_QUEUE); VALUE(FAMILY_VALUE);
	VALUE(STAMP_INGRESS); VALUE(STAMP_CONNECTED); VALUE(STAMP_FAMILY); VALUE(STAMP_NAMED); VALUE(STAMP_PERMIT);
	VALUE(GRAFT_DEFAULT); OFFSET(graft_family, flags); OFFSET(graft_family, queue); OFFSET(graft_denial, real);
	OFFSET(graft_stamp, place);
	SIZE(sup_shared); SIZE(sup_slot); OFFSET(sup_shared, netns); OFFSET(sup_shared, flags); OFFSET(sup_shared, calls);
	OFFSET(sup_shared, slots); OFFSET(sup_slot, answer); OFFSET(sup_slot, call);
	VALUE(SUP_ABI); VALUE(SUP_SLOTS); VALUE(SUP_FORWARD); VALUE(SLOT_FREE); VALUE(SLOT_HELD); VALUE(SLOT_FORWARDED);
	VALUE(GRAFT_INET); VALUE(GRAFT_INET6); VALUE(SLICE6_WORD0); VALUE(SLICE6_WORD1);
	return 0;
}
"""


def test_layout(tmp_path):
    source = tmp_path / "layout.c"
    source.write_text(PROGRAM)
    subprocess.run(["gcc", f"-I{ROOT / 'csrc'}", source, "-o", tmp_path / "layout"], check=True)
    lines = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert dict(line.rsplit(" ", 1) for line in lines) == {
        "sizeof graft_config": str(programs.CONFIG.size),
        "sizeof graft_tenant": str(programs.TENANT.size),
        "sizeof graft_client_key": str(programs.CLIENT_KEY.size),
        "sizeof graft_holder": str(tables.OWNER.size),
        "sizeof graft_stamp": str(stamps.STAMP.size),
        "sizeof graft_ingress_key": str(tables.INGRESS_KEY.size),
        "sizeof graft_ingress": str(tables.INGRESS_VALUE.size),
        "sizeof graft_egress_key": str(tables.EGRESS_KEY.size),
        "sizeof graft_egress": str(tables.EGRESS_VALUE.size),
        "sizeof graft_service_key": str(tables.SERVICE_KEY.size),
        "sizeof graft_counter_key": str(programs.COUNTER_KEY.size),
        "sizeof graft_denial": str(denials.DENIAL.size),
        "sizeof graft_served_key": str(programs.SERVED_KEY.size),
        "sizeof graft_served": str(programs.SERVED.size),
        "graft_ingress_key.tenant": "4",
        "graft_ingress_key.ip": "12",
        "graft_ingress_key.port_be": "28",
        "graft_denial.error": "8",
        "graft_denial.addr": "16",
        "graft_denial.real": "36",
        "graft_denial.comm": "56",
        "graft_stamp.place": "8",
        "graft_family.flags": "16",
        "graft_family.queue": str(family.HEAD.size),
        "sizeof graft_family": str(stamps.FAMILY_SIZE),
        "sizeof graft_usage": str(programs.USAGE.size),
        "graft_usage.udp": "8",
        "graft_usage.sockets_max": "16",
        "sizeof graft_probe": str(stamps.PROBE.size),
        "GRAFT_LEVEL": str(stamps.GRAFT_LEVEL),
        "GRAFT_PROBE": str(stamps.GRAFT_PROBE),
        "sup_shared.number": str(journal.NUMBER_OFFSET),
        "sup_shared.token": str(journal.TOKEN_OFFSET),
        "TENANT_HOME": str(tables.TENANT_HOME),
        "TENANT_VERBOSE": str(tables.TENANT_VERBOSE),
        "PLACE_UNIX": str(tables.PLACE_UNIX),
        "FAMILY_QUEUE": str(family.QUEUE_MAX),
        "FAMILY_VALUE": str(family.VALUE_MAX),
        "STAMP_INGRESS": str(stamps.STAMP_INGRESS),
        "STAMP_CONNECTED": str(stamps.STAMP_CONNECTED),
        "STAMP_FAMILY": str(stamps.STAMP_FAMILY),
        "STAMP_NAMED": str(stamps.STAMP_NAMED),
        "STAMP_PERMIT": str(stamps.STAMP_PERMIT),
        "GRAFT_DEFAULT": str(tables.DEFAULT),
        "graft_stamp.flags": "4",
        "GRAFT_ABI": str(programs.ABI),
        "SLICE4_NET": str(slices.SLICE4_NET),
        "SLICE_SHIFT": str(slices.SLICE_SHIFT),
        "SLICE_DYNAMIC": str(slices.SLICE_DYNAMIC),
        "SLICE_PORT_BASE": str(slices.SLICE_PORT_BASE),
        "SLICE_COUNT": str(slices.SLICE_SLOTS),
        "INGRESS_FIXED_BITS": str(tables.INGRESS_FIXED_BITS),
        "EGRESS_FIXED_BITS": str(tables.EGRESS_FIXED_BITS),
        "TENANT_EGRESS": str(tables.TENANT_EGRESS),
        "TENANT_STRICT": str(tables.TENANT_STRICT),
        "TENANT_REPLIES": str(tables.TENANT_REPLIES),
        "STAMP_V6ONLY": str(stamps.STAMP_V6ONLY),
        "OP_GUARD": str(len(denials.OPS) - 1),
        "REASON_CONVERTED": str(len(denials.REASONS) - 1),
        "GRAFT_INET": str(tables.INET),
        "GRAFT_INET6": str(tables.INET6),
        "SLICE6_WORD0": str(int.from_bytes(slices.SLICE6_PREFIX[:4], "big")),
        "sizeof sup_shared": str(journal.SHARED_SIZE + journal.SLOTS * journal.SLOT_SIZE),
        "sizeof sup_slot": str(journal.SLOT_SIZE),
        "sup_shared.netns": "16",
        "sup_shared.flags": str(journal.FLAGS_OFFSET),
        "sup_shared.calls": str(journal.COUNTED_OFFSET),
        "sup_shared.slots": str(journal.SHARED_SIZE),
        "sup_slot.answer": str(journal.INJECTION_OFFSET),
        "sup_slot.call": str(journal.SLOT.size),
        "SUP_ABI": str(journal.SHARED_ABI),
        "SUP_SLOTS": str(journal.SLOTS),
        "SUP_FORWARD": str(journal.SUP_FORWARD),
        "SLOT_FREE": str(journal.SLOT_FREE),
        "SLOT_HELD": str(journal.SLOT_HELD),
        "SLOT_FORWARDED": str(journal.SLOT_FORWARDED),
        "SLICE6_WORD1": str(int.from_bytes(slices.SLICE6_PREFIX[4:], "big")),
    }
