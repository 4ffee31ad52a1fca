/* SPDX-License-Identifier: GPL-2.0 */
/*
 * core.bpf.h - the maps, how a refusal is reported, whose socket it is, and one form for both families
 */
#ifndef CORE_BPF_H
#define CORE_BPF_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "graft.h"
#include "slice.bpf.h"

#define AF_UNSPEC 0
#define AF_INET 2
#define AF_INET6 10
#define EPERM 1
#define ENOENT 2
#define EINVAL 22
#define EADDRINUSE 98
#define EADDRNOTAVAIL 99
#define ENETUNREACH 101
#define ECONNREFUSED 111

/* Return value of a bind hook: allowed, and a port below 1024 needs no CAP_NET_BIND_SERVICE. */
#define BIND_ALLOW 3
#define ALLOW 1
#define DENY 0

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_stamp);
} stamps SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_family);
} families SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct graft_config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_tenant);
} tenants SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_usage);
} usage SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1048576);
	__type(key, struct graft_ingress_key);
	__type(value, struct graft_ingress);
} ingress SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1048576);
	__type(key, struct graft_egress_key);
	__type(value, struct graft_egress);
} egress SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32[4]);
	__type(value, struct graft_owner);
} addresses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct graft_service_key);
	__type(value, __u32);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct graft_client_key);
	__type(value, __u32);
} clients SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct graft_dynamic_key);
	__type(value, __u32);
} dynamic SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct graft_served_key);
	__type(value, struct graft_served);
} served SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct graft_asker_key);
	__type(value, __u64);
} askers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct graft_counter_key);
	__type(value, __u64);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} denials SEC(".maps");

/* ---- reporting ---- */

/* @comm: may this program type ask for the command's name? sockops may not on Linux 6.1. */
static __always_inline void event(__u32 tenant, __u32 op_reason, int error, __u32 proto,
				  const struct graft_addr *addr, const struct graft_addr *real, bool comm)
{
	struct graft_denial *told = bpf_ringbuf_reserve(&denials, sizeof(*told), 0);

	if (!told)
		return;
	told->tenant = tenant;
	told->op = op_reason >> 16;
	told->reason = op_reason & 0xffff;
	told->error = error;
	told->proto = proto;
	__builtin_memset(&told->addr, 0, sizeof(told->addr));
	if (addr)
		told->addr = *addr;
	__builtin_memset(&told->real, 0, sizeof(told->real));
	if (real)
		told->real = *real;
	__builtin_memset(told->comm, 0, sizeof(told->comm));
	if (comm)
		bpf_get_current_comm(told->comm, sizeof(told->comm));
	bpf_ringbuf_submit(told, 0);
}

/* Count a refusal and tell of it. */
static __always_inline void report(__u32 tenant, __u32 op_reason, int error, __u32 proto,
				   const struct graft_addr *addr, bool comm)
{
	struct graft_counter_key key = {.tenant = tenant, .op = op_reason >> 16, .reason = op_reason & 0xffff};
	__u64 one = 1, *count;

	count = bpf_map_lookup_elem(&counters, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&counters, &key, &one, BPF_NOEXIST);
	event(tenant, op_reason, error, proto, addr, NULL, comm);
}

/* Refuse the call with @error, and say so. */
static __noinline int deny(__u32 tenant, __u32 op_reason, int error, __u32 proto, struct graft_addr *addr)
{
	report(tenant, op_reason, error, proto, addr, true);
	bpf_set_retval(-error);
	return DENY;
}

#define DENIED(op, reason) ((op) << 16 | (reason))

/* Tell of a conversion, where the tenant wants that: @asked became, or leaves from, @real. */
static __noinline int converted(__u32 id, struct graft_tenant *tenant, __u32 op_proto, struct graft_addr *asked,
				struct graft_addr *real)
{
	if (tenant && asked && real && tenant->flags & TENANT_VERBOSE)
		event(id, DENIED(op_proto >> 16, REASON_CONVERTED), 0, op_proto & 0xffff, asked, real, true);
	return 0;
}

/* ---- whose socket is it ---- */

static __always_inline struct graft_stamp *stamp_on(struct bpf_sock *sk)
{
	return sk ? bpf_sk_storage_get(&stamps, sk, NULL, 0) : NULL;
}

/* MPTCP: the address hooks run on a subflow, the stamp is on the connection above it. */
static __always_inline struct graft_stamp *stamp_of(struct bpf_sock *sk)
{
	struct graft_stamp *stamp;
	struct mptcp_sock *msk;

	if (!sk)
		return NULL;
	stamp = stamp_on(sk);
	if (stamp)
		return stamp;
	msk = bpf_skc_to_mptcp_sock(sk);
	if (!msk)
		return NULL;
	return bpf_sk_storage_get(&stamps, msk, NULL, 0);
}

static __always_inline struct graft_owner *owner_of(const struct graft_addr *a)
{
	return bpf_map_lookup_elem(&addresses, a->ip);
}

static __always_inline struct graft_tenant *tenant_of(struct graft_stamp *stamp)
{
	__u32 id = stamp->tenant;

	return bpf_map_lookup_elem(&tenants, &id);
}

/* An accepted socket that was disconnected, or whatever else graftd has not stamped. */
static __always_inline int unstamped(struct bpf_sock_addr *ctx, __u32 op, struct graft_addr *a)
{
	return deny(GRAFT_OWN, DENIED(op, REASON_UNSTAMPED), EPERM, ctx->protocol, a);
}

static __always_inline struct graft_usage *usage_of(struct graft_stamp *stamp)
{
	__u32 id = stamp->tenant;

	return bpf_map_lookup_elem(&usage, &id);
}

/* ---- one form for both families ---- */

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

/* Where the socket itself is bound, or connected from. */
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
