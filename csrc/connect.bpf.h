/* SPDX-License-Identifier: GPL-2.0 */
/*
 * connect.bpf.h - connect(): the host address that it goes to, and leaves from
 */
#ifndef CONNECT_BPF_H
#define CONNECT_BPF_H

#include "destination.bpf.h"
#include "late.bpf.h"
#include "listeners.bpf.h"
#include "made.bpf.h"
#include "met.bpf.h"
#include "numbers.bpf.h"
#include "pace.bpf.h"
#include "watch.bpf.h"

/* Remember the peer as the program named it, to show it. What graftd has permitted is one peer, and no later one. */
static __always_inline void note_peer(struct graft_stamp *stamp, const struct graft_addr *asked,
				      const struct graft_addr *real)
{
	if (stamp->flags & STAMP_PERMIT && !same_addr(real, &stamp->peer_real))
		stamp->flags &= ~STAMP_PERMIT;
	stamp->peer = *asked;
	stamp->peer_real = *real;
	stamp->flags |= STAMP_CONNECTED;
}

static __always_inline bool has_source(const struct bpf_sock *sk)
{
	return sk->src_port || sk->src_ip4;
}

/*
 * Take the address back that an earlier connect() has lent to a TCP socket, which the kernel leaves to it when the
 * connection is refused, or given up: on any host it would have none. False: it stays.
 */
static __always_inline bool take_source_back(struct bpf_sock_addr *ctx, const struct graft_stamp *stamp, bool six)
{
	struct graft_addr none = {};

	if (!ctx->sk || !(stamp->flags & STAMP_LENT) || ctx->sk->src_port)
		return true;
	if (!six)
		set_v4(&none, 0);
	return !bind_source(ctx, &none, six);
}

/*
 * The source of a connection to the container's loopback. TCP has a port of the kernel's choice, which many
 * connections have in common. A UDP socket has its port alone, so that it is a private one.
 */
__noinline int private_source(struct bpf_sock_addr *ctx, struct graft_addr *source, __u32 id, bool v4)
{
	struct graft_tenant *tenant = bpf_map_lookup_elem(&tenants, &id);
	int number;

	if (!source || !tenant)
		return -EINVAL;
	if (ctx->protocol != IPPROTO_UDP) {
		slice_ip(source, v4, tenant->slice, SLICE_DYNAMIC);
		source->port = 0;
		return 0;
	}
	number = take_number(ctx, id, tenant->slice, v4, 0);
	if (!number)
		return -EADDRNOTAVAIL;
	slice_addr(source, v4, tenant->slice, number);
	if (!v4 && tenant->flags & TENANT_DIRECT) { /* of the slice's it can have this address alone: direct.bpf.h */
		slice_ip(source, v4, tenant->slice, SLICE_DYNAMIC);
		source->port = number;
	}
	return 0;
}

/*
 * Does a socket without a source get a private one, to reach the container's server at @a? What is asked at the
 * loopback comes from the loopback, wherever the server is.
 */
static __always_inline bool has_private_source(struct bpf_sock_addr *ctx, const struct graft_addr *a,
					       const struct graft_tenant *tenant)
{
	return in_slices(a) || (ctx->protocol == IPPROTO_UDP && !(tenant->flags & TENANT_STRICT));
}

/*
 * Does a UDP socket on the host's wildcard connect to itself? The kernel then gives it the loopback's address, and
 * that is where it is to send.
 */
static __always_inline bool is_itself(const struct bpf_sock *sk, const struct graft_addr *a,
				      const struct graft_addr *source)
{
	return sk->protocol == IPPROTO_UDP && is_any(source->ip) && a->port == sk->src_port &&
	       slice_index(a, slice_number(a)) == SLICE_DYNAMIC;
}

/*
 * Does a UDP socket on the wildcard connect to its own port at another address of the loopback than 127.0.0.1? It is
 * at 127.0.0.1 from then on, and nobody is there.
 */
