/* SPDX-License-Identifier: GPL-2.0 */
/*
 * numbers.bpf.h - ports that nobody names: private numbers, which are chosen here, and ports of the host's, which the
 * kernel chooses and which are counted here
 *
 * What a socket has of either is in its storage `held`, and given back when it is closed, or bound anew after a bind
 * that failed. The kernel holds the socket's lock where these functions are called.
 */
#ifndef NUMBERS_BPF_H
#define NUMBERS_BPF_H

#include "abroad.bpf.h"
#include "claims.bpf.h"
#include "listeners.bpf.h"
#include "loopback.bpf.h"
#include "made.bpf.h"
#include "traffic.bpf.h"

#define TRIES 4
#define SOCKET_COUNTED (1u << 16) /* of GRAFT_USED */

/* Which of graft_numbers.taken a socket's numbers are in. */
static __always_inline __u32 number_kind(bool udp, bool v4)
{
	return (udp ? 2 : 0) + (v4 ? 0 : 1);
}

static __always_inline struct graft_held *held_by(struct bpf_sock *sk)
{
	return sk ? bpf_sk_storage_get(&held, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE) : NULL;
}

/* The number of the lowest bit that is set in @word, which is not 0. */
static __always_inline __u32 lowest_bit(__u64 word)
{
	__u64 below = (word & -word) - 1;

	below -= below >> 1 & 0x5555555555555555ull;
	below = (below & 0x3333333333333333ull) + (below >> 2 & 0x3333333333333333ull);
	below = (below + (below >> 4)) & 0x0f0f0f0f0f0f0f0full;
	return (below * 0x0101010101010101ull) >> 56;
}

/* The word of @numbers in which bit @index is; NULL if there is none. */
static __always_inline __u64 *taken_word(struct graft_numbers *numbers, __u32 kind, __u32 index)
{
	__u64 at = kind * NUMBERS_WORDS + index / 64;

	if (!numbers || index >= NUMBERS_WORDS * 64)
		return NULL;
	asm volatile("" : "+r"(at)); /* clang would test another register than it uses */
	return at < NUMBERS_ALL ? &numbers->taken[at] : NULL;
}

/* The word of the tenant's in which @number is; NULL: no bind to port 0 could get it. */
static __always_inline __u64 *word_of(__u32 tenant, __u32 kind, __u32 number)
{
	return taken_word(bpf_map_lookup_elem(&numbers, &tenant), kind, number - NUMBERS_FIRST);
}

/* Mark @number as taken in @word, its own. False: it is already. */
static __always_inline bool mark_in(__u64 *word, __u32 number)
{
	__u64 one = 1ull << ((number - NUMBERS_FIRST) & 63);

	return !(__sync_fetch_and_or(word, one) & one);
}

struct search {
	struct graft_numbers *of;
	__u32 kind;
	__u32 index;  /* of the first number to look at */
	__u32 number; /* what was found, 0: none */
};

/* One step of find_number(), through the word with the number at index; not 0: it is over. */
static long search_word(__u32 step, struct search *search)
{
	__u32 index = search->index;
	__u64 free, one, *word;

	(void)step;
	word = taken_word(search->of, search->kind, index);
	if (!word) { /* behind the last one */
		search->index = 0;
		return search->kind >= NUMBERS_KINDS;
	}
	free = ~*(volatile __u64 *)word & ~0ull << (index & 63);
	if (!free) {
		search->index = (index | 63) + 1;
		return 0;
	}
	one = free & -free;
	if (__sync_fetch_and_or(word, one) & one)
		return 0; /* another thread was faster */
	index = (index & ~63u) + lowest_bit(free);
	search->of->next = index + 1;
	search->number = NUMBERS_FIRST + index;
	return 1;
}

/* Find a free number and mark it as taken; 0: none is free. */
__noinline int find_number(__u32 tenant, __u32 kind)
{
	struct search search = {.kind = kind};

	search.of = bpf_map_lookup_elem(&numbers, &tenant);
	if (!search.of)
		return 0;
	search.index = search.of->next;
	bpf_loop(NUMBERS_WORDS + 64, search_word, &search, 0);
	return search.number;
}

