/* SPDX-License-Identifier: GPL-2.0 */
/*
 * guard.bpf.h - the guard, on the cgroup root: what connections and sends of the host's own programs may reach
 *
 * It runs for every process of the machine, so whatever is not a container's returns first. The process graft-guard
 * (graft/process/keeper.py) is something else.
 */
#ifndef GUARD_BPF_H
#define GUARD_BPF_H

#include "own.bpf.h"

#define GUARD_LED 3 /* allowed, and the destination has become another */

/* Keep a socket without a stamp out of the slices, and route it to the server at a container's own address. */
static __always_inline int guard_destination(struct bpf_sock_addr *ctx, struct graft_addr *a)
{
	struct graft_holder *holder = in_slices(a) ? NULL : find_holder(a);
	struct graft_config *conf;
	struct graft_addr to;
	__u32 zero = 0;

	if (!holder && !in_slices(a))
		return ALLOW;
	if (holder && is_led(ctx, holder))
		return ALLOW;
	if (stamp_of(ctx->sk))
		return ALLOW;
	conf = bpf_map_lookup_elem(&config, &zero);
	if (!conf || bpf_get_netns_cookie(ctx) != conf->host_cookie)
		return ALLOW;
	to = *a;
	if (!holder)
		return deny(0, DENIED(OP_GUARD, REASON_SLICE), ECONNREFUSED, ctx->protocol, &to);
	if (!route_to_container(ctx, holder->tenant, a, NULL))
		return deny(0, DENIED(OP_GUARD, REASON_NOT_LISTENING), ECONNREFUSED, ctx->protocol, &to);
	return GUARD_LED;
}

static __always_inline int guard4(struct bpf_sock_addr *ctx)
{
	struct graft_addr a;
	int verdict;

	load4(ctx, &a);
	verdict = guard_destination(ctx, &a);
	if (verdict == GUARD_LED)
		store4(ctx, &a);
	return bounded(verdict, ALLOW);
}

static __always_inline int guard6(struct bpf_sock_addr *ctx)
{
	struct graft_addr a;
	int verdict;

	load6(ctx, &a);
	verdict = guard_destination(ctx, &a);
	if (verdict == GUARD_LED)
		store6(ctx, &a);
	return bounded(verdict, ALLOW);
}

/* Lead a connection, and remember where to. */
static __always_inline int guard_connected(struct bpf_sock_addr *ctx, bool six)
{
	struct graft_addr asked, a;
	int verdict;

	if (six)
		load6(ctx, &a);
	else
		load4(ctx, &a);
	asked = a;
	verdict = guard_destination(ctx, &a);
	if (verdict != GUARD_LED)
		return bounded(verdict, ALLOW);
	if (ctx->protocol == IPPROTO_UDP)
		remember_port(&asked, a.port);
	if (six)
		store6(ctx, &a);
	else
		store4(ctx, &a);
	return ALLOW;
}

/* A container's server answers a program of the host's, which has asked it by the port that its program knows. */
static __always_inline bool is_answered(struct bpf_sock_addr *ctx, struct graft_addr *a)
{
	struct graft_config *conf;
	__u32 zero = 0;

	if (!may_be_owned(a) || stamp_on(ctx->sk))
		return false;
	conf = bpf_map_lookup_elem(&config, &zero);
	return conf && bpf_get_netns_cookie(ctx) == conf->host_cookie && name_port(a);
}

SEC("cgroup/recvmsg4")
int guard_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct graft_addr a;

	load4(ctx, &a);
	if (is_answered(ctx, &a))
		store4(ctx, &a);
	return ALLOW;
}

SEC("cgroup/recvmsg6")
int guard_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct graft_addr a;

	load6(ctx, &a);
	if (is_answered(ctx, &a))
		store6(ctx, &a);
	return ALLOW;
}

SEC("cgroup/connect4")
int guard_connect4(struct bpf_sock_addr *ctx)
{
	return guard_connected(ctx, false);
}

SEC("cgroup/connect6")
int guard_connect6(struct bpf_sock_addr *ctx)
{
	return guard_connected(ctx, true);
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

#endif
