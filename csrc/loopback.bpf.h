/* SPDX-License-Identifier: GPL-2.0 */
/*
 * loopback.bpf.h - the container's own loopback: who listens there
 */
#ifndef LOOPBACK_BPF_H
#define LOOPBACK_BPF_H

#include "report.bpf.h"
#include "rules.bpf.h"
#include "slice.bpf.h"

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
