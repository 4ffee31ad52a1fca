/* SPDX-License-Identifier: GPL-2.0 */
/*
 * loopback.bpf.h - the rules, and the container's own loopback: who listens there
 */
#ifndef LOOPBACK_BPF_H
#define LOOPBACK_BPF_H

#include "core.bpf.h"

/* ---- rules ---- */

static __noinline struct graft_ingress *ingress_rule(__u32 tenant, __u32 proto, struct graft_addr *a)
{
	struct graft_ingress_key key = {.prefixlen = INGRESS_FIXED_BITS + 16, .tenant = tenant};

	if (!a)
		return NULL;
	key.proto = proto;
	key.family = is_v4(a) ? GRAFT_INET : GRAFT_INET6;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	key.port_be = bpf_htons((__u16)a->port);
	return bpf_map_lookup_elem(&ingress, &key);
}

static __always_inline __u32 ingress_port(const struct graft_ingress *rule, __u32 port)
{
	return rule->span ? rule->port + port - rule->first : rule->port;
}

static __noinline struct graft_egress *egress_rule(__u32 tenant, struct graft_addr *a)
{
	struct graft_egress_key key = {.prefixlen = EGRESS_FIXED_BITS + 128, .tenant = tenant};

	if (!a)
		return NULL;
	key.family = is_v4(a) ? GRAFT_INET : GRAFT_INET6;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	return bpf_map_lookup_elem(&egress, &key);
}

static __always_inline struct graft_egress *default_source(__u32 tenant)
{
	struct graft_egress_key key = {
		.prefixlen = EGRESS_FIXED_BITS + 128, .tenant = tenant, .family = GRAFT_DEFAULT};

	return bpf_map_lookup_elem(&egress, &key);
}

/*
 * Where this socket leaves from on its way to @a; NULL if it may not. A socket of AF_GRAFT that nobody bound
 * leaves from `default-source`. A wrapper inside a container has rules of its own; the container's must
 * allow the destination as well.
 */
static __noinline struct graft_egress *leave(struct graft_stamp *stamp, struct graft_tenant *tenant,
					     struct graft_addr *a)
{
	if (!stamp || !tenant || !a)
		return NULL;
	if (tenant->parent && !is_loopback(a) && !egress_rule(tenant->parent, a))
		return NULL;
	if (stamp->flags & STAMP_FAMILY) {
		if (!(tenant->flags & TENANT_STRICT) && !egress_rule(stamp->tenant, a))
			return NULL;
		return default_source(stamp->tenant);
	}
	return egress_rule(stamp->tenant, a);
}

/* Bound to an endpoint by name, outside any container: it may go where that address goes, as in AF_GRAFT. */
static __noinline bool named_may(struct graft_stamp *stamp, struct graft_tenant *tenant, struct graft_addr *a)
{
	if (!stamp || !tenant || !a || !(tenant->flags & TENANT_STRICT) || !(stamp->flags & STAMP_NAMED))
		return false;
	return !tenant->parent || is_loopback(a) || egress_rule(tenant->parent, a);
}

/* Has this address sent to a published UDP server of the tenant's? Then it may be answered. */
static __noinline bool asked_us(__u32 tenant, struct graft_addr *a)
{
	struct graft_asker_key key = {.tenant = tenant};

	if (!a)
		return false;
	key.port = a->port;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	return bpf_map_lookup_elem(&askers, &key) != NULL;
}

/* A published UDP server answers a client on the host's own loopback, which is not the container's. */
static __always_inline bool answers(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *a)
{
	return ctx->protocol == IPPROTO_UDP && stamp->flags & STAMP_INGRESS && asked_us(stamp->tenant, a);
}

/* ---- the container's loopback ---- */

/* OWN_CHOSEN: the container's, at a port that the kernel chose, so at SLICE_DYNAMIC under its own number. */
enum { NOBODY, OWN, OWN_CHOSEN, ALIEN };

/* The socket that gets what is sent to @a, an address of the host; @from finds connected UDP sockets. To be released.
 */
