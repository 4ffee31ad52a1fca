/* SPDX-License-Identifier: GPL-2.0 */
/*
 * forward.bpf.h - who dials a container's server inside the container's netns is led to graftd's listener there
 *
 * A container's servers are sockets of the host's netns. Programs that enter the container's netns from outside
 * (nsenter -n, the port-forward of engines) and dial 127.0.0.1 find nobody there. graftd has one listener in the
 * netns, and graft-relay joins what it accepts to the container's server.
 *
 * The program of the netns (entrance.bpf.c) has selected that listener for every port, and ends in this one. Where
 * the container does not listen the selection is taken back, and the kernel goes on by itself: it finds a listener of
 * the netns's own, or answers with a reset. The same for what comes from elsewhere: a device that another plugin has
 * put into the netns is no way round the rules. graftd's listener itself is nobody's to dial: at its own address,
 * which a container with CAP_NET_ADMIN may give to a device, nothing is found but the container's servers.
 *
 * Sources: net/core/filter.c (bpf_sk_lookup_assign()), net/ipv4/route.c (ip_route_output_key_hash_rcu(), orig_oif).
 */
#ifndef FORWARD_BPF_H
#define FORWARD_BPF_H

#include "listeners.bpf.h"
#include "own.bpf.h"

#define LOOPBACK_IFINDEX 1		  /* include/net/flow.h */
#define ENTRANCE_IP bpf_htonl(0xc0000008) /* 192.0.0.8: graft/daemon/doors.py */

/* Does a socket listen at @place? */
__noinline int is_served(struct graft_listener_key *place, __u64 slots)
{
	struct graft_listener_key key;
	struct bpf_sock *sk;
	bool listens;

	if (!place)
		return false;
	key = *place; /* on this stack: Linux 6.1 takes no argument for a key */
	for (int slot = 0; slot < LISTENER_SLOTS && slots >> slot; slot++) {
		key.slot = slot;
		sk = bpf_map_lookup_elem(&listeners, &key);
		if (!sk)
			continue;
		listens = sk->state == BPF_TCP_LISTEN;
		bpf_sk_release(sk);
		if (listens)
			return true;
	}
	return false;
}

/*
 * Does this connection to @to come from the netns itself? Then it is lo's; but one to an address of another device
 * has that device, and its source is its destination.
 */
static __always_inline bool comes_from_inside(struct bpf_sk_lookup *ctx, const struct graft_addr *to)
{
	return ctx->ingress_ifindex == LOOPBACK_IFINDEX || is_from_itself(ctx, to);
}

/*
 * Has the tenant a listener for this connection to @to, at its address or on the wildcard of its family? At an
 * address that is neither the loopback's nor the tenant's own, the wildcard alone: what the tenant has bound to one
 * of the host's is not what has the same address in here.
 */
static __always_inline bool has_server(struct bpf_sk_lookup *ctx, __u32 tenant, struct graft_addr *to)
{
	struct graft_listener_key key = {.tenant = tenant, .port = (__u16)to->port};
	struct graft_listening *of = bpf_map_lookup_elem(&listening, &tenant);

	if (!of || !comes_from_inside(ctx, to))
		return false;
	__builtin_memcpy(key.ip, to->ip, sizeof(key.ip));
	if ((is_loopback(to) || is_own_address(tenant, to)) && is_served(&key, of->slots))
		return true;
	to_wildcard(to);
	__builtin_memcpy(key.ip, to->ip, sizeof(key.ip));
	return is_served(&key, of->slots);
}

/* The listener of the netns is selected. Its SO_PRIORITY is the tenant, which graftd has given it. */
SEC("sk_lookup")
int graft_forward(struct bpf_sk_lookup *ctx)
{
	struct bpf_sock *entrance = ctx->sk;
	struct graft_addr to = {
		.ip = {FIELD(ctx->local_ip6[0]), FIELD(ctx->local_ip6[1]), FIELD(ctx->local_ip6[2]),
		       FIELD(ctx->local_ip6[3])},
		.port = ctx->local_port,
	};
	__u32 four = FIELD(ctx->local_ip4);
	bool itself;

	if (ctx->family == AF_INET)
		set_v4(&to, four);
	itself = is_v4(&to) && to.ip[3] == ENTRANCE_IP;
	if (!entrance || has_server(ctx, entrance->priority, &to))
		return SK_PASS;
	bpf_sk_assign(ctx, NULL, BPF_SK_LOOKUP_F_REPLACE);
	return itself ? SK_DROP : SK_PASS;
}

#endif
