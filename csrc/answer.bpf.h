/* SPDX-License-Identifier: GPL-2.0 */
/*
 * answer.bpf.h - a published UDP server answers from the address of the host's that was asked
 *
 * The server is on the host's wildcard, so the kernel takes the source of an answer from the route to the client.
 * Where the host has several addresses that may be another one than the client has asked, and a client that is
 * connected, or looks, drops the answer. Behind Docker's NAT it would come from the address that was asked. So the
 * packets that arrive at the socket are looked at, and its storage keeps which peer, by address and port, has asked
 * at which address.
 *
 * Only an address at which a packet for this socket has arrived is ever chosen, for the peer that the packet came
 * from; none of a group's or a broadcast, none that another container holds. A socket's table is its own, and its
 * hashes have a key that nobody knows: whoever sends from many addresses drives out entries by chance. What is driven
 * out, or older than ASKED_TIME, is answered as the kernel chooses, so that an address that the host has no more is
 * in nobody's way. A peer that asks at two addresses is answered from the later one.
 */
#ifndef ANSWER_BPF_H
#define ANSWER_BPF_H

#include "own.bpf.h"

#define PACKET_HOST 0		 /* linux/if_packet.h */
#define ASKED_CLOCK_SHIFT 32	 /* units of 2^32 ns, 4.3 s, */
#define ASKED_TIME 28		 /* so 120 s, as long as conntrack keeps a stream (nf_conntrack_udp_timeout_stream) */
#define ASKED_HASH (~0ull << 24) /* of an entry; below are 16 bits of time, and 8 of the address, from 1 */

static __always_inline __u32 asked_clock(void)
{
	return bpf_ktime_get_ns() >> ASKED_CLOCK_SHIFT;
}

/* The set of @of that @hash belongs to; NULL if there is none. */
static __always_inline __u64 *asked_set(struct graft_asked *of, __u64 hash)
{
	__u64 at = (hash >> 24) % ASKED_SETS * (ASKED_WAYS * sizeof(of->entries[0]));

	asm volatile("" : "+r"(at)); /* the verifier does not know what a remainder is: clang has to keep the test */
	if (at > sizeof(of->entries) - ASKED_WAYS * sizeof(of->entries[0]))
		return NULL;
	return (void *)of->entries + at;
}

/* The number of @a among the addresses of @of, from 1. One that nobody has asked at lately gives way; 0: none does.
 */
__noinline int number_of_local(struct graft_asked *of, struct graft_addr *a, __u32 now)
{
	__u32 old = 0;

	if (!of || !a)
		return 0;

	for (__u32 n = 0; n < ASKED_LOCALS; n++) {
		if (same_ip(of->locals[n].ip, a->ip)) {
			of->locals[n].used = now;
			return n + 1;
		}
		if (!old && (is_any6(of->locals[n].ip) || now - of->locals[n].used > ASKED_TIME))
			old = n + 1;
	}
	if (!old || old > ASKED_LOCALS)
		return 0;
	of->locals[old - 1].used = now;
	__builtin_memcpy(of->locals[old - 1].ip, a->ip, sizeof(a->ip));
	return old;
}

/* Link-local addresses are for the kernel to choose, which knows the link. The broadcast of 127.0.0.0/8 is no host's.
 */
static __always_inline bool may_answer_from(__u32 tenant, const struct graft_addr *a)
{
	if (in_slices(a) || is_anothers(tenant, a))
		return false;
	if (is_v4(a))
		return a->ip[3] != bpf_htonl(0x7fffffff);
	return (a->ip[0] & bpf_htonl(0xffc00000)) != bpf_htonl(0xfe800000);
}

/* The ends of a UDP packet that begins with its IP header. False: it is none, or has options. */
static __always_inline bool read_udp(const struct __sk_buff *skb, struct graft_addr *from, struct graft_addr *to)
{
	__u8 *packet = (void *)(long)skb->data, *end = (void *)(long)skb->data_end, *ports;

	if (packet + 28 > end)
		return false;
	if (packet[0] == 0x45) {
		set_v4(from, *(__be32 *)(packet + 12));
		set_v4(to, *(__be32 *)(packet + 16));
		ports = packet + 20;
	} else {
		if (packet + 48 > end || packet[6] != IPPROTO_UDP)
			return false;
		__builtin_memcpy(from->ip, packet + 8, sizeof(from->ip));
		__builtin_memcpy(to->ip, packet + 24, sizeof(to->ip));
		ports = packet + 40;
	}
	from->port = bpf_ntohs(*(__be16 *)ports);
	to->port = bpf_ntohs(*(__be16 *)(ports + 2));
	return true;
}

/* Remember that @from has asked at @to, where the packet has arrived. */
__noinline int note_asked(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct graft_addr from, to;
	struct graft_stamp *stamp;
	struct graft_asked *of;
	__u64 hash, entry, *set;
	__u32 now, number;

	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	stamp = stamp_on(sk);
	if (!sk || !stamp || skb->pkt_type != PACKET_HOST || !read_udp(skb, &from, &to) ||
	    !may_answer_from(stamp->tenant, &to))
		return 0;
	of = bpf_sk_storage_get(&asked, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!of)
		return 0;
	if (!of->key)
		of->key = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32() | 1;
	now = asked_clock();
	number = number_of_local(of, &to, now);
	hash = hash_addr(&from, from.port, of->key) << 24;
	entry = number ? hash | (now & 0xffff) << 8 | number
		       : 0; /* what it has asked before is not where it asks now */
	set = asked_set(of, hash);
	if (!set)
		return 0;
	for (int n = 0; n < ASKED_WAYS; n++)
		if ((set[n] & ASKED_HASH) == hash) {
			if (set[n] != entry)
				set[n] = entry;
			return 0;
		}
	if (!number)
		return 0;
	for (int n = 0; n < ASKED_WAYS; n++)
		if (((now - (set[n] >> 8)) & 0xffff) > ASKED_TIME || !set[n]) {
			set[n] = entry;
			return 0;
		}
	switch (bpf_get_prandom_u32() % ASKED_WAYS) {
	case 0:
		set[0] = entry;
		break;
	case 1:
		set[1] = entry;
		break;
	case 2:
		set[2] = entry;
		break;
	default:
		set[3] = entry;
	}
	return 0;
}

/* Put the address there at which @a has asked this server; it stays the wildcard if it has not. */
__noinline int answer_source(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_addr *source)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr at = {};
	struct graft_asked *of;
	__u64 hash, *set;
	__u32 number;

	if (!a || !source || !stamp || !ctx->sk || !(stamp->flags & STAMP_INGRESS) || !is_any(stamp->local_real.ip))
		return 0;
	of = bpf_sk_storage_get(&asked, ctx->sk, NULL, 0);
	if (!of)
		return 0;
	hash = hash_addr(a, a->port, of->key) << 24;
	set = asked_set(of, hash);
	if (!set)
		return 0;
	for (int n = 0; n < ASKED_WAYS; n++) {
		if ((set[n] & ASKED_HASH) != hash || ((asked_clock() - (set[n] >> 8)) & 0xffff) > ASKED_TIME)
			continue;
		number = (set[n] & 0xff) - 1;
		if (number >= ASKED_LOCALS)
			return 0;
		__builtin_memcpy(at.ip, of->locals[number].ip, sizeof(at.ip));
		if (is_v4(&at) == is_v4(a) && !is_any(at.ip) && may_answer_from(stamp->tenant, &at))
			__builtin_memcpy(source->ip, at.ip, sizeof(at.ip));
		return 0;
	}
	return 0;
}

#endif
