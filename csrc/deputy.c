// SPDX-License-Identifier: Apache-2.0
/*
 * graft-deputy - makes one system call as a target's user
 *
 * usage: graft-deputy; graftd starts it, with the socket as descriptor 0 and a channel to graftd as descriptor 1
 *
 * Theory of operation
 *
 * A unix socket tells its peer who connected, and the path is looked up with that user's permissions. So the call
 * must be made as the user of the program that asked for it. Whoever has a thread's uid may send it signals, lower
 * its limits, and trace it. So no thread of graftd takes another's uid. This program does, and shares nothing with
 * graftd: it has two descriptors, no capability and no memory of graftd's.
 *
 * Only the effective uid and gid are the target's, because those are what SO_PEERCRED tells and what file permissions
 * go by. The real and the saved ones are nobody's (DEPUTY_ID): kill(2) looks at those, so that the target's user
 * cannot stop this process either. It has the target's uid for the length of the one call. It is not dumpable.
 *
 * It fails closed: whatever goes wrong on the way is answered with an errno, and the call is not made. graftd kills
 * it when it has answered, or when its time is up.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/capability.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "deputy.h"

#define SOCKET 0
#define CHANNEL 1

static struct deputy_order order;
static char data[DEPUTY_DATA];

/* Take the target's user for what comes, and nothing else. 0, or -1 with errno. */
static int become(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {0};

	if (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setresgid, DEPUTY_ID, order.gid, DEPUTY_ID) ||
	    syscall(SYS_setresuid, DEPUTY_ID, order.uid, DEPUTY_ID) || syscall(SYS_capset, &header, none) ||
	    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
		return -1;
	return 0;
}

/* SCM_CREDENTIALS would show the real ids, which are nobody's; the effective ones may be named (unix(7)). */
static long send_as_target(struct sockaddr_un *peer, socklen_t length)
{
	union {
		struct cmsghdr align;
		char text[CMSG_SPACE(sizeof(struct ucred))];
	} control = {0};
	struct iovec part = {data, order.data_length};
	struct msghdr message = {.msg_name = peer,
				 .msg_namelen = length,
				 .msg_iov = &part,
				 .msg_iovlen = 1,
				 .msg_control = &control,
				 .msg_controllen = sizeof(control)};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	struct ucred who = {getpid(), order.uid, order.gid};

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_CREDENTIALS;
	header->cmsg_len = CMSG_LEN(sizeof(who));
	memcpy(CMSG_DATA(header), &who, sizeof(who));
	return sendmsg(SOCKET, &message, order.flags);
}

static long carry_out(void)
{
	struct sockaddr_un peer = {.sun_family = AF_UNIX};
	socklen_t length = offsetof(struct sockaddr_un, sun_path) + order.path_length + 1;

	if (order.path_length >= sizeof(peer.sun_path) || order.data_length > DEPUTY_DATA) {
		errno = EINVAL;
		return -1;
	}
	memcpy(peer.sun_path, order.path, order.path_length);
	switch (order.call) {
	case DEPUTY_CONNECT:
		return connect(SOCKET, (struct sockaddr *)&peer, length);
	case DEPUTY_SENDTO:
		return send_as_target(&peer, length);
	}
	errno = ENOSYS;
	return -1;
}

int main(void)
{
	struct iovec parts[] = {{&order, sizeof(order)}, {data, sizeof(data)}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
	struct deputy_answer answer = {.value = -1, .error = EPERM};
	const struct rlimit none = {0, 0};
	ssize_t got;

	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || setrlimit(RLIMIT_CORE, &none) ||
	    syscall(SYS_close_range, CHANNEL + 1, ~0U, 0))
		return 1;
	got = recvmsg(CHANNEL, &message, 0);
	if (got < (ssize_t)sizeof(order) || (size_t)got != sizeof(order) + order.data_length)
		return 1;
	if (become()) {
		answer.error = errno;
	} else {
		answer.value = carry_out();
		answer.error = answer.value < 0 ? errno : 0;
		if (syscall(SYS_setresuid, -1, DEPUTY_ID, -1)) /* cannot fail: it is the real one */
			return 1;
	}
	send(CHANNEL, &answer, sizeof(answer), MSG_NOSIGNAL);
	return 0;
}
