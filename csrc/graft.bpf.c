// SPDX-License-Identifier: GPL-2.0
/*
 * graft.bpf.c - the policy, inside the very calls that bind, connect and send
 *
 * Theory of operation
 *
 * A grafted socket is made by graftd in the host's network namespace and stamped (socket storage) with
 * its tenant before the container sees it. The programs here run for sockets created in graftd's cgroup,
 * wherever they are used later. An accepted socket inherits the cgroup but not the stamp, which costs a
 * server nothing: it may do what a connection does, the option policy holds for it, and any other use (it can
 * be disconnected and connected, bound or made to listen again) is refused. graftd's own sockets carry the
 * stamp GRAFT_OWN. The guard alone sits on the cgroup root and runs for everybody: it keeps unstamped sockets out of
 * the containers' private loopback.
 *
 * bind      an ingress rule names the host address that a bind to ADDR:PORT becomes; loopback and wildcard
 *           binds without a rule go to the tenant's block (slice.bpf.h); anything else is refused.
 * connect,  loopback destinations are looked up among the tenant's own sockets: a socket table look-up
 * send      (bpf_sk_lookup_*) and its stamp say whose server it is, so no table of bound ports has to be
 *           kept true, and a host's wildcard listener is never taken for the container's. Everything else
 *           is matched against the egress rules, and leaves from the rule's address.
 * get*name, show what the program asked for, from the stamp.
 * recvmsg
 *
 * Facts that this rests on (each proved by a test under tests/kernel): an accepted socket is in its listener's
 * cgroup; v4-mapped addresses arrive in the *6 hooks for bind and connect, in sendmsg4 for sends; MPTCP runs the
 * hooks on an unstamped subflow; listen() without bind runs no hook but sockops'; a connected send with a
 * control message arrives with family 0.
 */
#include "core.bpf.h"
#include "loopback.bpf.h"
#include "names.bpf.h"
#include "options.bpf.h"

char LICENSE[] SEC("license") = "GPL";

/* ---- bind ---- */

/* Accepted sockets of this server show the program's port. */
static __always_inline void note_served(__u32 tenant, const struct graft_addr *real, __u32 port)
{
	struct graft_served_key key = {.port = real->port};
	struct graft_served value = {.tenant = tenant, .port = port};

	__builtin_memcpy(key.ip, real->ip, sizeof(key.ip));
	bpf_map_update_elem(&served, &key, &value, BPF_ANY);
}

static __always_inline int bound(struct graft_stamp *stamp, const struct graft_addr *asked,
				 const struct graft_addr *real, __u32 how)
{
	stamp->local = *asked;
	stamp->local_real = *real;
	stamp->flags = (stamp->flags & ~(STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL)) | how;
	return BIND_ALLOW;
}

/*
 * The options by which UDP sockets share a port hold where a rule, an address of its own or the container's loopback
 * lets one bind. For a port that the kernel chooses it would choose a host's or another's that has set them, too.
 */
static __noinline int set_reuse(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, bool allowed)
{
	int addr, port;

	if (!stamp || ctx->protocol != IPPROTO_UDP)
		return 0;
	addr = allowed && stamp->flags & STAMP_REUSEADDR;
	port = allowed && stamp->flags & STAMP_REUSEPORT;
	bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEADDR_, &addr, sizeof(addr));
	bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEPORT_, &port, sizeof(port));
	return 0;
}

/*
 * Into the tenant's block. A port that the kernel has chosen for another socket of the container stands at
 * SLICE_DYNAMIC; a bind to the same number goes there too, so that the kernel decides whether both can be.
 */
static __noinline int bind_private(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				   struct graft_tenant *tenant, bool dual)
{
	struct graft_addr asked, from, chosen;
	bool v4;

	if (!a || !stamp || !tenant)
		return DENY;
	asked = *a;
	v4 = is_v4(&asked) || dual;
	slice_addr(a, v4, tenant->slot, asked.port);
	if (asked.port) {
		slice_ip(&chosen, v4, tenant->slot, SLICE_DYNAMIC);
		chosen.port = asked.port;
		sender(ctx, &from, v4, tenant->slot);
		if (receiver(ctx, stamp->tenant, &chosen, &from) == OWN_CHOSEN)
			*a = chosen;
	}
	return bound(stamp, &asked, a, STAMP_PRIVATE);
}

/*
 * A port of the container's own address, and a port that such a container publishes on the host's wildcard, may have
 * the same number: with SO_REUSEPORT (graftd gives such sockets one owner) the kernel takes both, and the exact
 * address gets what is sent to it. With SO_REUSEADDR the connections of the container that had the address before
 * stand in nobody's way, as in a fresh namespace. Two sockets of the container at one address stay a conflict, as
 * everywhere; false for one of another container.
 */
