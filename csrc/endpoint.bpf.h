/* SPDX-License-Identifier: GPL-2.0 */
/*
 * endpoint.bpf.h - addresses that stand for the name of an endpoint (abi.h)
 *
 * graftd's resolver tells NAME.graft by such an address. A bind there is decided as one by an ingress rule, which
 * graftd writes for each name. A connection or a datagram to it goes to the endpoint, from where the egress rules say
 * for the endpoint's address, or else as the host sends. That the endpoint is in the container's table is its leave,
 * as it is for who asks for it by AF_GRAFT. One that a user without root has added is no leave: what goes to it is
 * decided as if the program had named the address itself.
 */
#ifndef ENDPOINT_BPF_H
#define ENDPOINT_BPF_H

#include "rules.bpf.h"
#include "slice.bpf.h"

/* May @a stand for the name of an endpoint? It is nothing else's address. */
static __always_inline bool names_endpoint(const struct graft_addr *a)
{
	if (is_v4(a))
		return (a->ip[3] & bpf_htonl(NAMES4_MASK)) == bpf_htonl(NAMES4_NET);
	return a->ip[0] == bpf_htonl(SLICE6_WORD0) && a->ip[1] == bpf_htonl(NAMES6_WORD1);
}

#define REFUSED_NAME(reason, error) ((reason) << 16 | (error))
#define AS_ITSELF 1 /* no errno with a reason */

/*
 * Put the address of the endpoint there that @a stands for. @source: where the socket is bound. Returns 0, AS_ITSELF
 * where it gives no leave, or REFUSED_NAME(). A socket on its private loopback reaches no endpoint elsewhere: a
 * server would take it for its own host's.
 */
__noinline int to_endpoint(struct graft_stamp *stamp, struct graft_addr *a, struct graft_addr *source)
{
	struct graft_endpoint_key key = {};
	struct graft_endpoint *found;

	if (!stamp || !a || !source)
		return REFUSED_NAME(REASON_NO_ENDPOINT, ENETUNREACH);
	key.tenant = stamp->tenant;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	found = bpf_map_lookup_elem(&endpoints, &key);
	if (!found || stamp->flags & STAMP_STAYS)
		return REFUSED_NAME(REASON_NO_ENDPOINT, ENETUNREACH);
	if (found->place != stamp->place)
		return REFUSED_NAME(REASON_PLACE, ENETUNREACH);
	if (!(found->port & 0xffff)) /* of a `dynamic` one nobody can say where it is */
		return REFUSED_NAME(REASON_NO_ENDPOINT, ECONNREFUSED);
	__builtin_memcpy(a->ip, found->ip, sizeof(a->ip));
	a->port = found->port & 0xffff;
	if (found->port & ENDPOINT_OF_USER)
		return AS_ITSELF;
	if (in_slices(a))
		return REFUSED_NAME(REASON_NO_ENDPOINT, ENETUNREACH);
	if (!is_loopback(a) && !(stamp->flags & STAMP_NAMED) &&
	    (is_loopback(source) || in_slices(source) || stamp->flags & STAMP_PRIVATE))
		return REFUSED_NAME(REASON_PRIVATE_SOURCE, EADDRNOTAVAIL);
	return 0;
}

/* The egress rule that says from where an endpoint at @a is reached; NULL: as the host sends. */
static __noinline struct graft_egress *rule_to_endpoint(struct graft_stamp *stamp, struct graft_addr *a)
{
	struct graft_egress *rule;

	if (!stamp || !a || is_loopback(a))
		return NULL;
	rule = egress_rule(stamp->tenant, a);
	return rule && rule->place == stamp->place ? rule : NULL;
}

#endif
