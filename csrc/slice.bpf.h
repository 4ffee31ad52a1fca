/* SPDX-License-Identifier: GPL-2.0 */
/*
 * slice.bpf.h - a tenant's slice of the loopback: where the ports of its 127.0.0.1 and ::1 really are (abi.h)
 */
#ifndef SLICE_BPF_H
#define SLICE_BPF_H

#include "address.bpf.h"

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
		set_v4(a, bpf_htonl(SLICE4_NET | slice << SLICE_SHIFT | index));
		return;
	}
	a->ip[0] = bpf_htonl(SLICE6_WORD0);
	a->ip[1] = bpf_htonl(SLICE6_WORD1);
	a->ip[2] = bpf_htonl(slice);
	a->ip[3] = bpf_htonl(index);
}

/* Where port @port of the container's loopback really is. */
static __always_inline void slice_addr(struct graft_addr *a, bool v4, __u32 slice, __u32 port)
{
	slice_ip(a, v4, slice, (port & 0xffff) >> SLICE_PORT_BITS);
	a->port = SLICE_PORT_BASE | (port & ((1u << SLICE_PORT_BITS) - 1));
}

/* Where port @port of an address of the container's own really is. */
static __always_inline void own_place(struct graft_addr *a, bool v4, __u32 slice, __u32 port, __u32 number)
{
	slice_addr(a, v4, slice, port);
	slice_ip(a, v4, slice, SLICE_OWN + ((((port & 0xffff) >> SLICE_PORT_BITS) ^ number) & 15));
}

/* The slice number of an address that is in a slice. */
static __always_inline __u32 slice_number(const struct graft_addr *a)
{
	return is_v4(a) ? (bpf_ntohl(a->ip[3]) & ~SLICE4_MASK) >> SLICE_SHIFT : bpf_ntohl(a->ip[2]);
}

/* Which address of slice number @slice this is, -1 if it is in no slice or in another. */
static __always_inline int slice_index(const struct graft_addr *a, __u32 slice)
{
	__u32 low;

	if (!in_slices(a))
		return -1;
	low = bpf_ntohl(a->ip[3]);
	if (is_v4(a)) {
		if ((low & ~SLICE4_MASK) >> SLICE_SHIFT != slice)
			return -1;
		low &= (1u << SLICE_SHIFT) - 1;
	} else if (a->ip[2] != bpf_htonl(slice)) {
		return -1;
	}
	return low <= SLICE_DYNAMIC ? (int)low : -1;
}

/* The inverse of slice_addr(): turn an address of the slice into the one that the container knows. */
static __always_inline bool slice_show(struct graft_addr *a, __u32 slice)
{
	int index = slice_index(a, slice);

	if (index < 0)
		return false;
	if (index != SLICE_DYNAMIC && a->port >= SLICE_PORT_BASE)
		a->port = (__u32)index << SLICE_PORT_BITS | (a->port & ((1u << SLICE_PORT_BITS) - 1));
	set_loopback(a);
	return true;
}

#endif