static __noinline int share_port(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_tenant *tenant,
				 __u32 id)
{
	struct graft_addr from = {};
	struct graft_stamp *stamp;
	struct bpf_sock *sk;
	bool here = false, alien = false;
	int on = 1;

	if (!a || !tenant || !a->port || !(tenant->own4 || tenant->own6[0]))
		return true;
	if (is_v4(a))
		set_v4(&from, 0);
	sk = look_up(ctx, a, &from);
	if (sk) {
		stamp = stamp_of(sk);
		here = stamp && same_addr(&stamp->local_real, a);
		alien = here && stamp->tenant != id;
		bpf_sk_release(sk);
	}
	if (alien)
		return false;
	if (here)
		return true;
	bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEPORT_, &on, sizeof(on));
	if (ctx->protocol == IPPROTO_TCP)
		bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEADDR_, &on, sizeof(on));
	return true;
}

/* Two containers may have one endpoint: there the owner that those with addresses share must not let both in. */
static __noinline int keep_port(struct bpf_sock_addr *ctx, struct graft_tenant *tenant)
{
	int off = 0;

	if (tenant && (tenant->own4 || tenant->own6[0]))
		bpf_setsockopt(ctx, SOL_SOCKET_, SO_REUSEPORT_, &off, sizeof(off));
	return true;
}

/* A bind to the wildcard, or to an address of the container's own, that no rule names. */
static __always_inline bool own_address(struct graft_addr *a, __u32 id, const struct graft_tenant *tenant, bool dual)
{
	if (!is_any(a->ip))
		return is_own(id, a);
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

/* Decide a bind to @a; on success the real address is in @a. @dual: IPv6 wildcard that takes IPv4 too. */
static __noinline int decide_bind(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				  bool dual)
{
	struct graft_ingress *rule, *rule4 = NULL;
	struct graft_tenant *tenant;
	struct graft_addr asked, v4;
	__u32 proto = ctx->protocol;

	if (!a || !stamp)
		return DENY;
	if (ctx->sk && ctx->sk->src_port) { /* bound: the kernel will refuse, and the stamp is to stay */
		bpf_set_retval(-EINVAL);
		return DENY;
	}
	tenant = tenant_of(stamp);
	if (!tenant)
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_NO_TENANT), EADDRNOTAVAIL, proto, a);
	set_reuse(ctx, stamp, a->port);
	if (stamp->flags & STAMP_NAMED && same_addr(a, &stamp->local_real)) {
		stamp->flags &= ~STAMP_FAMILY;
		return bound(stamp, a, a, STAMP_INGRESS);
	}
	asked = *a;
	rule = ingress_rule(stamp->tenant, proto, &asked);
	if (dual && !(rule && tenant->flags & TENANT_STRICT)) {
		set_v4(&v4, 0);
		v4.port = asked.port;
		rule4 = ingress_rule(stamp->tenant, proto, &v4);
		if (!rule) {
			rule = rule4;
		} else if (rule4) {
			if (!is_any(rule->ip) || !is_any(rule4->ip) ||
			    ingress_port(rule, asked.port) != ingress_port(rule4, asked.port))
				return deny(stamp->tenant, DENIED(OP_BIND, REASON_DUAL_STACK), EADDRNOTAVAIL, proto,
					    a);
		} else if (is_any(rule->ip) && rule->ip[2] == 0) {
			/* [::] on the host would take IPv4 as well, which no rule allows */
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_DUAL_STACK), EADDRNOTAVAIL, proto, a);
		}
	}
	if (rule) {
		if (rule->place != stamp->place)
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_PLACE), EADDRNOTAVAIL, proto, a);
		__builtin_memcpy(a->ip, rule->ip, sizeof(a->ip));
		a->port = ingress_port(rule, asked.port);
		if (rule->exclusive ? !share_port(ctx, a, tenant, stamp->tenant) : !keep_port(ctx, tenant))
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_TAKEN), EADDRINUSE, proto, &asked);
		converted(stamp->tenant, tenant, OP_BIND << 16 | proto, &asked, a);
		if (proto == IPPROTO_TCP && a->port)
			note_served(stamp->tenant, a, asked.port);
		return bound(stamp, &asked, a, STAMP_INGRESS);
	}
	if (tenant->flags & TENANT_STRICT)
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_NO_RULE), EADDRNOTAVAIL, proto, a);
	if (proto == IPPROTO_UDP && !asked.port && is_any(asked.ip) && tenant->flags & TENANT_EGRESS)
		return bound(stamp, &asked, a, STAMP_EPHEMERAL);
	if (own_address(a, stamp->tenant, tenant, dual)) {
		if (!share_port(ctx, a, tenant, stamp->tenant))
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_TAKEN), EADDRINUSE, proto, &asked);
		if (proto == IPPROTO_TCP && a->port)
			note_served(stamp->tenant, a, a->port); /* another's wildcard may have the number */
		return bound(stamp, &asked, a, STAMP_INGRESS);
	}
	if (!is_any(asked.ip) && !is_loopback(&asked))
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_NO_RULE), EADDRNOTAVAIL, proto, a);
	return bind_private(ctx, a, stamp, tenant, dual);
}

SEC("cgroup/bind4")
int graft_bind4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;
	int verdict;

	load4(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_BIND, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	verdict = decide_bind(ctx, &a, stamp, false);
	if (verdict == BIND_ALLOW)
		store4(ctx, &a);
	return verdict & BIND_ALLOW;
}