/* Mark @number as free again. */
static __always_inline void free_number(__u32 tenant, __u32 kind, __u32 number)
{
	__u64 *word = word_of(tenant, kind, number);

	if (word)
		__sync_fetch_and_and(word, ~(1ull << ((number - NUMBERS_FIRST) & 63)));
}

/* Give back the number that a socket has, in each family in which it is marked. */
static __always_inline void give_number_back(struct graft_held *mine, __u32 tenant)
{
	if (!mine->number)
		return;
	free_number(tenant, mine->kind, mine->number);
	if (mine->flags & HELD_BOTH)
		free_number(tenant, number_kind(true, true), mine->number);
	mine->number = 0;
	mine->flags &= ~HELD_BOTH;
}

/*
 * Choose a private number for this socket; 0: none is free. A number may be in use although it is not marked: whoever
 * took it has closed his socket and others share it, or an unbound UDP socket has it as its port on the host's
 * wildcard. @loopback: the number of the address; all have the same numbers to choose from.
 */
__noinline int take_number(struct bpf_sock_addr *ctx, __u32 tenant, __u32 slice, bool v4, __u32 loopback)
{
	__u32 kind = number_kind(ctx->protocol == IPPROTO_UDP, v4);
	struct graft_held *mine = held_by(ctx->sk);
	struct graft_addr at, from;
	int number, n;

	if (!mine)
		return 0;
	give_number_back(mine, tenant); /* of a bind that failed, or was undone: whoever comes here is not bound */
	for (n = 0; n < TRIES; n++) {
		number = find_number(tenant, kind);
		if (!number)
			return 0;
		loopback_source(ctx, &from, v4, slice);
		slice_place(&at, v4, slice, number, loopback);
		if (receiver_at(ctx, tenant, &at, &from) == RECEIVER_NOBODY) {
			slice_ip(&at, v4, slice, SLICE_DYNAMIC);
			at.port = number;
			if (ctx->protocol != IPPROTO_UDP ||
			    receiver_at(ctx, tenant, &at, &from) != RECEIVER_TENANT_CHOSEN) {
				mine->number = number;
				mine->kind = kind;
				return number;
			}
		}
		free_number(tenant, kind, number);
	}
	return 0;
}

/* Mark the number that the program has named, if a bind to port 0 could get it. */
__noinline int name_number(struct bpf_sock_addr *ctx, __u32 tenant, __u32 number, bool v4)
{
	__u32 kind = number_kind(ctx->protocol == IPPROTO_UDP, v4);
	__u64 *word = word_of(tenant, kind, number);
	struct graft_held *mine;

	if (!word)
		return 0;
	mine = held_by(ctx->sk);
	if (mine && mark_in(word, number)) { /* else it is another's to give back */
		mine->number = number;
		mine->kind = kind;
	}
	return 0;
}

static __always_inline void count_ports(__u32 tenant, __s64 by)
{
	struct graft_ports *of = bpf_map_lookup_elem(&ports, &tenant);

	if (of)
		__sync_fetch_and_add(&of->used, by);
}

static __always_inline bool too_many_ports(const struct graft_ports *of)
{
	return *(volatile __s64 *)&of->used > (__s64)of->max;
}

static __always_inline void count_served(__u32 tenant, __s64 by)
{
	struct graft_ports *of = bpf_map_lookup_elem(&ports, &tenant);

	if (of)
		__sync_fetch_and_add(&of->served, by);
}

/* Count a port of the host's that the kernel chooses for this socket. False: the tenant may have no more. */
__noinline bool hold_port(struct bpf_sock_addr *ctx, __u32 tenant)
{
	struct graft_held *mine = held_by(ctx->sk);
	struct graft_ports *own, *all;
	__u32 sum = GRAFT_EXEMPT;

	if (!mine)
		return false;
	if (mine->number || mine->flags & HELD_PORT)
		return true;
	own = bpf_map_lookup_elem(&ports, &tenant);
	all = bpf_map_lookup_elem(&ports, &sum);
	if (!own || !all)
		return true; /* graftd is starting: what is not counted is not given back */
	__sync_fetch_and_add(&own->used, 1);
	__sync_fetch_and_add(&all->used, 1);
	if (too_many_ports(own) || too_many_ports(all)) {
		__sync_fetch_and_add(&own->used, -1);
		__sync_fetch_and_add(&all->used, -1);
		return false;
	}
	mine->flags |= HELD_PORT;
	return true;
}

