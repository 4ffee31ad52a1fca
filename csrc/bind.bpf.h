/* SPDX-License-Identifier: GPL-2.0 */
/*
 * bind.bpf.h - bind(): the host address that it becomes; listen() without it
 */
#ifndef BIND_BPF_H
#define BIND_BPF_H

#include "abroad.bpf.h"
#include "late.bpf.h"
#include "low_ports.bpf.h"
#include "made.bpf.h"
#include "numbers.bpf.h"
#include "options.bpf.h"
#include "own.bpf.h"
#include "watch.bpf.h"

static __always_inline int note_local(struct graft_stamp *stamp, const struct graft_addr *asked,
				      const struct graft_addr *real, __u32 how)
{
	stamp->local = *asked;
	stamp->local_real = *real;
	stamp->flags = (stamp->flags & ~(STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL | STAMP_V6ONLY | STAMP_LENT |
					 STAMP_WAITS | STAMP_ABROAD)) |
		       how;
	return BIND_ALLOW;
}

/*
 * UDP sockets that set SO_REUSEADDR or SO_REUSEPORT share ports with all that set it. Among those that the kernel
 * may choose are ports of the host's and of other containers. So the options hold where the program names the port.
 * Whichever is set, the kernel's is SO_REUSEPORT, which works among sockets of one uid: where the bind fails the
 * option stays set, and no hook runs before the kernel chooses a port for the first datagram. So it holds for a
 * socket that has its container's uid still (owners.bpf.h).
 */
__noinline int set_reuse(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, bool allowed)
{
	struct graft_tenant *tenant;
	__u32 owner;
	int port;

	if (!stamp || ctx->protocol != IPPROTO_UDP)
		return 0;
	port = allowed && stamp->flags & (STAMP_REUSEADDR | STAMP_REUSEPORT);
	if (port) {
		tenant = tenant_of(stamp);
		owner = uid_of(ctx->sk) - GRAFT_OWNERS;
		port = tenant && (owner == tenant->slice || (!owner && (tenant->own4 || tenant->own6[0])));
	}
	bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEPORT_, &port, sizeof(port));
	return 0;
}

/*
 * Is a UDP socket of the tenant's in the way of a bind to @asked that has the port at the address with this number,
 * and is on the wildcard if that is an address, or the other way round? -1: no address has the number.
 */
__noinline int is_in_the_way(struct bpf_sock_addr *ctx, __u32 slice, struct graft_addr *asked,
			     struct graft_stamp *stamp, __u32 number)
{
	struct graft_addr at, from = {};
	int how;

	if (!asked || !stamp || loopback_address(stamp->tenant, number) == bpf_htonl(0x7f000000))
		return -1;
	set_v4(&from, 0);
	slice_place(&at, true, slice, asked->port, number);
	how = bound_at(ctx, stamp->tenant, &at, &from);
	return how & (is_any(asked->ip) ? BOUND_EXACT : BOUND_WILD) && !(lets_share(stamp) && how & BOUND_SHARES);
}

/* Is a UDP socket on the wildcard, at a port of the kernel's choice, in the way of a bind to @asked, an address? */
__noinline int is_on_wildcard(struct bpf_sock_addr *ctx, __u32 slice, struct graft_addr *asked,
			      struct graft_stamp *stamp)
{
	struct graft_addr at, from = {};
	int how;
	bool v4;

	if (!asked || !stamp)
		return false;
	v4 = is_v4(asked);
	if (v4)
		set_v4(&from, 0);
	for (int six = !v4; six < 2; six++) {
		slice_ip(&at, v4, slice, SLICE_DYNAMIC);
		at.port = chosen_port(stamp->tenant, !six, asked->port);
		how = at.port ? bound_at(ctx, stamp->tenant, &at, &from) : 0;
		if (how & BOUND_WILD)
			return !(lets_share(stamp) && how & BOUND_SHARES);
	}
	return false;
}

/*
 * Is a further address of the loopback in the way of a UDP bind to the wildcard, or the wildcard in the way of one
 * there? These are different places, and the kernel sees no conflict.
 */
__noinline int is_beside(struct bpf_sock_addr *ctx, __u32 slice, struct graft_addr *asked, struct graft_stamp *stamp,
			 bool dual)
{
	int number, found = 0;

	if (!asked || !stamp || ctx->protocol != IPPROTO_UDP)
		return false;
	if (!is_any(asked->ip) && is_on_wildcard(ctx, slice, asked, stamp))
		return true;
	if (!is_v4(asked) && !dual)
		return false;
	number = number_at(stamp->tenant, asked, true);
	if (number)
		return is_in_the_way(ctx, slice, asked, stamp, 0);
	if (is_any(asked->ip))
		for (number = 1; !found && number <= SLICE_LOOPBACKS; number++)
			found = is_in_the_way(ctx, slice, asked, stamp, number);
	return found > 0;
}

/*
 * The port of the host's at which a UDP socket of the container's is on a wildcard for @asked, in whose way a bind
 * there may be; 0: there is none. By what was noted, because a look-up finds no socket that is connected.
 */