static __always_inline struct bpf_sock *look_up(struct bpf_sock_addr *ctx, const struct graft_addr *a,
						const struct graft_addr *from)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size;

	if (is_v4(a)) {
		tuple.ipv4.saddr = from->ip[3];
		tuple.ipv4.sport = bpf_htons((__u16)from->port);
		tuple.ipv4.daddr = a->ip[3];
		tuple.ipv4.dport = bpf_htons((__u16)a->port);
		size = sizeof(tuple.ipv4);
		if (ctx->protocol == IPPROTO_UDP)
			return bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
		return bpf_sk_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	}
	__builtin_memcpy(tuple.ipv6.saddr, from->ip, sizeof(tuple.ipv6.saddr));
	tuple.ipv6.sport = bpf_htons((__u16)from->port);
	__builtin_memcpy(tuple.ipv6.daddr, a->ip, sizeof(tuple.ipv6.daddr));
	tuple.ipv6.dport = bpf_htons((__u16)a->port);
	size = sizeof(tuple.ipv6);
	if (ctx->protocol == IPPROTO_UDP)
		return bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	return bpf_sk_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
}

/*
 * Who would get what is sent to @a, an address of the host? @from finds connected UDP sockets.
 *
 * Not static: the verifier then proves it (and find_own) once instead of at every call, which takes the
 * larger programs from 559,000 instructions to 5,000 on Linux 6.1.
 */
__noinline int receiver(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *a, struct graft_addr *from)
{
	struct graft_stamp *stamp;
	struct bpf_sock *sk;
	int who = ALIEN;

	if (!a || !from)
		return NOBODY;
	sk = look_up(ctx, a, from);
	if (!sk)
		return NOBODY;
	stamp = stamp_of(sk);
	if (stamp && stamp->tenant == tenant)
		who = stamp->flags & STAMP_INGRESS || stamp->local.port ? OWN : OWN_CHOSEN;
	bpf_sk_release(sk);
	return who;
}

/* Where this socket sends from when it sends to the container's own loopback. */
static __always_inline void sender(struct bpf_sock_addr *ctx, struct graft_addr *from, bool v4, __u32 slot)
{
	struct bpf_sock *sk = ctx->sk;

	slice_ip(from, v4, slot, SLICE_DYNAMIC);
	from->port = 0;
	if (!sk)
		return;
	from->port = sk->src_port;
	if (v4 && sk->src_ip4)
		set_v4(from, sk->src_ip4);
	if (!v4 && (sk->src_ip6[0] || sk->src_ip6[3])) {
		from->ip[0] = sk->src_ip6[0];
		from->ip[1] = sk->src_ip6[1];
		from->ip[2] = sk->src_ip6[2];
		from->ip[3] = sk->src_ip6[3];
	}
}

/* The host address of a port that the container published, if one of its sockets is there. */
static __noinline bool published(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *asked, __u32 slot,
				 struct graft_addr *from)
{
	struct graft_dynamic_key key = {.tenant = tenant};
	struct graft_ingress *rule;
	struct graft_addr found;
	__u32 *port;

	if (!asked)
		return false;
	rule = ingress_rule(tenant, ctx->protocol, asked);
	if (!rule)
		return false;
	__builtin_memcpy(found.ip, rule->ip, sizeof(found.ip));
	found.port = ingress_port(rule, asked->port);
	if (!found.port) {
		key.proto = ctx->protocol;
		key.family = is_v4(asked) ? GRAFT_INET : GRAFT_INET6;
		key.port = asked->port;
		port = bpf_map_lookup_elem(&dynamic, &key);
		if (!port)
			return false;
		found.port = *port;
	}
	if (is_any(found.ip))
		slice_ip(&found, is_v4(asked), slot, SLICE_DYNAMIC);
	if (receiver(ctx, tenant, &found, from) != OWN)
		return false;
	*asked = found;
	return true;
}

/*
 * Find the container's own server for the loopback destination @a and put its real address there.
 * In the order of what is most exact: a private bind to this port, a port that the kernel chose, the container's
 * own address, a published port, all of one family.
 */
