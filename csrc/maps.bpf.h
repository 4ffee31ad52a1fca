/* SPDX-License-Identifier: GPL-2.0 */
/*
 * maps.bpf.h - the maps, and whose a socket or an address is
 */
#ifndef MAPS_BPF_H
#define MAPS_BPF_H

#include "address.bpf.h"

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

/* The inode of graftd's pid namespace; 0: the first, whose numbers need no translation (pids.bpf.h). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} pidns_of_graftd SEC(".maps");

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
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_ports);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_numbers);
} numbers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_held);
} held SEC(".maps");

/* An entry ends with the last socket of it; CLAIMS_MAX sockets are a tenant's. What is beyond is not seen to be in
 * the way. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct graft_claim_key);
	__type(value, struct graft_claim);
} claims SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u64);
} claiming SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_claimed);
} claimed SEC(".maps");

/* what its maker would have set on a direct container's socket: the pid of who sets it now, or GRAFT_PREPARED
 * (late.bpf.h) */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} prepared SEC(".maps");

/* graftd binds the socket now, because it is to listen: its pid while it does (late.bpf.h) */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} settling SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_peers);
} peers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_told);
} told SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_met);
} met SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_told);
} called SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_asked);
} asked SEC(".maps");

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
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1048576);
	__type(key, struct graft_allowed_key);
	__type(value, __u32);
} allowed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1048576);
	__type(key, struct graft_endpoint_key);
	__type(value, struct graft_endpoint);
} endpoints SEC(".maps");

/* graftd bounds what is one tenant's */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1048576);
	__type(key, struct graft_pinned_key);
	__type(value, __u64);
} pinned SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct graft_pinned_key);
	__type(value, __u32);
} learnt SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32[4]);
	__type(value, struct graft_holder);
} holders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct graft_owned);
} owned SEC(".maps");

/* likewise, of the addresses at which a listener is published that is bound to another one (share_listener()) */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct graft_owned);
} shared SEC(".maps");

/* the addresses that devices of the host's netns have, but for the containers' own */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32[4]);
	__type(value, __u32);
} locals SEC(".maps");

/* the tenant of a slice number */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u32);
} slices SEC(".maps");

/* graftd makes the entry of a tenant, the programs fill it */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_loopbacks);
} loopbacks SEC(".maps");

/* each entry is of sockets that are counted in `ports`, and ends with the last of them */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct graft_abroad_key);
	__type(value, struct graft_abroad);
} abroad SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_abroad_place);
} abroad_place SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct graft_abroad_key);
	__type(value, __u32);
} abroad_ports SEC(".maps");

int graft_forward(struct bpf_sk_lookup *ctx);

/* The program in which those of the containers' netns end (entrance.bpf.c). A new graftd exchanges it for all. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__array(values, int(struct bpf_sk_lookup *));
} forwards SEC(".maps") = {.values = {&graft_forward}};

/* graftd writes it; the key is the cgroup's number */
struct {
	__uint(type, BPF_MAP_TYPE_CGROUP_STORAGE);
	__type(key, __u64);
	__type(value, struct graft_direct);
} direct SEC(".maps");

/* the cgroups of direct containers by their numbers, and whose they are */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, __u32);
} direct_cgroups SEC(".maps");

/* A container has an entry for each `graft run` that has joined it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct graft_leash);
} leashes SEC(".maps");

/* LISTENERS_MAX entries are a tenant's. An entry ends with its socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 262144);
	__type(key, struct graft_listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_listening);
} listening SEC(".maps");

/* UDP_PORTS_MAX entries are a tenant's */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct graft_udp_key);
	__type(value, __u32);
} udp_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_udp_place);
} udp_place SEC(".maps");

/* how many entries in `listeners` a socket has made */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
} listed SEC(".maps");

/* By port: of UDP, because a container's TCP has no port on the host that nobody has published. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u32);
} reserved SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct graft_service_key);
	__type(value, __u32);
} services SEC(".maps");

/* as many entries as there are keys: two protocols, 65536 ports */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct graft_client_key);
	__type(value, __u32);
} client_ports SEC(".maps");

/* each entry is of a socket that is counted in `ports`, and ends with it */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct graft_dynamic_key);
	__type(value, __u32);
} dynamic_ports SEC(".maps");

/* SERVED_MAX entries are a tenant's */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1048576);
	__type(key, struct graft_served_key);
	__type(value, struct graft_served);
} served_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct graft_led_key);
	__type(value, struct graft_led);
} led SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LED_WORDS);
	__type(key, __u32);
	__type(value, __u64);
} led_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_askers);
} asker_tables SEC(".maps");

/* What a tenant may still send to graftd's resolver: see budget.bpf.h. */
struct graft_budget {
	struct bpf_spin_lock lock;
	__u32 pad;
	__u64 sure_at; /* ns of bpf_ktime_get_ns() */
	__u64 full_at;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_budget);
} budgets SEC(".maps");

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

/* bytes that each TCP socket of a tenant may send in a second; graftd writes it */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u32);
} rates SEC(".maps");

/* graftd makes the entry of a tenant, the programs fill it */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_traffic);
} traffic SEC(".maps");

/* likewise */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_datagrams);
} datagrams SEC(".maps");

/* likewise */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct graft_reports);
} reports SEC(".maps");

static __always_inline struct graft_stamp *stamp_on(struct bpf_sock *sk)
{
	return sk ? bpf_sk_storage_get(&stamps, sk, NULL, 0) : NULL;
}

/* With MPTCP the address hooks run on a subflow, and the stamp is on the connection above it. */
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

static __always_inline bool in_connection(const struct bpf_sock *sk)
{
	return sk && sk->state != BPF_TCP_CLOSE && sk->state != BPF_TCP_LISTEN;
}

static __always_inline struct graft_holder *holder_of(const struct graft_addr *a)
{
	return bpf_map_lookup_elem(&holders, a->ip);
}

static __always_inline struct graft_tenant *tenant_of(struct graft_stamp *stamp)
{
	__u32 id = stamp->tenant;

	return bpf_map_lookup_elem(&tenants, &id);
}

static __always_inline struct graft_usage *usage_of(struct graft_stamp *stamp)
{
	__u32 id = stamp->tenant;

	return bpf_map_lookup_elem(&usage, &id);
}

#endif
