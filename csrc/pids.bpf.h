/* SPDX-License-Identifier: GPL-2.0 */
/*
 * pids.bpf.h - the calling process as graftd numbers it
 *
 * bpf_get_current_pid_tgid() has the number of the first pid namespace. graftd may run in another, as under an engine
 * inside a container, and its /proc knows the numbers of that one. bpf_get_ns_current_pid_tgid() answers only for
 * processes that are in it themselves, and a container's are in one below. So the numbers of each level are read
 * (struct pid, include/linux/pid.h).
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

struct pid_search {
	struct upid___numbered *numbers;
	__u32 pidns;
	__u32 found;
};

/* One step of current_pid(): is this the number in graftd's namespace? */
static long compare_pidns(__u32 level, struct pid_search *search)
{
	struct upid___numbered *number = (void *)search->numbers + level * bpf_core_type_size(struct upid___numbered);

	if (BPF_CORE_READ(number, ns, ns.inum) != search->pidns)
		return 0;
	search->found = BPF_CORE_READ(number, nr);
	return 1;
}

/* The pid of the calling process; 0: it has none where graftd is. Not static: the verifier proves it once. */
__noinline int current_pid(void)
{
	struct task_struct___numbered *task;
	struct pid_search search = {};
	__u32 zero = 0, *pidns, level;
	struct pid___numbered *pid;

	pidns = bpf_map_lookup_elem(&pidns_of_graftd, &zero);
	if (!pidns || !*pidns)
		return bpf_get_current_pid_tgid() >> 32;
	task = (struct task_struct___numbered *)bpf_get_current_task();
	pid = BPF_CORE_READ(task, group_leader, thread_pid);
	level = BPF_CORE_READ(pid, level);
	search.numbers = __builtin_preserve_access_index(&pid->numbers[0]);
	search.pidns = *pidns;
	bpf_loop(level < PIDNS_LEVELS ? level + 1 : PIDNS_LEVELS, compare_pidns, &search, 0);
	return search.found;
}

#endif
