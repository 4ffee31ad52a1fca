/* SPDX-License-Identifier: GPL-2.0 */
/*
 * destination.bpf.h - may a connection or a datagram go there? What connect() and a send decide alike
 *
 * The two differ in what they do with the source: connect() binds it, a datagram names it. What is alike is inlined
 * into both: a call would be one more frame in a chain that has 32 bytes left of 512 on Linux 6.1.
 */
#ifndef DESTINATION_BPF_H
#define DESTINATION_BPF_H

#include "endpoint.bpf.h"
#include "own.bpf.h"

/*
 * The wildcard as a destination is this host, as tcp_v4_connect(), ip4_datagram_connect() and their like have it: the
 * address that the socket is bound to, or else the loopback, of IPv4 where it is bound to that. @source: where the
 * kernel has bound it.
 */
static __always_inline void name_this_host(struct graft_addr *a, const struct graft_stamp *stamp,
					   const struct graft_addr *source)
{
	bool v4 = is_v4(a);

	if (!v4 && is_v4(source))
		set_v4(a, 0);
	set_loopback(a);
	if (v4 && is_v4(&stamp->local) && !is_any(stamp->local.ip) &&
	    (stamp->flags & (STAMP_WAITS | STAMP_ABROAD) ||
	     (!is_any(source->ip) && stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS))))
		a->ip[3] = stamp->local.ip[3];
}

/* A socket on the loopback reaches nothing else, but a server that is published there may answer who asked it. */
static __noinline int is_confined(struct graft_stamp *stamp, struct graft_addr *source, struct graft_addr *a)
{
	if (!stamp || !source || !a || in_slices(source))
		return true;
	return is_loopback(source) && !(stamp->flags & STAMP_INGRESS && same_ip(source->ip, stamp->local_real.ip) &&
					has_asked(stamp->tenant, a));
}

/*
 * The errno of a confined socket's way out. The kernel says EINVAL from 127.0.0.1, whether a bind or a connection has
 * put it there; @otherwise is for what it would allow: from the wildcard, which is private here, from ::1, and after
 * a disconnect.
 */
static __always_inline int confined_error(struct bpf_sock_addr *ctx, const struct graft_stamp *stamp,
					  const struct graft_addr *source, int otherwise)
{
	if (!is_v4(source))
		return otherwise;
	if (in_connection(ctx->sk))
		return EINVAL;
	return stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS) && is_loopback(&stamp->local) ? EINVAL : otherwise;
}

/*
 * The errno of a destination in a family that an AF_INET6 socket does not speak, 0 if it does: IPv4 with IPV6_V6ONLY,
 * or bound to an IPv6 address; IPv6 where it is bound to an IPv4 address. The kernel sees the address that graft has
 * put in its place.
 */
static __always_inline int family_error(struct bpf_sock_addr *ctx, const struct graft_stamp *stamp,
					const struct graft_addr *a)
{
	if (is_v4(a))
		return takes_ipv4(ctx->sk) && !(stamp->flags & (STAMP_WAITS | STAMP_EPHEMERAL) &&
						!is_v4(&stamp->local) && !is_any(stamp->local.ip))
			       ? 0
			       : ENETUNREACH;
	if (!is_any(a->ip) && is_v4(&stamp->local) &&
	    (stamp->flags & STAMP_WAITS ||
	     (ctx->sk->src_port && stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL))))
		return EAFNOSUPPORT;
	return 0;
}

/*
 * Has graftd looked this destination up by name, for this socket? One that is bound to its private loopback may not
 * leave that by a name either: a server elsewhere would take it for its own host's.
 */
static __always_inline bool is_permitted(const struct graft_stamp *stamp, const struct graft_addr *a)
{
	return stamp->flags & STAMP_PERMIT && same_addr(a, &stamp->peer_real) &&
	       (!(stamp->flags & STAMP_PRIVATE) || is_loopback(a));
}

/*
 * Tell graftd's resolver by the source port whose this client is: it was bound before, outside its slice, to @source.
 * An address of the tenant's own says that by itself, and another's port may have the same number at the host's.
 */
__noinline int note_client(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *source)
{
	struct graft_client_key key = {.proto = ctx->protocol};
	struct graft_addr from;

	if (!ctx->sk || !source)
		return 0;
	from = *source; /* on this stack: Linux 6.1 takes no argument for a key */
	if (in_slices(&from) || is_own_address(tenant, &from))
		return 0;
	key.port = ctx->sk->src_port;
	bpf_map_update_elem(&client_ports, &key, &tenant, BPF_ANY);
	return 0;
}

