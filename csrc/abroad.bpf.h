/* SPDX-License-Identifier: GPL-2.0 */
/*
 * abroad.bpf.h - UDP sockets that are on their container's network, and go beyond it
 *
 * The address of a container on an engine's network is known on this host alone. A program binds a UDP socket to a
 * port of the wildcard or of that address, and bind() does not say what for: it may ask a server beyond the network,
 * answer its neighbours, or do both (SIP). A socket that is bound to the network's address cannot leave from another
 * port than the one it has, and that port of the host's is not the container's to use. So such a socket is on the
 * host's wildcard, at a port of the kernel's choice (STAMP_ABROAD):
 *
 * - What it sends beyond the network leaves from the host's address, and whom it has sent to is let in there
 *   (receive.bpf.h).
 * - What it sends to a neighbour leaves from the network's address: the send hook names the source.
 * - Whoever is to reach the container's address goes through a hook: neighbours, and programs of this host
 *   (HOLDER_LOCAL: what comes by a device is dropped). The hook of connect or send looks the program's port up here,
 *   and leads to the kernel's. Everything that arrives at the network's address is let in.
 * - A neighbour that was not the first to send sees the kernel's port as the source. The hook of recvmsg turns it
 *   into the program's, by the entry of GRAFT_USED in `dynamic_ports`.
 *
 * Two binds are never in each other's way on the host, so `claims` says which are for the program. Sockets that share
 * a port have a port of the host's each, and a neighbour is led to one of them by its own port.
 *
 * A neighbour that has connected sends to the kernel's port for as long as it lives, also when the server has been
 * started anew. So that port is remembered (`abroad_ports`), and the next bind of the program's port asks for it.
 */
#ifndef ABROAD_BPF_H
#define ABROAD_BPF_H

#include "claims.bpf.h"
#include "listeners.bpf.h"

/* May neighbours ask this UDP socket, and be answered? */
static __always_inline bool is_server(const struct graft_stamp *stamp)
{
	return stamp->flags & (STAMP_INGRESS | STAMP_ABROAD);
}

static __always_inline struct graft_abroad_key abroad_key(__u32 tenant, const __u32 *ip, __u32 port)
{
	struct graft_abroad_key key = {.tenant = tenant, .port = port};

	__builtin_memcpy(key.ip, ip, sizeof(key.ip));
	return key;
}

struct member_search {
	struct graft_abroad *of;
	__u32 at;   /* of the member to look at */
	__u32 port; /* what was found */
};

/* One step of choose_member(); not 0: it is over. */
static long search_member(__u32 step, struct member_search *search)
{
	__u64 at = search->at % ABROAD_MEMBERS;

	(void)step;
	asm volatile("" : "+r"(at)); /* clang would test another register than it uses */
	if (at >= ABROAD_MEMBERS || !search->of)
		return 1;
	search->port = search->of->port[at];
	search->at++;
	return search->port != 0;
}

/* A member of @of, chosen by @hash: a port of the host's; 0: there is none. */
static __always_inline __u32 choose_member(struct graft_abroad *of, __u32 hash)
{
	struct member_search search = {.of = of};

	if (of->used <= 1)
		return of->port[0];
	search.at = hash % (__u32)of->used;
	bpf_loop(ABROAD_MEMBERS, search_member, &search, 0);
	return search.port;
}

/* The port of the host's at which the tenant's socket is for @a, an address of its own and the program's port; 0:
 * there is none. */
__noinline int abroad_port(__u32 tenant, struct graft_addr *a, __u32 hash)
{
	struct graft_abroad_key key;
	struct graft_abroad *of;

	if (!a)
		return 0;
	key = abroad_key(tenant, a->ip, a->port);
	of = bpf_map_lookup_elem(&abroad, &key);
	if (!of) {
		key.ip[0] = 0;
		key.ip[1] = 0;
		if (!is_v4(a))
			key.ip[2] = 0;
		key.ip[3] = 0;
		of = bpf_map_lookup_elem(&abroad, &key);
	}
	return of ? (__u16)choose_member(of, hash) : 0;
}

