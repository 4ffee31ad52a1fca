"""csrc/graft.h and the Python side agree, as a C compiler sees the header."""

import subprocess
from pathlib import Path

from graft import bpf, family, notify, policy

ROOT = Path(__file__).parent.parent.parent
PROGRAM = r"""
#include <stdio.h>
#include <stddef.h>
#include <linux/types.h>
#include "graft.h"
#include "sup.h"
#define SIZE(s) printf("sizeof " #s " %zu\n", sizeof(struct s))
#define OFFSET(s, m) printf(#s "." #m " %zu\n", offsetof(struct s, m))
#define VALUE(v) printf(#v " %lld\n", (long long)(v))
int main(void)
{
	SIZE(graft_usage); SIZE(graft_probe); OFFSET(graft_usage, udp); OFFSET(graft_usage, sockets_max); VALUE(GRAFT_LEVEL);
	VALUE(GRAFT_PROBE); OFFSET(sup_shared, number); OFFSET(sup_shared, token);
	SIZE(graft_config); SIZE(graft_tenant); SIZE(graft_owner); SIZE(graft_client_key); SIZE(graft_stamp); SIZE(graft_ingress_key); SIZE(graft_ingress);
	SIZE(graft_egress_key); SIZE(graft_egress); SIZE(graft_service_key); SIZE(graft_counter_key); SIZE(graft_denial); SIZE(graft_served_key); SIZE(graft_served); SIZE(graft_family);
	OFFSET(graft_ingress_key, tenant); OFFSET(graft_ingress_key, ip); OFFSET(graft_ingress_key, port_be);
	OFFSET(graft_denial, error); OFFSET(graft_denial, addr); OFFSET(graft_denial, comm); OFFSET(graft_stamp, flags);
	VALUE(GRAFT_ABI); VALUE(SLICE4_NET); VALUE(SLICE_SHIFT); VALUE(SLICE_DYNAMIC); VALUE(SLICE_PORT_BASE);
	VALUE(SLICE_SLOTS); VALUE(INGRESS_FIXED_BITS); VALUE(EGRESS_FIXED_BITS); VALUE(TENANT_EGRESS);
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
        "sizeof graft_config": str(bpf.CONFIG.size),
        "sizeof graft_tenant": str(bpf.TENANT.size),
        "sizeof graft_client_key": str(bpf.CLIENT_KEY.size),
        "sizeof graft_owner": str(policy.OWNER.size),
        "sizeof graft_stamp": str(bpf.STAMP.size),
        "sizeof graft_ingress_key": str(policy.INGRESS_KEY.size),
        "sizeof graft_ingress": str(policy.INGRESS_VALUE.size),
        "sizeof graft_egress_key": str(policy.EGRESS_KEY.size),
        "sizeof graft_egress": str(policy.EGRESS_VALUE.size),
        "sizeof graft_service_key": str(policy.SERVICE_KEY.size),
        "sizeof graft_counter_key": str(bpf.COUNTER_KEY.size),
        "sizeof graft_denial": str(bpf.DENIAL.size),
        "sizeof graft_served_key": str(bpf.SERVED_KEY.size),
        "sizeof graft_served": str(bpf.SERVED.size),
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
        "sizeof graft_family": str(bpf.FAMILY_SIZE),
        "sizeof graft_usage": str(bpf.USAGE.size),
        "graft_usage.udp": "8",
        "graft_usage.sockets_max": "16",
        "sizeof graft_probe": str(bpf.PROBE.size),
        "GRAFT_LEVEL": str(bpf.GRAFT_LEVEL),
        "GRAFT_PROBE": str(bpf.GRAFT_PROBE),
        "sup_shared.number": str(notify.NUMBER_OFFSET),
        "sup_shared.token": str(notify.TOKEN_OFFSET),
        "TENANT_HOME": str(policy.TENANT_HOME),
        "TENANT_VERBOSE": str(policy.TENANT_VERBOSE),
        "PLACE_UNIX": str(policy.PLACE_UNIX),
        "FAMILY_QUEUE": str(family.QUEUE_MAX),
        "FAMILY_VALUE": str(family.VALUE_MAX),
        "STAMP_INGRESS": str(bpf.STAMP_INGRESS),
        "STAMP_CONNECTED": str(bpf.STAMP_CONNECTED),
        "STAMP_FAMILY": str(bpf.STAMP_FAMILY),
        "STAMP_NAMED": str(bpf.STAMP_NAMED),
        "STAMP_PERMIT": str(bpf.STAMP_PERMIT),
        "GRAFT_DEFAULT": str(policy.DEFAULT),
        "graft_stamp.flags": "4",
        "GRAFT_ABI": str(bpf.ABI),
        "SLICE4_NET": str(policy.SLICE4_NET),
        "SLICE_SHIFT": str(policy.SLICE_SHIFT),
        "SLICE_DYNAMIC": str(policy.SLICE_DYNAMIC),
        "SLICE_PORT_BASE": str(policy.SLICE_PORT_BASE),
        "SLICE_SLOTS": str(policy.SLICE_SLOTS),
        "INGRESS_FIXED_BITS": str(policy.INGRESS_FIXED_BITS),
        "EGRESS_FIXED_BITS": str(policy.EGRESS_FIXED_BITS),
        "TENANT_EGRESS": str(policy.TENANT_EGRESS),
        "TENANT_STRICT": str(policy.TENANT_STRICT),
        "TENANT_REPLIES": str(policy.TENANT_REPLIES),
        "STAMP_V6ONLY": str(bpf.STAMP_V6ONLY),
        "OP_GUARD": str(len(bpf.OPS) - 1),
        "REASON_CONVERTED": str(len(bpf.REASONS) - 1),
        "GRAFT_INET": str(policy.INET),
        "GRAFT_INET6": str(policy.INET6),
        "SLICE6_WORD0": str(int.from_bytes(policy.SLICE6_PREFIX[:4], "big")),
        "sizeof sup_shared": str(notify.SHARED_SIZE + notify.SLOTS * notify.SLOT_SIZE),
        "sizeof sup_slot": str(notify.SLOT_SIZE),
        "sup_shared.netns": "16",
        "sup_shared.flags": str(notify.FLAGS_OFFSET),
        "sup_shared.calls": str(notify.COUNTED_OFFSET),
        "sup_shared.slots": str(notify.SHARED_SIZE),
        "sup_slot.answer": str(notify.INJECTION_OFFSET),
        "sup_slot.call": str(notify.SLOT.size),
        "SUP_ABI": str(notify.SHARED_ABI),
        "SUP_SLOTS": str(notify.SLOTS),
        "SUP_FORWARD": str(notify.SUP_FORWARD),
        "SLOT_FREE": str(notify.SLOT_FREE),
        "SLOT_HELD": str(notify.SLOT_HELD),
        "SLOT_FORWARDED": str(notify.SLOT_FORWARDED),
        "SLICE6_WORD1": str(int.from_bytes(policy.SLICE6_PREFIX[4:], "big")),
    }