/*
 * Would nobody answer what the tenant sends from @bound to @to? Addresses of an engine's network are known on this
 * host alone. A socket that is bound there for real, which is of UDP, cannot leave from another.
 */
static __always_inline bool is_unanswerable(__u32 tenant, const struct graft_addr *bound, const struct graft_addr *to)
{
	struct graft_holder *holder;

	if (is_any(bound->ip) || names_a_group(to))
		return false;
	holder = holder_of(bound);
	return holder && holder->tenant == tenant && holder->flags & HOLDER_LOCAL &&
	       !bpf_map_lookup_elem(&locals, to->ip) && !holder_of(to);
}

/* Why a call is to be refused, and the errno that the program gets. */
struct refusal {
	__u32 reason;
	int error;
};

static __always_inline int refuse(struct refusal *why, __u32 reason, int error)
{
	why->reason = reason;
	why->error = error;
	return 0;
}

/*
 * Does the destination lead to the loopback: is it there, or for graftd's resolver, wherever it is? A published
 * server may answer who has asked it from port 53.
 */
static __always_inline bool is_for_loopback(struct bpf_sock_addr *ctx, struct graft_stamp *stamp,
					    const struct graft_tenant *tenant, struct graft_addr *a)
{
	return is_loopback(a) || (asks_resolver(tenant, a) && !may_answer(ctx, stamp, a));
}

/* Decide a destination on the loopback: LOCAL_*; the real address is put into @a. @mapped: see resolve_local(). */
static __always_inline int decide_loopback(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
					   struct graft_tenant *tenant, bool mapped, struct refusal *why)
{
	int where;

	if (!is_loopback(a)) { /* is_for_loopback() */
		to_resolver(a);
		return LOCAL_NAMED;
	}
	if (tenant->flags & TENANT_STRICT) {
		where = strict_local(ctx, a, stamp, tenant);
		return where == LOCAL_REFUSED ? refuse(why, REASON_NO_EGRESS, ENETUNREACH) : where;
	}
	where = resolve_local(ctx, a, stamp, tenant, mapped);
	return where == LOCAL_REFUSED ? refuse(why, REASON_NOT_LISTENING, ECONNREFUSED) : where;
}

/*
 * Decide a destination elsewhere: ROUTE_CONTAINER, the real address of a container's server in @a, ROUTE_ELSEWHERE,
 * or ROUTE_REFUSED. @rule is then the egress rule, whose source is to be used; NULL: the destination needs none.
 * @confined: the socket is bound to its loopback, and only a rule counts.
 */
static __always_inline int decide_egress(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
					 struct graft_tenant *tenant, bool confined, struct graft_egress **rule,
					 struct refusal *why)
{
	__u32 id = stamp->tenant;
	int where = ROUTE_ELSEWHERE;

	*rule = NULL;
	if (in_slices(a))
		return refuse(why, REASON_SLICE, ENETUNREACH);
	if (tenant->flags & TENANT_ALLOW && !is_loopback(a) &&
	    !is_allowed(tenant->parent ? tenant->parent : id, ctx->protocol, a) &&
	    (confined || !may_answer(ctx, stamp, a)))
		return refuse(why, REASON_NOT_ALLOWED, ENETUNREACH);
	if (!confined && named_may_go(stamp, tenant, a) && !holder_of(a))
		return ROUTE_ELSEWHERE;
	*rule = egress_for(stamp, tenant, a);
	if (*rule || is_own_address(id, a))
		where = route_to_holder(ctx, id, a, *rule);
	if (where == ROUTE_FOREIGN)
		return refuse(why, REASON_NETWORK, ENETUNREACH);
	if (where == ROUTE_NOBODY && !confined && may_answer(ctx, stamp, a))
		return ROUTE_ELSEWHERE; /* somebody of the host's has asked from the container's address */
	if (where == ROUTE_NOBODY)
		return refuse(why, REASON_NOT_LISTENING, ECONNREFUSED);
	if (*rule)
		return (*rule)->place == stamp->place ? where : refuse(why, REASON_PLACE, ENETUNREACH);
	if (where == ROUTE_CONTAINER)
		return where;
	if (stamp->flags & STAMP_FAMILY)
		return refuse(why, REASON_NO_DEFAULT, ENOENT);
	if (!confined && (may_answer(ctx, stamp, a) || service_at(id, a)))
		return ROUTE_ELSEWHERE;
	return refuse(why, REASON_NO_EGRESS, ENETUNREACH);
}

#endif