/* The key of `abroad_ports` for a bind to @asked: the wildcard has the tenant's first address, of IPv4 if @v4. */
static __always_inline struct graft_abroad_key remembered_key(const struct graft_tenant *tenant,
							      const struct graft_addr *asked, bool v4)
{
	struct graft_abroad_key key = abroad_key(0, asked->ip, asked->port);

	if (!is_any(key.ip))
		return key;
	__builtin_memcpy(key.ip, tenant->own6, sizeof(key.ip));
	if (v4) {
		key.ip[0] = 0;
		key.ip[1] = 0;
		key.ip[2] = MAPPED;
		key.ip[3] = tenant->own4;
	}
	return key;
}

/*
 * The port of the host's that a neighbour has connected to at one of the tenant's addresses, and that the next bind
 * to @asked should get; 0: none. It is forgotten until the kernel has bound it, which may refuse.
 */
static __always_inline __u32 take_remembered(const struct graft_tenant *tenant, const struct graft_addr *asked)
{
	struct graft_abroad_key key = remembered_key(tenant, asked, is_v4(asked));
	__u32 *found = bpf_map_lookup_elem(&abroad_ports, &key), port;

	if (!found && is_any6(asked->ip)) {
		key = remembered_key(tenant, asked, true);
		found = bpf_map_lookup_elem(&abroad_ports, &key);
	}
	if (!found)
		return 0;
	port = *found;
	bpf_map_delete_elem(&abroad_ports, &key);
	return port;
}

/* The program's port of the tenant's socket at port @port of the host's; 0: it is not one that the kernel chose. */
static __always_inline __u32 programs_port(__u32 tenant, bool v4, __u32 port)
{
	struct graft_dynamic_key key = {.tenant = tenant, .proto = IPPROTO_UDP, .port = port};
	__u32 *found = NULL;

	if (v4) {
		key.family = GRAFT_INET | GRAFT_USED;
		found = bpf_map_lookup_elem(&dynamic_ports, &key);
	}
	if (!found) {
		key.family = GRAFT_INET6 | GRAFT_USED;
		found = bpf_map_lookup_elem(&dynamic_ports, &key);
	}
	return found ? *found & 0xffff : 0;
}

/* A neighbour has connected to @asked, and was led to @port of the host's, perhaps that of a wildcard. */
__noinline int remember_port(struct graft_addr *asked, __u32 port)
{
	struct graft_abroad_key key;
	struct graft_tenant *tenant;
	struct graft_holder *holder;
	__u32 id;

	if (!asked || asked->port == port)
		return 0;
	key = abroad_key(0, asked->ip, asked->port);
	holder = bpf_map_lookup_elem(&holders, key.ip);
	if (!holder)
		return 0;
	id = holder->tenant;
	if (programs_port(id, is_v4(asked), port) != asked->port)
		return 0; /* it is published there */
	bpf_map_update_elem(&abroad_ports, &key, &port, BPF_ANY);
	tenant = bpf_map_lookup_elem(&tenants, &id);
	if (!tenant || !(is_v4(asked) ? tenant->own4 : tenant->own6[0]))
		return 0;
	key = remembered_key(tenant, &(struct graft_addr){.port = asked->port}, is_v4(asked));
	return bpf_map_update_elem(&abroad_ports, &key, &port, BPF_ANY);
}