SEC("cgroup/bind6")
int graft_bind6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;
	int verdict;

	load6(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_BIND, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	verdict = decide_bind(ctx, &a, stamp, is_any(a.ip) && !is_v4(&a) && !(stamp->flags & STAMP_V6ONLY));
	if (verdict == BIND_ALLOW)
		store6(ctx, &a);
	return verdict & BIND_ALLOW;
}

/* The port that the kernel chose for a `dynamic` endpoint: what connects to it from inside wants to know. */
static __always_inline int note_dynamic(struct bpf_sock *sk)
{
	struct graft_stamp *stamp = stamp_on(sk);
	struct graft_dynamic_key key = {};
	struct graft_addr real;
	__u32 port;

	if (!stamp || !(stamp->flags & STAMP_INGRESS) || stamp->local_real.port || !stamp->local.port)
		return ALLOW;
	port = sk->src_port;
	key.tenant = stamp->tenant;
	key.proto = sk->protocol == IPPROTO_UDP ? IPPROTO_UDP : IPPROTO_TCP;
	key.family = is_v4(&stamp->local) ? GRAFT_INET : GRAFT_INET6;
	key.port = stamp->local.port;
	bpf_map_update_elem(&dynamic, &key, &port, BPF_ANY);
	if (key.proto == IPPROTO_TCP) {
		real = stamp->local_real;
		real.port = port;
		note_served(stamp->tenant, &real, stamp->local.port);
	}
	return ALLOW;
}

SEC("cgroup/post_bind4")
int graft_post_bind4(struct bpf_sock *sk)
{
	return note_dynamic(sk);
}

SEC("cgroup/post_bind6")
int graft_post_bind6(struct bpf_sock *sk)
{
	return note_dynamic(sk);
}

/* ---- connect ---- */

static __always_inline void connected(struct graft_stamp *stamp, const struct graft_addr *asked,
				      const struct graft_addr *real)
{
	stamp->peer = *asked;
	stamp->peer_real = *real;
	stamp->flags |= STAMP_CONNECTED;
}

/* Choose the source of an unbound socket. bpf_bind() on one that has a port would fail. */
static __noinline int bind_source(struct bpf_sock_addr *ctx, struct graft_addr *source, bool mapped)
{
	struct sockaddr_in sin = {};
	struct sockaddr_in6 sin6 = {};

	if (!source)
		return -EINVAL;
	if (is_v4(source) && !mapped) {
		sin.sin_family = AF_INET;
		sin.sin_addr.s_addr = source->ip[3];
		sin.sin_port = bpf_htons((__u16)source->port);
		return bpf_bind(ctx, (struct sockaddr *)&sin, sizeof(sin));
	}
	sin6.sin6_family = AF_INET6;
	__builtin_memcpy(&sin6.sin6_addr, source->ip, sizeof(source->ip));
	sin6.sin6_port = bpf_htons((__u16)source->port);
	return bpf_bind(ctx, (struct sockaddr *)&sin6, sizeof(sin6));
}

static __always_inline bool has_source(const struct bpf_sock *sk)
{
	return sk->src_port || sk->src_ip4;
}

/* A client of graftd's resolver that was bound before: its port says whose it is. */
static __noinline int note_client(struct bpf_sock_addr *ctx, __u32 tenant)
{
	struct graft_client_key key = {.proto = ctx->protocol};

	if (!ctx->sk)
		return 0;
	key.port = ctx->sk->src_port;
	bpf_map_update_elem(&clients, &key, &tenant, BPF_ANY);
	return 0;
}

/* A source on the loopback goes nowhere else, but for the answers of a server that is published there. */
static __noinline int stays_inside(struct graft_stamp *stamp, struct graft_addr *source, struct graft_addr *a)
{
	if (!stamp || !source || !a || in_slices(source))
		return true;
	return is_loopback(source) && !(stamp->flags & STAMP_INGRESS && same_ip(source->ip, stamp->local_real.ip) &&
					asked_us(stamp->tenant, a));
}

