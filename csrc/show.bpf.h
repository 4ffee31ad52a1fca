/* SPDX-License-Identifier: GPL-2.0 */
/*
 * show.bpf.h - what the program sees: the addresses that it asked for
 */
#ifndef SHOW_BPF_H
#define SHOW_BPF_H

#include "led.bpf.h"
#include "made.bpf.h"
#include "own.bpf.h"

/* Has the program of the socket @sk sent to @real by the name of its loopback? */
static __always_inline bool has_called_loopback(struct bpf_sock *sk, const struct graft_stamp *stamp,
						const struct graft_addr *real)
{
	struct graft_told *of;

	if (stamp->flags & STAMP_CONNECTED && same_addr(real, &stamp->peer_real))
		return is_loopback(&stamp->peer);
	of = bpf_sk_storage_get(&told, sk, NULL, 0);
	if (of)
		for (int n = 0; n < TOLD_MAX; n++)
			if (same_addr(real, &of->of[n].real))
				return is_loopback(&of->of[n].asked);
	return false;
}

/*
 * A UDP socket of the container's on the host's wildcard, or at an address of its own, may send over the loopback
 * from an address that is not the loopback's to the program: SLICE_DYNAMIC, with the host's port, if it is not
 * connected, and where the kernel took its source from if it is. The sender's stamp says what it is called.
 */
static __noinline int show_neighbour(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				     __u32 slice)
{
	struct graft_stamp *theirs;
	struct graft_addr here;
	struct bpf_sock *sk;
	bool by_loopback;

	if (!a || !stamp)
		return 0;
	loopback_source(ctx, &here, is_v4(a), slice);
	if (in_slices(a) ? slice_index(a, slice) != SLICE_DYNAMIC
			 : !(stamp->flags & (STAMP_PRIVATE | STAMP_LENT)) && !is_loopback(a) &&
				   !same_ip(a->ip, here.ip) && !is_own_address(stamp->tenant, a))
		return 0;
	if (stamp->flags & STAMP_ABROAD && !in_slices(a)) /* what comes from its address has gone there */
		__builtin_memcpy(here.ip, a->ip, sizeof(here.ip));
	sk = socket_at(ctx, a, &here);
	if (!sk)
		return 0;
	theirs = stamp_of(sk);
	if (theirs && theirs->tenant == stamp->tenant && a->port == sk->src_port) {
		by_loopback =
			is_any(theirs->local.ip) && (in_slices(&here) || has_called_loopback(sk, theirs, &here));
		if (theirs->local.port)
			a->port = theirs->local.port;
		if (by_loopback)
			set_loopback(a);
	}
	bpf_sk_release(sk);
	return 0;
}

/*
 * A neighbour's socket on the host's wildcard that has connected to this one sends from the address that it sends to,
 * which the kernel has given it. It is called by its own address on the network, and the port that its program knows,
 * which note_called() has seen, if the socket is closed already.
 */
static __noinline int show_connected(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp)
{
	struct graft_stamp *theirs;
	struct graft_told *of;
	struct graft_addr here;
	struct bpf_sock *sk;
	bool found;

	if (!a || !stamp || !ctx->sk)
		return false;
	of = bpf_sk_storage_get(&called, ctx->sk, NULL, 0);
	if (of && find_told(of, a))
		return true;
	here = *a;
	here.port = ctx->sk->src_port;
	sk = socket_at(ctx, a, &here);
	if (!sk)
		return false;
	theirs = stamp_of(sk);
	found = theirs && sk->dst_port && a->port == sk->src_port && name_connected(theirs, stamp->tenant, a);
	bpf_sk_release(sk);
	return found;
}

