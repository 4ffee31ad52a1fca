// SPDX-License-Identifier: GPL-2.0
/*
 * graft.bpf.c - the policy, inside the very calls that bind, connect and send
 *
 * Theory of operation
 *
 * A grafted socket is made by graftd in the host's network namespace and stamped (socket storage) with
 * its tenant before the container sees it. The programs here run for sockets created in graftd's cgroup,
 * wherever they are used later. An accepted socket inherits the cgroup but not the stamp, which costs a
 * server nothing: it may do what a connection does, the option policy holds for it, and any other use (it can
 * be disconnected and connected, bound or made to listen again) is refused. graftd's own sockets carry the
 * stamp GRAFT_OWN. The guard alone sits on the cgroup root and runs for everybody: it keeps unstamped sockets out of
 * the containers' private loopback.
 *
 * bind      an ingress rule names the host address that a bind to ADDR:PORT becomes; loopback and wildcard
 *           binds without a rule go to the tenant's block (slice.bpf.h); anything else is refused.
 * connect,  loopback destinations are looked up among the tenant's own sockets: a socket table look-up
 * send      (bpf_sk_lookup_*) and its stamp say whose server it is, so no table of bound ports has to be
 *           kept true, and a host's wildcard listener is never taken for the container's. Everything else
 *           is matched against the egress rules, and leaves from the rule's address.
 * get*name, show what the program asked for, from the stamp.
 * recvmsg
 *
 * Facts that this rests on (each proved by a test under tests/kernel): an accepted socket is in its listener's
 * cgroup; v4-mapped addresses arrive in the *6 hooks for bind and connect, in sendmsg4 for sends; MPTCP runs the
 * hooks on an unstamped subflow; listen() without bind runs no hook but sockops'; a connected send with a
 * control message arrives with family 0.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "graft.h"
#include "options.bpf.h"
#include "slice.bpf.h"

#define AF_UNSPEC 0
#define AF_INET 2
#define AF_INET6 10
#define EPERM 1
#define EINVAL 22
#define EADDRNOTAVAIL 99
#define ENETUNREACH 101
#define ECONNREFUSED 111

/* Return value of a bind hook: allowed, and a port below 1024 needs no CAP_NET_BIND_SERVICE. */
#define BIND_ALLOW 3
#define ALLOW 1
#define DENY 0

char LICENSE[] SEC("license") = "GPL";

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct graft_stamp);
} stamps SEC(".maps");

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
	__type(key, struct graft_service_key);
	__type(value, __u32);
} services SEC(".maps");

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
static __always_inline void report(__u32 tenant, __u32 op_reason, int error, __u32 proto,
				   const struct graft_addr *addr, bool comm)
{
	struct graft_counter_key key = {.tenant = tenant, .op = op_reason >> 16, .reason = op_reason & 0xffff};
	struct graft_denial *event;
	__u64 one = 1, *count;

	count = bpf_map_lookup_elem(&counters, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&counters, &key, &one, BPF_NOEXIST);
	event = bpf_ringbuf_reserve(&denials, sizeof(*event), 0);
	if (event) {
		event->tenant = tenant;
		event->op = key.op;
		event->reason = key.reason;
		event->error = error;
		event->proto = proto;
		__builtin_memset(&event->addr, 0, sizeof(event->addr));
		if (addr)
			event->addr = *addr;
		__builtin_memset(event->comm, 0, sizeof(event->comm));
		if (comm)
			bpf_get_current_comm(event->comm, sizeof(event->comm));
		bpf_ringbuf_submit(event, 0);
	}
}

/* Refuse the call with @error, and say so. */
static __noinline int deny(__u32 tenant, __u32 op_reason, int error, __u32 proto, struct graft_addr *addr)
{
	report(tenant, op_reason, error, proto, addr, true);
	bpf_set_retval(-error);
	return DENY;
}

#define DENIED(op, reason) ((op) << 16 | (reason))

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

/* ---- rules ---- */

static __noinline struct graft_ingress *ingress_rule(__u32 tenant, __u32 proto, struct graft_addr *a)
{
	struct graft_ingress_key key = {.prefixlen = INGRESS_FIXED_BITS + 16, .tenant = tenant};

	if (!a)
		return NULL;
	key.proto = proto;
	key.family = is_v4(a) ? GRAFT_INET : GRAFT_INET6;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	key.port_be = bpf_htons((__u16)a->port);
	return bpf_map_lookup_elem(&ingress, &key);
}

static __always_inline __u32 ingress_port(const struct graft_ingress *rule, __u32 port)
{
	return rule->span ? rule->port + port - rule->first : rule->port;
}

