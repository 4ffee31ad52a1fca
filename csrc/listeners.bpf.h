/* SPDX-License-Identifier: GPL-2.0 */
/*
 * listeners.bpf.h - what arrives at the containers' addresses, and the tables of who is there to receive it
 *
 * A listener at an address of the container's own is bound elsewhere: in the slice, or at the host's port that
 * publishes it. A bind at the address would claim the port for all of the host, because it stands in the way of a
 * wildcard bind. So the program of sk_lookup leads a connection there to the listener, and to nobody else: whether it
 * comes from a program of this host, from another machine, or by NAT. The same for the slices, so that the loopback
 * reaches a server wherever it is bound, and both ends have addresses of the loopback.
 *
 * The kernel runs the program for look-ups of listeners and of UDP sockets that are not connected, also for the
 * look-ups that hooks make (bpf_sk_lookup_tcp). So a hook that asks who listens gets the answer that a packet gets.
 *
 * The kernel removes an entry when its socket is closed. One that has ended to listen (shutdown(2)) is still there,
 * and not used.
 *
 * A UDP socket is bound for real, because what it sends leaves from its own address and port. The program looks only
 * whether the container has one at the port: else the host's wildcard socket would get what is sent to the container.
 *
 * Sources: net/core/sock_map.c, net/core/filter.c, Documentation/bpf/prog_sk_lookup.rst.
 */
#ifndef LISTENERS_BPF_H
#define LISTENERS_BPF_H

#include "kernel_sock.bpf.h"
#include "led.bpf.h"
#include "report.bpf.h"
#include "rules.bpf.h"
#include "slice.bpf.h"

#define LISTENERS_FULL -1

static __always_inline struct graft_listening *listening_of(__u32 tenant)
{
	struct graft_listening *of = bpf_map_lookup_elem(&listening, &tenant), new = {};

	if (of)
		return of;
	bpf_map_update_elem(&listening, &tenant, &new, BPF_NOEXIST);
	return bpf_map_lookup_elem(&listening, &tenant);
}

/* Enter the socket at @key, in the first slot that is free. Where none is, it gets one of the latter half: the
 * socket that had it may be found by others of its place. Returns the slot, or what is negative. */
static __always_inline int take_slot(struct bpf_sock_ops *ctx, struct graft_listener_key *key)
{
	long failed;

	for (int slot = 0; slot < LISTENER_SLOTS; slot++) {
		key->slot = slot;
		failed = bpf_sock_hash_update(ctx, &listeners, key, BPF_NOEXIST);
		if (!failed)
			return slot;
		if (failed != -EEXIST)
			return failed;
	}
	key->slot = LISTENER_SLOTS / 2 + bpf_get_prandom_u32() % (LISTENER_SLOTS / 2);
	failed = bpf_sock_hash_update(ctx, &listeners, key, BPF_ANY);
	return failed ? failed : key->slot;
}

static __always_inline int list_at(struct bpf_sock_ops *ctx, struct graft_listening *of, __u64 *made,
				   struct graft_listener_key *key)
{
	int slot;

	if ((__s64)__sync_fetch_and_add(&of->used, 1) >= LISTENERS_MAX) {
		__sync_fetch_and_add(&of->used, -1);
		return LISTENERS_FULL;
	}
	slot = take_slot(ctx, key);
	if (slot < 0) {
		__sync_fetch_and_add(&of->used, -1);
		return slot;
	}
	*made += 1;
	__sync_fetch_and_or(&of->slots, 1ull << (slot & 63));
	return 0;
}

/* Enter a listener of a container's, which is bound to @port. Not 0: it is not in the table, or not whole. */
static __always_inline int list_listener(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct graft_stamp *stamp,
					 __u32 port)
{
	struct graft_listener_key key = {.tenant = stamp->tenant};
	struct graft_addr asked = stamp->local;
	struct graft_listening *of;
	__u64 *made;
	int failed;

	name_loopback(stamp->tenant, &asked);
	__builtin_memcpy(key.ip, asked.ip, sizeof(key.ip));
	key.port = asked.port ? asked.port : port;
	of = listening_of(stamp->tenant);
	made = bpf_sk_storage_get(&listed, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!of || !made)
		return LISTENERS_FULL;
	failed = list_at(ctx, of, made, &key);
	if (failed || !is_any6(key.ip) || !takes_ipv4(sk))
		return failed;
	key.ip[2] = MAPPED;
	return list_at(ctx, of, made, &key);
}

/* The TCP socket is closed: what it had in the table does not count any more. */
static __always_inline void forget_listener(struct bpf_sock *sk, __u32 tenant)
{
	__u64 *made = bpf_sk_storage_get(&listed, sk, NULL, 0);
	struct graft_listening *of;

	if (!made || !*made)
		return;
	of = bpf_map_lookup_elem(&listening, &tenant);
	if (of)
		__sync_fetch_and_add(&of->used, -*made);
	*made = 0;
}

