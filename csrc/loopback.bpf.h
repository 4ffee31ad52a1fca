/* SPDX-License-Identifier: GPL-2.0 */
/*
 * loopback.bpf.h - the container's own loopback: who listens there
 */
#ifndef LOOPBACK_BPF_H
#define LOOPBACK_BPF_H

#include "allow.bpf.h"
#include "kernel_sock.bpf.h"
#include "report.bpf.h"
#include "rules.bpf.h"
#include "slice.bpf.h"

/* Who receives what is sent to an address of the host. */
enum {
	RECEIVER_NOBODY,
	RECEIVER_TENANT,
	RECEIVER_TENANT_CHOSEN, /* the tenant, at a port that no bind of the program's named */
	RECEIVER_TENANT_ALONE,	/* the tenant, whose program has bound one address, which is no loopback */
	RECEIVER_OTHER,
};

/* What a look-up of sockets is told of a packet from @from to @to; returns the size of it. */
static __always_inline __u32 tuple_of(struct bpf_sock_tuple *tuple, const struct graft_addr *from,
				      const struct graft_addr *to)
{
	if (is_v4(to)) {
		tuple->ipv4.saddr = from->ip[3];
		tuple->ipv4.sport = bpf_htons((__u16)from->port);
		tuple->ipv4.daddr = to->ip[3];
		tuple->ipv4.dport = bpf_htons((__u16)to->port);
		return sizeof(tuple->ipv4);
	}
	__builtin_memcpy(tuple->ipv6.saddr, from->ip, sizeof(tuple->ipv6.saddr));
	tuple->ipv6.sport = bpf_htons((__u16)from->port);
	__builtin_memcpy(tuple->ipv6.daddr, to->ip, sizeof(tuple->ipv6.daddr));
	tuple->ipv6.dport = bpf_htons((__u16)to->port);
	return sizeof(tuple->ipv6);
}

/* The socket that receives what @from sends to @a, an address of the host. The caller releases it. */
static __always_inline struct bpf_sock *socket_at(struct bpf_sock_addr *ctx, const struct graft_addr *a,
						  const struct graft_addr *from)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = tuple_of(&tuple, from, a);

	if (ctx->protocol == IPPROTO_UDP)
		return bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	return bpf_sk_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
}

/* Who receives what @from sends to @a, an address of the host? The source matters: it finds connected UDP sockets. */
__noinline int receiver_at(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *a, struct graft_addr *from)
{
	struct graft_stamp *stamp;
	struct bpf_sock *sk;
	int who = RECEIVER_OTHER;

	if (!a || !from)
		return RECEIVER_NOBODY;
	sk = socket_at(ctx, a, from);
	if (!sk)
		return RECEIVER_NOBODY;
	stamp = stamp_of(sk);
	if (stamp && stamp->tenant == tenant)
		who = stamp->flags & STAMP_INGRESS || stamp->local.port ? RECEIVER_TENANT : RECEIVER_TENANT_CHOSEN;
	if (stamp && (who == RECEIVER_TENANT || (who == RECEIVER_TENANT_CHOSEN && stamp->flags & STAMP_ABROAD)) &&
	    !is_any(stamp->local.ip) && !is_loopback(&stamp->local))
		who = RECEIVER_TENANT_ALONE;
	bpf_sk_release(sk);
	return who;
}

/* How a UDP socket of the tenant is bound. */
enum {
	BOUND_EXACT = 1, /* its program named an address */
	BOUND_WILD = 2,	 /* or the wildcard */
	BOUND_SHARES = 4,
};

/* How is the tenant's UDP socket bound that receives what @from sends to @a? 0: there is none. */
__noinline int bound_at(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *a, struct graft_addr *from)
{
	struct graft_stamp *stamp;
	struct bpf_sock *sk;
	int how = 0;

	if (!a || !from)
		return 0;
	sk = socket_at(ctx, a, from);
	if (!sk)
		return 0;
	stamp = stamp_of(sk);
	if (stamp && stamp->tenant == tenant) {
		how = is_any(stamp->local.ip) ? BOUND_WILD : BOUND_EXACT;
		if (stamp->flags & (STAMP_REUSEADDR | STAMP_REUSEPORT))
			how |= BOUND_SHARES;
	}
	bpf_sk_release(sk);
	return how;
}

