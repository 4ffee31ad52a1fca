/* SPDX-License-Identifier: GPL-2.0 */
/*
 * moved.bpf.h - a process of a direct container that somebody has moved out of its cgroup makes no socket
 *
 * The cgroup is where the policy is. The container's own processes cannot leave it, but the host can move them, and
 * does so without ill will: a service manager gives a login session a cgroup of its own (pam_systemd(8)). Such a
 * process would make sockets of the host's that nobody judges. It is known by its cgroup namespace, which has the
 * container's cgroup for a root, and which it cannot leave without CAP_SYS_ADMIN; in a user namespace of its own,
 * where it has that, by its filter (leash.bpf.h).
 */
#ifndef MOVED_BPF_H
#define MOVED_BPF_H

#include "leash.bpf.h"
#include "report.bpf.h"

#define INIT_CGROUP_NS 0xeffffffbu /* include/linux/proc_ns.h, PROC_CGROUP_INIT_INO */
#define CGROUP_LEVELS 32

struct ns_common {
	unsigned int inum;
} __attribute__((preserve_access_index));

struct cgroup_namespace {
	struct ns_common ns;
	struct css_set *root_cset;
} __attribute__((preserve_access_index));

struct nsproxy___cgroup {
	struct cgroup_namespace *cgroup_ns;
} __attribute__((preserve_access_index));

struct task_struct___cgroup {
	struct nsproxy___cgroup *nsproxy;
	struct css_set *cgroups;
} __attribute__((preserve_access_index));

/* Is the cgroup with the number @id the one of @task, or above it? */
static __always_inline bool is_below(struct task_struct___cgroup *task, __u64 id)
{
	struct cgroup *at = task->cgroups->dfl_cgrp;

	if (at->kn->id == id)
		return true;
	for (int n = 1; n < CGROUP_LEVELS && at; n++) {
		at = (struct cgroup *)BPF_CORE_READ(at, self.parent); /* which is its first member */
		if (BPF_CORE_READ(at, kn, id) == id)
			return true;
	}
	return false;
}

/* Every socket of the host's programs comes by here: what the kernel knows the type of is read without a helper. */
SEC("cgroup/sock_create")
int guard_sock_create(struct bpf_sock *sk)
{
	struct task_struct___cgroup *task = (struct task_struct___cgroup *)bpf_get_current_task_btf();
	struct cgroup_namespace *ns = task->nsproxy->cgroup_ns;
	struct graft_config *conf;
	struct graft_leash *leash;
	__u32 zero = 0, *tenant;
	__u64 id;

	if (ns->ns.inum == INIT_CGROUP_NS)
		return ALLOW;
	id = ns->root_cset->dfl_cgrp->kn->id;
	tenant = bpf_map_lookup_elem(&direct_cgroups, &id);
	leash = tenant ? NULL : leash_of_caller();
	if (leash) {
		tenant = &leash->tenant;
		id = leash->cgroup;
	}
	if (!tenant || is_below(task, id))
		return ALLOW;
	conf = bpf_map_lookup_elem(&config, &zero);
	if (conf && bpf_get_netns_cookie(sk) != conf->host_cookie)
		return ALLOW;
	count_and_tell(*tenant, DENIED(OP_SOCKET, REASON_MOVED), EPERM, FIELD(sk->protocol), NULL, true);
	bpf_set_retval(-EPERM);
	return DENY;
}

#endif