/* Decide a connection to @a, from a socket of family AF_INET6 if @six; the real destination is in @a. */
static __noinline int decide_connect(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				     bool six)
{
	struct graft_addr asked, source;
	struct graft_tenant *tenant;
	struct graft_egress *rule;
	__u32 proto = ctx->protocol;
	bool strict, inside;
	__u32 id;
	int who;

	if (!a || !stamp)
		return DENY;
	id = stamp->tenant;
	tenant = tenant_of(stamp);
	if (!tenant)
		return deny(id, DENIED(OP_CONNECT, REASON_NO_TENANT), ENETUNREACH, proto, a);
	asked = *a;
	if (stamp->flags & STAMP_PERMIT && same_addr(a, &stamp->peer_real)) {
		connected(stamp, &asked, a);
		return ALLOW;
	}
	strict = tenant->flags & TENANT_STRICT;
	if (is_loopback(&asked) || is_any(asked.ip)) {
		who = strict ? strict_local(ctx, a, stamp, tenant) : resolve_local(ctx, a, stamp, tenant);
		if (who == LOCAL_REFUSED) {
			if (strict)
				return deny(id, DENIED(OP_CONNECT, REASON_NO_EGRESS), ENETUNREACH, proto, &asked);
			return deny(id, DENIED(OP_CONNECT, REASON_NOT_LISTENING), ECONNREFUSED, proto, &asked);
		}
		if ((who == LOCAL_NAMED || (who == LOCAL_OWN && in_slices(a))) && ctx->sk && !has_source(ctx->sk)) {
			slice_ip(&source, is_v4(a), tenant->slot, SLICE_DYNAMIC);
			source.port = 0;
			if (bind_source(ctx, &source, six))
				return deny(id, DENIED(OP_CONNECT, REASON_NOT_LISTENING), EADDRNOTAVAIL, proto,
					    &asked);
		} else if (who == LOCAL_NAMED) {
			note_client(ctx, id);
		}
		if (who == LOCAL_OWN || !strict) {
			connected(stamp, &asked, a);
			return ALLOW;
		}
	} else if (in_slices(a)) {
		return deny(id, DENIED(OP_CONNECT, REASON_SLICE), ENETUNREACH, proto, &asked);
	}
	/* a source on the loopback stays when a connection there fails, or is given up */
	load_source(ctx, &source, six);
	inside = !is_loopback(a) && stays_inside(stamp, &source, a);
	if (!inside && named_may(stamp, tenant, a) && !owner_of(a)) {
		connected(stamp, &asked, a);
		return ALLOW;
	}
	rule = leave(stamp, tenant, a);
	who = rule || is_own(id, a) ? visit(ctx, id, a, rule) : VISIT_ELSEWHERE;
	if (who == VISIT_FOREIGN)
		return deny(id, DENIED(OP_CONNECT, REASON_NETWORK), ENETUNREACH, proto, &asked);
	if (who == VISIT_NOBODY)
		return deny(id, DENIED(OP_CONNECT, REASON_NOT_LISTENING), ECONNREFUSED, proto, &asked);
	if (who == VISIT_REACHED && !rule) {
		connected(stamp, &asked, a);
		return ALLOW;
	}
	if (!rule) {
		if (stamp->flags & STAMP_FAMILY)
			return deny(id, DENIED(OP_CONNECT, REASON_NO_DEFAULT), ENOENT, proto, &asked);
		if (proto != IPPROTO_UDP || inside || !(stamp->flags & STAMP_INGRESS) || !asked_us(id, a))
			return deny(id, DENIED(OP_CONNECT, REASON_NO_EGRESS), ENETUNREACH, proto, &asked);
		connected(stamp, &asked, a);
		return ALLOW;
	}
	if (rule->place != stamp->place)
		return deny(id, DENIED(OP_CONNECT, REASON_PLACE), ENETUNREACH, proto, &asked);
	if (inside)
		return deny(id, DENIED(OP_CONNECT, REASON_PRIVATE_SOURCE), EADDRNOTAVAIL, proto, &asked);
	if (!is_any(rule->ip) || rule->port) {
		if (ctx->sk && has_source(ctx->sk)) {
			if (!is_any(rule->ip) && !(who == VISIT_REACHED && stamp->flags & STAMP_EPHEMERAL) &&
			    !same_ip(source.ip, rule->ip))
				return deny(id, DENIED(OP_CONNECT, REASON_WRONG_SOURCE), EADDRNOTAVAIL, proto,
					    &asked);
		} else {
			__builtin_memcpy(source.ip, rule->ip, sizeof(source.ip));
			source.port = rule->port;
			if (bind_source(ctx, &source, six))
				return deny(id, DENIED(OP_CONNECT, REASON_WRONG_SOURCE), EADDRNOTAVAIL, proto,
					    &asked);
		}
	}
	if (who == VISIT_REACHED && stamp->flags & STAMP_EPHEMERAL)
		note_client(ctx, id); /* its source will be the one that it connects to */
	converted(id, tenant, OP_CONNECT << 16 | proto, &asked, (struct graft_addr *)rule);
	connected(stamp, &asked, a);
	return ALLOW;
}

SEC("cgroup/connect4")
int graft_connect4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;

	load4(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_CONNECT, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	if (!decide_connect(ctx, &a, stamp, false))
		return DENY;
	store4(ctx, &a);
	return ALLOW;
}

SEC("cgroup/connect6")
int graft_connect6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;

	load6(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_CONNECT, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	if (!decide_connect(ctx, &a, stamp, true))
		return DENY;
	store6(ctx, &a);
	return ALLOW;
}

/* ---- UDP sends ---- */

/*
 * Decide a datagram to @a. @bound is the socket's own address, unspecified if it has none. @source is what
 * the kernel would use: @bound, or what a control message asked for. A program on the wildcard may choose among the
 * host's addresses, but never a loopback one: that would make it look like another container's neighbour.
 */
