/* SPDX-License-Identifier: GPL-2.0 */
/*
 * own.bpf.h - addresses of the host's stack that are a container's own
 */
#ifndef OWN_BPF_H
#define OWN_BPF_H

#include "abroad.bpf.h"
#include "loopback.bpf.h"

/* By which of several sockets at one place this one is answered: always by the same. */
static __always_inline __u32 sender_hash(const struct bpf_sock_addr *ctx)
{
	__u32 port = ctx->sk ? ctx->sk->src_port : 0;

	return port ? port * 0x9e3779b1u >> 16 : bpf_get_prandom_u32();
}

/*
 * Put the place there of a socket of @holder's that has connected to this one, which sends from @source. The kernel
 * gives a socket on the wildcard that connects to an address of this host that one for its own.
 */
__noinline int find_connected(struct bpf_sock_addr *ctx, __u32 holder, struct graft_addr *a,
			      struct graft_addr *source)
{
	struct graft_stamp *stamp;
	struct graft_addr at, from;
	struct bpf_sock *sk;
	bool found;

	if (!a || !source || !ctx->sk || is_v4(source) != is_v4(a) || is_any(source->ip))
		return false;
	__builtin_memcpy(at.ip, source->ip, sizeof(at.ip));
	at.port = a->port;
	from = at;
	from.port = ctx->sk->src_port;
	sk = socket_at(ctx, &at, &from);
	if (!sk)
		return false;
	stamp = stamp_of(sk);
	found = stamp && stamp->tenant == holder && stamp->flags & STAMP_EPHEMERAL && sk->dst_port;
	bpf_sk_release(sk);
	if (found)
		__builtin_memcpy(a->ip, source->ip, sizeof(a->ip));
	return found;
}

/*
 * Route a datagram to @a, an address of tenant @holder's own, to where its server is: to the host's port where it has
 * published the port, to its first address where it has several. False if somebody else's socket on the host's
 * wildcard would receive it. TCP is led by the kernel's look-up (listeners.bpf.h), but to graftd's own address.
 * @source: what the kernel takes for the sender's address; NULL: it is not known. A socket of the container's on the
 * wildcard that has connected there has that address as its own.
 */
__noinline int route_to_container(struct bpf_sock_addr *ctx, __u32 holder, struct graft_addr *a,
				  struct graft_addr *source)
{
	struct graft_dynamic_key key = {.tenant = holder};
	struct graft_addr at = {}, from = {};
	struct graft_tenant *tenant;
	struct graft_ingress *rule;
	__u32 *port, chosen;
	int who;
	bool v4;

	if (!a)
		return false;
	v4 = is_v4(a);
	if (v4)
		set_v4(&at, 0);
	at.port = a->port;
	rule = ingress_rule(holder, ctx->protocol, &at);
	if (rule && !rule->place) {
		if (!is_any(rule->ip))
			__builtin_memcpy(a->ip, rule->ip, sizeof(a->ip));
		a->port = ingress_port(rule, at.port);
		if (!a->port) {
			key.proto = ctx->protocol;
			key.family = v4 ? GRAFT_INET : GRAFT_INET6;
			key.port = at.port;
			port = bpf_map_lookup_elem(&dynamic_ports, &key);
			a->port = port ? *port : at.port;
		}
	}
	if (!rule) {
		chosen = abroad_port(holder, a, sender_hash(ctx));
		if (chosen)
			a->port = chosen;
	}
	if (v4)
		set_v4(&from, 0);
	who = receiver_at(ctx, holder, a, &from);
	if (who == RECEIVER_NOBODY && find_connected(ctx, holder, a, source))
		return true;
	if (who == RECEIVER_NOBODY && !rule) {
		tenant = bpf_map_lookup_elem(&tenants, &holder);
		if (!tenant)
			return false;
		at = *a;
		if (v4 && tenant->own4)
			set_v4(a, tenant->own4);
		else if (!v4 && tenant->own6[0])
			__builtin_memcpy(a->ip, tenant->own6, sizeof(a->ip));
		if (!same_ip(a->ip, at.ip))
			who = receiver_at(ctx, holder, a, &from);
	}
	return who != RECEIVER_OTHER;
}

