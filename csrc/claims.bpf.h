/* SPDX-License-Identifier: GPL-2.0 */
/*
 * claims.bpf.h - which ports the sockets of a container are bound to, by what their programs asked for
 *
 * The kernel sees that two binds are in each other's way where both are at one place of the host's. What a
 * container's programs bind is at several places (the slice, the host's port that publishes it), or at none yet
 * (late.bpf.h), and graft sets SO_REUSEADDR for what it binds. So it is looked at here, by the kernel's rules
 * (inet_csk_bind_conflict() of net/ipv4/inet_connection_sock.c): a bind to an address is in the way of one to the
 * same address and to the wildcard, unless both sockets have set SO_REUSEADDR and the first one does not listen, or
 * both have set SO_REUSEPORT. Of UDP, of which none listens, the sockets of abroad.bpf.h have claims.
 */
#ifndef CLAIMS_BPF_H
#define CLAIMS_BPF_H

#include "maps.bpf.h"

/* By what the program lets others have the port of this socket: STAMP_REUSEADDR, STAMP_REUSEPORT. */
static __always_inline __u32 lets_share(const struct graft_stamp *stamp)
{
	return stamp->flags & (STAMP_REUSEADDR | STAMP_REUSEPORT);
}

static __always_inline struct graft_claim_key claim_key(__u32 tenant, const struct graft_addr *at, __u32 kind)
{
	struct graft_claim_key key = {.tenant = tenant, .port = at->port, .kind = kind};

	if (kind % CLAIM_UDP == CLAIM_AT)
		__builtin_memcpy(key.ip, at->ip, sizeof(key.ip));
	return key;
}

/* Is there a claim of this kind that is in the way? @shares: of a socket that lets others have its port so. */
__noinline int meets_claim(__u32 tenant, struct graft_addr *at, __u32 kind, __u32 shares)
{
	struct graft_claim_key key;
	struct graft_claim *of;

	if (!at)
		return false;
	key = claim_key(tenant, at, kind);
	of = bpf_map_lookup_elem(&claims, &key);
	if (!of || (__s64)of->all <= 0)
		return false;
	return !(shares & STAMP_REUSEADDR && (__s64)of->no_reuseaddr <= 0) &&
	       !(shares & STAMP_REUSEPORT && (__s64)of->no_reuseport <= 0);
}

/* Is a socket of the container's in the way of a bind to @asked? @dual: to both wildcards. @udp: CLAIM_UDP, 0: TCP.
 */
__noinline int is_claimed(struct graft_stamp *stamp, struct graft_addr *asked, bool dual, __u32 udp)
{
	struct graft_addr wildcard = {};
	__u32 shares;

	if (!stamp || !asked || !asked->port)
		return false;
	shares = lets_share(stamp);
	if (is_any(asked->ip))
		return meets_claim(stamp->tenant, asked, udp + (is_v4(asked) ? CLAIM_ALL4 : CLAIM_ALL6), shares) ||
		       (dual && meets_claim(stamp->tenant, asked, udp + CLAIM_ALL4, shares));
	if (is_v4(asked))
		set_v4(&wildcard, 0);
	wildcard.port = asked->port;
	return meets_claim(stamp->tenant, asked, udp + CLAIM_AT, shares) ||
	       meets_claim(stamp->tenant, &wildcard, udp + CLAIM_AT, shares);
}

/* Count @by sockets at one claim, which let others have their port by @shares. */
__noinline int count_claim(__u32 tenant, struct graft_addr *at, __u32 kind, int by, __u32 shares)
{
	struct graft_claim *of, none = {};
	struct graft_claim_key key;

	if (!at)
		return 0;
	key = claim_key(tenant, at, kind);
	of = bpf_map_lookup_elem(&claims, &key);
	if (!of && by > 0) {
		bpf_map_update_elem(&claims, &key, &none, BPF_NOEXIST);
		of = bpf_map_lookup_elem(&claims, &key);
	}
	if (!of)
		return 0;
	if (!(shares & STAMP_REUSEADDR))
		__sync_fetch_and_add(&of->no_reuseaddr, (__s64)by);
	if (!(shares & STAMP_REUSEPORT))
		__sync_fetch_and_add(&of->no_reuseport, (__s64)by);
	__sync_fetch_and_add(&of->all, (__s64)by);
	if (*(volatile __s64 *)&of->all <= 0)
		bpf_map_delete_elem(&claims, &key);
	return 0;
}

/* Count @by sockets at each claim of one that is bound to @at. */
__noinline int count_claims(__u32 tenant, struct graft_claimed *mine, int by)
{
	struct graft_addr at, four = {};
	__u32 shares, udp;

	if (!mine)
		return 0;
	udp = mine->dual & CLAIM_UDP;
	at = mine->at;
	shares = mine->shares;
	count_claim(tenant, &at, udp + CLAIM_AT, by, shares);
	count_claim(tenant, &at, udp + (is_v4(&at) ? CLAIM_ALL4 : CLAIM_ALL6), by, shares);
	if (!(mine->dual & 1))
		return 0;
	set_v4(&four, 0);
	four.port = at.port;
	count_claim(tenant, &four, udp + CLAIM_AT, by, shares);
	return count_claim(tenant, &four, udp + CLAIM_ALL4, by, shares);
}

/* The socket is closed, or its bind has failed: it is in nobody's way. */
__noinline int give_claim_up(struct graft_claimed *mine, __u32 tenant)
{
	__u64 *of;

	if (!mine || !mine->at.port)
		return 0;
	count_claims(tenant, mine, -1);
	mine->at.port = 0;
	of = bpf_map_lookup_elem(&claiming, &tenant);
	if (of)
		__sync_fetch_and_add(of, -1);
	return 0;
}

/* Claim @asked for this socket. @dual: 1 for both wildcards, and CLAIM_UDP where a UDP socket is to have a claim. */
__noinline int claim(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *asked, __u32 dual)
{
	__u64 *of, none = 0;
	struct graft_claimed *mine;
	__u32 tenant;

	if (!stamp || !asked || !asked->port || !ctx->sk || stamp->place || !tenant_of(stamp) ||
	    ctx->protocol != (dual & CLAIM_UDP ? IPPROTO_UDP : IPPROTO_TCP))
		return 0;
	mine = bpf_sk_storage_get(&claimed, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!mine)
		return 0;
	tenant = stamp->tenant;
	give_claim_up(mine, tenant);
	bpf_map_update_elem(&claiming, &tenant, &none, BPF_NOEXIST);
	of = bpf_map_lookup_elem(&claiming, &tenant);
	if (!of || (__s64)__sync_fetch_and_add(of, 1) >= CLAIMS_MAX) {
		if (of)
			__sync_fetch_and_add(of, -1);
		return 0;
	}
	mine->at = *asked;
	mine->dual = dual;
	mine->shares = lets_share(stamp);
	return count_claims(stamp->tenant, mine, 1);
}

/* The socket listens: by SO_REUSEADDR nobody else may have its port any more. */
static __always_inline void claim_alone(struct bpf_sock *sk, const struct graft_stamp *stamp)
{
	struct graft_claimed *mine = bpf_sk_storage_get(&claimed, sk, NULL, 0);

	if (!mine || !mine->at.port || !(mine->shares & STAMP_REUSEADDR))
		return;
	count_claims(stamp->tenant, mine, -1);
	mine->shares &= ~STAMP_REUSEADDR;
	count_claims(stamp->tenant, mine, 1);
}

#endif
