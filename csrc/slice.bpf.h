/* SPDX-License-Identifier: GPL-2.0 */
/*
 * slice.bpf.h - a tenant's slice of the loopback: where the ports of its 127.0.0.0/8 and ::1 really are (abi.h)
 */
#ifndef SLICE_BPF_H
#define SLICE_BPF_H

#include "maps.bpf.h"

/* Is @a in some tenant's slice? */
static __always_inline bool in_slices(const struct graft_addr *a)
{
	if (is_v4(a))
		return (a->ip[3] & bpf_htonl(SLICE4_MASK)) == bpf_htonl(SLICE4_NET);
	return a->ip[0] == bpf_htonl(SLICE6_WORD0) && a->ip[1] == bpf_htonl(SLICE6_WORD1);
}

/* Address @index of slice number @slice. */
static __always_inline void slice_ip(struct graft_addr *a, bool v4, __u32 slice, __u32 index)
{
	if (v4) {
		set_v4(a, bpf_htonl(SLICE4_NET + (slice << SLICE_SHIFT) + index));
		return;
	}
	a->ip[0] = bpf_htonl(SLICE6_WORD0);
	a->ip[1] = bpf_htonl(SLICE6_WORD1);
	a->ip[2] = bpf_htonl(slice);
	a->ip[3] = bpf_htonl(index);
}

struct loopback_search {
	struct graft_loopbacks *of;
	__u64 ip;
	__u32 take;
	__u32 number; /* what was found */
};

/* One step of find_loopback(); not 0: it is over. */
static long search_loopback(__u32 step, struct loopback_search *search)
{
	__u64 at = step, seen;

	asm volatile("" : "+r"(at)); /* clang would test another register than it uses */
	if (at >= SLICE_LOOPBACKS || !search->of)
		return 1;
	search->number = at + 1;
	seen = *(volatile __u64 *)&search->of->ip[at];
	if (!seen && search->take)
		seen = __sync_val_compare_and_swap(&search->of->ip[at], 0, search->ip);
	return !seen || seen == search->ip;
}

/*
 * The number of @a, 0 if it is no further address of the loopback. @take: it gets a number if it has none; else that
 * is the next free one, where nobody is. Inlined, because the chain of calls to loopback_place() has no stack left
 * for more frames on Linux 6.1.
 */
static __always_inline __u32 find_loopback(__u32 tenant, const struct graft_addr *a, __u32 take)
{
	struct loopback_search search = {.ip = a->ip[3], .take = take};

	if (!is_v4(a) || !is_loopback(a) || a->ip[3] == bpf_htonl(0x7f000001))
		return 0;
	search.of = bpf_map_lookup_elem(&loopbacks, &tenant);
	if (!search.of)
		return 0;
	bpf_loop(SLICE_LOOPBACKS, search_loopback, &search, 0);
	return search.number;
}

__noinline int number_at(__u32 tenant, struct graft_addr *a, int take)
{
	return a ? find_loopback(tenant, a, take) : 0;
}

/* The address with this number; the network's own, where nobody is, if none has it. */
__noinline int loopback_address(__u32 tenant, __u32 number)
{
	struct graft_loopbacks *of;
	__u64 at = number - 1;
	__u32 ip;

	if (!number)
		return bpf_htonl(0x7f000001);
	of = bpf_map_lookup_elem(&loopbacks, &tenant);
	asm volatile("" : "+r"(at)); /* clang would test another register than it uses */
	if (!of || at >= SLICE_LOOPBACKS)
		return bpf_htonl(0x7f000000);
	ip = of->ip[at];
	return ip ? ip : bpf_htonl(0x7f000000);
}

/* Where port @port of the container's loopback really is, at the address with number @number. */
static __always_inline void slice_place(struct graft_addr *a, bool v4, __u32 slice, __u32 port, __u32 number)
{
	__u32 index = (port & 0xffff) >> SLICE_PORT_BITS;

	slice_ip(a, v4, slice, number ? SLICE_OWN + number * 16 + index : index);
	a->port = SLICE_PORT_BASE | (port & ((1u << SLICE_PORT_BITS) - 1));
}