/* Give back what this socket has. */
static __noinline int let_go(struct graft_held *mine, __u32 tenant)
{
	if (!mine)
		return 0;
	give_number_back(mine, tenant);
	if (mine->flags & HELD_PORT) {
		count_ports(tenant, -1);
		count_ports(GRAFT_EXEMPT, -1);
	}
	mine->flags &= ~HELD_PORT;
	return 0;
}

/* Mark @number as taken in @kind. False: it is already. One that no bind to port 0 could get needs no mark. */
static __always_inline bool mark_number(__u32 tenant, __u32 kind, __u32 number)
{
	__u64 *word = word_of(tenant, kind, number);

	return !word || mark_in(word, number);
}

/* Mark @number as taken among those of @kind, and of IPv4 as well if @both. */
static __always_inline bool mark_numbers(__u32 tenant, __u32 kind, __u32 number, bool both)
{
	if (!mark_number(tenant, kind, number))
		return false;
	if (!both || mark_number(tenant, number_kind(true, true), number))
		return true;
	free_number(tenant, kind, number);
	return false;
}

/* As find_number(), for one that is free in IPv4 as well if @both. */
static __always_inline __u32 find_numbers(__u32 tenant, __u32 kind, bool both)
{
	for (int n = 0; n < TRIES; n++) {
		__u32 number = find_number(tenant, kind);

		if (!number || !both || mark_number(tenant, number_kind(true, true), number))
			return number;
		free_number(tenant, kind, number);
	}
	return 0;
}

/*
 * The kernel has chosen @port for a UDP socket on the host's wildcard. The container knows it by that number, unless
 * a socket on its loopback has it, of which the kernel knows nothing: then by another one, to which the caller leads
 * (`dynamic_ports`). Returns that; 0: none is needed, or none is free. @both: the socket is of IPv6 and IPv4.
 */
__noinline int name_chosen(struct graft_held *mine, __u32 tenant, __u32 port, bool v4, bool both)
{
	__u32 kind = number_kind(true, v4), number = port;

	if (!mine)
		return 0;
	if (!mark_numbers(tenant, kind, port, both))
		number = find_numbers(tenant, kind, both);
	mine->number = number;
	mine->kind = kind;
	if (both && number)
		mine->flags |= HELD_BOTH;
	return number == port ? 0 : number;
}

/* Is the socket where its bind was decided? The hook notes that before the kernel binds, which may fail. */
static __always_inline bool is_where_decided(const struct bpf_sock *sk, const struct graft_stamp *stamp)
{
	const struct graft_addr *real = &stamp->local_real;
	__u32 ip[4];

	if (!(stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS)) || !sk->src_port)
		return false;
	if (real->port && sk->src_port != real->port)
		return false;
	if (is_any(real->ip))
		return true;
	/* clang would compute one address for both families, which the verifier refuses */
	if (sk->family == AF_INET) {
		ip[3] = sk->src_ip4;
		asm volatile("" : "+r"(ip[3]));
		return ip[3] == real->ip[3];
	}
	ip[0] = sk->src_ip6[0];
	ip[1] = sk->src_ip6[1];
	ip[2] = sk->src_ip6[2];
	ip[3] = sk->src_ip6[3];
	return same_ip(ip, real->ip);
}

/*
 * Remember the program's port: an accepted socket has no stamp to show it from. The entry stays for accepted sockets
 * that outlive the listener. A tenant has SERVED_MAX of them; what is beyond shows the host's port.
 */
__noinline int note_served(__u32 tenant, struct graft_addr *real, __u32 port)
{
	struct graft_ports *of = bpf_map_lookup_elem(&ports, &tenant);
	struct graft_served value = {.tenant = tenant, .port = port};
	struct graft_served_key key = {};
	struct graft_served *before;

	if (!real)
		return 0;
	key.port = real->port;
	__builtin_memcpy(key.ip, real->ip, sizeof(key.ip));
	before = bpf_map_lookup_elem(&served_ports, &key);
	if (before && before->tenant == tenant) {
		before->port = port;
		return 0;
	}
	if (of && (__s64)of->served >= SERVED_MAX)
		return 0;
	if (before)
		count_served(before->tenant, -1);
	if (!bpf_map_update_elem(&served_ports, &key, &value, BPF_ANY))
		count_served(tenant, 1);
	return 0;
}

