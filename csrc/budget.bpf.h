/* SPDX-License-Identifier: GPL-2.0 */
/*
 * budget.bpf.h - how much a container may ask graftd's resolver
 *
 * The resolver is one socket for all. What one container sends beyond its budget is dropped in its own send, before
 * it takes room in the queue or graftd's time. A connected socket's send() runs no hook for addresses, so the packet
 * is counted, where every datagram passes.
 *
 * The budget is a token bucket: a unit comes back each BUDGET_UNIT, and BUDGET_BURST are there at most. It is kept as
 * the time at which it is full again (GCRA, ITU-T I.371), which is one number.
 */
#ifndef BUDGET_BPF_H
#define BUDGET_BPF_H

#include "report.bpf.h"

#define BUDGET_UNIT 5000000ull /* ns: 200 queries a second */
#define BUDGET_BURST (400 * BUDGET_UNIT)
#define BUDGET_SHIFT 9	    /* each 512 bytes cost as much as a query */
#define BUDGET_CONNECTION 4 /* graftd has a thread for each connection */
#define RESOLVER_IP bpf_htonl(0x7f00000b)
#define DNS_PORT bpf_htons(53)
#define DROP_IN_SILENCE 2 /* the send succeeds, and the datagram is lost, as in a queue that is full */

/* Take @cost from the tenant's budget; false: it has not so much. */
static __noinline int take_budget(__u32 tenant, __u64 cost)
{
	struct graft_budget *budget = bpf_map_lookup_elem(&budgets, &tenant), new = {};
	__u64 now = bpf_ktime_get_ns(), at;
	bool enough;

	if (!budget) {
		bpf_map_update_elem(&budgets, &tenant, &new, BPF_NOEXIST);
		budget = bpf_map_lookup_elem(&budgets, &tenant);
		if (!budget)
			return false;
	}
	bpf_spin_lock(&budget->lock);
	at = (budget->full_at > now ? budget->full_at : now) + cost * BUDGET_UNIT;
	enough = at - now <= BUDGET_BURST;
	if (enough)
		budget->full_at = at;
	bpf_spin_unlock(&budget->lock);
	return enough;
}

/* Is graftd's resolver at this address: Docker's, or a gateway that graftd holds for a network of CNI? */
static __always_inline bool is_resolver(__be32 ip)
{
	struct graft_holder *holder;
	struct graft_addr a = {};

	if (ip == RESOLVER_IP)
		return true;
	set_v4(&a, ip);
	holder = holder_of(&a);
	return holder && holder->tenant == GRAFT_EXEMPT;
}

/* May this packet, of IPv4 without options, go? Anything but what asks graftd's resolver may. */
static __noinline int within_budget(struct __sk_buff *skb)
{
	__u8 *packet = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct graft_counter_key key = {.op = OP_SEND, .reason = REASON_BUDGET};
	struct graft_stamp *stamp;
	struct graft_tenant *tenant;
	__u64 cost, one = 1, *count;

	if (packet + 24 > end || *(__be16 *)(packet + 22) != DNS_PORT)
		return ALLOW;
	if (packet[9] == IPPROTO_UDP) {
		cost = 1 + (skb->len >> BUDGET_SHIFT);
	} else { /* of TCP it is the first packet that costs: SYN without ACK */
		if (packet[9] != IPPROTO_TCP || packet + 34 > end || (packet[33] & 0x12) != 0x02)
			return ALLOW;
		cost = BUDGET_CONNECTION;
	}
	if (!is_resolver(*(__be32 *)(packet + 16)))
		return ALLOW;
	if (skb->gso_segs > 1)
		cost += skb->gso_segs; /* one send, many datagrams (UDP_SEGMENT, udp(7)) */
	stamp = stamp_of(skb->sk);
	if (!stamp || stamp->tenant == GRAFT_EXEMPT)
		return stamp ? ALLOW : DENY;
	tenant = tenant_of(stamp);
	if (!tenant)
		return DENY;
	key.tenant = tenant->parent ? tenant->parent : stamp->tenant; /* a wrapper has its container's */
	if (take_budget(key.tenant, cost))
		return ALLOW;
	count = bpf_map_lookup_elem(&counters, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&counters, &key, &one, BPF_NOEXIST);
	return DROP_IN_SILENCE; /* not told to graftd, which is to be left alone */
}

#endif
