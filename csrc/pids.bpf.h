/* SPDX-License-Identifier: GPL-2.0 */
/*
 * pids.bpf.h - the calling process as graftd numbers it
 *
 * bpf_get_current_pid_tgid() has the number of the first pid namespace. graftd may run in another, as under an engine
 * inside a container, and its /proc knows the numbers of that one. bpf_get_ns_current_pid_tgid() answers only for
 * processes that are in it themselves, and a container's are in one below. So the numbers of each level are read
 * (struct pid___numbered, include/linux/pid.h).
 */
#ifndef PIDS_BPF_H
#define PIDS_BPF_H

#include "maps.bpf.h"

#include <bpf/bpf_core_read.h>

#define PIDNS_LEVELS 33 /* MAX_PID_NS_LEVEL and the first (kernel/pid_namespace.c) */

struct ns_common___numbered {
	unsigned int inum;
} __attribute__((preserve_access_index));

struct pid_namespace___numbered {
	struct ns_common___numbered ns;
} __attribute__((preserve_access_index));

struct upid___numbered {
	int nr;
	struct pid_namespace___numbered *ns;
} __attribute__((preserve_access_index));

struct pid___numbered {
	unsigned int level;
	struct upid___numbered numbers[1];
} __attribute__((preserve_access_index));

struct task_struct___numbered {
	struct task_struct___numbered *group_leader;
	struct pid___numbered *thread_pid;
} __attribute__((preserve_access_index));

/* The pid of the calling process; 0: it has none where graftd is. */
static __always_inline __u32 current_pid(void)
{
	struct task_struct___numbered *task;
	__u32 zero = 0, *pidns, level;
	struct upid___numbered *number;
	struct pid___numbered *pid;
	__u32 i;

	pidns = bpf_map_lookup_elem(&pidns_of_graftd, &zero);
	if (!pidns || !*pidns)
		return bpf_get_current_pid_tgid() >> 32;
	task = (struct task_struct___numbered *)bpf_get_current_task();
	pid = BPF_CORE_READ(task, group_leader, thread_pid);
	level = BPF_CORE_READ(pid, level);
	number = __builtin_preserve_access_index(&pid->numbers[0]);
	for (i = 0; i < PIDNS_LEVELS && i <= level; i++) {
		if (BPF_CORE_READ(number, ns, ns.inum) == *pidns)
			return BPF_CORE_READ(number, nr);
		number = (void *)number + bpf_core_type_size(struct upid___numbered);
	}
	return 0;
}

#endif