/* Put the container's own address of a family there, which it has. */
static __always_inline void own_ip(struct graft_addr *a, const struct graft_tenant *tenant, bool v4)
{
	if (v4)
		set_v4(a, tenant->own4);
	else
		__builtin_memcpy(a->ip, tenant->own6, sizeof(a->ip));
}

/* The source that this socket has when it sends to the container's loopback. */
static __always_inline void loopback_source(struct bpf_sock_addr *ctx, struct graft_addr *from, bool v4, __u32 slice)
{
	struct bpf_sock *sk = ctx->sk;

	slice_ip(from, v4, slice, SLICE_DYNAMIC);
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

/*
 * The place of a UDP socket of the container's that is on the host's wildcard at port @at->port, put into @at. One
 * that sends is at SLICE_DYNAMIC. One that has connected is where the kernel took its source from: the loopback, the
 * container's own address, or the address of its peer, which is @from. @who: what the socket is to be.
 */
__noinline int find_on_wildcard(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *at,
				struct graft_addr *from, int who)
{
	struct graft_tenant *container = bpf_map_lookup_elem(&tenants, &tenant);
	bool v4;

	if (!at || !from || !container)
		return false;
	v4 = is_v4(at);
	slice_ip(at, v4, container->slice, SLICE_DYNAMIC);
	if (receiver_at(ctx, tenant, at, from) == who)
		return true;
	set_loopback(at);
	if (receiver_at(ctx, tenant, at, from) == who)
		return true;
	if (v4 ? container->own4 : container->own6[0]) {
		own_ip(at, container, v4);
		if (receiver_at(ctx, tenant, at, from) == who)
			return true;
	}
	if (in_slices(from))
		return false;
	__builtin_memcpy(at->ip, from->ip, sizeof(at->ip));
	return receiver_at(ctx, tenant, at, from) == who;
}

/* The port of the host's that the kernel chose for the UDP port @port, bound to the wildcard of IPv4 if @v4, or to
 * that of IPv6, which may be both; 0: none. */
__noinline int chosen_port(__u32 tenant, bool v4, __u32 port)
{
	struct graft_dynamic_key key = {.tenant = tenant, .proto = IPPROTO_UDP, .port = port};
	__u32 *found;

	key.family = v4 ? GRAFT_INET : GRAFT_INET6;
	found = bpf_map_lookup_elem(&dynamic_ports, &key);
	return found ? *found : 0;
}

/* Put the host's address of the published port @asked there, if a socket of the container has it. */
__noinline bool find_published(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *asked, __u32 slice,
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
		port = bpf_map_lookup_elem(&dynamic_ports, &key);
		if (!port)
			return false;
		found.port = *port;
	}
	if (is_any(found.ip))
		slice_ip(&found, is_v4(asked), slice, SLICE_DYNAMIC);
	if (receiver_at(ctx, tenant, &found, from) != RECEIVER_TENANT)
		return false;
	*asked = found;
	return true;
}

/* Put the place of a UDP server on the wildcard of the loopback there, which is asked at another address than
 * 127.0.0.1; false if none has the port. */
__noinline int find_wildcard(struct bpf_sock_addr *ctx, __u32 tenant, __u32 slice, struct graft_addr *a,
			     struct graft_addr *from)
{
	struct graft_addr at;

	if (!a || !from || !is_v4(a) || a->ip[3] == bpf_htonl(0x7f000001))
		return false;
	slice_addr(&at, true, slice, a->port);
	if (!(bound_at(ctx, tenant, &at, from) & BOUND_WILD))
		return false;
	*a = at;
	return true;
}

/*
 * Find the container's server for the loopback destination @a and put its real address there: RECEIVER_TENANT, or
 * who has the private port. TCP arrives at the private port wherever the server is bound (listeners.bpf.h), and has
 * an address of its own there for each of the loopback, so that both ends show it. Of UDP the most exact is tried
 * first: this private port, that of the wildcard, a port on the host's wildcard that the kernel chose, for nobody or
 * for this port (bind_chosen()), an address of the container's own, a published port.
 */
