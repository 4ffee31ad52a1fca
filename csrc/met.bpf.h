/* SPDX-License-Identifier: GPL-2.0 */
/*
 * met.bpf.h - a UDP socket that connects again, while another thread sends
 *
 * The kernel sends on a connected UDP socket without the socket's lock, and no hook runs: udp_sendmsg() and
 * udpv6_sendmsg() read the address of the peer, its port and the socket's own address one after the other. Where a
 * thread connects meanwhile, the address of one peer meets the port of another, halves of two addresses of IPv6 meet,
 * or the source of one connection the destination of another: 4 of 100 datagrams, where a thread connects in a loop.
 * A thread may stop between two reads for as long as it likes, and no hook sees a disconnect. So a socket connects
 * again only if it may send to whatever can be put together from the peers that it has had. That is always so where
 * rules ask for the address alone, and where all peers have one port, as where getaddrinfo() sorts addresses.
 */
#ifndef MET_BPF_H
#define MET_BPF_H

#include "destination.bpf.h"

static __always_inline bool is_hosts_loopback(const struct graft_addr *a)
{
	return is_loopback(a) && !in_slices(a);
}

/* May a datagram of this socket go there? Who receives what is sent to a slice is looked at in the packet. */
__noinline int may_stray(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *a)
{
	struct graft_tenant *tenant;
	struct graft_egress *rule;
	struct graft_addr at;
	struct refusal why;

	if (!stamp || !a)
		return false;
	tenant = tenant_of(stamp);
	if (!tenant)
		return false;
	if (in_slices(a))
		return true;
	if (is_hosts_loopback(a) || is_any(a->ip))
		return !!(tenant->flags & TENANT_HOME);
	if (tenant->flags & TENANT_LEARN)
		return true;
	at = *a;
	return decide_egress(ctx, &at, stamp, tenant, false, &rule, &why) == ROUTE_ELSEWHERE;
}

/* May it go wherever parts of these two lead? From the host's loopback, which one of them is at, it goes nowhere
 * else. */
__noinline int may_mix(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *one,
		       struct graft_addr *other)
{
	struct graft_tenant *tenant;
	struct graft_addr mixed;

	if (!stamp || !one || !other)
		return false;
	if (is_hosts_loopback(one) != is_hosts_loopback(other)) {
		tenant = tenant_of(stamp);
		if (!tenant || !(tenant->flags & TENANT_HOME))
			return false;
	}
	for (int n = 1; n < 7; n++) {
		mixed = *one;
		if (n & 1) {
			mixed.ip[0] = other->ip[0];
			mixed.ip[1] = other->ip[1];
		}
		if (n & 2) {
			mixed.ip[2] = other->ip[2];
			mixed.ip[3] = other->ip[3];
		}
		if (n & 4)
			mixed.port = other->port;
		if (!same_addr(&mixed, one) && !same_addr(&mixed, other) && !may_stray(ctx, stamp, &mixed))
			return false;
	}
	return true;
}

static __always_inline void add_met(struct graft_met *of, const struct graft_addr *a)
{
	__u32 count = of->count;

	for (__u32 n = 0; n < MET_MAX; n++)
		if (n < count && same_addr(&of->peers[n], a))
			return;
	if (count >= MET_MAX)
		return;
	of->peers[count] = *a;
	of->count = count + 1;
}

/* Remember the peer that the socket has had, before it connects again. False: there is no memory for it. */
__noinline int note_met(struct bpf_sock_addr *ctx, struct graft_stamp *stamp)
{
	struct graft_met *of;

	if (!stamp || !ctx->sk || ctx->protocol != IPPROTO_UDP || !(stamp->flags & STAMP_CONNECTED))
		return true;
	of = bpf_sk_storage_get(&met, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!of)
		return false;
	add_met(of, &stamp->peer_real);
	of->asked = stamp->peer;
	of->real = stamp->peer_real;
	return true;
}

/* The socket keeps the peer that it has, because the connection that was decided is refused. */
__noinline int keep_peer(struct bpf_sock_addr *ctx, struct graft_stamp *stamp)
{
	struct graft_met *of;

	if (!stamp || !ctx->sk)
		return 0;
	of = bpf_sk_storage_get(&met, ctx->sk, NULL, 0);
	if (!of)
		return 0;
	stamp->peer = of->asked;
	stamp->peer_real = of->real;
	return 0;
}

/*
 * May the socket connect to @a, which rules allow, beside the peers that it has had? graftd writes the peer of one of
 * AF_GRAFT before it connects (STAMP_PERMIT), so that those are remembered here.
 */
__noinline int may_meet(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *a)
{
	struct graft_addr before, new;
	struct graft_met *of;

	if (!stamp || !a || !ctx->sk || ctx->protocol != IPPROTO_UDP)
		return true;
	of = bpf_sk_storage_get(&met, ctx->sk, NULL, stamp->flags & STAMP_FAMILY ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	if (!of)
		return !(stamp->flags & STAMP_FAMILY);
	new = *a; /* on this stack: Linux 6.1 takes no argument for a key */
	for (__u32 n = 0; n < MET_MAX; n++) {
		if (n >= of->count)
			break;
		before = of->peers[n];
		if (same_addr(&before, &new))
			return true; /* it has been mixed with all others */
	}
	for (__u32 n = 0; n < MET_MAX; n++) {
		if (n >= of->count)
			break;
		before = of->peers[n];
		if (!may_mix(ctx, stamp, &before, &new))
			return false;
	}
	if (of->count >= MET_MAX) {
		before = new;
		before.port = 0;
		if (!is_v4(&before) || !may_stray(ctx, stamp, &before)) /* any port of it will do */
			return false;
	}
	if (stamp->flags & STAMP_FAMILY)
		add_met(of, &new);
	return true;
}

#endif
