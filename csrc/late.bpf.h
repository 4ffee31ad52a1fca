/* SPDX-License-Identifier: GPL-2.0 */
/*
 * late.bpf.h - a bind that waits until it is known what the port is for
 *
 * A program binds a TCP socket to a port that nobody publishes, and then listens: on its private loopback, in the
 * slice. Or it connects: the slice is no source that anybody could answer, so that it leaves as a socket does that
 * was not bound, from a port of the kernel's choice, and behind a NAT it would not be different. bind() does not say
 * which it will be. So the program's bind binds nothing (the stamp has what it asked for, STAMP_WAITS), which the
 * kernel does for port 0 where IP_BIND_ADDRESS_NO_PORT is set; graft-sup sets it. listen() is trapped: graftd binds
 * the socket first (`settling`), and it waits until that bind is done. A connection to the loopback binds it in its
 * connect hook.
 *
 * Nor is an address bound, which may be one of the container's own, or of the host's: the egress rule says the
 * source.
 */
#ifndef LATE_BPF_H
#define LATE_BPF_H

#include "claims.bpf.h"
#include "loopback.bpf.h"
#include "pids.bpf.h"
#include "report.bpf.h"

/* Has the calling process put its number there for this socket? The program's threads, which have the same socket,
 * have another. */
static __always_inline bool is_callers(void *map, struct bpf_sock *sk)
{
	__u32 *pid = sk ? bpf_sk_storage_get(map, sk, NULL, 0) : NULL;

	return pid && *pid && *pid == (__u32)current_pid();
}

/* Is it graftd that calls, which binds this socket now? Nobody else can say so: it is no flag of the stamp, which
 * graftd would have to read and to write. */
static __always_inline bool settles(struct bpf_sock *sk)
{
	return is_callers(&settling, sk);
}

/* Is it who sets the options of its maker on this socket that calls? */
static __always_inline bool prepares(struct bpf_sock *sk)
{
	return is_callers(&prepared, sk);
}

/* Has a direct container's socket what its maker would have set? bind() is trapped for that, but another thread may
 * have put another socket under the same number since. */
static __always_inline bool is_prepared(struct bpf_sock *sk)
{
	__u32 *pid = sk ? bpf_sk_storage_get(&prepared, sk, NULL, 0) : NULL;

	return pid && *pid == GRAFT_PREPARED;
}

/* Is the socket bound for its program, and not for the kernel? */
static __always_inline bool waits(struct bpf_sock *sk, const struct graft_stamp *stamp)
{
	return stamp->flags & STAMP_WAITS && !settles(sk);
}

/* May the bind of this socket wait? */
static __always_inline bool may_wait(const struct bpf_sock_addr *ctx, const struct graft_stamp *stamp)
{
	return ctx->protocol == IPPROTO_TCP && !stamp->place &&
	       (stamp->flags & (STAMP_LATE | STAMP_FAMILY | STAMP_NAMED)) == STAMP_LATE && !settles(ctx->sk);
}

/* Choose the source of a socket that has none: bpf_bind() fails on one that has a port. @mapped: it is of AF_INET6.
 */
__noinline int bind_source(struct bpf_sock_addr *ctx, struct graft_addr *source, bool mapped)
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

/*
 * Bind a socket that waits to its port of the loopback, which it is to connect to by IPv4 if @v4. The real place is
 * put into @source. False: it does not wait, or not for that, or cannot have the port.
 */
__noinline int settle(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *source, bool v4,
		      bool mapped)
{
	struct graft_holder *holder;
	struct graft_tenant *tenant;
	struct graft_addr at, asked;

	if (!stamp || !source || !(stamp->flags & STAMP_WAITS) || !stamp->local.port)
		return false;
	asked = stamp->local;
	holder = holder_of(&asked);
	tenant = tenant_of(stamp);
	if (!tenant || !(holder || is_any(asked.ip)) || (holder && is_v4(&asked) != v4))
		return false;
	private_place(&at, v4, tenant->slice, &asked, holder, 0);
	if (bind_source(ctx, &at, mapped))
		return false;
	stamp->local_real = at;
	stamp->flags = (stamp->flags & ~STAMP_WAITS) | STAMP_PRIVATE;
	*source = at;
	return true;
}

#endif
