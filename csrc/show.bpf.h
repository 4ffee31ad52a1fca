/* SPDX-License-Identifier: GPL-2.0 */
/*
 * show.bpf.h - what the program sees: the addresses that it asked for
 */
#ifndef SHOW_BPF_H
#define SHOW_BPF_H

#include "own.bpf.h"

/* Turn a peer's real address into the one that the program asked for, or the container's name for its loopback. */
static __noinline int show_peer(struct graft_addr *a, struct graft_stamp *stamp)
{
	struct graft_tenant *tenant;

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

	if (holder && !(holder->flags & HOLDER_DEVICE)) /* what arrives there goes by the program's ports */
		return;
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

	if (!a || !a->port)
		return 0;
	if (!stamp) {
		/* a published wildcard is reached from inside at SLICE_DYNAMIC, under the host's port */
		if (!in_slices(a) || slice_index(a, slice_number(a)) == SLICE_DYNAMIC)
			show_served(a);
		slice_show(a, slice_number(a));
		return 0;
	}
	if (stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL)) {
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

/* Remember who sent to a published server: it may be answered, though no egress rule leads there. */
static __always_inline void note_asker(struct graft_stamp *stamp, struct graft_addr *a)
{
	struct graft_tenant *tenant;

	if (!(stamp->flags & STAMP_INGRESS))
		return;
	tenant = tenant_of(stamp);
	if (!tenant)
		return;
	if (!(tenant->flags & TENANT_REPLIES) && (!is_loopback(a) || in_slices(a)) &&
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

#endif