__noinline int leaves_its_place(struct graft_stamp *stamp, struct graft_addr *a, struct graft_addr *asked,
				bool itself)
{
	if (!stamp || !a || !asked || !is_any(stamp->local.ip))
		return false;
	if (!itself &&
	    !(stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL) && same_addr(a, &stamp->local_real)))
		return false;
	return number_at(stamp->tenant, asked, false);
}

/* Does a TCP socket connect to the very port that it is bound to? TCP lets it (RFC 9293, 3.5). @source becomes whole.
 */
static __always_inline bool connects_to_itself(const struct bpf_sock *sk, const struct graft_stamp *stamp,
					       const struct graft_addr *asked, struct graft_addr *source)
{
	if (!sk || !sk->src_port || is_any(source->ip) || is_v4(source) != is_v4(asked))
		return false;
	source->port = sk->src_port;
	return stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS) && same_ip(source->ip, stamp->local_real.ip) &&
	       (stamp->local.port ? stamp->local.port : source->port) == asked->port &&
	       (is_any(stamp->local.ip) ? !is_v4(asked) || asked->ip[3] == bpf_htonl(0x7f000001)
					: same_ip(stamp->local.ip, asked->ip));
}

/* Does a socket whose bind waits connect to its own port? */
static __always_inline bool waits_for_itself(const struct graft_stamp *stamp, const struct graft_addr *asked)
{
	return stamp->flags & STAMP_WAITS && stamp->local.port == asked->port;
}

/* A UDP socket that connects without a bind gets a port of the host's when this hook has allowed it. */
static __always_inline bool may_have_source(struct bpf_sock_addr *ctx, struct graft_stamp *stamp)
{
	return ctx->protocol != IPPROTO_UDP || stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS) ||
	       hold_port(ctx, stamp->tenant);
}

