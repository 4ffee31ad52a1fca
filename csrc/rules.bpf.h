/* SPDX-License-Identifier: GPL-2.0 */
/*
 * rules.bpf.h - the rules of ingress and egress
 */
#ifndef RULES_BPF_H
#define RULES_BPF_H

#include "maps.bpf.h"

static __noinline struct graft_ingress *ingress_rule(__u32 tenant, __u32 proto, struct graft_addr *a)
{
	struct graft_ingress_key key = {.prefixlen = INGRESS_FIXED_BITS + 16, .tenant = tenant};
	struct graft_ingress *found;

	if (!a)
		return NULL;
	key.proto = proto;
	key.family = is_v4(a) ? GRAFT_INET : GRAFT_INET6;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	key.port_be = bpf_htons((__u16)a->port);
	found = bpf_map_lookup_elem(&ingress, &key);
	return found && found->place != PLACE_NOWHERE ? found : NULL;
}

static __always_inline __u32 ingress_port(const struct graft_ingress *rule, __u32 port)
{
	return rule->span ? rule->port + port - rule->first : rule->port;
}

static __noinline struct graft_egress *egress_rule(__u32 tenant, struct graft_addr *a)
{
	struct graft_egress_key key = {.prefixlen = EGRESS_FIXED_BITS + 128, .tenant = tenant};
	struct graft_egress *found;

	if (!a)
		return NULL;
	key.family = is_v4(a) ? GRAFT_INET : GRAFT_INET6;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	found = bpf_map_lookup_elem(&egress, &key);
	return found && found->place != PLACE_NOWHERE ? found : NULL;
}

static __always_inline struct graft_egress *default_source(__u32 tenant)
{
	struct graft_egress_key key = {
		.prefixlen = EGRESS_FIXED_BITS + 128, .tenant = tenant, .family = GRAFT_DEFAULT};

	return bpf_map_lookup_elem(&egress, &key);
}

/*
 * The rule by which this socket leaves for @a; NULL if it may not go there. A socket of AF_GRAFT that nobody bound
 * leaves from `default-source`. A wrapper inside a container has rules of its own, and the container's must allow
 * the destination as well.
 */
static __noinline struct graft_egress *egress_for(struct graft_stamp *stamp, struct graft_tenant *tenant,
						  struct graft_addr *a)
{
	if (!stamp || !tenant || !a)
		return NULL;
	if (tenant->parent && !is_loopback(a) && !egress_rule(tenant->parent, a))
		return NULL;
	if (stamp->flags & STAMP_FAMILY) {
		if (!(tenant->flags & TENANT_STRICT) && !egress_rule(stamp->tenant, a))
			return NULL;
		return default_source(stamp->tenant);
	}
	return egress_rule(stamp->tenant, a);
}

/* As in AF_GRAFT, a wrapper's socket that is bound to an endpoint by name may go wherever that address may. */
static __noinline bool named_may_go(struct graft_stamp *stamp, struct graft_tenant *tenant, struct graft_addr *a)
{
	if (!stamp || !tenant || !a || !(tenant->flags & TENANT_STRICT))
		return false;
	if ((stamp->flags & (STAMP_NAMED | STAMP_STAYS)) != STAMP_NAMED)
		return false;
	return !tenant->parent || is_loopback(a) || egress_rule(tenant->parent, a);
}

/* The set of @of that @hash belongs to; NULL if there is none. */
static __always_inline __u64 *askers_set(struct graft_askers *of, __u64 hash)
{
	__u64 at = (hash >> 32) % ASKERS_SETS * (ASKERS_WAYS * sizeof(of->hash[0]));

	asm volatile("" : "+r"(at)); /* the verifier does not know what a remainder is: clang has to keep the test */
	if (at > sizeof(of->hash) - ASKERS_WAYS * sizeof(of->hash[0]))
		return NULL;
	return (void *)of->hash + at;
}

/* Has this address sent a datagram to a published UDP server of the tenant's, which may then answer? */
__noinline bool has_asked(__u32 tenant, struct graft_addr *a)
{
	struct graft_askers *of = bpf_map_lookup_elem(&asker_tables, &tenant);
	__u64 hash, *set;

	if (!of || !a)
		return false;
	hash = hash_addr(a, a->port, of->key) | 1; /* 0 is an empty place */
	set = askers_set(of, hash);
	return set && (set[0] == hash || set[1] == hash || set[2] == hash || set[3] == hash);
}

/* Remember that this address has. */
__noinline int add_asker(__u32 tenant, struct graft_addr *a)
{
	struct graft_askers *of = bpf_map_lookup_elem(&asker_tables, &tenant);
	__u64 hash, *set;

	if (!of || !a || has_asked(tenant, a))
		return 0;
	hash = hash_addr(a, a->port, of->key) | 1;
	set = askers_set(of, hash);
	if (!set)
		return 0;
	switch (bpf_get_prandom_u32() % ASKERS_WAYS) {
	case 0:
		set[0] = hash;
		break;
	case 1:
		set[1] = hash;
		break;
	case 2:
		set[2] = hash;
		break;
	default:
		set[3] = hash;
	}
	return 0;
}

/* A published UDP server may answer whoever asked it, also on the host's loopback, which is not the container's. */
static __always_inline bool may_answer(struct bpf_sock_addr *ctx, struct graft_stamp *stamp, struct graft_addr *a)
{
	return ctx->protocol == IPPROTO_UDP && stamp->flags & (STAMP_INGRESS | STAMP_ABROAD) &&
	       has_asked(stamp->tenant, a);
}

#endif