static __noinline struct graft_egress *egress_rule(__u32 tenant, struct graft_addr *a)
{
	struct graft_egress_key key = {.prefixlen = EGRESS_FIXED_BITS + 128, .tenant = tenant};

	if (!a)
		return NULL;
	key.family = is_v4(a) ? GRAFT_INET : GRAFT_INET6;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	return bpf_map_lookup_elem(&egress, &key);
}

/* ---- the container's loopback ---- */

/* OWN_CHOSEN: the container's, at a port that the kernel chose, so at SLICE_DYNAMIC under its own number. */
enum { NOBODY, OWN, OWN_CHOSEN, ALIEN };

/*
 * Who would get what is sent to @a, an address of the host? @from finds connected UDP sockets.
 *
 * Not static: the verifier then proves it (and find_own) once instead of at every call, which takes the
 * larger programs from 559,000 instructions to 5,000 on Linux 6.1.
 */
__noinline int receiver(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *a, struct graft_addr *from)
{
	struct bpf_sock_tuple tuple = {};
	struct graft_stamp *stamp;
	struct bpf_sock *sk;
	int who = ALIEN;
	__u32 size;

	if (!a || !from)
		return NOBODY;
	if (is_v4(a)) {
		tuple.ipv4.saddr = from->ip[3];
		tuple.ipv4.sport = bpf_htons((__u16)from->port);
		tuple.ipv4.daddr = a->ip[3];
		tuple.ipv4.dport = bpf_htons((__u16)a->port);
		size = sizeof(tuple.ipv4);
		if (ctx->protocol == IPPROTO_UDP)
			sk = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
		else
			sk = bpf_sk_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, from->ip, sizeof(tuple.ipv6.saddr));
		tuple.ipv6.sport = bpf_htons((__u16)from->port);
		__builtin_memcpy(tuple.ipv6.daddr, a->ip, sizeof(tuple.ipv6.daddr));
		tuple.ipv6.dport = bpf_htons((__u16)a->port);
		size = sizeof(tuple.ipv6);
		if (ctx->protocol == IPPROTO_UDP)
			sk = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
		else
			sk = bpf_sk_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return NOBODY;
	stamp = stamp_of(sk);
	if (stamp && stamp->tenant == tenant)
		who = stamp->flags & STAMP_INGRESS || stamp->local.port ? OWN : OWN_CHOSEN;
	bpf_sk_release(sk);
	return who;
}

/* Where this socket sends from when it sends to the container's own loopback. */
static __always_inline void sender(struct bpf_sock_addr *ctx, struct graft_addr *from, bool v4, __u32 slot)
{
	struct bpf_sock *sk = ctx->sk;

	slice_ip(from, v4, slot, SLICE_DYNAMIC);
	from->port = 0;
	if (!sk)
		return;
	from->port = sk->src_port;
	if (v4 && sk->src_ip4)
		set_v4(from, sk->src_ip4);
	if (!v4 && (sk->src_ip6[0] || sk->src_ip6[3])) {
		from->ip[0] = sk->src_ip6[0];
		from->ip[1] = sk->src_ip6[1];
		from->ip[2] = sk->src_ip6[2];
		from->ip[3] = sk->src_ip6[3];
	}
}

/* The host address of a port that the container published, if one of its sockets is there. */
static __noinline bool published(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *asked, __u32 slot,
				 struct graft_addr *from)
{
	struct graft_dynamic_key key = {.tenant = tenant};
	struct graft_ingress *rule;
	struct graft_addr found;
	__u32 *port;

	if (!asked)
		return false;
	rule = ingress_rule(tenant, ctx->protocol, asked);
	if (!rule)
		return false;
	__builtin_memcpy(found.ip, rule->ip, sizeof(found.ip));
	found.port = ingress_port(rule, asked->port);
	if (!found.port) {
		key.proto = ctx->protocol;
		key.family = is_v4(asked) ? GRAFT_INET : GRAFT_INET6;
		key.port = asked->port;
		port = bpf_map_lookup_elem(&dynamic, &key);
		if (!port)
			return false;
		found.port = *port;
	}
	if (is_any(found.ip))
		slice_ip(&found, is_v4(asked), slot, SLICE_DYNAMIC);
	if (receiver(ctx, tenant, &found, from) != OWN)
		return false;
	*asked = found;
	return true;
}

/*
 * Find the container's own server for the loopback destination @a and put its real address there.
 * In the order of what is most exact: a private bind to this port, a port that the kernel chose, a
 * published port, all of one family.
 */