__noinline int port_in_use(struct graft_addr *asked, struct graft_stamp *stamp, bool dual)
{
	__u32 port;

	if (!asked || !stamp)
		return 0;
	for (int six = 0; six < 2; six++) {
		if (is_v4(asked) ? 0 : !dual && !six)
			continue;
		port = used_port(stamp->tenant, dual ? six : !six, asked->port);
		if (port)
			return port;
	}
	return 0;
}

/*
 * May a UDP socket leave from @a, an address of the host's, because its program says so? A server that is published
 * at each of them answers from the one that was asked, also by another socket (TFTP). Others leave as the rules say.
 */
static __always_inline bool answers_from(const struct graft_tenant *tenant, const struct graft_addr *a)
{
	return tenant->flags & (is_v4(a) ? TENANT_SERVES4 : TENANT_SERVES6);
}

/*
 * Bind a UDP socket to a port that nobody publishes, on the wildcard, or at an address of the host's if @hosts. It is
 * on the host's wildcard, or at that address, at a port of the kernel's choice: from there it can send, and hears
 * whom it has sent to. The loopback leads to it (note_dynamic()). Of [::] that is the only place for both families.
 * Where a socket of the container has the port, the bind goes there, so that the kernel refuses it, or lets them
 * share it.
 */
__noinline int bind_chosen(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp, bool dual,
			   bool hosts)
{
	struct graft_tenant *tenant;
	struct graft_addr asked, from;
	__u32 slice;

	if (!a || !stamp)
		return DENY;
	tenant = tenant_of(stamp);
	if (!tenant)
		return DENY;
	asked = *a;
	slice = tenant->slice;
	for (int v4 = 0; v4 < 2 && !hosts; v4++) {
		if (!dual && v4 != is_v4(&asked))
			continue;
		loopback_source(ctx, &from, v4, slice);
		slice_addr(a, v4, slice, asked.port);
		if (receiver_at(ctx, stamp->tenant, a, &from) == RECEIVER_TENANT)
			return note_local(stamp, &asked, a, STAMP_PRIVATE);
		slice_ip(a, v4, slice, SLICE_DYNAMIC);
		a->port = asked.port;
		if (receiver_at(ctx, stamp->tenant, a, &from) == RECEIVER_TENANT_CHOSEN)
			return note_local(stamp, &asked, a, STAMP_PRIVATE);
	}
	*a = asked;
	if (!hosts || !answers_from(tenant, a))
		to_wildcard(a);
	if (tenant->own4 || tenant->own6[0])
		set_reuse(ctx, stamp, false); /* such containers have one uid: another's port could be chosen */
	a->port = port_in_use(&asked, stamp, dual);
	if (!hold_port(ctx, stamp->tenant))
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_PORTS), EADDRINUSE, IPPROTO_UDP, &asked);
	return note_local(stamp, &asked, a, STAMP_EPHEMERAL);
}

/* TCP connections of a server that has ended are in nobody's way: they inherit this from their listener. */
static __always_inline void outlive_connections(struct bpf_sock_addr *ctx)
{
	int on = 1;

	if (ctx->protocol == IPPROTO_TCP)
		bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEADDR_, &on, sizeof(on));
}

/* Is a TCP socket of the container's in the way of a bind to @asked? */
static __always_inline bool is_in_use(const struct bpf_sock_addr *ctx, struct graft_stamp *stamp,
				      struct graft_addr *asked, bool dual)
{
	return ctx->protocol == IPPROTO_TCP && !stamp->place && is_claimed(stamp, asked, dual, 0);
}

/*
 * As graft_holder.number, for an address of the host's: a server there is in nobody's way at the loopback. A
 * container's sixteenth address has it, too; then who binds both at one port gets EADDRINUSE.
 */
#define HOSTS_NUMBER 15

/*
 * Bind into the tenant's slice. A UDP socket of the container may have this number on the host's wildcard, from where
 * it has sent without a bind. Then the bind goes to SLICE_DYNAMIC, so that the kernel refuses it.
 */
static __noinline int bind_private(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				   struct graft_tenant *tenant, bool dual)
{
	struct graft_addr asked, from, chosen;
	struct graft_holder *holder;
	__u32 number;
	bool v4;

	if (!a || !stamp || !tenant)
		return DENY;
	asked = *a;
	v4 = is_v4(&asked) || dual;
	holder = holder_of(&asked);
	number = number_at(stamp->tenant, a, true);
	if (asked.port && (is_beside(ctx, tenant->slice, a, stamp, dual) || is_in_use(ctx, stamp, a, dual)))
		return bpf_set_retval(-EADDRINUSE), DENY; /* as on any host */
	if (!asked.port) {
		asked.port = take_number(ctx, stamp->tenant, tenant->slice, v4, number);
		if (!asked.port)
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_PORTS), EADDRINUSE, ctx->protocol, a);
		slice_place(a, v4, tenant->slice, asked.port, number);
		claim(ctx, stamp, &asked, dual);
		return note_local(stamp, &asked, a, STAMP_PRIVATE);
	}
	name_number(ctx, stamp->tenant, asked.port, v4);
	claim(ctx, stamp, &asked, dual);
	private_place(a, v4, tenant->slice, &asked, holder, number);
	if (!holder && !is_any(asked.ip) && !is_loopback(&asked))
		own_place(a, v4, tenant->slice, asked.port, HOSTS_NUMBER);
	if (ctx->protocol == IPPROTO_UDP) {
		slice_ip(&chosen, v4, tenant->slice, SLICE_DYNAMIC);
		chosen.port = asked.port;
		loopback_source(ctx, &from, v4, tenant->slice);
		if (receiver_at(ctx, stamp->tenant, &chosen, &from) == RECEIVER_TENANT_CHOSEN)
			*a = chosen;
	}
	return note_local(stamp, &asked, a, STAMP_PRIVATE);
}

