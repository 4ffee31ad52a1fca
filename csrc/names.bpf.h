/* SPDX-License-Identifier: GPL-2.0 */
/*
 * names.bpf.h - what the program sees: the addresses that it asked for
 */
#ifndef NAMES_BPF_H
#define NAMES_BPF_H

#include "core.bpf.h"

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

#endif