__noinline int find_own(struct bpf_sock_addr *ctx, __u32 tenant, struct graft_addr *a, __u32 slot)
{
	struct graft_addr from;
	struct graft_addr try;
	__u32 port;
	int who;
	bool v4;

	if (!a)
		return NOBODY;
	v4 = is_v4(a);
	sender(ctx, &from, v4, slot);
	port = a->port;
	slice_addr(&try, v4, slot, port);
	who = receiver(ctx, tenant, &try, &from);
	if (who == OWN) {
		*a = try;
		return OWN;
	}
	slice_ip(&try, v4, slot, SLICE_DYNAMIC);
	try.port = port;
	if (receiver(ctx, tenant, &try, &from) == OWN_CHOSEN) {
		*a = try;
		return OWN;
	}
	if (v4)
		set_v4(&try, 0);
	else
		__builtin_memset(try.ip, 0, sizeof(try.ip));
	if (published(ctx, tenant, &try, slot, &from)) {
		*a = try;
		return OWN;
	}
	try = *a;
	if (published(ctx, tenant, &try, slot, &from)) {
		*a = try;
		return OWN;
	}
	return who;
}

enum { LOCAL_REFUSED, LOCAL_OWN, LOCAL_HOST };

/*
 * Resolve a loopback destination. An IPv6 socket that may speak IPv4 finds the server of a dual-stack
 * bind at its IPv4 address. A UDP port where nobody listens stays the tenant's own empty address, so
 * that the sender sees what it would on any host.
 */
static __noinline int resolve_local(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				    struct graft_tenant *tenant)
{
	struct graft_service_key service = {};
	struct graft_addr asked, mapped;
	int who;

	if (!a || !stamp || !tenant)
		return LOCAL_REFUSED;
	asked = *a;
	if (is_any(asked.ip))
		set_loopback(&asked);
	*a = asked;
	who = find_own(ctx, stamp->tenant, a, tenant->slot);
	if (who == OWN)
		return LOCAL_OWN;
	if (!is_v4(&asked) && !(stamp->flags & STAMP_V6ONLY) &&
	    (ctx->protocol == IPPROTO_TCP || ctx->user_family == AF_INET6)) {
		set_v4(&mapped, bpf_htonl(0x7f000001));
		mapped.port = asked.port;
		if (find_own(ctx, stamp->tenant, &mapped, tenant->slot) == OWN) {
			*a = mapped;
			return LOCAL_OWN;
		}
	}
	service.tenant = stamp->tenant;
	service.port = asked.port;
	__builtin_memcpy(service.ip, asked.ip, sizeof(service.ip));
	if (bpf_map_lookup_elem(&services, &service)) {
		*a = asked;
		return LOCAL_HOST;
	}
	if (who == ALIEN)
		return LOCAL_REFUSED;
	slice_addr(a, is_v4(&asked), tenant->slot, asked.port);
	return LOCAL_OWN;
}

/* ---- bind ---- */

/* Accepted sockets of this server show the program's port. */
static __always_inline void note_served(__u32 tenant, const struct graft_addr *real, __u32 port)
{
	struct graft_served_key key = {.port = real->port};
	struct graft_served value = {.tenant = tenant, .port = port};

	__builtin_memcpy(key.ip, real->ip, sizeof(key.ip));
	bpf_map_update_elem(&served, &key, &value, BPF_ANY);
}

static __always_inline int bound(struct graft_stamp *stamp, const struct graft_addr *asked,
				 const struct graft_addr *real, __u32 how)
{
	stamp->local = *asked;
	stamp->local_real = *real;
	stamp->flags = (stamp->flags & ~(STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL)) | how;
	return BIND_ALLOW;
}

/*
 * Into the tenant's block. A port that the kernel has chosen for another socket of the container stands at
 * SLICE_DYNAMIC; a bind to the same number goes there too, so that the kernel decides whether both can be.
 */
static __noinline int bind_private(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				   struct graft_tenant *tenant, bool dual)
{
	struct graft_addr asked, from, chosen;
	bool v4;

	if (!a || !stamp || !tenant)
		return DENY;
	asked = *a;
	v4 = is_v4(&asked) || dual;
	slice_addr(a, v4, tenant->slot, asked.port);
	if (asked.port) {
		slice_ip(&chosen, v4, tenant->slot, SLICE_DYNAMIC);
		chosen.port = asked.port;
		sender(ctx, &from, v4, tenant->slot);
		if (receiver(ctx, stamp->tenant, &chosen, &from) == OWN_CHOSEN)
			*a = chosen;
	}
	return bound(stamp, &asked, a, STAMP_PRIVATE);
}