__noinline int find_own(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *a, __u32 slot)
{
	struct graft_tenant *own;
	struct graft_addr from;
	struct graft_addr
	try
		;
	__u32 port;
	int who;
	bool v4;

	if (!a)
		return NOBODY;
	v4 = is_v4(a);
	sender(ctx, &from, v4, slot);
	port = a->port;
	slice_addr(&try, v4, slot, port);
	who = receiver(ctx, tenant, &try, &from);
	if (who == OWN) {
		*a =
		try
			;
		return OWN;
	}
	slice_ip(&try, v4, slot, SLICE_DYNAMIC);
	try
		.port = port;
	if (receiver(ctx, tenant, &try, &from) == OWN_CHOSEN) {
		*a =
		try
			;
		return OWN;
	}
	/* a UDP socket on a port of the host, connected: the kernel gave it the loopback address as its source */
	set_loopback(&try);
	if (ctx->protocol == IPPROTO_UDP && receiver(ctx, tenant, &try, &from) == OWN_CHOSEN) {
		*a =
		try
			;
		return OWN;
	}
	own = bpf_map_lookup_elem(&tenants, &tenant);
	if (own && (v4 ? own->own4 : own->own6[0])) {
		if (v4)
			set_v4(&try, own->own4);
		else
			__builtin_memcpy(try.ip, own->own6, sizeof(try.ip));
		if (receiver(ctx, tenant, &try, &from) == OWN) {
			*a =
			try
				;
			return OWN;
		}
	}
	if (v4)
		set_v4(&try, 0);
	else
		__builtin_memset(try.ip, 0, sizeof(try.ip));
	if (published(ctx, tenant, &try, slot, &from)) {
		*a =
		try
			;
		return OWN;
	}
	try
		= *a;
	if (published(ctx, tenant, &try, slot, &from)) {
		*a =
		try
			;
		return OWN;
	}
	return who;
}

/* ---- containers' own addresses ---- */

/*
 * Lead what is sent to @a, which is @owner's, to where its server is: at the host's port where it has published the
 * port, at its first address where it has several. False if somebody else would get it, on the host's wildcard.
 */
__noinline int reach(struct bpf_sock_addr *ctx, __u32 owner, struct graft_addr *a)
{
	struct graft_dynamic_key key = {.tenant = owner};
	struct graft_addr at = {}, from = {};
	struct graft_tenant *tenant;
	struct graft_ingress *rule;
	__u32 *port;
	int who;
	bool v4;

	if (!a)
		return false;
	v4 = is_v4(a);
	if (v4)
		set_v4(&at, 0);
	at.port = a->port;
	rule = ingress_rule(owner, ctx->protocol, &at);
	if (rule && !rule->place) {
		if (!is_any(rule->ip))
			__builtin_memcpy(a->ip, rule->ip, sizeof(a->ip));
		a->port = ingress_port(rule, at.port);
		if (!a->port) {
			key.proto = ctx->protocol;
			key.family = v4 ? GRAFT_INET : GRAFT_INET6;
			key.port = at.port;
			port = bpf_map_lookup_elem(&dynamic, &key);
			a->port = port ? *port : at.port;
		}
	}
	if (v4)
		set_v4(&from, 0);
	who = receiver(ctx, owner, a, &from);
	if (who == NOBODY && !rule) {
		tenant = bpf_map_lookup_elem(&tenants, &owner);
		if (!tenant)
			return false;
		if (v4 && tenant->own4)
			set_v4(a, tenant->own4);
		else if (!v4 && tenant->own6[0])
			__builtin_memcpy(a->ip, tenant->own6, sizeof(a->ip));
		who = receiver(ctx, owner, a, &from);
	}
	return who != ALIEN;
}

enum { VISIT_ELSEWHERE, VISIT_REACHED, VISIT_NOBODY, VISIT_FOREIGN };

