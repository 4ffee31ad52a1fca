/* SPDX-License-Identifier: GPL-2.0 */
/*
 * leash.bpf.h - whose process it is, by what none can shed: its seccomp filter
 *
 * A process of a direct container that has left the cgroup is known by its cgroup namespace (moved.bpf.h), until it
 * makes another one in a user namespace of its own. But nobody leaves his seccomp filter. So the filter's listener is
 * known by its address in the kernel: `graft run` asks a socket for its cookie before it executes the command, and
 * then it is noted with the container's cgroup.
 *
 * graftd deletes the entries of a container whose listeners have ended, a moment later, and where it has lost them it
 * does not. Another listener may get the address. It has other numbers for its notifications, which begin at random.
 */
#ifndef LEASH_BPF_H
#define LEASH_BPF_H

#include "maps.bpf.h"
#include "listener.bpf.h"

#define NOTIFICATIONS (1ull << 40) /* more than one listener will have */

struct notification {
	__u64 next_id;
} __attribute__((preserve_access_index));

struct kernfs_node {
	__u64 id;
} __attribute__((preserve_access_index));

struct cgroup_subsys_state {
	struct cgroup_subsys_state *parent;
} __attribute__((preserve_access_index));

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
} __attribute__((preserve_access_index));

struct css_set {
	struct cgroup *dfl_cgrp;
} __attribute__((preserve_access_index));

struct task_struct___leashed {
	struct css_set *cgroups;
} __attribute__((preserve_access_index));

static __always_inline __u64 next_notification(__u64 listener)
{
	struct notification *of = (struct notification *)listener;

	return BPF_CORE_READ(of, next_id);
}

/* Is the entry @leash of the listener that has the address now? */
static __always_inline bool is_of(const struct graft_leash *leash, __u64 listener)
{
	return next_notification(listener) - leash->notification < NOTIFICATIONS;
}

/*
 * Note whose the listener of the calling thread is, which is in the cgroup of the direct container @tenant. Who has
 * made one below notes nothing: others of the container need not be there.
 */
__noinline int note_leash(__u32 tenant)
{
	struct task_struct___leashed *task = (struct task_struct___leashed *)bpf_get_current_task();
	struct graft_leash leash = {.tenant = tenant}, *before;
	__u64 key = listener_address(), cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);

	if (!key || !bpf_map_lookup_elem(&direct_cgroups, &cgroup))
		return 0;
	before = bpf_map_lookup_elem(&leashes, &key);
	if (before && is_of(before, key))
		return 0;
	leash.notification = next_notification(key);
	leash.cgroup = cgroup;
	bpf_map_update_elem(&leashes, &key, &leash, BPF_ANY);
	return 0;
}

/* The entry of the container whose process this is; NULL: it is none of a direct one's. */
static __always_inline struct graft_leash *leash_of_caller(void)
{
	__u64 key = listener_address();
	struct graft_leash *leash = key ? bpf_map_lookup_elem(&leashes, &key) : NULL;

	return leash && is_of(leash, key) ? leash : NULL;
}

#endif