/* Decide a bind to @a; on success the real address is in @a. @dual: IPv6 wildcard that takes IPv4 too. */
static __noinline int decide_bind(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				  bool dual)
{
	struct graft_ingress *rule, *rule4 = NULL;
	struct graft_tenant *tenant;
	struct graft_addr asked, v4;
	__u32 proto = ctx->protocol;

	if (!a || !stamp)
		return DENY;
	tenant = tenant_of(stamp);
	if (!tenant)
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_NO_TENANT), EADDRNOTAVAIL, proto, a);
	asked = *a;
	rule = ingress_rule(stamp->tenant, proto, &asked);
	if (dual) {
		set_v4(&v4, 0);
		v4.port = asked.port;
		rule4 = ingress_rule(stamp->tenant, proto, &v4);
		if (!rule) {
			rule = rule4;
		} else if (rule4) {
			if (!is_any(rule->ip) || !is_any(rule4->ip) ||
			    ingress_port(rule, asked.port) != ingress_port(rule4, asked.port))
				return deny(stamp->tenant, DENIED(OP_BIND, REASON_DUAL_STACK), EADDRNOTAVAIL, proto,
					    a);
		} else if (is_any(rule->ip) && rule->ip[2] == 0) {
			/* [::] on the host would take IPv4 as well, which no rule allows */
			return deny(stamp->tenant, DENIED(OP_BIND, REASON_DUAL_STACK), EADDRNOTAVAIL, proto, a);
		}
	}
	if (rule) {
		__builtin_memcpy(a->ip, rule->ip, sizeof(a->ip));
		a->port = ingress_port(rule, asked.port);
		if (proto == IPPROTO_TCP && a->port)
			note_served(stamp->tenant, a, asked.port);
		return bound(stamp, &asked, a, STAMP_INGRESS);
	}
	if (!is_any(asked.ip) && !is_loopback(&asked))
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_NO_RULE), EADDRNOTAVAIL, proto, a);
	if (tenant->flags & TENANT_STRICT)
		return deny(stamp->tenant, DENIED(OP_BIND, REASON_NO_RULE), EADDRNOTAVAIL, proto, a);
	if (proto == IPPROTO_UDP && !asked.port && is_any(asked.ip) && tenant->flags & TENANT_EGRESS)
		return bound(stamp, &asked, a, STAMP_EPHEMERAL);
	return bind_private(ctx, a, stamp, tenant, dual);
}

SEC("cgroup/bind4")
int graft_bind4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;
	int verdict;

	load4(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_BIND, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	verdict = decide_bind(ctx, &a, stamp, false);
	if (verdict == BIND_ALLOW)
		store4(ctx, &a);
	return verdict & BIND_ALLOW;
}

SEC("cgroup/bind6")
int graft_bind6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;
	int verdict;

	load6(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_BIND, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	verdict = decide_bind(ctx, &a, stamp, is_any(a.ip) && !is_v4(&a) && !(stamp->flags & STAMP_V6ONLY));
	if (verdict == BIND_ALLOW)
		store6(ctx, &a);
	return verdict & BIND_ALLOW;
}

/* The port that the kernel chose for a `dynamic` endpoint: what connects to it from inside wants to know. */
static __always_inline int note_dynamic(struct bpf_sock *sk)
{
	struct graft_stamp *stamp = stamp_on(sk);
	struct graft_dynamic_key key = {};
	struct graft_addr real;
	__u32 port;

	if (!stamp || !(stamp->flags & STAMP_INGRESS) || stamp->local_real.port || !stamp->local.port)
		return ALLOW;
	port = sk->src_port;
	key.tenant = stamp->tenant;
	key.proto = sk->protocol == IPPROTO_UDP ? IPPROTO_UDP : IPPROTO_TCP;
	key.family = is_v4(&stamp->local) ? GRAFT_INET : GRAFT_INET6;
	key.port = stamp->local.port;
	bpf_map_update_elem(&dynamic, &key, &port, BPF_ANY);
	if (key.proto == IPPROTO_TCP) {
		real = stamp->local_real;
		real.port = port;
		note_served(stamp->tenant, &real, stamp->local.port);
	}
	return ALLOW;
}

SEC("cgroup/post_bind4")
int graft_post_bind4(struct bpf_sock *sk)
{
	return note_dynamic(sk);
}

SEC("cgroup/post_bind6")
int graft_post_bind6(struct bpf_sock *sk)
{
	return note_dynamic(sk);
}

