/* SPDX-License-Identifier: GPL-2.0 */
/*
 * send.bpf.h - datagrams that are sent, and the packets that come of them
 */
#ifndef SEND_BPF_H
#define SEND_BPF_H

#include "budget.bpf.h"
#include "destination.bpf.h"
#include "met.bpf.h"
#include "receive.bpf.h"
#include "watch.bpf.h"

/*
 * Remember under which name the program sends to @real: what comes from there is shown by it. A server on the
 * wildcard answers from 127.0.0.1, whichever address of the loopback it was asked at.
 */
__noinline int note_told(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *asked,
			 struct graft_addr *real)
{
	bool same, known = false;
	struct graft_told *of;
	struct graft_addr shown;

	if (!stamp || !asked || !real || !ctx->sk)
		return 0;
	shown = *real;
	if (slice_number(&shown)) /* that of number 0 is graftd's resolver's, and shown as it is */
		slice_show(&shown, slice_number(&shown));
	if (is_v4(asked) && is_loopback(asked) && (!is_loopback(&shown) || shown.ip[3] == bpf_htonl(0x7f000001)))
		set_loopback(asked);
	if (!in_connection(ctx->sk) && stamp->flags & STAMP_CONNECTED && same_addr(real, &stamp->peer_real))
		stamp->peer = *asked; /* no hook has seen that it was disconnected */
	if (shown.port != asked->port && same_ip(shown.ip, asked->ip))
		name_port(&shown);
	same = same_addr(&shown, asked);
	of = bpf_sk_storage_get(&told, ctx->sk, NULL, same ? 0 : BPF_SK_STORAGE_GET_F_CREATE);
	if (!of)
		return 0;
	for (int n = 0; n < TOLD_MAX; n++)
		if (same_addr(&of->of[n].real, real)) {
			of->of[n].asked = *asked;
			known = true;
		}
	if (same || known)
		return 0;
	put_told(of, real, asked);
	return 0;
}

/*
 * Does this send go to the peer of a connected socket? That of an AF_INET6 socket whose peer is of IPv4 arrives in
 * the hook with the peer's address (udpv6_sendmsg()), which connect() has decided.
 */
static __always_inline bool is_connected_to(const struct bpf_sock *sk, const struct graft_addr *a)
{
	return sk->family == AF_INET6 && sk->state == BPF_TCP_ESTABLISHED && sk->dst_ip4 == a->ip[3] &&
	       bpf_ntohs((__u16)sk->dst_port) == a->port;
}

/*
 * A socket on the wildcard sends by a rule that lets the kernel choose the source. This host's programs are answered
 * from the container's address, where they have asked. Nobody beyond it could answer that one, which the program may
 * have named.
 */
__noinline int leave_network(struct graft_stamp *stamp, struct graft_tenant *tenant, struct graft_addr *a,
			     struct graft_addr *source)
{
	struct graft_addr to, from;

	if (!stamp || !tenant || !a || !source)
		return 0;
	to = *a; /* on this stack: Linux 6.1 takes no argument for a key */
	from = *source;
	if (!is_any(from.ip)) {
		if (is_unanswerable(stamp->tenant, &from, &to))
			to_wildcard(source);
		return 0;
	}
	if (!(stamp->flags & STAMP_ABROAD) || is_v4(&from) != is_v4(&to) || !bpf_map_lookup_elem(&locals, to.ip))
		return 0;
	if (!is_any(stamp->local.ip))
		__builtin_memcpy(source->ip, stamp->local.ip, sizeof(source->ip));
	else if (is_v4(&to) ? tenant->own4 : tenant->own6[0])
		own_ip(source, tenant, is_v4(&to));
	return 0;
}

/*
 * Decide a datagram to @a. @bound is the socket's own address, the wildcard if it has none. @source is what the
 * kernel would use: @bound, or what a control message asked for. A program on the wildcard may choose among the
 * host's addresses, but not one of the loopback, by which a server takes its client for one of its own container.
 */
