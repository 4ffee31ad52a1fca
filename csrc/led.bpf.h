/* SPDX-License-Identifier: GPL-2.0 */
/*
 * led.bpf.h - endpoints and publications that were moved to a container which runs
 *
 * Blue has a listener at the host's port, and green one of its own in its slice. A move writes one entry of a map,
 * and from then on the program of sk_lookup gives green the connections that begin. Nothing is bound, closed or
 * passed on: what blue has accepted, what waits in its queue, and handshakes that are half done (the kernel finds
 * those by their own entries) stay blue's. So nobody is refused, and no program has to take part.
 */
#ifndef LED_BPF_H
#define LED_BPF_H

#include "maps.bpf.h"

/* To whom connections to @a are led, a port that has its bit. */
static __noinline struct graft_led *find_led(struct graft_addr *a)
{
	struct graft_led_key key = {.prefixlen = LED_FIXED_BITS + 16};
	struct graft_led *found;

	if (!a)
		return NULL;
	key.port_be = bpf_htons((__u16)a->port);
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	found = bpf_map_lookup_elem(&led, &key);
	if (found)
		return found;
	__builtin_memset(key.ip, 0, sizeof(key.ip));
	if (is_v4(a))
		key.ip[2] = MAPPED;
	return bpf_map_lookup_elem(&led, &key);
}

/* To whom connections to @a are led; NULL: to nobody, they go to who is bound there. */
static __always_inline struct graft_led *led_at(struct graft_addr *a)
{
	__u32 word = a->port / 64;
	__u64 *bits = bpf_map_lookup_elem(&led_ports, &word);

	return bits && *bits >> a->port % 64 & 1 ? find_led(a) : NULL;
}

/* The port of the program's that connections to @port of the host's are for. */
static __always_inline __u32 led_port(const struct graft_led *to, __u32 port)
{
	return (__u16)(to->inside + port - to->first);
}

#endif
