// SPDX-License-Identifier: Apache-2.0
/*
 * sup_bind.c - graft-sup: what a socket of a direct container lacks when it is about to be bound
 *
 * A direct container's programs make their sockets themselves, so that nobody has set what make_socket() sets. bind()
 * is trapped for that, as graft/trap/sockets.py, Sockets.prepare(), has it. Then it proceeds, and the hooks decide.
 *
 * graftd decides the binds of a container that may have endpoints of type unix or of another netns, because those
 * need another socket (SUP_BIND), and whatever is unclear here.
 *
 * The map `prepared` has the pid of this process for the socket while its options are set, which nobody else may do
 * meanwhile, and afterwards that it is prepared (late.bpf.h). Another call for the same socket is graftd's, which
 * sets them whatever pid there is: who has that may have been killed. A socket of the tenant's uid without either was
 * made by graft, as for a container with sysctls. A program may have given it that uid, too: then the hooks refuse
 * the bind, because nothing says that it is prepared.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/kcmp.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sup_parts.h"

#define PIDFD_THREAD O_EXCL /* linux/pidfd.h, Linux 6.9 */
#define BINDS_AT_ONCE 4	    /* half of the threads */

static int preparing = -1; /* the map */

/* Take the argument bind:MAP:LOWEST:HIGHEST: the map, and the ephemeral ports of the host. false for any other. */
bool take_bind(const char *word)
{
	unsigned int low, high;
	int map, end = 0;

	if (sscanf(word, "bind:%d:%u:%u%n", &map, &low, &high, &end) != 3 || word[end] || low > high || high > 65535)
		return false;
	preparing = map;
	set_port_ranges(low, high);
	return true;
}

bool prepares_binds(void)
{
	return preparing >= 0 && has_unix_sockets && __atomic_load_n(&shared->flags, __ATOMIC_RELAXED) & SUP_BIND;
}

/* The process of a thread, if both have one table of descriptors; 0 if not, or if it cannot be known. */
static int process_of(int thread)
{
	int process = 0;
	char path[32], line[128];
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/status", thread);
	file = fopen(path, "re");
	if (!file)
		return 0;
	while (!process && fgets(line, sizeof(line), file))
		sscanf(line, "Tgid: %d", &process);
	fclose(file);
	return syscall(SYS_kcmp, thread, process, KCMP_FILES, 0, 0) ? 0 : process;
}

/* Has the call ended, for which a number of a process stood? 0 or an errno: ESRCH. */
static int check_call(const struct seccomp_notif *call)
{
	while (ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &call->id))
		if (errno != EINTR)
			return errno == ENOENT ? ESRCH : errno;
	return 0;
}

/* A duplicate of the caller's descriptor; -1 and an errno: EBADF if it has none of this number. */
static int borrow_fd(const struct seccomp_notif *call)
{
	int pidfd = (int)syscall(SYS_pidfd_open, call->pid, PIDFD_THREAD), process, fd, error;

	if (pidfd < 0 && errno == EINVAL) { /* before Linux 6.9 there are processes alone */
		process = process_of((int)call->pid);
		pidfd = process ? (int)syscall(SYS_pidfd_open, process, 0) : -1;
	}
	if (pidfd < 0)
		return -1;
	fd = (int)syscall(SYS_pidfd_getfd, pidfd, (int)call->data.args[0], 0);
	error = errno;
	close(pidfd);
	if (fd >= 0) {
		error = check_call(call);
		if (error) {
			close(fd);
			fd = -1;
		}
	}
	errno = error;
	return fd;
}

/*
 * The stamp of a socket, which has one from now on. False: it is none that a program of the container has made, or a
 * graftd that has lost its pins has other maps by now.
 */
static bool find_stamp(int fd, struct graft_stamp *stamp)
{
	struct graft_probe answer = {0};
	socklen_t size = sizeof(answer);

	if (!map_call(BPF_MAP_LOOKUP_ELEM, stamps, fd, stamp, 0))
		return true;
	getsockopt(fd, GRAFT_LEVEL, GRAFT_PROBE, &answer, &size); /* the hook makes it; the answer is the kernel's */
	return !map_call(BPF_MAP_LOOKUP_ELEM, stamps, fd, stamp, 0);
}

/* Prepare a socket. False: it may not be whole, and graftd has to see to it. */
static bool prepare(int fd, int family, bool udp)
{
	__u32 mine = (__u32)getpid(), now = mine, prepared = GRAFT_PREPARED;
	struct stat status;
	int one = 1;

	if (map_call(BPF_MAP_LOOKUP_ELEM, preparing, fd, &now, 0) && !fstat(fd, &status) &&
	    status.st_uid == shared->reuse_uid)
		return true;
	if (map_call(BPF_MAP_UPDATE_ELEM, preparing, fd, &mine, BPF_NOEXIST))
		return !map_call(BPF_MAP_LOOKUP_ELEM, preparing, fd, &now, 0) && now == GRAFT_PREPARED;
	/* EPERM: programs of another graftd are attached, which do not know this map; or graftd has taken over */
	if (limit_ports(fd, udp) != EPERM &&
	    (udp || !setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one))) &&
	    (family != AF_INET6 || !setsockopt(fd, IPPROTO_IPV6, IPV6_FREEBIND, &one, sizeof(one))) &&
	    !fchown(fd, shared->reuse_uid, (gid_t)-1))
		return !map_call(BPF_MAP_UPDATE_ELEM, preparing, fd, &prepared, BPF_EXIST);
	if (!map_call(BPF_MAP_LOOKUP_ELEM, preparing, fd, &now, 0) && now == mine)
		map_call(BPF_MAP_DELETE_ELEM, preparing, fd, NULL, 0);
	return false;
}

/* May the bind() of the socket @fd proceed? It is prepared then. False: graftd has to decide it. */
static bool may_proceed(int fd)
{
	union {
		struct sockaddr any;
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	} name = {0};
	socklen_t size = sizeof(int), length = sizeof(name);
	struct graft_stamp stamp;
	int family, type;

	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size))
		return true;
	if (family == AF_UNIX) /* one with a stamp stands for a socket of AF_GRAFT, or of an endpoint's */
		return map_call(BPF_MAP_LOOKUP_ELEM, stamps, fd, &stamp, 0) != 0;
	if (family != AF_INET && family != AF_INET6)
		return true;
	size = sizeof(int);
	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) || (type != SOCK_STREAM && type != SOCK_DGRAM))
		return true;
	if (!find_stamp(fd, &stamp) || stamp.place || stamp.flags & (STAMP_FAMILY | STAMP_NAMED))
		return false;
	if (stamp.tenant != shared->tenant)
		return true;
	if (getsockname(fd, &name.any, &length))
		return false;
	if (name.v4.sin_port) /* sin6_port is at the same place */
		return true;
	return prepare(fd, family, type == SOCK_DGRAM);
}

bool prepare_bind(const struct seccomp_notif *call)
{
	static int threads; /* in here: what they call may block, and then the others serve the container */
	bool proceeds = false;
	int fd;

	if (__atomic_add_fetch(&threads, 1, __ATOMIC_RELAXED) <= BINDS_AT_ONCE) {
		fd = borrow_fd(call);
		if (fd < 0) {
			proceeds = errno == EBADF || errno == ESRCH; /* the kernel says so, or nobody asks any more */
		} else {
			proceeds = may_proceed(fd);
			close(fd); /* before the answer: once the target closes its own, the port is free */
		}
	}
	__atomic_sub_fetch(&threads, 1, __ATOMIC_RELAXED);
	return proceeds;
}