/* Turn the source of a datagram into what the program called it, or the container's name for its loopback. */
static __noinline int show_sender(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp)
{
	struct graft_holder *holder;
	struct graft_tenant *tenant;
	struct graft_told *of;
	__u32 port;

	if (!a || !stamp || !ctx->sk)
		return 0;
	if (stamp->flags & STAMP_CONNECTED && same_addr(a, &stamp->peer_real)) {
		*a = stamp->peer;
		return 0;
	}
	of = bpf_sk_storage_get(&told, ctx->sk, NULL, 0);
	if (of && find_told(of, a))
		return 0;
	tenant = tenant_of(stamp);
	if (!tenant)
		return 0;
	holder = may_be_owned(a) ? holder_of(a) : NULL;
	if (holder) {
		if (holder->tenant == stamp->tenant && show_connected(ctx, a, stamp))
			return 0;
		port = programs_port(holder->tenant, is_v4(a), a->port);
		if (port)
			a->port = port;
		if (port || (stamp->flags & STAMP_ABROAD && holder->tenant != stamp->tenant))
			return 0;
	}
	show_neighbour(ctx, a, stamp, tenant->slice);
	slice_show(a, tenant->slice);
	return 0;
}

/* Turn a peer's real address into the one that the program asked for, or the container's name for its loopback. */
static __noinline int show_peer(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp)
{
	struct graft_tenant *tenant;

	(void)ctx;
	if (!a)
		return 0;
	if (!stamp) {
		slice_show(a, slice_number(a));
		return 0;
	}
	if (stamp->flags & STAMP_CONNECTED && same_addr(a, &stamp->peer_real)) {
		*a = stamp->peer;
		return 0;
	}
	tenant = tenant_of(stamp);
	if (tenant)
		slice_show(a, tenant->slice);
	return 0;
}

/* Put the port there that the program of an accepted socket's server bound, at this address or on the wildcard. */
static __always_inline void show_served(struct graft_addr *a)
{
	struct graft_served_key key = {.port = a->port};
	struct graft_holder *holder = holder_of(a);
	struct graft_served *found;
	struct graft_led *where;

	if (holder && !(holder->flags & HOLDER_DEVICE)) /* what arrives there goes by the program's ports */
		return;
	where = led_at(a);
	if (where) {
		a->port = led_port(where, a->port);
		return;
	}
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	found = bpf_map_lookup_elem(&served_ports, &key);
	if (!found) {
		key.ip[3] = 0; /* the wildcard */
		if (!is_v4(a)) {
			key.ip[0] = 0;
			key.ip[1] = 0;
			key.ip[2] = 0;
		}
		found = bpf_map_lookup_elem(&served_ports, &key);
	}
	if (!found && is_v4(a)) {
		key.ip[2] = 0; /* a dual-stack server */
		found = bpf_map_lookup_elem(&served_ports, &key);
	}
	if (found)
		a->port = found->port;
}

/*
 * Turn a socket's real address into what the program may expect. A listener shows what it was bound to. A connection
 * shows the host's address, which its peer knows, with the port that was asked for.
 */
static __noinline int show_local(struct graft_addr *a, struct graft_stamp *stamp, bool connected)
{
	struct graft_tenant *tenant;

	if (!a)
		return 0;
	if (!a->port) { /* of a UDP socket that was disconnected the kernel has kept the address alone */
		if (stamp && stamp->flags & STAMP_EPHEMERAL && same_ip(a->ip, stamp->local_real.ip))
			__builtin_memcpy(a->ip, stamp->local.ip, sizeof(a->ip));
		return 0;
	}
	if (!stamp) {
		/* a published wildcard is reached from inside at SLICE_DYNAMIC, under the host's port */
		if (!in_slices(a) || slice_index(a, slice_number(a)) == SLICE_DYNAMIC)
			show_served(a);
		slice_show(a, slice_number(a));
		return 0;
	}
	if (stamp->flags & (STAMP_WAITS | STAMP_EPHEMERAL) && !is_any(stamp->local.ip)) {
		__builtin_memcpy(a->ip, stamp->local.ip, sizeof(a->ip));
		if (stamp->local.port)
			a->port = stamp->local.port;
		return 0;
	}
	if (stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL | STAMP_WAITS)) {
		bool here = same_ip(a->ip, stamp->local_real.ip);

		if (stamp->local.port && (!stamp->local_real.port || a->port == stamp->local_real.port)) {
			a->port = stamp->local.port;
			if (!here && !in_slices(a))
				return 0;
		}
		if (here && !(connected && is_any(stamp->local.ip))) {
			__builtin_memcpy(a->ip, stamp->local.ip, sizeof(a->ip));
			return 0;
		}
		if (in_slices(a)) {
			set_loopback(a);
			return 0;
		}
	}
	tenant = tenant_of(stamp);
	if (tenant)
		slice_show(a, tenant->slice);
	return 0;
}

