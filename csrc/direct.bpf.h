/* SPDX-License-Identifier: GPL-2.0 */
/*
 * direct.bpf.h - sockets of a direct container, which its program makes itself in the host's netns
 *
 * The programs of this directory are attached to the cgroup of such a container, and this one counts each socket that
 * is made there, and stamps those of UDP; those of TCP get their stamp when there is something to note (made.bpf.h).
 * Whose it is says the storage of the place where it is attached, which graftd writes before the
 * container's first process is there. Without it no socket is made.
 *
 * What graft-sup sets on a socket that it makes cannot be set here: bpf_setsockopt() is not for this type of program.
 * So bind() is trapped, and graft-sup or graftd sets it first. A bind that comes without is refused
 * (is_unprepared()). The other calls do without: connect() to ::1 leaves
 * from an address that graftd has put on lo.
 *
 * The other program here keeps the container's from the host's sysctls.
 *
 * A socket of another netns than the host's is not graft's: a sandbox inside the container is free in its own.
 */
#ifndef DIRECT_BPF_H
#define DIRECT_BPF_H

#include "low_ports.bpf.h"
#include "options.bpf.h"

#define SOCK_DGRAM_ 2
#define ENFILE 23
#define EPROTONOSUPPORT 93

/*
 * Is it a kind of socket that the policy knows? The others are trapped, and made in the container's own netns; but an
 * engine's profile lets MPTCP and ping sockets come here, as a kernel that lacks them has it.
 */
static __always_inline bool is_native(__u32 type, __u32 protocol)
{
	return (type == SOCK_STREAM_ && protocol == IPPROTO_TCP) || (type == SOCK_DGRAM_ && protocol == IPPROTO_UDP);
}

/* Count a socket that is being made; false: the tenant may have no more. */
static __always_inline bool count_made(struct graft_usage *used, bool udp)
{
	__sync_fetch_and_add(&used->sockets, 1);
	if (udp)
		__sync_fetch_and_add(&used->udp, 1);
	if (*(volatile __s64 *)&used->sockets <= (__s64)used->sockets_max &&
	    (!udp || *(volatile __s64 *)&used->udp <= (__s64)used->udp_max))
		return true;
	__sync_fetch_and_add(&used->sockets, -1);
	if (udp)
		__sync_fetch_and_add(&used->udp, -1);
	return false;
}

static __always_inline int deny_made(__u32 tenant, __u32 reason, int error, __u32 protocol)
{
	count_and_tell(tenant, DENIED(OP_SOCKET, reason), error, protocol, NULL, true);
	fail_with(error);
	return DENY;
}

SEC("cgroup/sock_create")
int graft_sock_create(struct bpf_sock *sk)
{
	__u32 zero = 0, tenant = direct_tenant();
	struct graft_config *conf;
	__u32 protocol = FIELD(sk->protocol);
	struct graft_usage *used;
	bool udp;

	conf = bpf_map_lookup_elem(&config, &zero);
	if (conf && bpf_get_netns_cookie(sk) != conf->host_cookie) /* GRAFT_EXEMPT's */
		return bpf_sk_storage_get(&stamps, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE) ? ALLOW : DENY;
	if (!conf || !tenant || !is_native(FIELD(sk->type), protocol))
		return deny_made(tenant, REASON_KIND, EPROTONOSUPPORT, protocol);
	udp = protocol == IPPROTO_UDP;
	used = bpf_map_lookup_elem(&usage, &tenant);
	if (!used)
		return deny_made(tenant, REASON_NO_TENANT, EPERM, protocol);
	if (udp && !stamp_made(sk, tenant))
		return DENY;
	if (!count_made(used, udp))
		return deny_made(tenant, REASON_SOCKETS, ENFILE, protocol);
	return ALLOW;
}

/*
 * /proc/sys/net is that of whoever looks, the host's. Its root may write there without a capability, as uid 0, also
 * from a user namespace that has it. The mount over it holds for one path, and there are others: a procfs that the
 * host has for a chroot, the root directory of a process that may be looked at.
 */
SEC("cgroup/sysctl")
int graft_sysctl(struct bpf_sysctl *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	char name[] = "net/";
	struct graft_config *conf;
	__u32 zero = 0;

	if (!ctx->write)
		return ALLOW;
	bpf_sysctl_get_name(ctx, name, sizeof(name), 0); /* which says that there is more */
	if (name[0] != 'n' || name[1] != 'e' || name[2] != 't' || name[3] != '/')
		return ALLOW;
	conf = bpf_map_lookup_elem(&config, &zero);
	return conf && BPF_CORE_READ(task, nsproxy, net_ns, net_cookie) != conf->host_cookie;
}

#endif