static __noinline int decide_send(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_addr *source,
				  struct graft_addr *bound)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr asked;
	struct graft_tenant *tenant;
	struct graft_egress *rule;
	struct refusal why;
	bool strict;
	__u32 id;
	int where;

	if (!a || !source || !bound || !stamp)
		return DENY;
	id = stamp->tenant;
	tenant = tenant_of(stamp);
	if (!tenant)
		return deny(id, DENIED(OP_SEND, REASON_NO_TENANT), ENETUNREACH, IPPROTO_UDP, a);
	if (is_any(a->ip))
		name_this_host(a, stamp, bound);
	asked = *a;
	if (names_endpoint(a)) {
		where = to_endpoint(stamp, a, bound);
		if (where == AS_ITSELF)
			asked = *a;
		else if (where)
			return deny(id, DENIED(OP_SEND, where >> 16), where & 0xffff, IPPROTO_UDP, &asked);
	}
	if (has_anothers_source(stamp, bound, a))
		return deny(id, DENIED(OP_SEND, REASON_WRONG_SOURCE), ENETUNREACH, IPPROTO_UDP, a);
	if (!is_any(bound->ip) || is_loopback(source) || in_slices(source) ||
	    (!is_v4(source) && !(stamp->flags & STAMP_INGRESS)) || is_anothers(id, source))
		__builtin_memcpy(source->ip, bound->ip, sizeof(source->ip));
	if (names_endpoint(&asked)) {
		note_told(ctx, stamp, &asked, a);
		rule = rule_to_endpoint(stamp, a);
		goto leave;
	}
	if (is_permitted(stamp, a))
		return ALLOW;
	if (is_for_loopback(ctx, stamp, tenant, &asked)) {
		where = decide_loopback(ctx, a, stamp, tenant, false, &why);
		if (where == LOCAL_REFUSED)
			return deny(id, DENIED(OP_SEND, why.reason), why.error, IPPROTO_UDP, &asked);
		strict = tenant->flags & TENANT_STRICT;
		if (where == LOCAL_CONTAINER || where == LOCAL_NAMED) {
			__builtin_memcpy(source->ip, bound->ip, sizeof(source->ip));
			if (!strict && is_any(bound->ip) && is_v4(bound) == is_v4(a))
				slice_ip(source, is_v4(a), tenant->slice, SLICE_DYNAMIC);
		}
		if (where == LOCAL_NAMED &&
		    !is_any(bound->ip)) /* connected to somebody else, who gave it that source */
			note_client(ctx, id, bound);
		note_told(ctx, stamp, &asked, a);
		if (where == LOCAL_CONTAINER || !strict)
			return ALLOW;
	}
	where = decide_egress(ctx, a, stamp, tenant, false, &rule, &why);
	if (where == ROUTE_REFUSED)
		return deny(id, DENIED(OP_SEND, why.reason), why.error, IPPROTO_UDP, &asked);
	if (where == ROUTE_CONTAINER)
		note_told(ctx, stamp, &asked, a);
leave:
	if (!rule) {
		if (is_any(bound->ip))
			leave_network(stamp, tenant, a, source);
		return ALLOW;
	}
	if (!is_loopback(a) && is_confined(stamp, bound, a))
		return deny(id, DENIED(OP_SEND, REASON_PRIVATE_SOURCE),
			    confined_error(ctx, stamp, bound, ENETUNREACH), IPPROTO_UDP, &asked);
	tell_conversion(id, tenant, OP_SEND << 16 | IPPROTO_UDP, &asked, (struct graft_addr *)rule);
	if (is_any(rule->ip) && is_any(bound->ip)) {
		leave_network(stamp, tenant, a, source);
		return ALLOW;
	}
	if (is_any(rule->ip) ? !is_unanswerable(id, bound, a) : same_ip(bound->ip, rule->ip))
		return ALLOW;
	/*
	 * An answer leaves from where it was asked, which the kernel alone knows for a socket on the wildcard. A
	 * neighbour on a network knows the rule's address.
	 */
	if (stamp->flags & STAMP_INGRESS && has_asked(id, a) && !(is_any(bound->ip) && holder_of(a)))
		return ALLOW;
	if (!is_any(bound->ip))
		return deny(id, DENIED(OP_SEND, REASON_WRONG_SOURCE), ENETUNREACH, IPPROTO_UDP, &asked);
	__builtin_memcpy(source->ip, rule->ip, sizeof(source->ip));
	return ALLOW;
}

