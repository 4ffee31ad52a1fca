/* SPDX-License-Identifier: GPL-2.0 */
/*
 * kernel_sock.bpf.h - what the kernel's own socket says, where a hook's context does not show it
 *
 * A hook that notes what a program asks for is wrong where the kernel then refuses it, where it reads the program's
 * memory again, and where a call runs no hook (i386). So the socket is read.
 */
#ifndef KERNEL_SOCK_BPF_H
#define KERNEL_SOCK_BPF_H

#include "maps.bpf.h"
#include <bpf/bpf_core_read.h>

struct sock_common {
	unsigned char skc_reuseport : 1;
	unsigned char skc_ipv6only : 1;
} __attribute__((preserve_access_index));

/* May this socket be bound to IPv4 by a bind to [::]? That is, is it of AF_INET6, without IPV6_V6ONLY? */
static __always_inline bool takes_ipv4(struct bpf_sock *sk)
{
	struct sock_common *six;

	if (!sk || sk->family != AF_INET6)
		return false;
	six = (struct sock_common *)bpf_skc_to_tcp6_sock(sk);
	if (!six)
		six = (struct sock_common *)bpf_skc_to_udp6_sock(sk);
	return !six || !BPF_CORE_READ_BITFIELD(six, skc_ipv6only);
}

/* Does this TCP socket have SO_REUSEPORT? */
static __always_inline bool shares_port(struct bpf_sock *sk)
{
	struct sock_common *tcp = sk ? (struct sock_common *)bpf_skc_to_tcp_sock(sk) : NULL;

	return tcp && BPF_CORE_READ_BITFIELD(tcp, skc_reuseport);
}

/* takes_ipv4() in cgroup/post_bind6, whose context is the kernel's socket, and which has no helper to say so. */
static __always_inline bool bound_takes_ipv4(struct bpf_sock *sk)
{
	return !BPF_CORE_READ_BITFIELD_PROBED((struct sock_common *)sk, skc_ipv6only);
}

struct sock_reuseport {
	__u16 num_socks;
} __attribute__((preserve_access_index));

typedef struct {
	__u32 val;
} kuid_t;

struct sock___owned {
	kuid_t sk_uid;
} __attribute__((preserve_access_index));

/* The uid of a socket, among whose sockets SO_REUSEPORT works. Its address is read as a number (see made.bpf.h). */
static __always_inline __u32 uid_of(struct bpf_sock *sk)
{
	struct sock___owned *number = NULL;

	if (!sk || bpf_probe_read_kernel(&number, sizeof(number), &sk))
		return 0;
	return BPF_CORE_READ(number, sk_uid.val);
}

struct sock___grouped {
	struct sock_reuseport *sk_reuseport_cb;
} __attribute__((preserve_access_index));

/* Has SO_REUSEPORT let this socket have a port that another socket has? In cgroup/post_bind, as above. */
static __always_inline bool bound_shares(struct bpf_sock *sk)
{
	return BPF_CORE_READ((struct sock___grouped *)sk, sk_reuseport_cb, num_socks) > 1;
}

#endif