/* The UDP socket is closed, or has another port: forget where it was. */
static __always_inline void leave_udp(struct graft_udp_place *place, __u32 tenant)
{
	struct graft_udp_key key = {.tenant = tenant, .port = place->port, .slot = place->slot};
	struct graft_listening *of;
	__u32 *mark;

	if (!place->port)
		return;
	place->port = 0;
	of = bpf_map_lookup_elem(&listening, &tenant);
	if (of)
		__sync_fetch_and_add(&of->udp, -1);
	mark = bpf_map_lookup_elem(&udp_ports, &key);
	if (mark && *mark == place->mark)
		bpf_map_delete_elem(&udp_ports, &key);
}

/* Enter a UDP socket of a container's that is at @port of the host's. */
static __always_inline void enter_udp(struct bpf_sock *sk, __u32 tenant, __u32 port)
{
	struct graft_udp_place *place = bpf_sk_storage_get(&udp_place, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	struct graft_udp_key key = {.tenant = tenant, .port = port};
	struct graft_listening *of;
	__u32 mark;
	int slot;

	if (!place || place->port == port)
		return;
	leave_udp(place, tenant);
	of = listening_of(tenant);
	if (!of || (__s64)of->udp >= UDP_PORTS_MAX)
		return;
	mark = bpf_get_prandom_u32();
	for (slot = 0; slot < LISTENER_SLOTS; slot++) {
		key.slot = slot;
		if (!bpf_map_update_elem(&udp_ports, &key, &mark, BPF_NOEXIST))
			break;
	}
	if (slot == LISTENER_SLOTS) {
		key.slot = LISTENER_SLOTS / 2 + bpf_get_prandom_u32() % (LISTENER_SLOTS / 2);
		if (bpf_map_update_elem(&udp_ports, &key, &mark, BPF_ANY))
			return;
	}
	place->mark = mark;
	place->port = port;
	place->slot = key.slot;
	__sync_fetch_and_add(&of->udp, 1);
	__sync_fetch_and_or(&of->slots, 1ull << (key.slot & 63));
}

/* Has the tenant a UDP socket at @port of the host's? */
__noinline int hears(__u32 tenant, __u32 port)
{
	struct graft_listening *of = bpf_map_lookup_elem(&listening, &tenant);
	struct graft_udp_key key = {.tenant = tenant, .port = port};

	for (int slot = 0; of && slot < LISTENER_SLOTS && of->slots >> slot; slot++) {
		key.slot = slot;
		if (bpf_map_lookup_elem(&udp_ports, &key))
			return true;
	}
	return false;
}

/* Lead a connection to a listener at @key; false: there is none. */
__noinline int lead_to_place(struct bpf_sk_lookup *ctx, struct graft_listener_key *place, __u64 slots)
{
	struct graft_listener_key key;
	struct bpf_sock *sk;
	long failed;

	if (!place)
		return false;
	key = *place; /* on this stack: Linux 6.1 takes no argument for a key */
	for (int slot = 0; slot < LISTENER_SLOTS && slots >> slot; slot++) {
		key.slot = slot;
		sk = bpf_map_lookup_elem(&listeners, &key);
		if (!sk)
			continue;
		failed = sk->state == BPF_TCP_LISTEN ? bpf_sk_assign(ctx, sk, 0) : -1;
		bpf_sk_release(sk);
		if (!failed)
			return true;
	}
	return false;
}

/* Lead a connection to the tenant's listener for @a, an address and port as its programs know it: the one that is
 * bound to the address, or to the wildcard of its family. */
static __noinline bool lead(struct bpf_sk_lookup *ctx, __u32 tenant, struct graft_addr *a)
{
	struct graft_listening *of = bpf_map_lookup_elem(&listening, &tenant);
	struct graft_listener_key key = {.tenant = tenant, .port = a->port};

	if (!of)
		return false;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	if (lead_to_place(ctx, &key, of->slots))
		return true;
	__builtin_memset(key.ip, 0, sizeof(key.ip));
	if (is_v4(a))
		key.ip[2] = MAPPED;
	return lead_to_place(ctx, &key, of->slots);
}

/* A connection to a slice. Where the table has nobody, the kernel may find a listener that is bound there. */
static __always_inline int lead_in_slice(struct bpf_sk_lookup *ctx, struct graft_addr *to)
{
	__u32 slice = slice_number(to), *tenant;
	int index = slice_index(to, slice);

	if (index < 0 || index == SLICE_DYNAMIC)
		return SK_DROP;
	tenant = bpf_map_lookup_elem(&slices, &slice);
	if (!tenant || to->port < SLICE_PORT_BASE)
		return SK_PASS;
	slice_show(to, slice);
	lead(ctx, *tenant, to);
	return SK_PASS;
}

/* The bit of an address in a graft_owned, as graft/kernel/holders.py computes it. */
static __always_inline __u32 address_bit(const struct graft_addr *a)
{
	return (a->ip[0] ^ a->ip[1] ^ a->ip[2] ^ a->ip[3]) * 0x9e3779b1u >> 20;
}

static __always_inline bool has_bit(const struct graft_owned *of, __u32 bit)
{
	return of && of->bits[(bit / 64) % OWNED_WORDS] >> bit % 64 & 1;
}

/* Not: it is surely no container's. */
static __always_inline bool may_be_owned(const struct graft_addr *a)
{
	__u32 zero = 0;

	return has_bit(bpf_map_lookup_elem(&owned, &zero), address_bit(a));
}

/* holder_of(), for who asks about addresses that are mostly no container's. */
static __always_inline struct graft_holder *find_holder(const struct graft_addr *a)
{
	return may_be_owned(a) ? holder_of(a) : NULL;
}

/* Lead a connection to @to to the listener that is published there as well as where it is bound, if there is one. */
static __always_inline bool lead_to_shared(struct bpf_sk_lookup *ctx, const struct graft_addr *to)
{
	struct graft_served_key key = {.port = to->port};
	struct graft_addr wildcard = {};
	struct graft_ingress *rule;
	struct graft_served *found;
	__u32 zero = 0;

	if (!has_bit(bpf_map_lookup_elem(&shared, &zero), address_bit(to)))
		return false;
	__builtin_memcpy(key.ip, to->ip, sizeof(key.ip));
	found = bpf_map_lookup_elem(&served_ports, &key);
	if (!found)
		return false;
	wildcard.port = found->port;
	rule = ingress_rule(found->tenant, IPPROTO_TCP, &wildcard); /* the entry outlives the publication */
	return rule && rule->exclusive && same_ip(rule->ip, to->ip) &&
	       ingress_port(rule, wildcard.port) == to->port && lead(ctx, found->tenant, &wildcard);
}

/* A connection to @to, an address of the host's, which may be led to a container (led.bpf.h), or be @otherwise. */
static __always_inline int lead_moved(struct bpf_sk_lookup *ctx, struct graft_addr *to, int otherwise)
{
	struct graft_led *where = ctx->protocol == IPPROTO_TCP ? led_at(to) : NULL;
	struct graft_addr asked;

	if (!where)
		return otherwise;
	asked = *to;
	asked.port = led_port(where, to->port);
	if (where->ip[0] | where->ip[1] | where->ip[2] | where->ip[3])
		__builtin_memcpy(asked.ip, where->ip, sizeof(asked.ip));
	return lead(ctx, where->tenant, &asked) ? SK_PASS : SK_DROP;
}

/*
 * Does this datagram come from the address that it goes to? The kernel gives a client on this host that is not
 * connected the address that it sends to as its source. So it may be the container's answer to a program of the
 * host's, if it comes from a port of the container's; else it is a question, which the host's wildcard socket is not
 * asked.
 */
static __always_inline bool is_from_itself(struct bpf_sk_lookup *ctx, const struct graft_addr *to)
{
	__u32 four = FIELD(ctx->remote_ip4);
	__u32 six[] = {FIELD(ctx->remote_ip6[0]), FIELD(ctx->remote_ip6[1]), FIELD(ctx->remote_ip6[2]),
		       FIELD(ctx->remote_ip6[3])};

	return is_v4(to) ? four == to->ip[3] : same_ip(six, to->ip);
}

SEC("sk_lookup")
int guard_lookup(struct bpf_sk_lookup *ctx)
{
	struct graft_holder *holder;
	struct graft_addr to = {
		.ip = {FIELD(ctx->local_ip6[0]), FIELD(ctx->local_ip6[1]), FIELD(ctx->local_ip6[2]),
		       FIELD(ctx->local_ip6[3])},
		.port = ctx->local_port,
	};
	__u32 tenant, four = FIELD(ctx->local_ip4);

	if (ctx->family == AF_INET)
		set_v4(&to, four);
	if (in_slices(&to))
		return ctx->protocol == IPPROTO_TCP ? lead_in_slice(ctx, &to) : SK_PASS;
	holder = find_holder(&to);
	if (!holder && ctx->protocol == IPPROTO_TCP && lead_to_shared(ctx, &to))
		return SK_PASS;
	if (!holder)
		return lead_moved(ctx, &to, SK_PASS);
	if (holder->tenant == GRAFT_EXEMPT)
		return SK_PASS;
	if (holder->flags & HOLDER_LOCAL && ctx->ingress_ifindex > 1) /* a look-up of a hook's has no device */
		return SK_DROP;
	tenant = holder->tenant;
	if (ctx->protocol == IPPROTO_UDP && is_from_itself(ctx, &to) &&
	    hears(tenant, bpf_ntohs((__u16)ctx->remote_port)))
		return SK_PASS;
	if (ctx->protocol == IPPROTO_TCP ? lead(ctx, tenant, &to) : hears(tenant, to.port))
		return SK_PASS;
	return holder->flags & HOLDER_DEVICE ? lead_moved(ctx, &to, SK_PASS) : SK_DROP;
}

#endif