/*
 * Does a listener at @at, an address of the container's own, stand in the way of this bind? The kernel sees only
 * those that are bound to the same place. A bind to the wildcard and one to the address are not, and of an address
 * that a device has the host's programs have ports.
 */
__noinline int is_taken(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *at)
{
	struct graft_addr from = {};
	struct graft_stamp *stamp;
	struct bpf_sock *sk;
	bool taken;

	if (!at)
		return false;
	if (is_v4(at))
		set_v4(&from, 0);
	sk = socket_at(ctx, at, &from);
	if (!sk)
		return false;
	stamp = stamp_of(sk);
	taken = !stamp || stamp->tenant != tenant || !shares_port(sk) || !shares_port(ctx->sk);
	bpf_sk_release(sk);
	return taken;
}

/*
 * A container's UDP socket may have a port at its own address that another one publishes on the host's wildcard, and
 * graftd tries a port that it is to publish once more, after the container has left a network and come back.
 * With SO_REUSEPORT the kernel takes both (graftd gives the sockets of such containers one uid), and delivers what is
 * sent to the exact address there. With SO_REUSEADDR the connections of the container that had a TCP port before are
 * in nobody's way, as behind a bridge. Two sockets of one container at one address remain a conflict, which the
 * kernel sees. False: another container's socket is there.
 */
__noinline int share_port(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_tenant *tenant, __u32 id)
{
	struct graft_addr from = {};
	struct graft_stamp *stamp;
	struct bpf_sock *sk;
	bool here = false, taken = false;
	int on = 1;

	if (!a || !tenant || !a->port || !(tenant->own4 || tenant->own6[0]))
		return true;
	if (is_v4(a))
		set_v4(&from, 0);
	sk = socket_at(ctx, a, &from);
	if (sk) {
		stamp = stamp_of(sk);
		here = stamp && same_addr(&stamp->local_real, a);
		taken = here && stamp->tenant != id;
		bpf_sk_release(sk);
	}
	if (taken)
		return false;
	if (here)
		return true;
	bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEPORT_, &on, sizeof(on));
	if (ctx->protocol == IPPROTO_TCP)
		bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEADDR_, &on, sizeof(on));
	return true;
}

/*
 * The containers with addresses of their own share a uid, with which SO_REUSEPORT would let two of them bind one
 * endpoint that is not exclusive. The first one has it.
 */
static __noinline int claim_port(struct bpf_sock_addr *ctx, struct graft_tenant *tenant)
{
	int off = 0;

	if (tenant && (tenant->own4 || tenant->own6[0]))
		bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEPORT_, &off, sizeof(off));
	return true;
}

/*
 * A bind that no rule names, to the wildcard or an address of the container's own: is it one to the container's
 * address? So are those of UDP, whose answers leave from the socket's own address and port, and those of TCP to a
 * port that the kernel chooses: who does that connects next.
 */
static __always_inline bool to_own_address(struct graft_addr *a, __u32 id, const struct graft_tenant *tenant,
					   bool dual)
{
	if (!is_any(a->ip))
		return is_own_address(id, a);
	if (tenant->own4 && (dual || is_v4(a))) {
		set_v4(a, tenant->own4);
		return true;
	}
	if (tenant->own6[0] && !is_v4(a)) {
		__builtin_memcpy(a->ip, tenant->own6, sizeof(a->ip));
		return true;
	}
	return false;
}

/* Where all egress of a family leaves from an address of the container's own, a UDP socket that sends is bound there:
 * the kernel would connect one on the wildcard from another address. */
static __always_inline void to_default_source(struct graft_addr *a, __u32 tenant)
{
	struct graft_egress *rule = egress_rule(tenant, a);

	if (rule && is_own_address(tenant, (struct graft_addr *)rule))
		__builtin_memcpy(a->ip, rule->ip, sizeof(a->ip));
}

/*
 * Is @a an address of the host's, where a publication without an address holds as well? A bind there is narrower than
 * one to the wildcard. The kernel would take any address of IPv6, because a socket may be bound to the slices.
 */
static __always_inline bool is_hosts(const struct graft_stamp *stamp, const struct graft_addr *a)
{
	return !stamp->place && !is_any(a->ip) && !is_loopback(a) && bpf_map_lookup_elem(&locals, a->ip) &&
	       !holder_of(a);
}

/* May a listener of both families be at the address of this rule, beside that of the other family's rule? */
static __always_inline bool can_share(const struct bpf_sock_addr *ctx, const struct graft_stamp *stamp,
				      const struct graft_ingress *rule)
{
	return ctx->protocol == IPPROTO_TCP && !rule->place && !stamp->place && rule->exclusive && rule->port &&
	       !is_any(rule->ip);
}

/*
 * A listener on [::] is published at one address of each family, and a socket is bound to one. It is bound to that of
 * IPv4; what arrives at port @port of @at, that of IPv6, is led to the listener for @asked (lead_to_shared()).
 */