/* The kernel would say EAGAIN. A program would take the socket for full, wait for it, and try again at once. */
static __always_inline int deny_sent(struct graft_stamp *stamp, struct graft_addr *a)
{
	return deny(stamp->tenant, DENIED(OP_SEND, REASON_PORTS), ENOBUFS, IPPROTO_UDP, a);
}

SEC("cgroup/sendmsg4")
int graft_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a, asked, source = {}, bound = {};

	load4(ctx, &a);
	if (!stamp)
		return deny_unstamped(ctx, OP_SEND, &a);
	if (stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	forget_refused(ctx, stamp);
	if (ctx->sk->family == AF_INET6 && family_error(ctx, stamp, &a)) {
		bpf_set_retval(-ENETUNREACH);
		return DENY;
	}
	set_v4(&source, ctx->msg_src_ip4);
	set_v4(&bound, ctx->sk->src_ip4);
	if ((ctx->user_family == AF_UNSPEC && !a.port) || is_connected_to(ctx->sk, &a)) {
		/* the first: a connected socket with a control message; connect() has decided its destination */
		ctx->msg_src_ip4 = bound.ip[3];
		return ALLOW;
	}
	asked = a;
	if (!decide_send(ctx, &a, &source, &bound))
		return DENY;
	if (!may_name(ctx, stamp, &a))
		return deny(stamp->tenant, DENIED(OP_SEND, REASON_MET), EADDRNOTAVAIL, IPPROTO_UDP, &asked);
	if (!note_sent(ctx, &a, &source))
		return deny_sent(stamp, &a);
	if (is_any(source.ip) && is_any(bound.ip))
		answer_source(ctx, &a, &source);
	store4(ctx, &a);
	ctx->msg_src_ip4 = source.ip[3];
	tell_allowed(stamp->tenant, OP_SEND, IPPROTO_UDP, &asked, &a);
	return ALLOW;
}

SEC("cgroup/sendmsg6")
int graft_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a, asked, source = {}, bound = {};
	int error;

	load6(ctx, &a);
	if (!stamp)
		return deny_unstamped(ctx, OP_SEND, &a);
	if (stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	forget_refused(ctx, stamp);
	error = ctx->user_family == AF_INET6 ? family_error(ctx, stamp, &a) : 0;
	if (error) {
		fail_with(error);
		return DENY;
	}
	source.ip[0] = ctx->msg_src_ip6[0];
	source.ip[1] = ctx->msg_src_ip6[1];
	source.ip[2] = ctx->msg_src_ip6[2];
	source.ip[3] = ctx->msg_src_ip6[3];
	bound.ip[0] = ctx->sk->src_ip6[0];
	bound.ip[1] = ctx->sk->src_ip6[1];
	bound.ip[2] = ctx->sk->src_ip6[2];
	bound.ip[3] = ctx->sk->src_ip6[3];
	asked = a;
	if (ctx->user_family == AF_UNSPEC && !a.port) {
		/* likewise; IPV6_FREEBIND, which the slices need, would let the message choose any source */
		source = bound;
	} else if (!decide_send(ctx, &a, &source, &bound)) {
		return DENY;
	} else if (!may_name(ctx, stamp, &a)) {
		return deny(stamp->tenant, DENIED(OP_SEND, REASON_MET), EADDRNOTAVAIL, IPPROTO_UDP, &asked);
	} else if (!note_sent(ctx, &a, &source)) {
		return deny_sent(stamp, &a);
	} else {
		if (is_any6(source.ip) && is_any6(bound.ip))
			answer_source(ctx, &a, &source);
		store6(ctx, &a);
		tell_allowed(stamp->tenant, OP_SEND, IPPROTO_UDP, &asked, &a);
	}
	ctx->msg_src_ip6[0] = source.ip[0];
	ctx->msg_src_ip6[1] = source.ip[1];
	ctx->msg_src_ip6[2] = source.ip[2];
	ctx->msg_src_ip6[3] = source.ip[3];
	return ALLOW;
}