static __noinline int decide_send(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_addr *source,
				  struct graft_addr *bound)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr asked;
	struct graft_tenant *tenant;
	struct graft_egress *rule;
	bool strict;
	__u32 id;
	int who;

	if (!a || !source || !bound || !stamp)
		return DENY;
	id = stamp->tenant;
	tenant = tenant_of(stamp);
	if (!tenant)
		return deny(id, DENIED(OP_SEND, REASON_NO_TENANT), ENETUNREACH, IPPROTO_UDP, a);
	asked = *a;
	if (!is_any(bound->ip) || is_loopback(source) || in_slices(source) ||
	    (!is_v4(source) && !(stamp->flags & STAMP_INGRESS)) || is_anothers(id, source))
		__builtin_memcpy(source->ip, bound->ip, sizeof(source->ip));
	if (stamp->flags & STAMP_PERMIT && same_addr(a, &stamp->peer_real))
		return ALLOW;
	strict = tenant->flags & TENANT_STRICT;
	if (is_loopback(&asked) || is_any(asked.ip)) {
		who = strict ? strict_local(ctx, a, stamp, tenant) : resolve_local(ctx, a, stamp, tenant);
		if (who == LOCAL_REFUSED) {
			if (strict)
				return deny(id, DENIED(OP_SEND, REASON_NO_EGRESS), ENETUNREACH, IPPROTO_UDP, &asked);
			return deny(id, DENIED(OP_SEND, REASON_NOT_LISTENING), ECONNREFUSED, IPPROTO_UDP, &asked);
		}
		if (who == LOCAL_OWN || who == LOCAL_NAMED) {
			__builtin_memcpy(source->ip, bound->ip, sizeof(source->ip));
			if (!strict && (in_slices(a) || is_loopback(a)) && is_any(bound->ip))
				slice_ip(source, is_v4(a), tenant->slot, SLICE_DYNAMIC);
		}
		connected(stamp, &asked, a);
		if (who == LOCAL_OWN || !strict)
			return ALLOW;
	} else if (in_slices(a)) {
		return deny(id, DENIED(OP_SEND, REASON_SLICE), ENETUNREACH, IPPROTO_UDP, &asked);
	}
	if (named_may(stamp, tenant, a) && !owner_of(a))
		return ALLOW;
	rule = leave(stamp, tenant, a);
	who = rule || is_own(id, a) ? visit(ctx, id, a, rule) : VISIT_ELSEWHERE;
	if (who == VISIT_FOREIGN)
		return deny(id, DENIED(OP_SEND, REASON_NETWORK), ENETUNREACH, IPPROTO_UDP, &asked);
	if (who == VISIT_NOBODY)
		return deny(id, DENIED(OP_SEND, REASON_NOT_LISTENING), ECONNREFUSED, IPPROTO_UDP, &asked);
	if (who == VISIT_REACHED) {
		connected(stamp, &asked, a);
		if (!rule)
			return ALLOW;
	}
	if (!rule) {
		if (stamp->flags & STAMP_FAMILY)
			return deny(id, DENIED(OP_SEND, REASON_NO_DEFAULT), ENOENT, IPPROTO_UDP, &asked);
		if (stamp->flags & STAMP_INGRESS && asked_us(id, a))
			return ALLOW;
		return deny(id, DENIED(OP_SEND, REASON_NO_EGRESS), ENETUNREACH, IPPROTO_UDP, &asked);
	}
	if (rule->place != stamp->place)
		return deny(id, DENIED(OP_SEND, REASON_PLACE), ENETUNREACH, IPPROTO_UDP, &asked);
	if (!is_loopback(a) && stays_inside(stamp, bound, a))
		return deny(id, DENIED(OP_SEND, REASON_PRIVATE_SOURCE), ENETUNREACH, IPPROTO_UDP, &asked);
	converted(id, tenant, OP_SEND << 16 | IPPROTO_UDP, &asked, (struct graft_addr *)rule);
	if (is_any(rule->ip) || same_ip(bound->ip, rule->ip))
		return ALLOW;
	/* an answer leaves from where it was asked, which on the wildcard only the kernel knows; a neighbour knows
	 * the rule's */
	if (stamp->flags & STAMP_INGRESS && asked_us(id, a) && !(is_any(bound->ip) && owner_of(a)))
		return ALLOW;
	if (!is_any(bound->ip))
		return deny(id, DENIED(OP_SEND, REASON_WRONG_SOURCE), ENETUNREACH, IPPROTO_UDP, &asked);
	__builtin_memcpy(source->ip, rule->ip, sizeof(source->ip));
	return ALLOW;
}

SEC("cgroup/sendmsg4")
int graft_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a, source = {}, bound = {};

	load4(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_SEND, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	set_v4(&source, ctx->msg_src_ip4);
	set_v4(&bound, ctx->sk->src_ip4);
	if (ctx->user_family == AF_UNSPEC && !a.port) {
		/* connected, with a control message: the destination was decided at connect() */
		ctx->msg_src_ip4 = bound.ip[3];
		return ALLOW;
	}
	if (!decide_send(ctx, &a, &source, &bound))
		return DENY;
	store4(ctx, &a);
	ctx->msg_src_ip4 = source.ip[3];
	return ALLOW;
}