__noinline int share_listener(__u32 tenant, struct graft_addr *at, __u32 port, __u32 asked)
{
	struct graft_addr real = {};
	struct graft_owned *of;
	__u32 zero = 0, bit;

	if (!at)
		return 0;
	__builtin_memcpy(real.ip, at->ip, sizeof(real.ip));
	real.port = port;
	note_served(tenant, &real, asked);
	of = bpf_map_lookup_elem(&shared, &zero);
	bit = address_bit(&real);
	if (of)
		__sync_fetch_and_or(&of->bits[(bit / 64) % OWNED_WORDS], 1ull << bit % 64);
	return 0;
}

/*
 * Let the bind of a TCP socket wait (late.bpf.h). Port 0 becomes a private number at once, which the program may ask
 * for, but where it has said that it does not need one.
 */
__noinline int bind_late(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp, bool dual)
{
	struct graft_tenant *tenant;
	struct graft_addr asked, own;
	bool v4;

	if (!a || !stamp)
		return DENY;
	tenant = tenant_of(stamp);
	if (!tenant)
		return DENY;
	asked = own = *a;
	v4 = is_v4(&asked) || dual;
	if (!may_bind_low(tenant->netns_cookie, asked.port))
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_CAPABILITY), EACCES, IPPROTO_TCP, &asked);
	if (asked.port) {
		if (is_in_use(ctx, stamp, &asked, dual) ||
		    (to_own_address(&own, stamp->tenant, tenant, dual) && is_taken(ctx, stamp->tenant, &own)))
			return bpf_set_retval(-EADDRINUSE), DENY; /* as on any host */
		name_number(ctx, stamp->tenant, asked.port, v4);
	} else if (!(stamp->flags & STAMP_NO_PORT)) {
		asked.port = take_number(ctx, stamp->tenant, tenant->slice, v4, 0);
		if (!asked.port)
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_PORTS), EADDRINUSE, IPPROTO_TCP, a);
	}
	claim(ctx, stamp, &asked, dual);
	a->port = 0;
	to_wildcard(a);
	return note_local(stamp, &asked, a, STAMP_WAITS);
}

/*
 * May @port of the host's be had on the wildcard? A socket that is connected, or bound to one address, is not seen:
 * then the kernel refuses the bind, once, because the port is remembered no more.
 */
__noinline int is_free(struct bpf_sock_addr *ctx, struct graft_tenant *tenant, __u32 port, bool v4)
{
	struct graft_addr at, from;

	if (!tenant)
		return false;
	loopback_source(ctx, &from, v4, tenant->slice);
	slice_ip(&at, v4, tenant->slice, SLICE_DYNAMIC);
	at.port = port;
	return receiver_at(ctx, GRAFT_EXEMPT, &at, &from) == RECEIVER_NOBODY;
}

/* Bind a UDP socket to a port of the wildcard, or of an address of the container's own, from where it may send beyond
 * the container's network: abroad.bpf.h. */
__noinline int bind_abroad(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp, bool dual)
{
	struct graft_tenant *tenant;
	struct graft_addr asked;
	bool any;

	if (!a || !stamp)
		return DENY;
	tenant = tenant_of(stamp);
	if (!tenant)
		return DENY;
	asked = *a;
	any = is_any(asked.ip);
	if (!may_bind_low(tenant->netns_cookie, asked.port))
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_CAPABILITY), EACCES, IPPROTO_UDP, &asked);
	if (asked.port &&
	    (is_claimed(stamp, &asked, dual, CLAIM_UDP) || (any && is_beside(ctx, tenant->slice, a, stamp, dual)) ||
	     (any && (dual || is_v4(a)) && is_in_the_way(ctx, tenant->slice, a, stamp, 0) > 0)))
		return bpf_set_retval(-EADDRINUSE), DENY; /* as on any host */
	set_reuse(ctx, stamp, false); /* such containers have one uid: another's port could be chosen */
	to_wildcard(a);
	a->port = asked.port ? take_remembered(tenant, &asked) : 0;
	if (a->port && !(is_free(ctx, tenant, a->port, is_v4(a)) && (!dual || is_free(ctx, tenant, a->port, true))))
		a->port = 0;
	if (!hold_port(ctx, stamp->tenant))
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_PORTS), EADDRINUSE, IPPROTO_UDP, &asked);
	claim(ctx, stamp, &asked, CLAIM_UDP | dual);
	return note_local(stamp, &asked, a, STAMP_EPHEMERAL | STAMP_ABROAD);
}

/* May this socket have the port at @a? The kernel chooses it if none is named. */
static __always_inline bool may_have_port(struct bpf_sock_addr *ctx, const struct graft_addr *a, __u32 tenant)
{
	return a->port || hold_port(ctx, tenant);
}

static __always_inline int deny_port(struct bpf_sock_addr *ctx, struct graft_addr *a, __u32 tenant)
{
	return deny(tenant, DENIED(OP_BIND, REASON_PORTS), EADDRINUSE, ctx->protocol, a);
}

/*
 * Decide a bind to @a; if it is allowed the real address is put there. @both: the socket would take IPv4 as well
 * where that is [::]. That the socket does not become such a one before the kernel binds it is checked in post_bind.
 */