/* Put the place there of @a, the loopback's or the wildcard. Returns the number of the address. */
__noinline int loopback_place(__u32 tenant, __u32 slice, struct graft_addr *a, struct graft_addr *place, int take)
{
	int number;

	if (!a || !place)
		return 0;
	number = find_loopback(tenant, a, take);
	slice_place(place, is_v4(a), slice, a->port, number);
	return number;
}

/* Put the name there of the place that @a, an address of the loopback, has. */
__noinline int name_loopback(__u32 tenant, struct graft_addr *a)
{
	if (a && is_v4(a) && is_loopback(a))
		a->ip[3] = loopback_address(tenant, number_at(tenant, a, true));
	return 0;
}

/* Where port @port of 127.0.0.1 or ::1 really is. */
static __always_inline void slice_addr(struct graft_addr *a, bool v4, __u32 slice, __u32 port)
{
	slice_place(a, v4, slice, port, 0);
}

/* Where port @port of an address of the container's own really is. */
static __always_inline void own_place(struct graft_addr *a, bool v4, __u32 slice, __u32 port, __u32 number)
{
	slice_addr(a, v4, slice, port);
	slice_ip(a, v4, slice, SLICE_OWN + ((((port & 0xffff) >> SLICE_PORT_BITS) ^ number) & 15));
}

/* Put the place in the slice there of a bind to @asked: to the loopback's address with number @number, the wildcard,
 * or an own address of @holder. */
static __always_inline void private_place(struct graft_addr *a, bool v4, __u32 slice, const struct graft_addr *asked,
					  const struct graft_holder *holder, __u32 number)
{
	if (holder)
		own_place(a, v4, slice, asked->port, holder->number);
	else
		slice_place(a, v4, slice, asked->port, number);
}

/* The slice number of the tenant whose @number is: see abi.h. */
__noinline int slice_of_number(__u32 number)
{
	if (!(number % SLICE_GROUP) || bpf_map_lookup_elem(&slices, &number))
		return number;
	return number - number % SLICE_GROUP;
}

/* The slice number of an address that is in a slice. */
static __always_inline __u32 slice_number(const struct graft_addr *a)
{
	if (!is_v4(a))
		return bpf_ntohl(a->ip[2]);
	return slice_of_number((bpf_ntohl(a->ip[3]) & ~SLICE4_MASK) >> SLICE_SHIFT);
}

/* Which address of slice number @slice this is, -1 if it is in no slice or in another. */
static __always_inline int slice_index(const struct graft_addr *a, __u32 slice)
{
	__u32 low;

	if (!in_slices(a))
		return -1;
	low = bpf_ntohl(a->ip[3]);
	if (is_v4(a)) {
		low = (low & ~SLICE4_MASK) - (slice << SLICE_SHIFT);
		if (low >= 1u << SLICE_SHIFT && !(slice % SLICE_GROUP))
			return low < SLICE_GROUP << SLICE_SHIFT ? (int)low : -1;
	} else if (a->ip[2] != bpf_htonl(slice)) {
		return -1;
	}
	return low <= SLICE_DYNAMIC ? (int)low : -1;
}

/* The address of the loopback that the container knows for address @index of its slice. */
__noinline int slice_loopback(__u32 slice, __u32 index)
{
	__u32 *tenant = bpf_map_lookup_elem(&slices, &slice);

	return loopback_address(tenant ? *tenant : GRAFT_EXEMPT, (index >> 4) - 1);
}

/* The inverse of slice_place(): turn an address of the slice into the one that the container knows. */
__noinline int slice_show(struct graft_addr *a, __u32 slice)
{
	int index;

	if (!a)
		return false;
	index = slice_index(a, slice);
	if (index < 0)
		return false;
	if (index != SLICE_DYNAMIC && a->port >= SLICE_PORT_BASE)
		a->port = ((__u32)index & 15) << SLICE_PORT_BITS | (a->port & ((1u << SLICE_PORT_BITS) - 1));
	set_loopback(a);
	if (index >= 1 << SLICE_SHIFT)
		a->ip[3] = slice_loopback(slice, index);
	return true;
}

#endif
