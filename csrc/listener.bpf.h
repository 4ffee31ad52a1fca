/* SPDX-License-Identifier: GPL-2.0 */
/*
 * listener.bpf.h - the seccomp listener that the calling thread is under
 *
 * A process of a container is under one, graft's or another's, and nobody leaves his filters.
 */
#ifndef LISTENER_BPF_H
#define LISTENER_BPF_H

#include <bpf/bpf_core_read.h>

#define FILTERS                                                                                                      \
	(1 << 13) /* of one process: their instructions, and 4 for each, are 32,768 at most (kernel/seccomp.c) */

struct seccomp_filter {
	struct seccomp_filter *prev;
	struct notification *notif;
} __attribute__((preserve_access_index));

struct seccomp {
	struct seccomp_filter *filter;
} __attribute__((preserve_access_index));

struct task_struct___filtered {
	struct seccomp seccomp;
} __attribute__((preserve_access_index));

struct filter_walk {
	struct seccomp_filter *filter;
	__u64 found;
};

/* One step of listener_address(); not 0: the end. */
static long look_at_filter(__u32 n, struct filter_walk *walk)
{
	struct seccomp_filter *filter = walk->filter;

	(void)n;
	if (!filter)
		return 1;
	walk->found = (__u64)BPF_CORE_READ(filter, notif);
	walk->filter = BPF_CORE_READ(filter, prev);
	return walk->found != 0;
}

/* The address of the seccomp listener of the calling thread, of which it has one at the most; 0: it has none. */
static __always_inline __u64 listener_address(void)
{
	struct task_struct___filtered *task = (struct task_struct___filtered *)bpf_get_current_task();
	struct filter_walk walk = {.filter = BPF_CORE_READ(task, seccomp.filter)};

	bpf_loop(FILTERS, look_at_filter, &walk, 0);
	return walk.found;
}

#endif