static __noinline int decide_bind(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				  bool both)
{
	struct graft_ingress *rule, *rule4 = NULL;
	struct graft_tenant *tenant;
	struct graft_addr asked, v4;
	struct graft_held *mine;
	__u32 proto = ctx->protocol, only6 = both ? 0 : STAMP_V6ONLY;
	bool dual, hosts;

	if (!a || !stamp)
		return DENY;
	/* the socket is bound: the kernel would refuse, and the stamp must stay as it is */
	if (waits(ctx->sk, stamp) || (ctx->sk && ctx->sk->src_port)) {
		if (ctx->family == AF_INET && !is_any(a->ip) && !is_loopback(a) &&
		    !is_own_address(stamp->tenant, a) && !is_hosts(stamp, a))
			bpf_set_retval(-EADDRNOTAVAIL); /* IPv4 looks at the address first */
		else
			bpf_set_retval(-EINVAL);
		return DENY;
	}
	tenant = tenant_of(stamp);
	if (!tenant)
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_NO_TENANT), EADDRNOTAVAIL, proto, a);
	mine = ctx->sk ? bpf_sk_storage_get(&held, ctx->sk, NULL, 0) : NULL;
	let_go(mine, stamp->tenant); /* of a bind that failed, or was undone */
	forget_dynamic(mine, stamp->tenant, proto == IPPROTO_UDP);
	give_claim_up(ctx->sk ? bpf_sk_storage_get(&claimed, ctx->sk, NULL, 0) : NULL, stamp->tenant);
	come_home(ctx->sk ? bpf_sk_storage_get(&abroad_place, ctx->sk, NULL, 0) : NULL, stamp->tenant);
	set_reuse(ctx, stamp, a->port);
	asked = *a;
	dual = both && is_any6(a->ip);
	if (stamp->flags & STAMP_NAMED && same_addr(a, &stamp->local_real)) {
		if (dual)
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_DUAL_STACK), EADDRNOTAVAIL, proto, a);
		if (!may_have_port(ctx, a, stamp->tenant))
			return deny_port(ctx, a, stamp->tenant);
		stamp->flags &= ~STAMP_FAMILY;
		if (stamp->flags & STAMP_SOURCE)
			return note_local(stamp, &asked, a, (proto == IPPROTO_UDP ? STAMP_EPHEMERAL : 0) | only6);
		return note_local(stamp, &asked, a, STAMP_INGRESS | only6);
	}
	rule = ingress_rule(stamp->tenant, proto, &asked);
	hosts = !rule && is_hosts(stamp, &asked);
	/* what is published is so at each of the container's addresses, and of the host's if no address is named */
	if (!rule && (hosts || is_own_address(stamp->tenant, &asked))) {
		v4 = (struct graft_addr){.port = asked.port};
		if (is_v4(&asked))
			set_v4(&v4, 0);
		rule = ingress_rule(stamp->tenant, proto, &v4);
		if (hosts && rule && !is_any(rule->ip) && !same_ip(rule->ip, asked.ip))
			rule = NULL;
		if (!rule && !(tenant->flags & TENANT_EGRESS)) /* what addresses the host has is not its business */
			hosts = false;
	}
	if (dual) {
		set_v4(&v4, 0);
		v4.port = asked.port;
		rule4 = ingress_rule(stamp->tenant, proto, &v4);
		if (!rule) {
			rule = rule4;
		} else if (rule4 && (!is_any(rule->ip) || !is_any(rule4->ip) ||
				     ingress_port(rule, asked.port) != ingress_port(rule4, asked.port))) {
			if (tenant->flags & TENANT_STRICT) /* a wrapper's program gets what the rule of IPv6 says */
				rule4 = NULL;
			else if (can_share(ctx, stamp, rule) && can_share(ctx, stamp, rule4)) {
				share_listener(stamp->tenant, (struct graft_addr *)rule,
					       ingress_port(rule, asked.port), asked.port);
				rule = rule4;
			} else
				return deny(stamp->tenant, DENIED(OP_BIND, REASON_DUAL_STACK), EADDRNOTAVAIL, proto,
					    a);
		}
	}
	if (rule && both && !rule4 && !hosts &&
	    is_any6(rule->ip)) /* it would take IPv4 as well, which no rule allows */
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_DUAL_STACK), EADDRNOTAVAIL, proto, a);
	if (rule) {
		if (rule->place != stamp->place)
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_PLACE), EADDRNOTAVAIL, proto, a);
		if (!hosts)
			__builtin_memcpy(a->ip, rule->ip, sizeof(a->ip));
		a->port = ingress_port(rule, asked.port);
		if (is_in_use(ctx, stamp, &asked, dual))
			return bpf_set_retval(-EADDRINUSE), DENY; /* as on any host */
		if (!a->port && may_wait(ctx, stamp)) {		  /* the kernel would choose no port yet */
			claim(ctx, stamp, &asked, dual);
			return note_local(stamp, &asked, a, STAMP_WAITS);
		}
		if (rule->exclusive ? !share_port(ctx, a, tenant, stamp->tenant) : !claim_port(ctx, tenant))
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_TAKEN), EADDRINUSE, proto, &asked);
		if (rule->exclusive)
			outlive_connections(ctx);
		if (!may_have_port(ctx, a, stamp->tenant))
			return deny_port(ctx, &asked, stamp->tenant);
		claim(ctx, stamp, &asked, dual);
		tell_conversion(stamp->tenant, tenant, OP_BIND << 16 | proto, &asked, a);
		if (proto == IPPROTO_TCP && a->port)
			note_served(stamp->tenant, a, asked.port);
		return note_local(stamp, &asked, a, STAMP_INGRESS | only6);
	}
	if (tenant->flags & TENANT_STRICT)
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_NO_RULE), EADDRNOTAVAIL, proto, a);
	if (may_wait(ctx, stamp) && (is_any(asked.ip) || hosts || is_own_address(stamp->tenant, &asked)))
		return bind_late(ctx, a, stamp, dual);
	if (proto == IPPROTO_UDP && !asked.port && (is_any(asked.ip) || hosts) &&
	    (tenant->flags & TENANT_EGRESS || dual)) {
		if (!may_have_port(ctx, a, stamp->tenant))
			return deny_port(ctx, a, stamp->tenant);
		if (hosts && !answers_from(tenant, a))
			to_wildcard(a);
		if (!dual && !hosts)
			to_default_source(a, stamp->tenant);
		return note_local(stamp, &asked, a, STAMP_EPHEMERAL);
	}
	if (proto == IPPROTO_UDP && tenant->flags & TENANT_ABROAD &&
	    (is_any(asked.ip) || is_own_address(stamp->tenant, &asked)))
		return bind_abroad(ctx, a, stamp, dual);
	if (to_own_address(a, stamp->tenant, tenant, dual)) {
		if (!may_bind_low(tenant->netns_cookie, asked.port))
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_CAPABILITY), EACCES, proto, &asked);
		if (proto == IPPROTO_TCP && (asked.port || settles(ctx->sk))) {
			if (asked.port && is_taken(ctx, stamp->tenant, a))
				return bpf_set_retval(-EADDRINUSE), DENY; /* as on any host */
			*a = asked;
			return bind_private(ctx, a, stamp, tenant, dual);
		}
		if (is_reserved(asked.port))
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_RESERVED), EADDRINUSE, proto, &asked);
		if (!share_port(ctx, a, tenant, stamp->tenant))
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_TAKEN), EADDRINUSE, proto, &asked);
		if (!may_have_port(ctx, a, stamp->tenant))
			return deny_port(ctx, &asked, stamp->tenant);
		return note_local(stamp, &asked, a, STAMP_INGRESS);
	}
	if (!is_any(asked.ip) && !is_loopback(&asked) && !hosts)
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_NO_RULE), EADDRNOTAVAIL, proto, a);
	if (!may_bind_low(tenant->netns_cookie, asked.port))
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_CAPABILITY), EACCES, proto, a);
	if (proto == IPPROTO_UDP && !is_loopback(&asked) && (tenant->flags & TENANT_EGRESS || dual)) {
		if (!hosts && is_beside(ctx, tenant->slice, a, stamp, dual))
			return bpf_set_retval(-EADDRINUSE), DENY; /* as on any host */
		return bind_chosen(ctx, a, stamp, dual, hosts);
	}
	return bind_private(ctx, a, stamp, tenant, dual);
}

