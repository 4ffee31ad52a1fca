// SPDX-License-Identifier: Apache-2.0
/*
 * relay_cage.c - what graft-relay gives up before it gets its first connection
 *
 * In order: graftd's cgroup and its protection from the OOM killer, ids and capabilities, system calls.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "architecture.h"
#include "relay.h"

#define DESCRIPTORS 600 /* graftd gives it 256 pairs */

static bool write_to(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool done = fd >= 0 && write(fd, text, strlen(text)) > 0;

	if (fd >= 0)
		close(fd);
	return done;
}

/* Be a process like others: in a cgroup with the usual weight, and no better than others to the OOM killer. */
void leave_graftd(const char *name, const char *cgroup)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
	if (!write_to(path, "0"))
		fprintf(stderr, "graft-relay %s: enter %s: %s\n", name, cgroup, strerror(errno));
	if (!write_to("/proc/self/oom_score_adj", "0"))
		fprintf(stderr, "graft-relay %s: /proc/self/oom_score_adj: %s\n", name, strerror(errno));
}

/* Take the uid that the container's sockets have, and give up everything else. 0, or -1 with errno. */
int drop_privileges(uid_t uid)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {0};
	const struct rlimit no_core = {0, 0}, few = {DESCRIPTORS, DESCRIPTORS};

	if (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setresgid, uid, uid, uid) ||
	    syscall(SYS_setresuid, uid, uid, uid) || syscall(SYS_capset, &header, none))
		return -1;
	/* after the change of ids, which resets it to what fs.suid_dumpable says */
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
		return -1;
	return setrlimit(RLIMIT_CORE, &no_core) || setrlimit(RLIMIT_NOFILE, &few) ? -1 : 0;
}

#define ARGUMENT(n) offsetof(struct seccomp_data, args[n])
#define ALLOW(number) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
/* The next @count instructions decide about a call of this number. */
#define CASE(number, count) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, count)
/* Kill unless the lower half of argument @n, or the upper one, is @value. */
#define NEED_AT(offset, value)                                                                                       \
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 1, 0),                \
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS)
#define NEED(n, value) NEED_AT(ARGUMENT(n), value)
#define NEED_UPPER(n, value) NEED_AT(ARGUMENT(n) + 4, value)

/* Whatever this process does not do ends it. The sockets are exempt from the containers' policy, so options that
 * would matter, and addresses to send to, are not let through. 0, or -1 with errno. */
int filter_calls(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_NATIVE, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
#ifdef SYS_epoll_wait
		ALLOW(SYS_epoll_wait),
		ALLOW(SYS_alarm),
#else /* aarch64, where libc makes these instead */
		ALLOW(SYS_epoll_pwait),
		ALLOW(SYS_setitimer),
#endif
		ALLOW(SYS_epoll_ctl),
		ALLOW(SYS_recvfrom),
		CASE(SYS_sendto, 7),
		NEED(4, 0),
		NEED_UPPER(4, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		CASE(SYS_setsockopt, 7),
		NEED(1, SOL_SOCKET),
		NEED(2, SO_LINGER),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		ALLOW(SYS_recvmsg),
		ALLOW(SYS_shutdown),
		ALLOW(SYS_close),
		ALLOW(SYS_getrandom), /* malloc()'s first */
		ALLOW(SYS_brk),
		ALLOW(SYS_mmap),
		ALLOW(SYS_munmap),
		ALLOW(SYS_exit_group),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
	};
	struct sock_fprog program = {sizeof(filter) / sizeof(filter[0]), filter};

	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
