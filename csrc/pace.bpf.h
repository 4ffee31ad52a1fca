/* SPDX-License-Identifier: GPL-2.0 */
/*
 * pace.bpf.h - a bound to what a TCP socket sends in a second (`graft run --limit rate=`)
 *
 * The kernel paces a TCP socket that has SO_MAX_PACING_RATE (socket(7)), by a timer of its own or by the queueing
 * discipline fq. It is set when the socket connects or listens, and an accepted socket has it from its listener. A
 * program may set a lower one, and none that is higher.
 */
#ifndef PACE_BPF_H
#define PACE_BPF_H

#include "traffic.bpf.h"

#define SOL_SOCKET_ 1
#define SO_MAX_PACING_RATE_ 47

static __always_inline __u32 *rate_of(__u32 tenant)
{
	return bpf_map_lookup_elem(&rates, &tenant);
}

/* The socket of @ctx, a struct bpf_sock_addr or bpf_sock_ops, gets the rate of @id. */
#define SET_PACE(ctx, id)                                                                                            \
	do {                                                                                                         \
		__u32 *rate = rate_of(id), value;                                                                    \
                                                                                                                     \
		if (rate) {                                                                                          \
			value = *rate;                                                                               \
			bpf_setsockopt(ctx, SOL_SOCKET_, SO_MAX_PACING_RATE_, &value, sizeof(value));                \
		}                                                                                                    \
	} while (0)

static __noinline int pace_connection(struct bpf_sock_addr *ctx, __u32 id)
{
	if (ctx->protocol == IPPROTO_TCP)
		SET_PACE(ctx, id);
	return 0;
}

/* Would the program of a socket of @id's have more than its rate by this SO_MAX_PACING_RATE? */
static __always_inline bool outpaces(struct bpf_sockopt *ctx, __u32 id)
{
	__u8 *value = ctx->optval, *end = ctx->optval_end;
	__u32 *rate = rate_of(id);

	if (!rate || ctx->optlen < 4 || value + 4 > end)
		return false;
	if (ctx->optlen < 8 || value + 8 > end)
		return *(__u32 *)value > *rate;
	if (ctx->optlen > 8)
		ctx->optlen = 8; /* the kernel reads the program's memory again where it is longer than a page */
	return *(__u64 *)value > *rate;
}

#endif