/* Is the address of IPv6 there one of the slices'? */
static __always_inline bool is_in_slice6(const __u8 *at)
{
	return *(__be32 *)at == bpf_htonl(SLICE6_WORD0) && *(__be32 *)(at + 4) == bpf_htonl(SLICE6_WORD1);
}

/*
 * No hook sees control messages: a source route (IP_RETOPTS, IPV6_RTHDR) would lead a datagram round the egress
 * rules, a device (IP_PKTINFO) out of the loopback, or into it. This program sees the packet that comes of them, and
 * drops it. On the loopback it sees who is to receive a datagram. Nor does a hook see what threads make of a
 * connected UDP socket (met.bpf.h): a source from the loopback, or of another container, leaves by no device.
 */
static __always_inline int judge_packet(struct __sk_buff *skb)
{
	__u8 *packet = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	bool lo = skb->ifindex == 1;
	int verdict;

	if (packet + 20 > end)
		return ALLOW;
	if (packet[0] >> 4 == 4) {
		if (packet[0] != 0x45 || (!lo && (packet[12] == 127 || packet[16] == 127)))
			return DENY;
		if (packet[9] == IPPROTO_UDP && !goes_where_met(skb))
			return DENY;
		if (!lo)
			return packet[9] == IPPROTO_UDP ? bounded(leave_by_wire(skb), ALLOW | DROP_IN_SILENCE)
							: ALLOW;
		verdict = packet[9] == IPPROTO_UDP ? bounded(leave_by_loopback(skb), ALLOW | DROP_IN_SILENCE) : ALLOW;
		return verdict == ALLOW ? within_budget(skb) : verdict;
	}
	if (packet + 40 > end)
		return ALLOW;
	if (!lo && (is_in_slice6(packet + 8) || is_in_slice6(packet + 24)))
		return DENY;
	if (packet[6] == IPPROTO_HOPOPTS) /* the kernel writes one into a packet beyond 64 KiB (BIG TCP) */
		return packet + 41 <= end && packet[40] == IPPROTO_TCP;
	if (packet[6] != IPPROTO_UDP && packet[6] != IPPROTO_TCP)
		return DENY;
	if (packet[6] == IPPROTO_UDP && !goes_where_met(skb))
		return DENY;
	if (!lo)
		return packet[6] == IPPROTO_UDP ? bounded(leave_by_wire(skb), ALLOW | DROP_IN_SILENCE) : ALLOW;
	verdict = packet[6] == IPPROTO_UDP ? bounded(leave_by_loopback(skb), ALLOW | DROP_IN_SILENCE) : ALLOW;
	return verdict == ALLOW ? within_budget(skb) : verdict;
}

/* Is it of a socket that no policy holds for: a raw one that graftd has made for a direct container, in its netns? */
static __noinline int is_exempt(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct graft_stamp *stamp;

	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	stamp = stamp_on(sk);
	return stamp && stamp->tenant == GRAFT_EXEMPT;
}

SEC("cgroup_skb/egress")
int graft_egress(struct __sk_buff *skb)
{
	__u8 *packet = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	int verdict = judge_packet(skb);

	if (verdict == ALLOW && packet + 20 <= end &&
	    (packet[0] >> 4 == 4 ? packet[9] == IPPROTO_UDP : packet[6] == IPPROTO_UDP))
		count_if_asked(skb, packet, true);
	return verdict == DENY && is_exempt(skb) ? ALLOW : verdict;
}

#endif