/* ---- connect ---- */

static __always_inline void connected(struct graft_stamp *stamp, const struct graft_addr *asked,
				      const struct graft_addr *real)
{
	stamp->peer = *asked;
	stamp->peer_real = *real;
	stamp->flags |= STAMP_CONNECTED;
}

/* Choose the source of an unbound socket. bpf_bind() on one that has a port would fail. */
static __noinline int bind_source(struct bpf_sock_addr *ctx, struct graft_addr *source, bool mapped)
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

static __always_inline bool has_source(const struct bpf_sock *sk)
{
	return sk->src_port || sk->src_ip4;
}

/* Decide a connection to @a, from a socket of family AF_INET6 if @six; the real destination is in @a. */
static __noinline int decide_connect(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_stamp *stamp,
				     bool six)
{
	struct graft_addr asked, source;
	struct graft_tenant *tenant;
	struct graft_egress *rule;
	__u32 proto = ctx->protocol;
	__u32 id;

	if (!a || !stamp)
		return DENY;
	id = stamp->tenant;
	tenant = tenant_of(stamp);
	if (!tenant)
		return deny(id, DENIED(OP_CONNECT, REASON_NO_TENANT), ENETUNREACH, proto, a);
	asked = *a;
	if (is_loopback(&asked) || is_any(asked.ip)) {
		switch (resolve_local(ctx, a, stamp, tenant)) {
		case LOCAL_OWN:
			if (ctx->sk && !has_source(ctx->sk) && in_slices(a)) {
				slice_ip(&source, is_v4(a), tenant->slot, SLICE_DYNAMIC);
				source.port = 0;
				if (bind_source(ctx, &source, six))
					return deny(id, DENIED(OP_CONNECT, REASON_NOT_LISTENING), EADDRNOTAVAIL,
						    proto, &asked);
			}
			break;
		case LOCAL_HOST:
			break;
		default:
			return deny(id, DENIED(OP_CONNECT, REASON_NOT_LISTENING), ECONNREFUSED, proto, &asked);
		}
		connected(stamp, &asked, a);
		return ALLOW;
	}
	if (in_slices(a))
		return deny(id, DENIED(OP_CONNECT, REASON_SLICE), ENETUNREACH, proto, &asked);
	rule = egress_rule(id, a);
	if (!rule)
		return deny(id, DENIED(OP_CONNECT, REASON_NO_EGRESS), ENETUNREACH, proto, &asked);
	if (stamp->flags & STAMP_PRIVATE && ctx->sk && has_source(ctx->sk))
		return deny(id, DENIED(OP_CONNECT, REASON_PRIVATE_SOURCE), EADDRNOTAVAIL, proto, &asked);
	if (!is_any(rule->ip)) {
		__builtin_memcpy(source.ip, rule->ip, sizeof(source.ip));
		source.port = rule->port;
		if (ctx->sk && has_source(ctx->sk)) {
			if (!(stamp->flags & STAMP_CONNECTED) && !same_ip(stamp->local_real.ip, source.ip))
				return deny(id, DENIED(OP_CONNECT, REASON_WRONG_SOURCE), EADDRNOTAVAIL, proto,
					    &asked);
		} else if (bind_source(ctx, &source, six)) {
			return deny(id, DENIED(OP_CONNECT, REASON_WRONG_SOURCE), EADDRNOTAVAIL, proto, &asked);
		}
	}
	connected(stamp, &asked, a);
	return ALLOW;
}

SEC("cgroup/connect4")
int graft_connect4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;

	load4(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_CONNECT, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	if (!decide_connect(ctx, &a, stamp, false))
		return DENY;
	store4(ctx, &a);
	return ALLOW;
}

SEC("cgroup/connect6")
int graft_connect6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a;

	load6(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_CONNECT, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	if (!decide_connect(ctx, &a, stamp, true))
		return DENY;
	store6(ctx, &a);
	return ALLOW;
}

/* ---- UDP sends ---- */

static __always_inline bool asked_us(__u32 tenant, const struct graft_addr *a)
{
	struct graft_asker_key key = {.tenant = tenant, .port = a->port};

	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	return bpf_map_lookup_elem(&askers, &key) != NULL;
}

/*
 * Decide a datagram to @a. @bound is the socket's own address, unspecified if it has none. @source is what
 * the kernel would use: @bound, or what a control message asked for. A program may choose among the host's
 * addresses, but never a loopback one: that would make it look like another container's neighbour.
 */