/* Decide a connection to @a, from a socket of family AF_INET6 if @six; the real destination is in @a. */
static __noinline int decide_connect(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				     bool six)
{
	struct graft_addr asked, source;
	struct graft_tenant *tenant;
	struct graft_egress *rule;
	struct refusal why;
	bool confined, itself;
	__u32 id;
	int where;

	if (!a || !stamp)
		return DENY;
	id = stamp->tenant;
	tenant = tenant_of(stamp);
	if (!tenant)
		return deny(id, DENIED(OP_CONNECT, REASON_NO_TENANT), ENETUNREACH, ctx->protocol, a);
	if (!take_source_back(ctx, stamp, six))
		return deny(id, DENIED(OP_CONNECT, REASON_PRIVATE_SOURCE), EADDRNOTAVAIL, ctx->protocol, a);
	load_source(ctx, &source, six);
	if (is_any(a->ip))
		name_this_host(a, stamp, &source);
	asked = *a;
	if (names_endpoint(a)) {
		where = to_endpoint(stamp, a, &source);
		if (where == AS_ITSELF)
			asked = *a;
		else if (where)
			return deny(id, DENIED(OP_CONNECT, where >> 16), where & 0xffff, ctx->protocol, &asked);
	}
	if (has_anothers_source(stamp, &source, a))
		return deny(id, DENIED(OP_CONNECT, REASON_WRONG_SOURCE), EADDRNOTAVAIL, ctx->protocol, a);
	if (names_endpoint(&asked)) {
		where = ROUTE_ELSEWHERE;
		rule = rule_to_endpoint(stamp, a);
		if (!rule)
			goto allow;
		goto leave;
	}
	if (is_permitted(stamp, a) && (!in_slices(&source) || is_loopback(a)))
		goto allow;
	if (is_for_loopback(ctx, stamp, tenant, &asked)) {
		where = decide_loopback(ctx, a, stamp, tenant, true, &why);
		if (where == LOCAL_REFUSED)
			return deny(id, DENIED(OP_CONNECT, why.reason), why.error, ctx->protocol, &asked);
		if (where == LOCAL_CLOSED && waits_for_itself(stamp, &asked))
			settle(ctx, stamp, &source, is_v4(&asked), six);
		if (where == LOCAL_CLOSED && connects_to_itself(ctx->sk, stamp, &asked, &source)) {
			*a = source;
			goto allow;
		}
		if (where == LOCAL_CLOSED) { /* as on any host: no refusal that is to be counted */
			bpf_set_retval(-ECONNREFUSED);
			return DENY;
		}
		itself = where == LOCAL_CONTAINER && ctx->sk && is_itself(ctx->sk, a, &source);
		if (where == LOCAL_CONTAINER && ctx->protocol == IPPROTO_UDP &&
		    leaves_its_place(stamp, a, &asked, itself))
			loopback_place(id, tenant->slice, &asked, a, true);
		else if (itself)
			set_loopback(a);
		else if (where == LOCAL_CONTAINER && settle(ctx, stamp, &source, is_v4(a), six))
			goto allow;
		else if ((where == LOCAL_NAMED || (where == LOCAL_CONTAINER && has_private_source(ctx, a, tenant))) &&
			 ctx->sk && !has_source(ctx->sk)) {
			if (private_source(ctx, &source, id, is_v4(a)) || bind_source(ctx, &source, six)) {
				if (ctx->protocol == IPPROTO_UDP)
					let_go(held_by(ctx->sk), id);
				return deny(id, DENIED(OP_CONNECT, REASON_NOT_LISTENING), EADDRNOTAVAIL,
					    ctx->protocol, &asked);
			}
			stamp->flags |= STAMP_LENT;
		} else if (where == LOCAL_NAMED) {
			note_client(ctx, id, &source);
		}
		if (where == LOCAL_CONTAINER || !(tenant->flags & TENANT_STRICT))
			goto allow;
	}
	if (waits_for_itself(stamp, &asked) && same_ip(stamp->local.ip, asked.ip) &&
	    settle(ctx, stamp, &source, is_v4(&asked), six)) {
		*a = source;
		goto allow;
	}
	/* a UDP socket keeps its loopback source after a connection there was given up */
	confined = !is_loopback(a) && is_confined(stamp, &source, a);
	where = decide_egress(ctx, a, stamp, tenant, confined, &rule, &why);
	if (where == ROUTE_REFUSED)
		return deny(id, DENIED(OP_CONNECT, why.reason), why.error, ctx->protocol, &asked);
	if (!rule)
		goto allow;
	if (confined)
		return deny(id, DENIED(OP_CONNECT, REASON_PRIVATE_SOURCE),
			    confined_error(ctx, stamp, &source, EADDRNOTAVAIL), ctx->protocol, &asked);
leave:
	if (!is_any(rule->ip) || rule->port) {
		if (ctx->sk && has_source(ctx->sk)) {
			if (!is_any(rule->ip) && !(where == ROUTE_CONTAINER && stamp->flags & STAMP_EPHEMERAL) &&
			    !same_ip(source.ip, rule->ip))
				return deny(id, DENIED(OP_CONNECT, REASON_WRONG_SOURCE), EADDRNOTAVAIL, ctx->protocol,
					    &asked);
		} else {
			__builtin_memcpy(source.ip, rule->ip, sizeof(source.ip));
			source.port = rule->port;
			if (bind_source(ctx, &source, six))
				return deny(id, DENIED(OP_CONNECT, REASON_WRONG_SOURCE), EADDRNOTAVAIL, ctx->protocol,
					    &asked);
			stamp->flags |= STAMP_LENT;
		}
	}
	if (is_any(rule->ip) && is_unanswerable(id, &source, a) && !may_answer(ctx, stamp, a))
		return deny(id, DENIED(OP_CONNECT, REASON_WRONG_SOURCE), EADDRNOTAVAIL, ctx->protocol, &asked);
	if (where == ROUTE_CONTAINER && ctx->protocol == IPPROTO_UDP)
		remember_port(&asked, a->port);
	if (where == ROUTE_CONTAINER && stamp->flags & STAMP_EPHEMERAL)
		/* the kernel takes the destination's address as its source, which says nothing */
		note_client(ctx, id, &source);
	tell_conversion(id, tenant, OP_CONNECT << 16 | ctx->protocol, &asked, (struct graft_addr *)rule);
allow:
	if (!may_have_source(ctx, stamp))
		return deny(id, DENIED(OP_CONNECT, REASON_PORTS), EADDRNOTAVAIL, ctx->protocol, &asked);
	if (tenant->flags & TENANT_PACED)
		pace_connection(ctx, id);
	note_peer(stamp, &asked, a);
	return ALLOW;
}