SEC("cgroup/sendmsg6")
int graft_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a, source = {}, bound = {};

	load6(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_SEND, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	source.ip[0] = ctx->msg_src_ip6[0];
	source.ip[1] = ctx->msg_src_ip6[1];
	source.ip[2] = ctx->msg_src_ip6[2];
	source.ip[3] = ctx->msg_src_ip6[3];
	bound.ip[0] = ctx->sk->src_ip6[0];
	bound.ip[1] = ctx->sk->src_ip6[1];
	bound.ip[2] = ctx->sk->src_ip6[2];
	bound.ip[3] = ctx->sk->src_ip6[3];
	if (ctx->user_family == AF_UNSPEC && !a.port) {
		/* IPV6_FREEBIND, which the slices need, would let a control message choose any address */
		source = bound;
	} else if (!decide_send(ctx, &a, &source, &bound)) {
		return DENY;
	} else {
		store6(ctx, &a);
	}
	ctx->msg_src_ip6[0] = source.ip[0];
	ctx->msg_src_ip6[1] = source.ip[1];
	ctx->msg_src_ip6[2] = source.ip[2];
	ctx->msg_src_ip6[3] = source.ip[3];
	return ALLOW;
}

/* ---- names ---- */

static __always_inline bool in_connection(const struct bpf_sock *sk)
{
	return sk && sk->state != BPF_TCP_CLOSE && sk->state != BPF_TCP_LISTEN;
}

#define SHOW4(ctx, how, ...)                                                                                         \
	do {                                                                                                         \
		struct graft_stamp *stamp = stamp_of((ctx)->sk);                                                     \
		struct graft_addr a;                                                                                 \
                                                                                                                     \
		load4(ctx, &a);                                                                                      \
		how(&a, stamp, ##__VA_ARGS__);                                                                       \
		store4(ctx, &a);                                                                                     \
	} while (0)

#define SHOW6(ctx, how, ...)                                                                                         \
	do {                                                                                                         \
		struct graft_stamp *stamp = stamp_of((ctx)->sk);                                                     \
		struct graft_addr a;                                                                                 \
                                                                                                                     \
		load6(ctx, &a);                                                                                      \
		how(&a, stamp, ##__VA_ARGS__);                                                                       \
		store6(ctx, &a);                                                                                     \
	} while (0)

SEC("cgroup/getsockname4")
int graft_getsockname4(struct bpf_sock_addr *ctx)
{
	SHOW4(ctx, show_local, in_connection(ctx->sk));
	return ALLOW;
}

SEC("cgroup/getsockname6")
int graft_getsockname6(struct bpf_sock_addr *ctx)
{
	SHOW6(ctx, show_local, in_connection(ctx->sk));
	return ALLOW;
}

SEC("cgroup/getpeername4")
int graft_getpeername4(struct bpf_sock_addr *ctx)
{
	SHOW4(ctx, show_peer);
	return ALLOW;
}

SEC("cgroup/getpeername6")
int graft_getpeername6(struct bpf_sock_addr *ctx)
{
	SHOW6(ctx, show_peer);
	return ALLOW;
}

/* Whoever sends to a published server may be answered. */
static __always_inline void note_asker(struct graft_stamp *stamp, const struct graft_addr *a)
{
	struct graft_asker_key key = {.tenant = stamp->tenant, .port = a->port};
	struct graft_tenant *tenant;
	__u64 now;

	if (!(stamp->flags & STAMP_INGRESS))
		return;
	tenant = tenant_of(stamp);
	if (!tenant)
		return;
	if (!(tenant->flags & TENANT_REPLIES) && (!is_loopback(a) || in_slices(a)) &&
	    !(tenant->own4 || tenant->own6[0]))
		return;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	now = bpf_ktime_get_ns();
	bpf_map_update_elem(&askers, &key, &now, BPF_ANY);
}

SEC("cgroup/recvmsg4")
int graft_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;

	if (!stamp)
		return ALLOW;
	load4(ctx, &a);
	note_asker(stamp, &a);
	show_peer(&a, stamp);
	store4(ctx, &a);
	return ALLOW;
}

SEC("cgroup/recvmsg6")
int graft_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;

	if (!stamp)
		return ALLOW;
	load6(ctx, &a);
	note_asker(stamp, &a);
	show_peer(&a, stamp);
	store6(ctx, &a);
	return ALLOW;
}

/* ---- options ---- */

static __always_inline bool option_forbidden(struct bpf_sockopt *ctx)
{
	__u8 *value = ctx->optval, *end = ctx->optval_end;

	switch (ctx->level) {
	case SOL_SOCKET_:
		if (ctx->optname == SO_PRIORITY_)
			return value + 4 <= end && *(__u32 *)value > 6;
		return socket_option_forbidden(ctx->optname);
	case SOL_IP_:
		return ip_option_forbidden(ctx->optname);
	case SOL_IPV6_:
		return ipv6_option_forbidden(ctx->optname);
	case SOL_TCP_:
		if (ctx->optname == TCP_ULP_)
			return !(value + 3 <= end && value[0] == 't' && value[1] == 'l' && value[2] == 's');
		return tcp_option_forbidden(ctx->optname);
	}
	return false;
}

