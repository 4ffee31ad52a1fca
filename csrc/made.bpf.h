/* SPDX-License-Identifier: GPL-2.0 */
/*
 * made.bpf.h - TCP sockets of a direct container that have no stamp yet
 *
 * To give a socket storage, and to take it away, costs two thirds of what the policy costs a connection: 0.9 us. A
 * connection to a destination that is no container's, which the container may reach as the host does, needs none:
 * nothing is translated. So a TCP socket gets its stamp at the first call that has something to note, and most that
 * connect never do.
 *
 * Whose it is says the storage of the cgroup. But a socket that accept() gave has no stamp either, and may not be
 * put to another use. It is known by what the kernel leaves in it, the device of its first packet, where
 * IP_MULTICAST_IF and IPV6_MULTICAST_IF have theirs (tcp_v4_syn_recv_sock(), tcp_v6_syn_recv_sock()). A stream has
 * neither option (options.bpf.h), so that it stays.
 */
#ifndef MADE_BPF_H
#define MADE_BPF_H

#include "kernel_sock.bpf.h"

struct ipv6_pinfo {
	int mcast_oif;
} __attribute__((preserve_access_index));

struct inet_sock {
	struct ipv6_pinfo *pinet6;
	int mc_index;
	__be16 inet_sport;
} __attribute__((preserve_access_index));

/* The direct container to whose cgroup the program is attached that runs; 0 where it is graftd's. */
static __always_inline __u32 direct_tenant(void)
{
	struct graft_direct *here = bpf_get_local_storage(&direct, 0);

	return here->tenant;
}

/* Did socket() make this TCP socket, and not accept()? */
static __always_inline bool was_made(struct bpf_sock *sk)
{
	struct inet_sock *inet;
	struct ipv6_pinfo *six;

	if (sk->protocol != IPPROTO_TCP)
		return false;
	inet = (struct inet_sock *)bpf_skc_to_tcp_sock(sk);
	if (!inet)
		return false;
	if (sk->family != AF_INET6)
		return !inet->mc_index;
	six = inet->pinet6;
	return six && !six->mcast_oif;
}

/* was_made() in programs whose context is the kernel's socket. */
static __always_inline bool made_by_program(struct bpf_sock *sk)
{
	struct inet_sock *inet = (struct inet_sock *)sk;

	if (sk->protocol != IPPROTO_TCP)
		return false;
	if (sk->family != AF_INET6)
		return !BPF_CORE_READ(inet, mc_index);
	return !BPF_CORE_READ(inet, pinet6, mcast_oif);
}

/* was_made() in programs of socket options, which have no helper to say so: the address of the socket is read as a
 * number, with which the verifier allows arithmetic. */
static __always_inline bool was_made_says_option(struct bpf_sock *sk)
{
	struct bpf_sock *number = NULL;

	return !bpf_probe_read_kernel(&number, sizeof(number), &sk) && sk->protocol == IPPROTO_TCP &&
	       (sk->family == AF_INET6 ? !BPF_CORE_READ((struct inet_sock *)number, pinet6, mcast_oif)
				       : !BPF_CORE_READ((struct inet_sock *)number, mc_index));
}

/*
 * Stamp a socket that a program of the direct container @tenant has made. The stamp is whole when it is first seen:
 * another thread's call may be under way, to which one without a tenant would be GRAFT_EXEMPT's.
 */
static __noinline struct graft_stamp *stamp_made(struct bpf_sock *sk, __u32 tenant)
{
	struct graft_stamp stamp = {.tenant = tenant, .flags = STAMP_COUNTED | STAMP_VOUCHED};

	if (sk->protocol == IPPROTO_TCP)
		stamp.flags |= STAMP_LATE;
	return bpf_sk_storage_get(&stamps, sk, &stamp, BPF_SK_STORAGE_GET_F_CREATE);
}

/* The stamp of a socket on which a call is made that has something to note there; NULL: it is none of a program's. */
static __always_inline struct graft_stamp *stamp_for(struct bpf_sock *sk)
{
	struct graft_stamp *stamp = stamp_of(sk);
	__u32 tenant;

	if (stamp || !sk)
		return stamp;
	tenant = direct_tenant();
	return tenant && was_made(sk) ? stamp_made(sk, tenant) : NULL;
}

/* stamp_for() in programs of socket options. */
static __always_inline struct graft_stamp *stamp_for_option(struct bpf_sock *sk)
{
	__u32 tenant = direct_tenant();

	return tenant && was_made_says_option(sk) ? stamp_made(sk, tenant) : NULL;
}

#endif