__noinline int find_on_loopback(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *a, __u32 slice)
{
	struct graft_tenant *container;
	struct graft_addr from, at;
	__u32 port;
	int who;
	bool v4;

	if (!a)
		return RECEIVER_NOBODY;
	v4 = is_v4(a);
	loopback_source(ctx, &from, v4, slice);
	port = a->port;
	loopback_place(tenant, slice, a, &at, false);
	who = receiver_at(ctx, tenant, &at, &from);
	if (who == RECEIVER_TENANT || who == RECEIVER_TENANT_CHOSEN) {
		loopback_place(tenant, slice, a, &at, true); /* the address has it from now on */
		*a = at;
		return RECEIVER_TENANT;
	}
	if (ctx->protocol != IPPROTO_UDP)
		return who;
	if (find_wildcard(ctx, tenant, slice, a, &from))
		return RECEIVER_TENANT;
	at.port = port;
	if (find_on_wildcard(ctx, tenant, &at, &from, RECEIVER_TENANT_CHOSEN)) {
		*a = at;
		return RECEIVER_TENANT;
	}
	for (int six = !v4; six < 2; six++) {
		at.port = chosen_port(tenant, !six, port);
		if (at.port && find_on_wildcard(ctx, tenant, &at, &from, RECEIVER_TENANT)) {
			*a = at;
			return RECEIVER_TENANT;
		}
	}
	at.port = port;
	container = bpf_map_lookup_elem(&tenants, &tenant);
	if (container && (v4 ? container->own4 : container->own6[0])) {
		own_ip(&at, container, v4);
		if (receiver_at(ctx, tenant, &at, &from) == RECEIVER_TENANT) {
			*a = at;
			return RECEIVER_TENANT;
		}
	}
	if (v4)
		set_v4(&at, 0);
	else
		__builtin_memset(at.ip, 0, sizeof(at.ip));
	if (find_published(ctx, tenant, &at, slice, &from)) {
		*a = at;
		return RECEIVER_TENANT;
	}
	at = *a;
	if (find_published(ctx, tenant, &at, slice, &from)) {
		*a = at;
		return RECEIVER_TENANT;
	}
	return who;
}

/* Is this a socket of AF_INET6 at an IPv4 address? A dual-stack bind to the wildcard is one to the IPv4 slice. */
static __always_inline bool is_bound_to_v4(const struct bpf_sock *sk)
{
	return sk && sk->family == AF_INET6 && sk->src_ip6[2] == MAPPED && !sk->src_ip6[0] && !sk->src_ip6[1];
}

/* Is the socket that receives what this one sends to @a, an address of IPv4, bound to [::], so that it is ::1 as
 * well? */
__noinline bool is_of_both(struct bpf_sock_addr *ctx, struct graft_addr *a, __u32 slice)
{
	struct graft_addr from;
	struct graft_stamp *stamp;
	struct bpf_sock *sk;
	bool both;

	if (!a)
		return false;
	loopback_source(ctx, &from, true, slice);
	sk = socket_at(ctx, a, &from);
	if (!sk)
		return false;
	stamp = stamp_of(sk);
	both = stamp && is_any6(stamp->local.ip);
	bpf_sk_release(sk);
	return both;
}

/* Does this TCP socket of AF_INET6 speak IPv4 alone, which has asked for ::1? Then 127.0.0.1 is put there. @otherwise
 * is the answer for UDP. */
__noinline int asks_by_ipv4(struct bpf_sock_addr *ctx, struct graft_addr *a, bool otherwise)
{
	if (!a || ctx->protocol != IPPROTO_TCP)
		return otherwise;
	if (is_v4(a) || !is_bound_to_v4(ctx->sk))
		return false;
	set_v4(a, bpf_htonl(0x7f000001));
	return true;
}

/* What the tenant may reach at @asked without a rule: SERVICE_*, 0: nothing. */
__noinline int service_at(__u32 tenant, struct graft_addr *asked)
{
	struct graft_service_key service = {.tenant = tenant};
	__u32 *kind;

	if (!asked)
		return 0;
	service.port = asked->port;
	__builtin_memcpy(service.ip, asked->ip, sizeof(service.ip));
	kind = bpf_map_lookup_elem(&services, &service);
	return kind ? *kind : 0;
}