static __noinline int decide_send(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_addr *source,
				  struct graft_addr *bound)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_tenant *tenant;
	struct graft_egress *rule;
	struct graft_addr asked;
	__u32 id;

	if (!a || !source || !bound || !stamp)
		return DENY;
	id = stamp->tenant;
	tenant = tenant_of(stamp);
	if (!tenant)
		return deny(id, DENIED(OP_SEND, REASON_NO_TENANT), ENETUNREACH, IPPROTO_UDP, a);
	asked = *a;
	if (is_loopback(source) || in_slices(source))
		__builtin_memcpy(source->ip, bound->ip, sizeof(source->ip));
	if (is_loopback(&asked) || is_any(asked.ip)) {
		switch (resolve_local(ctx, a, stamp, tenant)) {
		case LOCAL_OWN:
			__builtin_memcpy(source->ip, bound->ip, sizeof(source->ip));
			if (in_slices(a) && is_any(bound->ip))
				slice_ip(source, is_v4(a), tenant->slot, SLICE_DYNAMIC);
			break;
		case LOCAL_HOST:
			break;
		default:
			return deny(id, DENIED(OP_SEND, REASON_NOT_LISTENING), ECONNREFUSED, IPPROTO_UDP, &asked);
		}
		connected(stamp, &asked, a);
		return ALLOW;
	}
	if (in_slices(a))
		return deny(id, DENIED(OP_SEND, REASON_SLICE), ENETUNREACH, IPPROTO_UDP, &asked);
	rule = egress_rule(id, a);
	if (!rule) {
		if (stamp->flags & STAMP_INGRESS && asked_us(id, a))
			return ALLOW;
		return deny(id, DENIED(OP_SEND, REASON_NO_EGRESS), ENETUNREACH, IPPROTO_UDP, &asked);
	}
	if (in_slices(bound))
		return deny(id, DENIED(OP_SEND, REASON_PRIVATE_SOURCE), ENETUNREACH, IPPROTO_UDP, &asked);
	if (is_any(rule->ip) || same_ip(bound->ip, rule->ip))
		return ALLOW;
	if (stamp->flags & STAMP_INGRESS && asked_us(id, a))
		return ALLOW;
	if (!is_any(bound->ip))
		return deny(id, DENIED(OP_SEND, REASON_WRONG_SOURCE), ENETUNREACH, IPPROTO_UDP, &asked);
	__builtin_memcpy(source->ip, rule->ip, sizeof(source->ip));
	return ALLOW;
}

SEC("cgroup/sendmsg4")
int graft_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a, source = {}, bound = {};

	load4(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_SEND, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	set_v4(&source, ctx->msg_src_ip4);
	set_v4(&bound, ctx->sk->src_ip4);
	if (ctx->user_family == AF_UNSPEC && !a.port) {
		/* connected, with a control message: the destination was decided at connect() */
		if (is_loopback(&source))
			ctx->msg_src_ip4 = bound.ip[3];
		return ALLOW;
	}
	if (!decide_send(ctx, &a, &source, &bound))
		return DENY;
	store4(ctx, &a);
	ctx->msg_src_ip4 = source.ip[3];
	return ALLOW;
}

SEC("cgroup/sendmsg6")
int graft_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr a, source = {}, bound = {};

	load6(ctx, &a);
	if (!stamp)
		return unstamped(ctx, OP_SEND, &a);
	if (stamp->tenant == GRAFT_OWN)
		return ALLOW;
	source.ip[0] = ctx->msg_src_ip6[0];
	source.ip[1] = ctx->msg_src_ip6[1];
	source.ip[2] = ctx->msg_src_ip6[2];
	source.ip[3] = ctx->msg_src_ip6[3];
	bound.ip[0] = ctx->sk->src_ip6[0];
	bound.ip[1] = ctx->sk->src_ip6[1];
	bound.ip[2] = ctx->sk->src_ip6[2];
	bound.ip[3] = ctx->sk->src_ip6[3];
	if (ctx->user_family == AF_UNSPEC && !a.port) {
		if (!is_loopback(&source) && !in_slices(&source))
			return ALLOW;
		source = bound;
	} else if (!decide_send(ctx, &a, &source, &bound)) {
		return DENY;
	} else {
		store6(ctx, &a);
	}
	ctx->msg_src_ip6[0] = source.ip[0];
	ctx->msg_src_ip6[1] = source.ip[1];
	ctx->msg_src_ip6[2] = source.ip[2];
	ctx->msg_src_ip6[3] = source.ip[3];
	return ALLOW;
}

/* ---- what the program sees ---- */