/* The key of `dynamic_ports` for the program's port @port; proto and family are IPPROTO_* and GRAFT_INET*. */
static __always_inline struct graft_dynamic_key dynamic_key(__u32 tenant, bool udp, bool v4, __u32 port)
{
	struct graft_dynamic_key key = {.tenant = tenant, .port = port};

	key.proto = udp ? IPPROTO_UDP : IPPROTO_TCP;
	key.family = v4 ? GRAFT_INET : GRAFT_INET6;
	return key;
}

/* Forget the port that the kernel chose for this socket, unless another socket has the program's port. */
static __noinline int forget_dynamic(struct graft_held *mine, __u32 tenant, bool udp)
{
	struct graft_dynamic_key key;
	__u32 *port, *sockets;
	bool v4;

	if (!mine || !(mine->flags & HELD_DYNAMIC))
		return 0;
	v4 = !(mine->flags & HELD_DYNAMIC6);
	mine->flags &= ~(HELD_DYNAMIC | HELD_DYNAMIC6);
	key = dynamic_key(tenant, udp, v4, mine->host_port);
	key.family |= GRAFT_USED;
	sockets = bpf_map_lookup_elem(&dynamic_ports, &key);
	if (sockets) {
		__sync_fetch_and_add(sockets, -SOCKET_COUNTED);
		if (*(volatile __u32 *)sockets >= SOCKET_COUNTED)
			return 0;
	}
	if (sockets)
		bpf_map_delete_elem(&dynamic_ports, &key);
	key = dynamic_key(tenant, udp, v4, mine->port);
	port = bpf_map_lookup_elem(&dynamic_ports, &key);
	if (port && *port == mine->host_port)
		bpf_map_delete_elem(&dynamic_ports, &key);
	return 0;
}

/* Forget a bind of a UDP socket that the kernel has refused after the hook had allowed it. */
__noinline int forget_refused(struct bpf_sock_addr *ctx, struct graft_stamp *stamp)
{
	struct graft_held *mine;

	if (!stamp || !ctx->sk || ctx->protocol != IPPROTO_UDP)
		return 0;
	if (stamp->flags & STAMP_EPHEMERAL
		    ? !stamp->local_real.port || ctx->sk->src_port == stamp->local_real.port
		    : !(stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS)) || is_where_decided(ctx->sk, stamp))
		return 0;
	mine = bpf_sk_storage_get(&held, ctx->sk, NULL, 0);
	let_go(mine, stamp->tenant);
	forget_dynamic(mine, stamp->tenant, true);
	stamp->flags &= ~(STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL | STAMP_ABROAD);
	return 0;
}

/* As chosen_port(), if a socket is there; 0: none is. */
__noinline int used_port(__u32 tenant, bool v4, __u32 asked)
{
	struct graft_dynamic_key key = dynamic_key(tenant, true, v4, chosen_port(tenant, v4, asked));
	__u32 *sockets;

	if (!key.port)
		return 0;
	key.family |= GRAFT_USED;
	sockets = bpf_map_lookup_elem(&dynamic_ports, &key);
	return sockets && *sockets >= SOCKET_COUNTED && (*sockets & 0xffff) == asked ? key.port : 0;
}

/* Count this socket at @port of the host's, where its program has asked for @asked. False: another of the program's
 * ports is there, with which SO_REUSEPORT has let it have that one. */