/* A bind of graftd's was refused: the socket has what it had before. */
__noinline int claim_again(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, bool both)
{
	struct graft_addr asked;

	if (!stamp)
		return 0;
	asked = stamp->local;
	name_number(ctx, stamp->tenant, asked.port, is_v4(&asked) || both);
	return claim(ctx, stamp, &asked, both && is_any6(asked.ip));
}

/*
 * decide_bind(), for a socket that may wait and that graftd binds now: it waits until the kernel has bound it
 * (post_bind), and goes on if that is refused.
 */
static __always_inline int settle_bind(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				       bool both)
{
	bool waited = stamp->flags & STAMP_WAITS;
	int verdict = decide_bind(ctx, a, stamp, both);

	if (waited && verdict == BIND_ALLOW)
		stamp->flags |= STAMP_WAITS;
	else if (waited && settles(ctx->sk))
		claim_again(ctx, stamp, both);
	return verdict;
}

/* An accepted socket has a port, and the kernel would refuse; one that was disconnected has none. */
static __always_inline int bind_unstamped(struct bpf_sock_addr *ctx, struct graft_addr *a)
{
	if (!ctx->sk || !ctx->sk->src_port)
		return deny_unstamped(ctx, OP_BIND, a);
	bpf_set_retval(-EINVAL);
	return DENY;
}

/* Would a direct container's socket that nobody has prepared get a port: of the kernel's choice among all of the
 * host's, or one that it shares with what has its program's uid? */
static __always_inline bool is_unprepared(struct bpf_sock_addr *ctx)
{
	return direct_tenant() && ctx->sk && !ctx->sk->src_port && !is_prepared(ctx->sk);
}

SEC("cgroup/bind4")
int graft_bind4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_for(ctx->sk);
	struct graft_addr a;
	int verdict;

	load4(ctx, &a);
	if (!stamp)
		return bind_unstamped(ctx, &a);
	if (stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	if (ctx->user_family != AF_INET && (ctx->user_family != AF_UNSPEC || ctx->user_ip4))
		return ALLOW; /* the kernel says EAFNOSUPPORT */
	if (is_unprepared(ctx))
		return DENY;
	verdict = settle_bind(ctx, &a, stamp, false);
	if (verdict == BIND_ALLOW)
		store4(ctx, &a);
	if (verdict == BIND_ALLOW && !settles(ctx->sk))
		tell_allowed(stamp->tenant, OP_BIND, ctx->protocol, &stamp->local, &stamp->local_real);
	return bounded(verdict, BIND_ALLOW);
}

