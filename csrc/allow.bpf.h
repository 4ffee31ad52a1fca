/* SPDX-License-Identifier: GPL-2.0 */
/*
 * allow.bpf.h - what a container with a list of destinations may reach (`graft run --allow`)
 *
 * The list is of addresses, `allowed`, and of names. What a name's addresses are is known when graftd's resolver
 * answers: it pins them here, in `pinned`, and then sends the answer. So all that such a container sends to port 53
 * goes to that resolver, wherever its program has meant it to go. A pin ends by itself, also while no graftd runs. It
 * is asked for when a socket connects, or sends without a connection; what is connected stays.
 *
 * The list narrows what the egress rules allow, and chooses no source.
 */
#ifndef ALLOW_BPF_H
#define ALLOW_BPF_H

#include "report.bpf.h"
#include "slice.bpf.h"

#define NAMES_PORT 53
#define RESOLVER_IP bpf_htonl(0x7f00000b)

/* Put graftd's resolver there, at its address of the same family. */
static __always_inline void to_resolver(struct graft_addr *a)
{
	if (is_v4(a))
		a->ip[3] = RESOLVER_IP;
	else
		slice_ip(a, false, 0, RESOLVER6_INDEX);
}

/* Does graftd's resolver answer what this tenant sends to @a? */
static __always_inline bool asks_resolver(const struct graft_tenant *tenant, const struct graft_addr *a)
{
	return (tenant->flags & (TENANT_NAMES | TENANT_STRICT)) == TENANT_NAMES && a->port == NAMES_PORT;
}

/* Has the list this destination, with this port or with all? */
static __always_inline bool has_destination(struct graft_allowed_key *key)
{
	__u64 *until = bpf_map_lookup_elem(&pinned, &key->tenant); /* its key begins there */

	return (until && *until > bpf_ktime_get_ns()) || bpf_map_lookup_elem(&allowed, key);
}

/*
 * Does the list of @owner let @protocol go to @a? One that is to learn lets everything go, and tells graftd of each
 * destination once.
 */
__noinline int is_allowed(__u32 owner, __u32 protocol, struct graft_addr *a)
{
	struct graft_allowed_key key = {.prefixlen = ALLOWED_FIXED_BITS + 128, .tenant = owner};
	struct graft_tenant *tenant;
	struct graft_holder *holder;
	__u32 one = 1;

	if (!a)
		return false;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip)); /* Linux 6.1 takes no argument for a key */
	holder = bpf_map_lookup_elem(&holders, key.ip);
	if (holder && holder->tenant == owner)
		return true;
	key.port = a->port;
	if (has_destination(&key))
		return true;
	key.port = 0;
	if (has_destination(&key))
		return true;
	tenant = bpf_map_lookup_elem(&tenants, &owner);
	if (!tenant || !(tenant->flags & TENANT_LEARN))
		return false;
	key.port = a->port;
	if (!bpf_map_update_elem(&learnt, &key.tenant, &one, BPF_NOEXIST))
		tell(owner, DENIED(OP_CONNECT, REASON_LEARNT), 0, protocol, a, NULL, true);
	return true;
}

#endif