__noinline int use_dynamic(__u32 tenant, bool v4, __u32 port, __u32 asked, bool shares)
{
	struct graft_dynamic_key key = dynamic_key(tenant, true, !v4, port);
	__u32 *sockets, first = asked | SOCKET_COUNTED;

	key.family |= GRAFT_USED;
	sockets = bpf_map_lookup_elem(&dynamic_ports, &key);
	if (sockets && shares && (*sockets & 0xffff) != asked)
		return false;
	key = dynamic_key(tenant, true, v4, port);
	key.family |= GRAFT_USED;
	sockets = bpf_map_lookup_elem(&dynamic_ports, &key);
	if (!sockets)
		return !bpf_map_update_elem(&dynamic_ports, &key, &first, BPF_NOEXIST);
	if ((*sockets & 0xffff) != asked)
		return false;
	__sync_fetch_and_add(sockets, SOCKET_COUNTED);
	return true;
}

/* A socket is at @port of the host's for the program's port @asked. The loopback leads there if @leads. */
static __always_inline void lead_to_chosen(struct graft_held *mine, const struct graft_dynamic_key *asked, __u32 port,
					   bool leads)
{
	mine->flags |= HELD_DYNAMIC | (asked->family == GRAFT_INET ? 0 : HELD_DYNAMIC6);
	mine->port = asked->port;
	mine->host_port = port;
	if (leads)
		bpf_map_update_elem(&dynamic_ports, asked, &port, BPF_ANY);
}

/* A UDP socket that nobody has bound sends for the first time: its port is the kernel's choice. */
__noinline int name_sender(struct bpf_sock_addr *ctx, struct graft_stamp *stamp)
{
	struct graft_dynamic_key key;
	struct graft_held *mine;
	__u32 port, number;
	bool v4;

	if (!stamp || !ctx->sk)
		return 0;
	mine = held_by(ctx->sk);
	port = ctx->sk->src_port;
	v4 = ctx->sk->family == AF_INET;
	number = name_chosen(mine, stamp->tenant, port, v4, !v4 && takes_ipv4(ctx->sk));
	if (!mine || !number || !use_dynamic(stamp->tenant, v4, port, number, false))
		return 0;
	__builtin_memset(&stamp->local, 0, sizeof(stamp->local));
	if (v4)
		set_v4(&stamp->local, 0);
	stamp->local_real = stamp->local;
	stamp->local.port = number;
	stamp->local_real.port = port;
	stamp->flags |= STAMP_EPHEMERAL;
	key = dynamic_key(stamp->tenant, true, v4, number);
	lead_to_chosen(mine, &key, port, true);
	return 0;
}

static __always_inline void uncount(__u32 tenant, bool udp)
{
	struct graft_usage *used = bpf_map_lookup_elem(&usage, &tenant);

	if (!used)
		return;
	__sync_fetch_and_add(&used->sockets, -1);
	if (udp)
		__sync_fetch_and_add(&used->udp, -1);
}

SEC("cgroup/sock_release")
int graft_sock_release(struct bpf_sock *sk)
{
	struct graft_stamp *stamp = stamp_on(sk);
	struct graft_udp_place *place;
	struct graft_held *mine;

	if (!stamp) {
		__u32 direct = direct_tenant();

		if (direct && made_by_program(sk)) {
			uncount(direct, false);
			count_closed(sk, direct, false);
		} else if (sk->protocol == IPPROTO_TCP) {
			count_accepted(sk, direct);
		}
		return ALLOW;
	}
	if (sk->protocol == IPPROTO_TCP && stamp->tenant != GRAFT_EXEMPT)
		count_closed(sk, stamp->tenant, false);
	mine = bpf_sk_storage_get(&held, sk, NULL, 0);
	if (mine) {
		let_go(mine, stamp->tenant);
		forget_dynamic(mine, stamp->tenant, sk->protocol == IPPROTO_UDP);
	}
	forget_listener(sk, stamp->tenant);
	give_claim_up(bpf_sk_storage_get(&claimed, sk, NULL, 0), stamp->tenant);
	come_home(bpf_sk_storage_get(&abroad_place, sk, NULL, 0), stamp->tenant);
	place = bpf_sk_storage_get(&udp_place, sk, NULL, 0);
	if (place)
		leave_udp(place, stamp->tenant);
	if (!(stamp->flags & STAMP_COUNTED))
		return ALLOW;
	stamp->flags &= ~STAMP_COUNTED; /* the programs of two graftds may run for one socket during an upgrade */
	uncount(stamp->tenant, sk->protocol == IPPROTO_UDP);
	return ALLOW;
}

#endif