SEC("cgroup/bind6")
int graft_bind6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_for(ctx->sk);
	struct graft_addr a;
	int verdict;

	load6(ctx, &a);
	if (!stamp)
		return bind_unstamped(ctx, &a);
	if (stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	if (ctx->user_family != AF_INET6)
		return ALLOW; /* likewise */
	if (is_unprepared(ctx))
		return DENY;
	/* IPV6_V6ONLY is looked at before the address */
	if (is_v4(&a) && !takes_ipv4(ctx->sk)) {
		bpf_set_retval(-EINVAL);
		return DENY;
	}
	verdict = settle_bind(ctx, &a, stamp, takes_ipv4(ctx->sk));
	if (verdict == BIND_ALLOW)
		store6(ctx, &a);
	if (verdict == BIND_ALLOW && !settles(ctx->sk))
		tell_allowed(stamp->tenant, OP_BIND, ctx->protocol, &stamp->local, &stamp->local_real);
	return bounded(verdict, BIND_ALLOW);
}

/*
 * Remember the port that the kernel chose for a `dynamic` endpoint, for a UDP port that nobody publishes, or for port
 * 0 of a UDP wildcard where it has another name: what is sent from inside is led there. False: the kernel has let the
 * second share a port with another of the program's.
 */
static __always_inline bool note_dynamic(struct bpf_sock *sk, struct graft_stamp *stamp)
{
	bool chosen = stamp->flags & STAMP_EPHEMERAL && !(stamp->flags & STAMP_NAMED);
	bool outside = stamp->flags & STAMP_ABROAD;
	struct graft_dynamic_key key;
	struct graft_held *mine;
	struct graft_addr real;
	bool v4, both;
	__u32 port;

	if (!chosen && !(stamp->flags & STAMP_INGRESS && stamp->local.port))
		return true;
	if (chosen ? !is_any(stamp->local.ip) && !outside : stamp->local_real.port)
		return true;
	port = sk->src_port;
	v4 = is_v4(&stamp->local);
	both = is_any6(stamp->local.ip) && bound_takes_ipv4(sk);
	mine = held_by(sk);
	if (!stamp->local.port && is_any(stamp->local.ip))
		stamp->local.port = name_chosen(mine, stamp->tenant, port, v4, both);
	if (!stamp->local.port)
		return true;
	if (chosen && !outside) { /* another thread was faster */
		__u32 other = used_port(stamp->tenant, v4, stamp->local.port);

		if (other && other != port)
			return false;
	}
	if (chosen && !use_dynamic(stamp->tenant, v4, port, stamp->local.port, !outside && lets_share(stamp)))
		return false;
	key = dynamic_key(stamp->tenant, sk->protocol == IPPROTO_UDP, v4, stamp->local.port);
	if (!mine)
		return true;
	if (outside)
		go_abroad(bpf_sk_storage_get(&abroad_place, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE), stamp, port,
			  both);
	lead_to_chosen(mine, &key, port, !outside || is_any(stamp->local.ip));
	if (key.proto == IPPROTO_TCP) {
		real = stamp->local_real;
		real.port = port;
		note_served(stamp->tenant, &real, stamp->local.port);
	}
	return true;
}

/* Enter a UDP socket of a container that has addresses of its own, where it may be reached at them. */
static __always_inline void note_udp(struct bpf_sock *sk, struct graft_stamp *stamp)
{
	struct graft_tenant *tenant;

	if (sk->protocol != IPPROTO_UDP || stamp->flags & STAMP_PRIVATE)
		return;
	tenant = tenant_of(stamp);
	if (tenant && (tenant->own4 || tenant->own6[0]) &&
	    (is_any(stamp->local_real.ip) || holder_of(&stamp->local_real)))
		enter_udp(sk, stamp->tenant, sk->src_port);
}

/* Has the kernel bound a socket that waits, at a port of its own choice? Only a bind of graftd's is to be done, and
 * that was decided for the slice or a rule. */
static __always_inline bool is_too_early(struct bpf_sock *sk, const struct graft_stamp *stamp)
{
	return stamp->flags & STAMP_WAITS && !(stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS) && settles(sk));
}

/*
 * Has the kernel chosen a port for a UDP socket that others have, with which SO_REUSEPORT lets it share? Theirs is
 * another server, of the container or, where its program has changed the uid since set_reuse(), of somebody else.
 */
static __always_inline bool has_joined(struct bpf_sock *sk, const struct graft_stamp *stamp)
{
	return sk->protocol == IPPROTO_UDP && !stamp->local_real.port && bound_shares(sk);
}

/*
 * The socket is bound, and locked. Is it bound as it was decided? Between the decision and the bind another thread
 * may have decided another bind, or changed IPV6_V6ONLY.
 */