/* graftd has sockets of other families, which are nobody's but its own. */
static __always_inline bool is_internet(const struct bpf_sock *sk)
{
	return sk && (sk->family == AF_INET || sk->family == AF_INET6);
}

static __always_inline void set_flag(struct graft_stamp *stamp, __u32 flag, __u32 value)
{
	stamp->flags = value ? stamp->flags | flag : stamp->flags & ~flag;
}

static __always_inline __u32 reuse_flag(__s32 name)
{
	return name == SO_REUSEADDR_ ? STAMP_REUSEADDR : name == SO_REUSEPORT_ ? STAMP_REUSEPORT : 0;
}

SEC("cgroup/setsockopt")
int graft_setsockopt(struct bpf_sockopt *ctx)
{
	struct graft_stamp *stamp = stamp_on(ctx->sk);
	struct graft_addr what = {};
	__u8 *value = ctx->optval, *end = ctx->optval_end;

	if ((stamp && stamp->tenant == GRAFT_OWN) || !is_internet(ctx->sk))
		return ALLOW;
	if (!stamp && ctx->level == SOL_IPV6_ && ctx->optname == IPV6_FREEBIND_)
		return ALLOW; /* graftd, just before it stamps; an accepted socket cannot be bound anyway */
	if (option_forbidden(ctx)) {
		what.port = (__u32)ctx->level << 16 | (ctx->optname & 0xffff);
		return deny(stamp ? stamp->tenant : GRAFT_OWN, DENIED(OP_SETSOCKOPT, REASON_OPTION), EPERM, 0, &what);
	}
	if (!stamp || value + 4 > end)
		return ALLOW;
	if (ctx->level == SOL_IPV6_ && ctx->optname == IPV6_V6ONLY_ && !ctx->sk->src_port)
		set_flag(stamp, STAMP_V6ONLY, *(__u32 *)value); /* of a bound socket the kernel refuses it */
	if (ctx->level == SOL_SOCKET_ && ctx->sk->protocol == IPPROTO_UDP && reuse_flag(ctx->optname)) {
		set_flag(stamp, reuse_flag(ctx->optname), *(__u32 *)value);
		ctx->optlen = -1; /* not the kernel's to set, see set_reuse() */
	}
	return ALLOW;
}

/* Answer who stamped the socket, and count it, once. */
static __always_inline int probe(struct bpf_sockopt *ctx, struct graft_stamp *stamp)
{
	struct graft_probe *answer = ctx->optval;
	struct graft_usage *used = usage_of(stamp);

	if ((void *)(answer + 1) > ctx->optval_end)
		return ALLOW;
	answer->tenant = stamp->tenant;
	answer->over = 0;
	if (used && !(stamp->flags & STAMP_COUNTED)) {
		stamp->flags |= STAMP_COUNTED;
		__sync_fetch_and_add(&used->sockets, 1);
		if (ctx->sk->protocol == IPPROTO_UDP)
			__sync_fetch_and_add(&used->udp, 1);
		answer->over = used->sockets > used->sockets_max || used->udp > used->udp_max;
	}
	ctx->optlen = sizeof(*answer);
	*(volatile __s32 *)&ctx->retval =
		0; /* volatile: clang would store both at once, which the verifier refuses */
	return ALLOW;
}

SEC("cgroup/getsockopt")
int graft_getsockopt(struct bpf_sockopt *ctx)
{
	__u8 *value = ctx->optval, *end = ctx->optval_end;
	struct graft_tenant *tenant;
	struct graft_stamp *stamp;

	if (!is_internet(ctx->sk))
		return ALLOW;
	stamp = stamp_on(ctx->sk);
	if (ctx->level == GRAFT_LEVEL && ctx->optname == GRAFT_PROBE && stamp)
		return probe(ctx, stamp);
	if ((ctx->level == SOL_IP_ && ctx->optname >= IP_FIREWALL_) ||
	    (ctx->level == SOL_IPV6_ && ipv6_reads_firewall(ctx->optname)))
		return stamp && stamp->tenant == GRAFT_OWN;
	if (ctx->retval || ctx->level != SOL_SOCKET_)
		return ALLOW;
	if (ctx->optname == SO_NETNS_COOKIE_ && value + 8 <= end) {
		tenant = stamp ? tenant_of(stamp) : NULL;
		*(__u64 *)value = tenant ? tenant->netns_cookie : 0;
	}
	if (stamp && ctx->sk->protocol == IPPROTO_UDP && reuse_flag(ctx->optname) && value + 4 <= end)
		*(__u32 *)value = !!(stamp->flags & reuse_flag(ctx->optname));
	return ALLOW;
}

SEC("cgroup/sock_release")
int graft_sock_release(struct bpf_sock *sk)
{
	struct graft_stamp *stamp = stamp_on(sk);
	struct graft_usage *used;

	if (!stamp || !(stamp->flags & STAMP_COUNTED))
		return ALLOW;
	used = usage_of(stamp);
	if (used) {
		__sync_fetch_and_add(&used->sockets, -1);
		if (sk->protocol == IPPROTO_UDP)
			__sync_fetch_and_add(&used->udp, -1);
	}
	return ALLOW;
}