/* Where a loopback destination leads. */
enum {
	LOCAL_REFUSED,
	LOCAL_CONTAINER, /* to the container's own server */
	LOCAL_HOST,	 /* to the host's loopback */
	LOCAL_CLOSED,	 /* a TCP port where nobody listens */
	LOCAL_NAMED,	 /* to graftd's resolver, which knows the client by its source (SERVICE_NAMED) */
};

/*
 * Decide a loopback destination of a container. @mapped: a UDP socket of IPv6 that connects, and may speak IPv4,
 * finds the server of a dual-stack bind at its IPv4 address; a datagram of IPv6 cannot go there (udpv6_sendmsg()). A
 * TCP socket that is bound to one speaks IPv4, and finds at ::1 who is there. Where nobody listens, TCP is refused
 * here: a server of the host that is bound to the device lo is not found by a look-up without a device, and would
 * take the connection. A UDP destination becomes the empty address in the tenant's slice, so that the sender sees
 * what it would on any host; graft_egress() looks at each datagram.
 */
static __noinline int resolve_local(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				    struct graft_tenant *tenant, bool mapped)
{
	struct graft_addr asked;
	int who, kind;

	if (!a || !stamp || !tenant)
		return LOCAL_REFUSED;
	mapped = asks_by_ipv4(ctx, a, mapped);
	asked = *a;
	who = find_on_loopback(ctx, stamp->tenant, a, tenant->slice);
	if (who == RECEIVER_TENANT && !(mapped && ctx->protocol == IPPROTO_TCP && !is_of_both(ctx, a, tenant->slice)))
		return LOCAL_CONTAINER;
	if (!is_v4(&asked) && mapped && ctx->protocol != IPPROTO_TCP && takes_ipv4(ctx->sk)) {
		/* in place, because this chain of calls has 32 bytes of stack left on Linux 6.1 */
		set_v4(a, bpf_htonl(0x7f000001));
		if (find_on_loopback(ctx, stamp->tenant, a, tenant->slice) == RECEIVER_TENANT &&
		    is_of_both(ctx, a, tenant->slice))
			return LOCAL_CONTAINER;
	}
	if (asks_resolver(tenant, &asked)) {
		*a = asked;
		to_resolver(a);
		return LOCAL_NAMED;
	}
	kind = service_at(stamp->tenant, &asked);
	if (kind || may_answer(ctx, stamp, &asked)) {
		*a = asked;
		return kind == SERVICE_NAMED ? LOCAL_NAMED : LOCAL_HOST;
	}
	if (who == RECEIVER_OTHER)
		return LOCAL_REFUSED;
	if (ctx->protocol != IPPROTO_UDP)
		return LOCAL_CLOSED;
	loopback_place(stamp->tenant, tenant->slice, &asked, a, true);
	return LOCAL_CONTAINER;
}

/*
 * Decide a loopback destination of a wrapper. A wrapper has no private loopback: the destination is the host's, and
 * an endpoint on the loopback is the permission to go there. What its rules do not list is refused.
 */
static __noinline int strict_local(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				   struct graft_tenant *tenant)
{
	struct graft_egress *rule;
	bool granted;

	if (!a || !stamp || !tenant)
		return LOCAL_REFUSED;
	if (in_slices(a))
		return LOCAL_REFUSED;
	if (may_answer(ctx, stamp, a))
		return LOCAL_CONTAINER;
	if ((stamp->flags & (STAMP_NAMED | STAMP_STAYS)) == STAMP_NAMED) {
		granted = is_loopback(&stamp->local_real);
	} else {
		rule = egress_for(stamp, tenant, a);
		if (!rule)
			return LOCAL_REFUSED;
		granted = is_loopback((struct graft_addr *)rule);
	}
	if (find_on_loopback(ctx, stamp->tenant, a, tenant->slice) == RECEIVER_TENANT)
		return LOCAL_CONTAINER;
	return granted || tenant->flags & TENANT_HOME ? LOCAL_HOST : LOCAL_REFUSED;
}

#endif
