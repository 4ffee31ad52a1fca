/* SPDX-License-Identifier: GPL-2.0 */
/*
 * low_ports.bpf.h - ports that ask for a capability, and ports that are the node's
 */
#ifndef LOW_PORTS_BPF_H
#define LOW_PORTS_BPF_H

#include "maps.bpf.h"
#include <bpf/bpf_core_read.h>

#define CAP_NET_BIND_SERVICE 10 /* capabilities(7) */
#define PRIVILEGED_PORTS 1024
#define USER_NS_LEVELS 33 /* user_namespaces(7): 32 below the first */

struct low_caps {
	__u32 low; /* of kernel_cap_t, which is two words before Linux 6.3, and one of 64 bits since */
};

struct low_kuid {
	__u32 val;
};

struct user_namespace {
	struct user_namespace *parent;
	int level;
	struct low_kuid owner;
} __attribute__((preserve_access_index));

struct cred {
	struct low_kuid euid;
	struct low_caps cap_effective;
	struct user_namespace *user_ns;
} __attribute__((preserve_access_index));

struct netns_ipv4 {
	int sysctl_ip_prot_sock;
} __attribute__((preserve_access_index));

struct net {
	struct user_namespace *user_ns;
	__u64 net_cookie;
	struct netns_ipv4 ipv4;
} __attribute__((preserve_access_index));

struct nsproxy {
	struct net *net_ns;
} __attribute__((preserve_access_index));

struct task_struct {
	const struct cred *cred;
	struct nsproxy *nsproxy;
} __attribute__((preserve_access_index));

/* ns_capable(@over, CAP_NET_BIND_SERVICE) of the kernel's cap_capable(); @over NULL: the host's user namespace. */
static __always_inline bool may_bind_service(const struct cred *cred, struct user_namespace *over)
{
	struct user_namespace *mine = BPF_CORE_READ(cred, user_ns);
	int i, level = BPF_CORE_READ(mine, level);
	struct low_caps caps = {};
	bool capable;

	bpf_core_read(&caps, sizeof(caps), &cred->cap_effective);
	capable = caps.low & 1u << CAP_NET_BIND_SERVICE;
	if (!over)
		return capable && !level;
	for (i = 0; i < USER_NS_LEVELS; i++) {
		if (over == mine)
			return capable;
		if (BPF_CORE_READ(over, level) <= level)
			return false;
		if (BPF_CORE_READ(over, parent) == mine &&
		    BPF_CORE_READ(over, owner.val) == BPF_CORE_READ(cred, euid.val))
			return true;
		over = BPF_CORE_READ(over, parent);
	}
	return false;
}

/*
 * May the calling thread bind @port at an address of its container, whose netns has @cookie? The kernel asks the
 * host's netns, where the socket is, and the hook has it not asked; what counts is the container's, as behind a
 * bridge: its net.ipv4.ip_unprivileged_port_start, and a capability over it. That of a direct container, whose
 * programs are in the host's, graftd has written down; it belongs to the host's user namespace. Whoever was sent a
 * socket, and is in another netns, needs the host's.
 */
__noinline int may_bind_low(__u64 cookie, __u32 port)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct net *net = BPF_CORE_READ(task, nsproxy, net_ns);
	bool inside = net && BPF_CORE_READ(net, net_cookie) == cookie;
	__u32 first = inside ? BPF_CORE_READ(net, ipv4.sysctl_ip_prot_sock) : PRIVILEGED_PORTS;
	struct graft_direct *here = bpf_get_local_storage(&direct, 0);

	if (here->tenant)
		first = here->low;
	if (!port || port >= first)
		return true;
	return may_bind_service(BPF_CORE_READ(task, cred), inside ? BPF_CORE_READ(net, user_ns) : NULL);
}

/* Is this one of the UDP ports that the node needs (graft.toml, reserved_ports), which no container takes there? */
__noinline int is_reserved(__u32 port)
{
	__u32 key = port;

	return port && bpf_map_lookup_elem(&reserved, &key);
}

#endif
