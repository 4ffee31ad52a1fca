/* SPDX-License-Identifier: GPL-2.0 */
/*
 * listener.bpf.h - the seccomp listener that the calling thread is under
 *
 * A process of a container is under one, graft's or another's, and nobody leaves his filters.
 */
#ifndef LISTENER_BPF_H
#define LISTENER_BPF_H

#include <bpf/bpf_core_read.h>

#define FILTERS 64 /* of one process that are looked at */

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

/* The address of the seccomp listener of the calling thread, of which it has one at the most; 0: it has none. */
static __always_inline __u64 listener_address(void)
{
	struct task_struct___filtered *task = (struct task_struct___filtered *)bpf_get_current_task();
	struct seccomp_filter *filter = BPF_CORE_READ(task, seccomp.filter);
	__u64 found = 0;

	for (int n = 0; n < FILTERS && filter && !found; n++) {
		found = (__u64)BPF_CORE_READ(filter, notif);
		filter = BPF_CORE_READ(filter, prev);
	}
	return found;
}

#endif
