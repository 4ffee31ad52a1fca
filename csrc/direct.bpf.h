/* SPDX-License-Identifier: GPL-2.0 */
/*
 * direct.bpf.h - sockets of a direct container, which its program makes itself in the host's netns
 *
 * The programs of this directory are attached to the cgroup of such a container, and this one stamps each socket that
 * is made there. Whose it is says the storage of the place where it is attached, which graftd writes before the
 * container's first process is there. Without it no socket is made.
 *
 * What graft-sup sets on a socket that it makes cannot be set here: bpf_setsockopt() is not for this type of program.
 * So bind() is trapped, and graftd sets it first. A bind that comes without has no port of its own to wait with, and
 * is refused when it is bound (is_too_early()). The other calls do without: connect() to ::1 leaves from an address
 * that graftd has put on lo.
 *
 * A socket of another netns than the host's is not graft's: a sandbox inside the container is free in its own.
 */
#ifndef DIRECT_BPF_H
#define DIRECT_BPF_H

#include "options.bpf.h"

#define SOCK_DGRAM_ 2
#define ENFILE 23
#define ENOMEM 12

/* Is it a kind of socket that the policy knows? All others are trapped, and made in the container's own netns. */
static __always_inline bool is_native(const struct bpf_sock *sk)
{
	return (sk->type == SOCK_STREAM_ && sk->protocol == IPPROTO_TCP) ||
	       (sk->type == SOCK_DGRAM_ && sk->protocol == IPPROTO_UDP);
}

/* Count a socket that is being made; false: the tenant may have no more. */
static __always_inline bool count_made(struct graft_usage *used, bool udp)
{
	__sync_fetch_and_add(&used->sockets, 1);
	if (udp)
		__sync_fetch_and_add(&used->udp, 1);
	if (*(volatile __u64 *)&used->sockets <= used->sockets_max &&
	    (!udp || *(volatile __u64 *)&used->udp <= used->udp_max))
		return true;
	__sync_fetch_and_add(&used->sockets, -1);
	if (udp)
		__sync_fetch_and_add(&used->udp, -1);
	return false;
}

static __always_inline int deny_made(__u32 tenant, __u32 reason, int error, __u32 protocol)
{
	count_and_tell(tenant, DENIED(OP_SOCKET, reason), error, protocol, NULL, true);
	bpf_set_retval(-error);
	return DENY;
}

SEC("cgroup/sock_create")
int graft_sock_create(struct bpf_sock *sk)
{
	struct graft_direct *here = bpf_get_local_storage(&direct, 0);
	struct graft_config *conf;
	struct graft_stamp *stamp;
	struct graft_usage *used;
	__u32 zero = 0, tenant;

	stamp = bpf_sk_storage_get(&stamps, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!stamp) {
		bpf_set_retval(-ENOMEM);
		return DENY;
	}
	conf = bpf_map_lookup_elem(&config, &zero);
	if (stamp->flags & STAMP_COUNTED)
		return ALLOW; /* the programs of two graftds may run for one socket during an upgrade */
	if (conf && bpf_get_netns_cookie(sk) != conf->host_cookie)
		return ALLOW; /* the stamp is GRAFT_EXEMPT's */
	tenant = here->tenant;
	if (!conf || !tenant || !is_native(sk))
		return deny_made(tenant, REASON_KIND, EPERM, sk->protocol);
	used = bpf_map_lookup_elem(&usage, &tenant);
	if (!used)
		return deny_made(tenant, REASON_NO_TENANT, EPERM, sk->protocol);
	if (!count_made(used, sk->protocol == IPPROTO_UDP))
		return deny_made(tenant, REASON_SOCKETS, ENFILE, sk->protocol);
	stamp->tenant = tenant;
	stamp->flags = STAMP_COUNTED | STAMP_VOUCHED | (sk->protocol == IPPROTO_TCP ? STAMP_LATE : 0);
	return ALLOW;
}

#endif