/* A UDP socket on the wildcard that has connected to a neighbour has the neighbour's address, and shows its own. */
static __always_inline void show_own(struct graft_addr *a, struct graft_stamp *stamp, bool connected)
{
	struct graft_egress *rule;

	if (!stamp || !connected || !(stamp->flags & STAMP_EPHEMERAL) || !may_be_owned(a) ||
	    !is_anothers(stamp->tenant, a))
		return;
	rule = egress_rule(stamp->tenant, a);
	if (rule && is_own_address(stamp->tenant, (struct graft_addr *)rule))
		__builtin_memcpy(a->ip, rule->ip, sizeof(a->ip));
}

/*
 * getsockname(): a socket that connect() gave a source has none when it is not connected any more; one that has asked
 * for the loopback leaves from there.
 */
static __noinline int show_name(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp)
{
	bool connected = in_connection(ctx->sk);

	if (!a)
		return 0;
	if (!stamp && !in_slices(a) && direct_tenant() && was_made(ctx->sk))
		return 0; /* a connection out, which has its port from the kernel: no server's */
	if (stamp && stamp->flags & STAMP_WAITS && !connected) {
		*a = stamp->local;
		return 0;
	}
	if (stamp && stamp->flags & STAMP_LENT && !connected) {
		if (ctx->family == AF_INET6)
			__builtin_memset(a->ip, 0, sizeof(a->ip));
		else
			set_v4(a, 0);
		if (ctx->protocol == IPPROTO_UDP)
			a->port = 0;
		return 0;
	}
	show_local(a, stamp, connected);
	show_own(a, stamp, connected);
	if (!stamp || !connected || !(stamp->flags & STAMP_CONNECTED) || !is_loopback(&stamp->peer))
		return 0;
	if (stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL) && !is_any(stamp->local.ip))
		return 0;
	if (is_v4(&stamp->peer))
		set_v4(a, 0);
	else
		__builtin_memset(a->ip, 0, sizeof(a->ip));
	set_loopback(a);
	return 0;
}

#define SHOW4(ctx, how)                                                                                              \
	do {                                                                                                         \
		struct graft_stamp *stamp = stamp_of((ctx)->sk);                                                     \
		struct graft_addr a;                                                                                 \
                                                                                                                     \
		load4(ctx, &a);                                                                                      \
		how(ctx, &a, stamp);                                                                                 \
		store4(ctx, &a);                                                                                     \
	} while (0)

#define SHOW6(ctx, how)                                                                                              \
	do {                                                                                                         \
		struct graft_stamp *stamp = stamp_of((ctx)->sk);                                                     \
		struct graft_addr a;                                                                                 \
                                                                                                                     \
		load6(ctx, &a);                                                                                      \
		how(ctx, &a, stamp);                                                                                 \
		store6(ctx, &a);                                                                                     \
	} while (0)

SEC("cgroup/getsockname4")
int graft_getsockname4(struct bpf_sock_addr *ctx)
{
	SHOW4(ctx, show_name);
	return ALLOW;
}

SEC("cgroup/getsockname6")
int graft_getsockname6(struct bpf_sock_addr *ctx)
{
	SHOW6(ctx, show_name);
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

/* Remember who sent to a published server: it may be answered, though no egress rule leads there. */
static __always_inline void note_asker(struct graft_stamp *stamp, struct graft_addr *a)
{
	struct graft_tenant *tenant;

	if (!is_server(stamp))
		return;
	tenant = tenant_of(stamp);
	if (!tenant)
		return;
	if (!(tenant->flags & (TENANT_REPLIES | TENANT_ALLOW)) && (!is_loopback(a) || in_slices(a)) &&
	    !(tenant->own4 || tenant->own6[0]))
		return;
	add_asker(stamp->tenant, a);
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
	show_sender(ctx, &a, stamp);
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
	show_sender(ctx, &a, stamp);
	store6(ctx, &a);
	return ALLOW;
}

#endif
