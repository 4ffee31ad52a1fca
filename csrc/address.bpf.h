/* SPDX-License-Identifier: GPL-2.0 */
/*
 * address.bpf.h - one form of address for both families: IPv4 is ::ffff:a.b.c.d
 */
#ifndef ADDRESS_BPF_H
#define ADDRESS_BPF_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

#define AF_UNSPEC 0
#define AF_INET 2
#define AF_INET6 10

#define MAPPED bpf_htonl(0xffff)

/*
 * A field of a context, to be loaded before any branch: clang computes one address for the fields of both families
 * where it can, and the verifier refuses a context that has been computed with.
 */
#define FIELD(field) (*(volatile __u32 *)&(field))

static __always_inline bool is_v4(const struct graft_addr *a)
{
	return a->ip[0] == 0 && a->ip[1] == 0 && a->ip[2] == MAPPED;
}

static __always_inline void set_v4(struct graft_addr *a, __be32 ip)
{
	a->ip[0] = 0;
	a->ip[1] = 0;
	a->ip[2] = MAPPED;
	a->ip[3] = ip;
}

static __always_inline bool same_ip(const __u32 *a, const __u32 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

static __always_inline bool same_addr(const struct graft_addr *a, const struct graft_addr *b)
{
	return a->port == b->port && same_ip(a->ip, b->ip);
}

/* The wildcard: 0.0.0.0, ::ffff:0.0.0.0 or :: */
static __always_inline bool is_any(const __u32 *ip)
{
	return ip[0] == 0 && ip[1] == 0 && ip[3] == 0 && (ip[2] == 0 || ip[2] == MAPPED);
}

/* [::], which takes IPv4 as well, but for IPV6_V6ONLY */
static __always_inline bool is_any6(const __u32 *ip)
{
	return !ip[0] && !ip[1] && !ip[2] && !ip[3];
}

/* Put the wildcard of its family there. */
static __always_inline void to_wildcard(struct graft_addr *a)
{
	if (is_v4(a))
		set_v4(a, 0);
	else
		__builtin_memset(a->ip, 0, sizeof(a->ip));
}

/* 224.0.0.0/4, 255.255.255.255 or ff00::/8: who answers is not known before */
static __always_inline bool names_a_group(const struct graft_addr *a)
{
	if (!is_v4(a))
		return bpf_ntohl(a->ip[0]) >> 24 == 0xff;
	return bpf_ntohl(a->ip[3]) >> 28 == 0xe || a->ip[3] == ~0u;
}

/* 127.0.0.0/8 or ::1 */
static __always_inline bool is_loopback(const struct graft_addr *a)
{
	if (is_v4(a))
		return (a->ip[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return a->ip[0] == 0 && a->ip[1] == 0 && a->ip[2] == 0 && a->ip[3] == bpf_htonl(1);
}

static __always_inline void set_loopback(struct graft_addr *a)
{
	if (is_v4(a)) {
		a->ip[3] = bpf_htonl(0x7f000001);
		return;
	}
	a->ip[0] = 0;
	a->ip[1] = 0;
	a->ip[2] = 0;
	a->ip[3] = bpf_htonl(1);
}

/* Put the name there by which a program has called @a; false: by its own. */
__noinline int find_told(struct graft_told *of, struct graft_addr *a)
{
	if (!of || !a)
		return false;
	for (int n = 0; n < TOLD_MAX; n++)
		if (same_addr(a, &of->of[n].real)) {
			*a = of->of[n].asked;
			return true;
		}
	return false;
}

/* Remember that @real is called @asked. */
static __always_inline void put_told(struct graft_told *of, const struct graft_addr *real,
				     const struct graft_addr *asked)
{
	__u32 at = of->next++ % TOLD_MAX;

	of->of[at].real = *real;
	of->of[at].asked = *asked;
}

/* A hash of an address and its port that nobody can foretell without @key. */
static __always_inline __u64 hash_addr(const struct graft_addr *a, __u32 port, __u64 key)
{
	__u64 hash = key ^ ((__u64)a->ip[0] << 32 | a->ip[1]);

	hash *= 0x9e3779b97f4a7c15ull;
	hash ^= hash >> 32 ^ ((__u64)a->ip[2] << 32 | a->ip[3]);
	hash *= 0xbf58476d1ce4e5b9ull;
	hash ^= hash >> 29 ^ port;
	hash *= 0x94d049bb133111ebull;
	hash ^= hash >> 32 ^ key;
	hash *= 0x9e3779b97f4a7c15ull;
	return hash ^ hash >> 32;
}

static __always_inline void load4(struct bpf_sock_addr *ctx, struct graft_addr *a)
{
	set_v4(a, ctx->user_ip4);
	a->port = bpf_ntohs((__u16)ctx->user_port);
}

static __always_inline void load6(struct bpf_sock_addr *ctx, struct graft_addr *a)
{
	a->ip[0] = ctx->user_ip6[0];
	a->ip[1] = ctx->user_ip6[1];
	a->ip[2] = ctx->user_ip6[2];
	a->ip[3] = ctx->user_ip6[3];
	a->port = bpf_ntohs((__u16)ctx->user_port);
}

/* The socket's own end, as bind() or connect() has set it; the wildcard if it has none. */
static __always_inline void load_source(const struct bpf_sock_addr *ctx, struct graft_addr *a, bool six)
{
	if (!ctx->sk) {
		set_v4(a, 0);
		return;
	}
	if (!six) {
		set_v4(a, ctx->sk->src_ip4);
		return;
	}
	a->ip[0] = ctx->sk->src_ip6[0];
	a->ip[1] = ctx->sk->src_ip6[1];
	a->ip[2] = ctx->sk->src_ip6[2];
	a->ip[3] = ctx->sk->src_ip6[3];
}

static __always_inline void store4(struct bpf_sock_addr *ctx, const struct graft_addr *a)
{
	ctx->user_ip4 = a->ip[3];
	ctx->user_port = bpf_htons((__u16)a->port);
}

static __always_inline void store6(struct bpf_sock_addr *ctx, const struct graft_addr *a)
{
	ctx->user_ip6[0] = a->ip[0];
	ctx->user_ip6[1] = a->ip[1];
	ctx->user_ip6[2] = a->ip[2];
	ctx->user_ip6[3] = a->ip[3];
	ctx->user_port = bpf_htons((__u16)a->port);
}

#endif
