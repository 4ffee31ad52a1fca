/* SPDX-License-Identifier: GPL-2.0 */
/*
 * met.bpf.h - a UDP socket that connects again, while another thread sends
 *
 * The kernel sends on a connected UDP socket without the socket's lock, and no hook runs: udp_sendmsg() and
 * udpv6_sendmsg() read the address of the peer, its port and the socket's own address one after the other. Where a
 * thread connects meanwhile, the address of one peer meets the port of another, or halves of two addresses of IPv6
 * meet: 4 of 100 datagrams, where a thread connects in a loop. A thread may stop between two reads for as long as it
 * likes, and no hook sees a disconnect. So a socket connects again only if it may send to whatever can be put
 * together from the peers that it has had. That is always so where rules ask for the address alone, and where all
 * peers have one port, as where getaddrinfo() sorts addresses.
 *
 * A destination that sendto() names with MSG_MORE is put where the kernel keeps the peer's (inet->cork.fl), so that
 * it counts as one. Before a socket is connected for the first time one is remembered, because most never are: if
 * there were more, it may connect to what it may reach at any port (STAMP_SENT_MORE).
 *
 * Of two peers of which one is of IPv4, halves make ::a:b:c:d, which is no host's but ::1, and an address in the
 * network of the other with the number ::ffff:a.b.c.d, which is let go: getaddrinfo() connects one socket to both
 * families.
 *
 * What is corked keeps its destination where a connection writes its own, and either family reads what the other has
 * written: the first words of an address of IPv6 are the addresses of IPv4 and its ports, and the other way round (of
 * IPv4 since Linux 7.0). No hook sees a connected socket cork. So the packets of a socket that has had peers of both
 * families go to those that are remembered, and nowhere else (goes_where_met()).
 *
 * What else the kernel reads without the lock is looked at in the packet (send.bpf.h): a source, the loopback that
 * stands for a peer which is being disconnected, and a route of another destination.
 */
#ifndef MET_BPF_H
#define MET_BPF_H

#include "answer.bpf.h"
#include "destination.bpf.h"

#define STAMP_BOTH (STAMP_HAD4 | STAMP_HAD6 | STAMP_CONNECTED)

/* May a datagram of this socket go there? Who receives what is sent to a loopback is looked at in the packet. */
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
	if (in_slices(a) || is_loopback(a) || tenant->flags & TENANT_LEARN)
		return true;
	at = *a; /* on this stack: Linux 6.1 takes no argument for a key */
	return decide_egress(ctx, &at, stamp, tenant, false, &rule, &why) == ROUTE_ELSEWHERE;
}

/* May the socket send to @a at any port, and where its halves meet those of anything that it may send to? */
__noinline int takes_any_port(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *a)
{
	struct graft_tenant *tenant;
	struct graft_addr at;

	if (!stamp || !a)
		return false;
	tenant = tenant_of(stamp);
	if (!tenant)
		return false;
	if (tenant->flags & TENANT_LEARN)
		return true;
	if (tenant->flags & TENANT_ALLOW)
		return false;
	if (!is_v4(a) && !in_slices(a))
		return !(tenant->flags & (TENANT_REPLIES | TENANT_STRICT));
	at = *a;
	at.port = 0;
	return may_stray(ctx, stamp, &at);
}

/* May it go wherever parts of these two lead? */
__noinline int may_mix(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *one,
		       struct graft_addr *other)
{
	struct graft_addr mixed;
	bool halves;

	if (!stamp || !one || !other)
		return false;
	halves = !is_v4(one) && !is_v4(other);
	for (int n = 1; n < 7; n++) {
		if (!halves && (n & 1) != (n >> 1 & 1))
			continue;
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

	if (!stamp || !ctx->sk || ctx->protocol != IPPROTO_UDP || !(stamp->flags & (STAMP_CONNECTED | STAMP_SENT)))
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

/* May the socket have @a beside the destinations that are remembered of it? @add: remember it as well. */
static __always_inline bool goes_beside(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *a,
					bool add)
{
	struct graft_met *of;

	if (!stamp || !a || !ctx->sk)
		return false;
	of = bpf_sk_storage_get(&met, ctx->sk, NULL, add ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	if (!of)
		return !add;
	for (__u32 n = 0; n < MET_MAX; n++)
		if (n < of->count && same_addr(&of->peers[n], a))
			return true; /* it has been mixed with all others */
	for (__u32 n = 0; n < MET_MAX; n++)
		if (n < of->count && !may_mix(ctx, stamp, &of->peers[n], a))
			return false;
	if (of->count >= MET_MAX && !takes_any_port(ctx, stamp, a))
		return false;
	if (add)
		add_met(of, a);
	return true;
}

/* Remember of which family a destination of a UDP socket is. */
static __always_inline void note_family(struct graft_stamp *stamp, const struct graft_addr *a)
{
	__u32 had = is_v4(a) ? STAMP_HAD4 : STAMP_HAD6;

	if (!(stamp->flags & had))
		stamp->flags |= had;
}

/*
 * Does this UDP packet go where its socket may? One that has had peers of one family is judged by the hooks alone.
 * Where the host translates addresses, the packet has another one than the socket has named, and is dropped.
 */
__noinline int goes_where_met(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct graft_addr from, to;
	struct graft_stamp *stamp;
	struct graft_met *of;

	if (!sk || sk->family != AF_INET6)
		return true;
	sk = bpf_sk_fullsock(sk);
	stamp = stamp_on(sk);
	if (!sk || !stamp || stamp->tenant == GRAFT_EXEMPT || (stamp->flags & STAMP_BOTH) != STAMP_BOTH)
		return true;
	if (!read_udp(skb, &from, &to))
		return false;
	if (same_addr(&to, &stamp->peer_real))
		return true;
	of = bpf_sk_storage_get(&met, sk, NULL, 0);
	if (!of)
		return false;
	for (__u32 n = 0; n < MET_MAX; n++)
		if (n < of->count && same_addr(&of->peers[n], &to))
			return true;
	return false;
}

/*
 * May the socket connect to @a, which rules allow? graftd writes the peer of one of AF_GRAFT before it connects
 * (STAMP_PERMIT), so that those are remembered here.
 */
__noinline int may_meet(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *a)
{
	if (!stamp || !a || !ctx->sk || ctx->protocol != IPPROTO_UDP)
		return true;
	note_family(stamp, a);
	if (stamp->flags & STAMP_SENT_MORE && !takes_any_port(ctx, stamp, a))
		return false;
	return goes_beside(ctx, stamp, a, !!(stamp->flags & STAMP_FAMILY));
}

/* May a datagram name @a, which rules allow, as its destination? */
__noinline int may_name(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *a)
{
	if (!stamp || !a)
		return false;
	note_family(stamp, a);
	if (!(stamp->flags & STAMP_CONNECTED)) {
		/* graftd writes peer_real of those */
		if (!(stamp->flags & (STAMP_SENT | STAMP_FAMILY | STAMP_NAMED | STAMP_PERMIT))) {
			stamp->peer_real = *a;
			stamp->flags |= STAMP_SENT;
		} else if (!(stamp->flags & STAMP_SENT_MORE) && !same_addr(a, &stamp->peer_real)) {
			stamp->flags |= STAMP_SENT_MORE;
		}
		return true;
	}
	if (same_addr(a, &stamp->peer_real))
		return true;
	return note_met(ctx, stamp) && goes_beside(ctx, stamp, a, true);
}

#endif