/* A peer's address: the one that the program asked for, or the container's view of its own loopback. */
static __noinline int show_peer(struct graft_addr *a, struct graft_stamp *stamp)
{
	struct graft_tenant *tenant;

	if (!a)
		return 0;
	if (!stamp) {
		slice_show(a, slice_slot(a));
		return 0;
	}
	if (stamp->flags & STAMP_CONNECTED && same_addr(a, &stamp->peer_real)) {
		*a = stamp->peer;
		return 0;
	}
	tenant = tenant_of(stamp);
	if (tenant)
		slice_show(a, tenant->slot);
	return 0;
}

/* The program's port of an accepted socket's server, which is bound to this address or to the wildcard. */
static __always_inline void show_served(struct graft_addr *a)
{
	struct graft_served_key key = {.port = a->port};
	struct graft_served *found;

	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	found = bpf_map_lookup_elem(&served, &key);
	if (!found) {
		key.ip[3] = 0; /* the wildcard */
		if (!is_v4(a)) {
			key.ip[0] = 0;
			key.ip[1] = 0;
			key.ip[2] = 0;
		}
		found = bpf_map_lookup_elem(&served, &key);
	}
	if (!found && is_v4(a)) {
		key.ip[2] = 0; /* a dual-stack server */
		found = bpf_map_lookup_elem(&served, &key);
	}
	if (found)
		a->port = found->port;
}

/*
 * The socket's own address. An unbound socket shows nothing of ours; a listener what it asked for; a
 * connection the host's address with the port that was asked for, since that is what its peer knows.
 */