/* Is @a an address of a container, and may this tenant go there, by @rule? Then the real one is put there. */
static __noinline int visit(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *a, struct graft_egress *rule)
{
	struct graft_owner *to, *from;
	struct graft_tenant *who;

	if (!a)
		return VISIT_ELSEWHERE;
	to = owner_of(a);
	from = rule ? owner_of((struct graft_addr *)rule) : NULL;
	if (!to) {
		/* a network's rule leads to its members; where egress is narrowed, to nobody else in its prefix */
		who = bpf_map_lookup_elem(&tenants, &tenant);
		if (from && from->network && who && who->flags & TENANT_REPLIES)
			return VISIT_FOREIGN;
		return VISIT_ELSEWHERE;
	}
	if (to->network && to->tenant != tenant) {
		if (!from || from->tenant != tenant || from->network != to->network)
			return VISIT_FOREIGN;
	}
	return reach(ctx, to->tenant, a) ? VISIT_REACHED : VISIT_NOBODY;
}

/* Is @a another container's, or the resolver's? */
static __always_inline bool is_anothers(__u32 tenant, const struct graft_addr *a)
{
	struct graft_owner *owner = owner_of(a);

	return owner && owner->tenant != tenant;
}

/* Is @a the tenant's own? Leaving needs no rule then. */
static __always_inline bool is_own(__u32 tenant, const struct graft_addr *a)
{
	struct graft_owner *owner = owner_of(a);

	return owner && owner->tenant == tenant;
}

enum { LOCAL_REFUSED, LOCAL_OWN, LOCAL_HOST, LOCAL_NAMED };

/*
 * Resolve a loopback destination. An IPv6 socket that may speak IPv4 finds the server of a dual-stack
 * bind at its IPv4 address. A UDP port where nobody listens stays the tenant's own empty address, so
 * that the sender sees what it would on any host.
 */
static __noinline int resolve_local(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				    struct graft_tenant *tenant)
{
	struct graft_service_key service = {};
	struct graft_addr asked;
	__u32 *kind;
	int who;

	if (!a || !stamp || !tenant)
		return LOCAL_REFUSED;
	asked = *a;
	if (is_any(asked.ip))
		set_loopback(&asked);
	*a = asked;
	who = find_own(ctx, stamp->tenant, a, tenant->slot);
	if (who == OWN)
		return LOCAL_OWN;
	if (!is_v4(&asked) && !(stamp->flags & STAMP_V6ONLY) &&
	    (ctx->protocol == IPPROTO_TCP || ctx->user_family == AF_INET6)) {
		/* in place: the stack of this chain of calls is at its limit on Linux 6.1 */
		set_v4(a, bpf_htonl(0x7f000001));
		if (find_own(ctx, stamp->tenant, a, tenant->slot) == OWN)
			return LOCAL_OWN;
	}
	service.tenant = stamp->tenant;
	service.port = asked.port;
	__builtin_memcpy(service.ip, asked.ip, sizeof(service.ip));
	kind = bpf_map_lookup_elem(&services, &service);
	if (kind || answers(ctx, stamp, &asked)) {
		*a = asked;
		return kind && *kind == SERVICE_NAMED ? LOCAL_NAMED : LOCAL_HOST;
	}
	if (who == ALIEN)
		return LOCAL_REFUSED;
	slice_addr(a, is_v4(&asked), tenant->slot, asked.port);
	return LOCAL_OWN;
}

/*
 * The wrapper converts what its rules list and nothing else. It has no private loopback: a destination
 * there is the host's own, and an endpoint on the loopback is the leave to go there.
 */
static __noinline int strict_local(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				   struct graft_tenant *tenant)
{
	struct graft_egress *rule;
	bool granted;

	if (!a || !stamp || !tenant)
		return LOCAL_REFUSED;
	if (is_any(a->ip))
		set_loopback(a);
	if (in_slices(a))
		return LOCAL_REFUSED;
	if (answers(ctx, stamp, a))
		return LOCAL_OWN;
	if (stamp->flags & STAMP_NAMED) {
		granted = is_loopback(&stamp->local_real);
	} else {
		rule = leave(stamp, tenant, a);
		if (!rule)
			return LOCAL_REFUSED;
		granted = is_loopback((struct graft_addr *)rule);
	}
	if (find_own(ctx, stamp->tenant, a, tenant->slot) == OWN)
		return LOCAL_OWN;
	return granted || tenant->flags & TENANT_HOME ? LOCAL_HOST : LOCAL_REFUSED;
}

#endif
