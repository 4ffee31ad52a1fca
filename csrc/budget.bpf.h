/* SPDX-License-Identifier: GPL-2.0 */
/*
 * budget.bpf.h - how much a container may ask graftd's resolver
 *
 * The resolver is one socket for all. What one container sends beyond its budget is dropped in its own send, before
 * it takes room in the queue or graftd's time. A connected socket's send() runs no hook for addresses, so the packet
 * is counted, where every datagram passes.
 *
 * A container has what is its own, whatever others do: BUDGET_SURE. Beyond that it has a budget, and so have all
 * together, so that a hundred containers do not do what one may not. Each is a token bucket: a unit comes back each
 * UNIT ns, and there are at most as many as come back in BURST ns. A bucket is kept as the time at which it is full
 * again (GCRA, ITU-T I.371), which is one number.
 */
#ifndef BUDGET_BPF_H
#define BUDGET_BPF_H

#include "allow.bpf.h"

#define SURE_UNIT 50000000ull /* 20 queries a second, */
#define SURE_BURST (100 * SURE_UNIT)
#define BUDGET_UNIT 500000ull /* and 2,000 more, */
#define BUDGET_BURST (400 * BUDGET_UNIT)
#define SHARED_UNIT 200000ull /* but 5,000 more of all together */
#define SHARED_BURST (1000 * SHARED_UNIT)
#define SHARED_KEY GRAFT_EXEMPT
#define BUDGET_SHIFT 9	    /* each 512 bytes cost as much as a query */
#define BUDGET_CONNECTION 4 /* graftd has a thread for each connection */
#define DNS_PORT bpf_htons(53)

static __always_inline struct graft_budget *budget_of(__u32 key)
{
	struct graft_budget *budget = bpf_map_lookup_elem(&budgets, &key), new = {};

	if (budget)
		return budget;
	bpf_map_update_elem(&budgets, &key, &new, BPF_NOEXIST);
	return bpf_map_lookup_elem(&budgets, &key);
}

/* Take @cost ns from a bucket that is full again at @full_at; false: it has not so much. */
static __always_inline bool take(__u64 *full_at, __u64 now, __u64 cost, __u64 burst)
{
	__u64 at = (*full_at > now ? *full_at : now) + cost;

	if (at - now > burst)
		return false;
	*full_at = at;
	return true;
}

/* Take @cost units from what the tenant is sure of, or else from its budget and from that of all. */
static __noinline int take_budget(__u32 tenant, __u64 cost)
{
	struct graft_budget *own = budget_of(tenant), *shared = budget_of(SHARED_KEY);
	__u64 now = bpf_ktime_get_ns();
	bool sure, enough;

	if (!own || !shared)
		return false;
	bpf_spin_lock(&own->lock);
	sure = take(&own->sure_at, now, cost * SURE_UNIT, SURE_BURST);
	enough = sure || take(&own->full_at, now, cost * BUDGET_UNIT, BUDGET_BURST);
	bpf_spin_unlock(&own->lock);
	if (sure || !enough)
		return enough;
	bpf_spin_lock(&shared->lock);
	enough = take(&shared->full_at, now, cost * SHARED_UNIT, SHARED_BURST);
	bpf_spin_unlock(&shared->lock);
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

static __always_inline bool is_resolver6(const __be32 *ip)
{
	return ip[0] == bpf_htonl(SLICE6_WORD0) && ip[1] == bpf_htonl(SLICE6_WORD1) && !ip[2] &&
	       ip[3] == bpf_htonl(RESOLVER6_INDEX);
}

/* What a packet to port 53 costs, whose header of TCP or UDP is at @header; 0: nothing. */
static __always_inline __u64 cost_of(struct __sk_buff *skb, __u8 *header, __u8 *end, __u8 protocol)
{
	if (header + 4 > end || *(__be16 *)(header + 2) != DNS_PORT)
		return 0;
	if (protocol == IPPROTO_UDP)
		return 1 + (skb->len >> BUDGET_SHIFT);
	/* of TCP it is the first packet that costs: SYN without ACK */
	if (protocol != IPPROTO_TCP || header + 14 > end || (header[13] & 0x12) != 0x02)
		return 0;
	return BUDGET_CONNECTION;
}

/* May this packet go, of IPv4 without options or of IPv6? Anything but what asks graftd's resolver may. */
static __noinline int within_budget(struct __sk_buff *skb)
{
	__u8 *packet = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct graft_stamp *stamp;
	struct graft_tenant *tenant;
	__u32 asker;
	__u64 cost;

	if (packet + 20 > end)
		return ALLOW;
	if (packet[0] >> 4 == 4) {
		cost = cost_of(skb, packet + 20, end, packet[9]);
		if (!cost || !is_resolver(*(__be32 *)(packet + 16)))
			return ALLOW;
	} else {
		if (packet + 40 > end)
			return ALLOW;
		cost = cost_of(skb, packet + 40, end, packet[6]);
		if (!cost || !is_resolver6((__be32 *)(packet + 24)))
			return ALLOW;
	}
	if (skb->gso_segs > 1)
		cost += skb->gso_segs; /* one send, many datagrams (UDP_SEGMENT, udp(7)) */
	stamp = stamp_of(skb->sk);
	if (!stamp || stamp->tenant == GRAFT_EXEMPT)
		return stamp ? ALLOW : DENY;
	tenant = tenant_of(stamp);
	if (!tenant)
		return DENY;
	asker = tenant->parent ? tenant->parent : stamp->tenant; /* a wrapper has its container's */
	if (take_budget(asker, cost))
		return ALLOW;
	count_refusal(asker, DENIED(OP_SEND, REASON_BUDGET));
	return DROP_IN_SILENCE; /* not told to graftd, which is to be left alone */
}

#endif