static __noinline int show_local(struct graft_addr *a, struct graft_stamp *stamp, bool connected)
{
	struct graft_tenant *tenant;

	if (!a || !a->port)
		return 0;
	if (!stamp) {
		/* a published wildcard is reached from inside at SLICE_DYNAMIC, under the host's port */
		if (!in_slices(a) || slice_index(a, slice_slot(a)) == SLICE_DYNAMIC)
			show_served(a);
		slice_show(a, slice_slot(a));
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
		slice_show(a, tenant->slot);
	return 0;
}

static __always_inline bool in_connection(const struct bpf_sock *sk)
{
	return sk && sk->state != BPF_TCP_CLOSE && sk->state != BPF_TCP_LISTEN;
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

/* Whoever sends to a published server may be answered. */
static __always_inline void note_asker(struct graft_stamp *stamp, const struct graft_addr *a)
{
	struct graft_asker_key key = {.tenant = stamp->tenant, .port = a->port};
	struct graft_tenant *tenant;
	__u64 now;

	if (!(stamp->flags & STAMP_INGRESS))
		return;
	tenant = tenant_of(stamp);
	if (!tenant || !(tenant->flags & TENANT_REPLIES))
		return;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	now = bpf_ktime_get_ns();
	bpf_map_update_elem(&askers, &key, &now, BPF_ANY);
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

/* ---- options ---- */

static __always_inline bool option_forbidden(struct bpf_sockopt *ctx)
{
	__u8 *value = ctx->optval, *end = ctx->optval_end;

	switch (ctx->level) {
	case SOL_SOCKET_:
		if (ctx->optname == SO_PRIORITY_)
			return value + 4 <= end && *(__u32 *)value > 6;
		return socket_option_forbidden(ctx->optname);
	case SOL_IP_:
		return ip_option_forbidden(ctx->optname);
	case SOL_IPV6_:
		return ipv6_option_forbidden(ctx->optname);
	case SOL_TCP_:
		if (ctx->optname == TCP_ULP_)
			return !(value + 3 <= end && value[0] == 't' && value[1] == 'l' && value[2] == 's');
		return tcp_option_forbidden(ctx->optname);
	}
	return false;
}

/* graftd has sockets of other families, which are nobody's but its own. */
static __always_inline bool is_internet(const struct bpf_sock *sk)
{
	return sk && (sk->family == AF_INET || sk->family == AF_INET6);
}

SEC("cgroup/setsockopt")
int graft_setsockopt(struct bpf_sockopt *ctx)
{
	struct graft_stamp *stamp = stamp_on(ctx->sk);
	struct graft_addr what = {};
	__u8 *value = ctx->optval, *end = ctx->optval_end;

	if ((stamp && stamp->tenant == GRAFT_OWN) || !is_internet(ctx->sk))
		return ALLOW;
	if (!stamp && ctx->level == SOL_IPV6_ && ctx->optname == IPV6_FREEBIND_)
		return ALLOW; /* graftd, just before it stamps; an accepted socket cannot be bound anyway */
	if (option_forbidden(ctx)) {
		what.port = (__u32)ctx->level << 16 | (ctx->optname & 0xffff);
		return deny(stamp ? stamp->tenant : GRAFT_OWN, DENIED(OP_SETSOCKOPT, REASON_OPTION), EPERM, 0, &what);
	}
	if (stamp && ctx->level == SOL_IPV6_ && ctx->optname == IPV6_V6ONLY_ && value + 4 <= end) {
		if (*(__u32 *)value)
			stamp->flags |= STAMP_V6ONLY;
		else
			stamp->flags &= ~STAMP_V6ONLY;
	}
	return ALLOW;
}

SEC("cgroup/getsockopt")
int graft_getsockopt(struct bpf_sockopt *ctx)
{
	__u8 *value = ctx->optval, *end = ctx->optval_end;
	struct graft_tenant *tenant;
	struct graft_stamp *stamp;

	if (ctx->level != SOL_SOCKET_ || ctx->optname != SO_NETNS_COOKIE_)
		return ALLOW;
	if (ctx->retval || !is_internet(ctx->sk))
		return ALLOW;
	stamp = stamp_on(ctx->sk);
	tenant = stamp ? tenant_of(stamp) : NULL;
	if (value + 8 <= end)
		*(__u64 *)value = tenant ? tenant->netns_cookie : 0;
	return ALLOW;
}

/*
 * listen() without a bind runs no bind hook; graftd's trap of listen() binds such a socket first. Where
 * the trap was evaded (another process got the socket) the listener is tied to an interface that does
 * not exist, so that nobody reaches it.
 */
SEC("sockops")
int graft_sockops(struct bpf_sock_ops *ctx)
{
	struct graft_stamp *stamp;
	struct graft_addr here = {};
	int nowhere = 0x7fffffff;
	struct bpf_sock *sk;
	__u32 ip4;

	ctx->reply = -1;
	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	stamp = stamp_of(sk);
	if (stamp && stamp->tenant == GRAFT_OWN)
		return 1;
	/* volatile: clang would else share an offset between the branches, which the verifier refuses */
	ip4 = *(volatile __u32 *)&ctx->local_ip4;
	here.ip[0] = *(volatile __u32 *)&ctx->local_ip6[0];
	here.ip[1] = *(volatile __u32 *)&ctx->local_ip6[1];
	here.ip[2] = *(volatile __u32 *)&ctx->local_ip6[2];
	here.ip[3] = *(volatile __u32 *)&ctx->local_ip6[3];
	here.port = ctx->local_port;
	if (ctx->family == AF_INET)
		set_v4(&here, ip4);
	if (stamp && in_slices(&here) && stamp->flags & STAMP_PRIVATE)
		return 1;
	if (stamp && stamp->flags & STAMP_INGRESS && same_ip(here.ip, stamp->local_real.ip) &&
	    (!stamp->local_real.port || here.port == stamp->local_real.port))
		return 1;
	bpf_setsockopt(ctx, SOL_SOCKET_, SO_BINDTOIFINDEX_, &nowhere, sizeof(nowhere));
	report(stamp ? stamp->tenant : GRAFT_OWN, DENIED(OP_LISTEN, REASON_UNBOUND_LISTEN), EADDRNOTAVAIL,
	       IPPROTO_TCP, &here, false);
	return 1;
}

/* ---- the guard, on the cgroup root ---- */

static __always_inline int guard(struct bpf_sock_addr *ctx, const struct graft_addr *a)
{
	struct graft_config *conf;
	struct graft_addr to;
	__u32 zero = 0;

	if (!in_slices(a))
		return ALLOW;
	if (stamp_of(ctx->sk))
		return ALLOW;
	conf = bpf_map_lookup_elem(&config, &zero);
	if (!conf || bpf_get_netns_cookie(ctx) != conf->host_cookie)
		return ALLOW;
	to = *a;
	return deny(0, DENIED(OP_GUARD, REASON_SLICE), ECONNREFUSED, ctx->protocol, &to);
}

static __always_inline int guard4(struct bpf_sock_addr *ctx)
{
	struct graft_addr a;

	load4(ctx, &a);
	return guard(ctx, &a);
}

static __always_inline int guard6(struct bpf_sock_addr *ctx)
{
	struct graft_addr a;

	load6(ctx, &a);
	return guard(ctx, &a);
}

SEC("cgroup/connect4")
int guard_connect4(struct bpf_sock_addr *ctx)
{
	return guard4(ctx);
}

SEC("cgroup/connect6")
int guard_connect6(struct bpf_sock_addr *ctx)
{
	return guard6(ctx);
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