/* ---- what leaves ---- */

/*
 * Control messages reach no hook: a source route (IP_RETOPTS, IPV6_RTHDR) would lead a datagram round the
 * egress rules, a device (IP_PKTINFO) out of the loopback. Here is the packet that came of them.
 */
SEC("cgroup_skb/egress")
int graft_egress(struct __sk_buff *skb)
{
	__u8 *packet = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	bool lo = skb->ifindex == 1;

	if (packet + 20 > end)
		return ALLOW;
	if (packet[0] >> 4 == 4)
		return packet[0] == 0x45 && (lo || packet[16] != 127);
	if (packet + 40 > end)
		return ALLOW;
	if (!lo && packet[24] == 0xfd && packet[25] == 0x67)
		return DENY;
	if (packet[6] == IPPROTO_HOPOPTS) /* the kernel's own, of a packet beyond 64 KiB (BIG TCP) */
		return packet + 41 <= end && packet[40] == IPPROTO_TCP;
	return packet[6] == IPPROTO_TCP || packet[6] == IPPROTO_UDP;
}

/*
 * listen() without a bind runs no bind hook; graftd's trap of listen() binds such a socket first. Where
 * the trap was evaded (another process got the socket) the listener is tied to an interface that does
 * not exist, so that nobody reaches it.
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
	if (stamp && stamp->tenant == GRAFT_OWN)
		return 1;
	/* volatile: clang would else share an offset between the branches, which the verifier refuses */
	ip4 = *(volatile __u32 *)&ctx->local_ip4;
	here.ip[0] = *(volatile __u32 *)&ctx->local_ip6[0];
	here.ip[1] = *(volatile __u32 *)&ctx->local_ip6[1];
	here.ip[2] = *(volatile __u32 *)&ctx->local_ip6[2];
	here.ip[3] = *(volatile __u32 *)&ctx->local_ip6[3];
	here.port = ctx->local_port;
	if (ctx->family == AF_INET)
		set_v4(&here, ip4);
	if (stamp && in_slices(&here) && stamp->flags & STAMP_PRIVATE)
		return 1;
	if (stamp && stamp->flags & STAMP_INGRESS && same_ip(here.ip, stamp->local_real.ip) &&
	    !is_anothers(stamp->tenant, &here) && tenant_of(stamp) &&
	    (!stamp->local_real.port || here.port == stamp->local_real.port))
		return 1;
	bpf_setsockopt(ctx, SOL_SOCKET_, SO_BINDTOIFINDEX_, &nowhere, sizeof(nowhere));
	report(stamp ? stamp->tenant : GRAFT_OWN, DENIED(OP_LISTEN, REASON_UNBOUND_LISTEN), EADDRNOTAVAIL,
	       IPPROTO_TCP, &here, false);
	return 1;
}

/* ---- the guard, on the cgroup root ---- */

#define LED 3 /* allowed, to another address than the program's */

/* Keeps the host's own programs out of private loopbacks, and leads them to containers' own addresses. */
static __always_inline int guard(struct bpf_sock_addr *ctx, struct graft_addr *a)
{
	struct graft_owner *owner = in_slices(a) ? NULL : owner_of(a);
	struct graft_config *conf;
	struct graft_addr to;
	__u32 zero = 0;

	if (!owner && !in_slices(a))
		return ALLOW;
	if (stamp_of(ctx->sk))
		return ALLOW;
	conf = bpf_map_lookup_elem(&config, &zero);
	if (!conf || bpf_get_netns_cookie(ctx) != conf->host_cookie)
		return ALLOW;
	to = *a;
	if (!owner)
		return deny(0, DENIED(OP_GUARD, REASON_SLICE), ECONNREFUSED, ctx->protocol, &to);
	if (!reach(ctx, owner->tenant, a))
		return deny(0, DENIED(OP_GUARD, REASON_NOT_LISTENING), ECONNREFUSED, ctx->protocol, &to);
	return LED;
}

static __always_inline int guard4(struct bpf_sock_addr *ctx)
{
	struct graft_addr a;
	int verdict;

	load4(ctx, &a);
	verdict = guard(ctx, &a);
	if (verdict == LED)
		store4(ctx, &a);
	return verdict & ALLOW;
}

static __always_inline int guard6(struct bpf_sock_addr *ctx)
{
	struct graft_addr a;
	int verdict;

	load6(ctx, &a);
	verdict = guard(ctx, &a);
	if (verdict == LED)
		store6(ctx, &a);
	return verdict & ALLOW;
}

SEC("cgroup/connect4")
int guard_connect4(struct bpf_sock_addr *ctx)
{
	return guard4(ctx);
}

SEC("cgroup/connect6")
int guard_connect6(struct bpf_sock_addr *ctx)
{
	return guard6(ctx);
}

SEC("cgroup/sendmsg4")
int guard_sendmsg4(struct bpf_sock_addr *ctx)
{
	return guard4(ctx);
}

SEC("cgroup/sendmsg6")
int guard_sendmsg6(struct bpf_sock_addr *ctx)
{
	return guard6(ctx);
}