/* Does the kernel's look-up find the holder's server, or nobody? */
static __always_inline bool is_led(const struct bpf_sock_addr *ctx, const struct graft_holder *holder)
{
	return ctx->protocol == IPPROTO_TCP && holder->tenant != GRAFT_EXEMPT;
}

/* Where a destination beyond the loopback leads. */
enum {
	ROUTE_REFUSED,
	ROUTE_ELSEWHERE, /* to an address that is no container's own */
	ROUTE_CONTAINER, /* to a container's address; of UDP: to its server */
	ROUTE_NOBODY,	 /* to a container's address where it does not listen */
	ROUTE_FOREIGN,	 /* to a network that the tenant is not in */
};

/* Where does @a lead, by the egress rule @rule (NULL: none)? For ROUTE_CONTAINER the server's real address is put
 * there. */
static __noinline int route_to_holder(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *a,
				      struct graft_egress *rule)
{
	struct graft_holder *to, *from;
	struct graft_tenant *who;

	if (!a)
		return ROUTE_ELSEWHERE;
	to = holder_of(a);
	from = rule ? holder_of((struct graft_addr *)rule) : NULL;
	if (!to) {
		/* where egress is narrowed, a network's rule leads to its members and to nobody else in its prefix */
		who = bpf_map_lookup_elem(&tenants, &tenant);
		if (from && from->network && who && who->flags & TENANT_REPLIES)
			return ROUTE_FOREIGN;
		return ROUTE_ELSEWHERE;
	}
	if (to->network && to->tenant != tenant) {
		if (!from || from->tenant != tenant || from->network != to->network)
			return ROUTE_FOREIGN;
	}
	if (is_led(ctx, to))
		return ROUTE_CONTAINER;
	return route_to_container(ctx, to->tenant, a, (struct graft_addr *)rule) ? ROUTE_CONTAINER : ROUTE_NOBODY;
}

/* Does another tenant hold @a, or graftd (its resolver's address)? */
static __always_inline bool is_anothers(__u32 tenant, const struct graft_addr *a)
{
	struct graft_holder *holder = holder_of(a);

	return holder && holder->tenant != tenant;
}

/*
 * Has the kernel given this socket another's address, because it has connected there and nothing else chose its
 * source? From it the socket reaches that address and nobody else, who would take it for the other. @source: where
 * the socket is. An address that a device has is the host's as well, from which everybody leaves.
 */
static __always_inline bool has_anothers_source(const struct graft_stamp *stamp, const struct graft_addr *source,
						const struct graft_addr *a)
{
	struct graft_holder *holder;

	if (stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS | STAMP_LENT | STAMP_NAMED) || same_ip(source->ip, a->ip))
		return false;
	holder = holder_of(source);
	return holder && holder->tenant != stamp->tenant && !(holder->flags & HOLDER_DEVICE);
}

/* Is @a an address of the tenant's own, where it may go without a rule? */
static __always_inline bool is_own_address(__u32 tenant, const struct graft_addr *a)
{
	struct graft_holder *holder = holder_of(a);

	return holder && holder->tenant == tenant;
}

/*
 * Is the socket with this stamp, which sends from @a, an address of @tenant's, another container's that is on the
 * host's wildcard and has connected there? Then the name is put there by which its network knows it.
 */
static __always_inline bool name_connected(const struct graft_stamp *theirs, __u32 tenant, struct graft_addr *a)
{
	struct graft_egress *rule;

	if (theirs->tenant == tenant || !(theirs->flags & STAMP_EPHEMERAL))
		return false;
	rule = egress_rule(theirs->tenant, a);
	if (!rule || !is_own_address(theirs->tenant, (struct graft_addr *)rule))
		return false;
	__builtin_memcpy(a->ip, rule->ip, sizeof(a->ip));
	if (theirs->local.port)
		a->port = theirs->local.port;
	return true;
}

#endif