/* Decide a connection as above, and beside the peers that a UDP socket has had. */
static __always_inline int decide_again(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
					bool six)
{
	if (!note_met(ctx, stamp))
		return bpf_set_retval(-ENOBUFS), DENY;
	if (!decide_connect(ctx, a, stamp, six))
		return DENY;
	if (may_meet(ctx, stamp, a))
		return ALLOW;
	keep_peer(ctx, stamp);
	return deny(stamp->tenant, DENIED(OP_CONNECT, REASON_MET), EADDRNOTAVAIL, IPPROTO_UDP, a);
}

/*
 * Does a connection of a direct container leave as the host's would, with nothing to be noted? Most do. The
 * container may go anywhere, and @a is nobody's whom it may not reach: neither loopback, nor slice, nor a
 * name's, nor a container's.
 */
static __always_inline bool goes_straight(struct bpf_sock_addr *ctx, const struct graft_addr *a)
{
	__u32 id = direct_tenant();
	struct graft_tenant *tenant;
	struct bpf_sock *sk;

	if (!id || ctx->protocol != IPPROTO_TCP || is_any(a->ip) || is_loopback(a) || in_slices(a) ||
	    names_endpoint(a) || may_be_owned(a))
		return false;
	sk = ctx->sk;
	if (!sk || sk->src_port || sk->state != BPF_TCP_CLOSE || (sk->family == AF_INET6 && is_v4(a)) ||
	    !was_made(sk))
		return false;
	tenant = bpf_map_lookup_elem(&tenants, &id);
	return tenant && tenant->flags & TENANT_PLAIN;
}

SEC("cgroup/connect4")
int graft_connect4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;

	load4(ctx, &a);
	if (!stamp && ctx->user_family == AF_INET && goes_straight(ctx, &a))
		return ALLOW;
	if (!stamp)
		stamp = stamp_for(ctx->sk);
	if (!stamp)
		return deny_unstamped(ctx, OP_CONNECT, &a);
	if (stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	if (ctx->user_family != AF_INET)
		return ALLOW; /* the kernel says EAFNOSUPPORT */
	forget_refused(ctx, stamp);
	if (ctx->sk && ctx->sk->family == AF_INET6 && family_error(ctx, stamp, &a)) {
		bpf_set_retval(-EAFNOSUPPORT);
		return DENY;
	}
	if (!decide_again(ctx, &a, stamp, false))
		return DENY;
	store4(ctx, &a);
	tell_allowed(stamp->tenant, OP_CONNECT, ctx->protocol, &stamp->peer, &stamp->peer_real);
	return ALLOW;
}

SEC("cgroup/connect6")
int graft_connect6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;
	int error;

	load6(ctx, &a);
	if (!stamp && ctx->user_family == AF_INET6 && goes_straight(ctx, &a))
		return ALLOW;
	if (!stamp)
		stamp = stamp_for(ctx->sk);
	if (!stamp)
		return deny_unstamped(ctx, OP_CONNECT, &a);
	if (stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	if (ctx->user_family != AF_INET6)
		return ALLOW; /* the kernel says EAFNOSUPPORT */
	forget_refused(ctx, stamp);
	error = family_error(ctx, stamp, &a);
	if (error) {
		fail_with(error);
		return DENY;
	}
	if (!decide_again(ctx, &a, stamp, true))
		return DENY;
	store6(ctx, &a);
	tell_allowed(stamp->tenant, OP_CONNECT, ctx->protocol, &stamp->peer, &stamp->peer_real);
	return ALLOW;
}

#endif