/* Enter @port of the host's at this place. Returns the number of the member, from 1; 0: it is not entered. */
static __always_inline __u32 enter_place(__u32 tenant, const __u32 *ip, __u32 asked, __u32 port)
{
	struct graft_abroad_key key = abroad_key(tenant, ip, asked);
	struct graft_abroad new = {.used = 1}, *of;
	__u32 member = 0;

	new.port[0] = port;
	if (!bpf_map_update_elem(&abroad, &key, &new, BPF_NOEXIST))
		return 1;
	of = bpf_map_lookup_elem(&abroad, &key);
	for (__u32 n = 0; of && n < ABROAD_MEMBERS; n++)
		if (!of->port[n] && !__sync_val_compare_and_swap(&of->port[n], 0, (__u64)port)) {
			if (of->used < n + 1)
				of->used = n + 1;
			member = n + 1;
			break;
		}
	/* the last member may have left meanwhile, and the entry with it */
	if (bpf_map_lookup_elem(&abroad, &key))
		return member;
	return bpf_map_update_elem(&abroad, &key, &new, BPF_NOEXIST) ? 0 : 1;
}

/* Enter a socket that has been bound, at @port of the host's. @both: on the wildcard of both families. */
__noinline int go_abroad(struct graft_abroad_place *place, struct graft_stamp *stamp, __u32 port, bool both)
{
	__u32 four[4] = {0, 0, MAPPED, 0};
	struct graft_abroad_key key;
	struct graft_tenant *tenant;

	if (!place || !stamp)
		return 0;
	tenant = tenant_of(stamp);
	if (tenant && stamp->local_real.port) {
		key = remembered_key(tenant, &stamp->local, is_v4(&stamp->local));
		bpf_map_update_elem(&abroad_ports, &key, &port, BPF_ANY);
	}
	place->at = stamp->local;
	place->port = port;
	place->member = enter_place(stamp->tenant, place->at.ip, place->at.port, port);
	if (both)
		place->member4 = enter_place(stamp->tenant, four, place->at.port, port);
	return 0;
}

/* Returns the port of the host's of a socket that is still there; 0: none is. */
static __always_inline __u32 leave_place(__u32 tenant, const __u32 *ip, __u32 asked, __u32 port, __u32 member)
{
	struct graft_abroad_key key = abroad_key(tenant, ip, asked);
	struct graft_abroad *of = bpf_map_lookup_elem(&abroad, &key);
	__u64 at = member - 1;
	__u32 left;

	asm volatile("" : "+r"(at)); /* likewise */
	if (!of || at >= ABROAD_MEMBERS)
		return 0;
	if (of->port[at] == port)
		of->port[at] = 0;
	left = choose_member(of, 0);
	if (!left)
		bpf_map_delete_elem(&abroad, &key);
	return left;
}

/* The socket is closed, or is bound anew. */
__noinline int come_home(struct graft_abroad_place *place, __u32 tenant)
{
	struct graft_dynamic_key key = {.tenant = tenant, .proto = IPPROTO_UDP};
	__u32 four[4] = {0, 0, MAPPED, 0}, left = 0;

	if (!place)
		return 0;
	if (place->member)
		left = leave_place(tenant, place->at.ip, place->at.port, place->port, place->member);
	if (left && is_any(place->at.ip)) { /* the loopback finds another that shares the port */
		key.family = is_v4(&place->at) ? GRAFT_INET : GRAFT_INET6;
		key.port = place->at.port;
		bpf_map_update_elem(&dynamic_ports, &key, &left, BPF_ANY);
	}
	if (place->member4)
		leave_place(tenant, four, place->at.port, place->port, place->member4);
	place->member = place->member4 = 0;
	return 0;
}

/* A datagram has come from @a: if that is a container's address, put the port there that its program knows. */
__noinline int name_port(struct graft_addr *a)
{
	struct graft_holder *holder;
	struct graft_addr at;
	__u32 port;

	if (!a || !may_be_owned(a))
		return false;
	at = *a; /* on this stack: Linux 6.1 takes no argument for a key */
	holder = holder_of(&at);
	if (!holder || holder->tenant == GRAFT_EXEMPT)
		return false;
	port = programs_port(holder->tenant, is_v4(a), a->port);
	if (!port)
		return false;
	a->port = port;
	return true;
}

#endif