static __always_inline bool is_as_decided(const struct graft_stamp *stamp, const __u32 *ip, __u32 port)
{
	return same_ip(ip, stamp->local_real.ip) && (!stamp->local_real.port || port == stamp->local_real.port);
}

SEC("cgroup/post_bind4")
int graft_post_bind4(struct bpf_sock *sk)
{
	struct graft_stamp *stamp = stamp_on(sk);
	struct graft_addr at = {};

	if (!stamp || stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	set_v4(&at, sk->src_ip4);
	if (is_too_early(sk, stamp) || !is_as_decided(stamp, at.ip, sk->src_port))
		return DENY;
	stamp->flags &= ~STAMP_WAITS;
	if (has_joined(sk, stamp) || !note_dynamic(sk, stamp)) {
		bpf_set_retval(-EADDRINUSE);
		return DENY;
	}
	note_udp(sk, stamp);
	return ALLOW;
}

SEC("cgroup/post_bind6")
int graft_post_bind6(struct bpf_sock *sk)
{
	struct graft_stamp *stamp = stamp_on(sk);
	struct graft_addr at = {};

	if (!stamp || stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	at.ip[0] = sk->src_ip6[0];
	at.ip[1] = sk->src_ip6[1];
	at.ip[2] = sk->src_ip6[2];
	at.ip[3] = sk->src_ip6[3];
	if (is_too_early(sk, stamp) || !is_as_decided(stamp, at.ip, sk->src_port))
		return DENY;
	if (stamp->flags & STAMP_V6ONLY && is_any6(at.ip) && bound_takes_ipv4(sk))
		return DENY;
	stamp->flags &= ~STAMP_WAITS;
	if (has_joined(sk, stamp) || !note_dynamic(sk, stamp)) {
		bpf_set_retval(-EADDRINUSE);
		return DENY;
	}
	note_udp(sk, stamp);
	return ALLOW;
}

/* Is this listener, at @here, bound as a bind hook has decided? */
static __always_inline bool is_bound_for(struct bpf_sock *sk, struct graft_stamp *stamp,
					 const struct graft_addr *here)
{
	if (in_slices(here) && stamp->flags & STAMP_PRIVATE)
		return true;
	return stamp->flags & STAMP_INGRESS && is_as_decided(stamp, here->ip, here->port) &&
	       !is_anothers(stamp->tenant, here) && tenant_of(stamp) &&
	       !(stamp->flags & STAMP_V6ONLY && is_any6(here->ip) && takes_ipv4(sk));
}

/*
 * Enter a listener into the table. What it accepts at an address of the container's own has a port there, which would
 * stand in the way of a bind to the wildcard by another, as the listener itself would: but for SO_REUSEADDR, which
 * accepted sockets have from their listener, and servers set.
 */
static __always_inline void make_known(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct graft_stamp *stamp,
				       const struct graft_addr *here)
{
	struct graft_tenant *tenant = tenant_of(stamp);
	int on = 1;

	if (!tenant || stamp->flags & STAMP_NAMED)
		return;
	claim_alone(sk, stamp);
	if (tenant->flags & TENANT_PACED)
		SET_PACE(ctx, stamp->tenant);
	if (tenant->flags & TENANT_WATCHED)
		tell(stamp->tenant, DENIED(OP_LISTEN, REASON_ALLOWED), 0, IPPROTO_TCP, &stamp->local, here, false);
	if (list_listener(ctx, sk, stamp, here->port) == LISTENERS_FULL)
		count_and_tell(stamp->tenant, DENIED(OP_LISTEN, REASON_PORTS), ENOBUFS, IPPROTO_TCP, here, false);
	if (tenant->own4 || tenant->own6[0])
		bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEADDR_, &on, sizeof(on));
}

/*
 * listen() without a bind runs no bind hook. graftd traps listen() and binds such a socket first, but a process that
 * was sent the socket may not be trapped. The listener is then tied to an interface that does not exist, so that
 * nobody reaches it.
 */
SEC("sockops")
int graft_sockops(struct bpf_sock_ops *ctx)
{
	struct graft_stamp *stamp;
	struct graft_addr here = {};
	int nowhere = 0x7fffffff;
	struct bpf_sock *sk;
	__u32 ip4;

	ctx->reply = -1;
	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	stamp = stamp_of(sk);
	if (stamp && stamp->tenant == GRAFT_EXEMPT)
		return 1;
	ip4 = FIELD(ctx->local_ip4);
	here.ip[0] = FIELD(ctx->local_ip6[0]);
	here.ip[1] = FIELD(ctx->local_ip6[1]);
	here.ip[2] = FIELD(ctx->local_ip6[2]);
	here.ip[3] = FIELD(ctx->local_ip6[3]);
	here.port = ctx->local_port;
	if (ctx->family == AF_INET)
		set_v4(&here, ip4);
	if (stamp && is_bound_for(sk, stamp, &here)) {
		make_known(ctx, sk, stamp, &here);
		return 1;
	}
	bpf_setsockopt(ctx, SOL_SOCKET_, SO_BINDTOIFINDEX_, &nowhere, sizeof(nowhere));
	count_and_tell(stamp ? stamp->tenant : GRAFT_EXEMPT, DENIED(OP_LISTEN, REASON_UNBOUND_LISTEN), EADDRNOTAVAIL,
		       IPPROTO_TCP, &here, false);
	return 1;
}

#endif
