// SPDX-License-Identifier: Apache-2.0
/*
 * graft-shim.so - socket() without a trap, for dynamically linked programs (`graft run --accel`, LD_PRELOAD)
 *
 * Theory of operation
 *
 * A trapped socket() costs two or four wake-ups. This library asks graft-sup for sockets ahead of the calls, up to
 * SUP_BATCH in a message and one message ahead, and gives those to the program: the same sockets, with the same
 * stamp, that the trap would give. It decides nothing and is trusted with nothing; a program that reads the channel
 * itself gets what socket() gives it anyway. Whatever is out of the ordinary goes the way of the trap: a kind of
 * socket that is not kept here, an empty channel, a lock that is taken, a table of descriptors that is small.
 *
 * What a program may rely on stays as it is, but for the lowest free number: a socket has one of those that were
 * lowest when its message was taken. Sockets in waiting are close-on-exec. A child gives them up at fork(), so that a
 * connection ends when its owner closes it; it asks for its own. A program that closes, or replaces, descriptors it
 * does not know may do so: each is compared with the inode that came with it before it is given away. A program that
 * makes few sockets never opens a channel.
 *
 * No libc is linked, so that the library loads under any; what it needs of one it takes where it is found.
 */
#define _GNU_SOURCE
#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/prctl.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "sup.h"

#define ACCUSTOM 4 /* sockets of a kind that a program gets by the trap before a channel is opened */
#define FIRST_BATCH 8
#define AGAIN 256 /* sockets until a channel that was lost is asked for again */
#define SPINS 2000
#define RESERVED (64 + SUP_KINDS) /* numbers below 1024: AF_GRAFT's, and the channels */
#define LIMIT_MIN 512

struct kept {
	int fd;
	unsigned long inode;
};

static struct pool {
	struct kept channel; /* fd 0: none */
	struct kept socket[SUP_BATCH];
	int left;
	int rest; /* sockets by the trap until a channel is asked for */
	int batch;
} pools[SUP_KINDS];

static int lock, off, base;
static int *unforked; /* a page that is zero again in a child (MADV_WIPEONFORK) */

extern int *__errno_location(void);
extern int __register_atfork(void (*)(void), void (*)(void), void (*)(void), void *) __attribute__((weak));
extern int pthread_atfork(void (*)(void), void (*)(void), void (*)(void)) __attribute__((weak));

static long call(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

static int returned(long result)
{
	if (result >= 0)
		return (int)result;
	*__errno_location() = (int)-result;
	return -1;
}

static bool same(struct kept kept)
{
	struct stat status;

	return !call(__NR_fstat, kept.fd, (long)&status, 0) && S_ISSOCK(status.st_mode) &&
	       status.st_ino == kept.inode;
}

static void forget(struct kept *kept)
{
	if (kept->fd && same(*kept))
		call(__NR_close, kept->fd, 0, 0);
	kept->fd = 0;
}

/* Give everything up: in a child, and in a process that leaves its netns. */
static void drop(void)
{
	for (struct pool *pool = pools; pool < pools + SUP_KINDS; pool++) {
		while (pool->left)
			forget(&pool->socket[--pool->left]);
		forget(&pool->channel);
		pool->rest = ACCUSTOM;
	}
}

static void in_child(void)
{
	drop();
	if (unforked)
		*unforked = 1;
	lock = 0;
}

/* A channel stays: out of the way of the program's own numbers. */
static int move_away(int fd)
{
	long moved = call(__NR_fcntl, fd, F_DUPFD_CLOEXEC, base);

	if (moved < 0)
		return fd;
	call(__NR_close, fd, 0, 0);
	return (int)moved;
}

static void ask(struct pool *pool)
{
	unsigned char count = (unsigned char)pool->batch;
	struct iovec text = {&count, 1};
	struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1};

	call(__NR_sendmsg, pool->channel.fd, (long)&message, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (pool->batch < SUP_BATCH)
		pool->batch *= 2;
}

static bool open_channel(struct pool *pool, long kind)
{
	struct stat status;
	long fd;

	if (pool->rest) {
		pool->rest--;
		return false;
	}
	fd = call(__NR_socket, AF_GRAFT, SOCK_STREAM | SOCK_CLOEXEC, SUP_CHANNEL + kind);
	if (fd < 0) { /* not under graft-sup */
		off = off || fd == -EAFNOSUPPORT || fd == -EPROTONOSUPPORT;
		pool->rest = AGAIN;
		return false;
	}
	pool->channel.fd = move_away((int)fd);
	call(__NR_fstat, pool->channel.fd, (long)&status, 0);
	pool->channel.inode = status.st_ino;
	pool->batch = FIRST_BATCH;
	ask(pool);
	ask(pool);
	return true;
}

/* Take the message that waits in the channel. */
static void refill(struct pool *pool, long kind)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(SUP_BATCH * sizeof(int))];
	} control;
	unsigned long inodes[SUP_BATCH];
	struct iovec text = {inodes, sizeof(inodes)};
	struct msghdr message = {
		.msg_iov = &text, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	struct cmsghdr *header;
	long length;
	int count, *fds;

	if (pool->channel.fd && !same(pool->channel))
		pool->channel.fd = 0; /* the program has closed it */
	if (!pool->channel.fd && !open_channel(pool, kind))
		return;
	length = call(__NR_recvmsg, pool->channel.fd, (long)&message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (length == -EAGAIN)
		return;
	header = length > 0 ? CMSG_FIRSTHDR(&message) : NULL;
	if (!header || header->cmsg_type != SCM_RIGHTS) { /* graft-sup has gone, or this table is full */
		forget(&pool->channel);
		pool->rest = AGAIN;
		return;
	}
	fds = (int *)CMSG_DATA(header);
	count = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
	for (int n = 0; n < count; n++) {
		pool->socket[count - 1 - n] = (struct kept){fds[n], inodes[n]}; /* the lowest number is taken first */
	}
	pool->left = count;
	ask(pool);
}

/* A socket of the pool, or -1. */
static int take(long kind, int flags)
{
	struct pool *pool = &pools[kind];
	struct kept kept;

	if (!*unforked)
		in_child(); /* made by a bare clone() */
	if (!pool->left)
		refill(pool, kind);
	while (pool->left) {
		kept = pool->socket[--pool->left];
		if (!same(kept))
			continue;
		if (!(flags & SOCK_CLOEXEC))
			call(__NR_fcntl, kept.fd, F_SETFD, 0);
		if (flags & SOCK_NONBLOCK)
			call(__NR_fcntl, kept.fd, F_SETFL, O_RDWR | O_NONBLOCK);
		return kept.fd;
	}
	return -1;
}

static bool enter(void)
{
	for (int n = 0; n < SPINS; n++) { /* in vain where a signal has interrupted the holder */
		if (!__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
			return true;
		__asm__ volatile("pause");
	}
	return false;
}

static void leave(void)
{
	__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
}

__attribute__((visibility("default"))) int socket(int domain, int type, int protocol)
{
	int what = type & ~(SOCK_NONBLOCK | SOCK_CLOEXEC), fd = -1;
	bool stream = what == SOCK_STREAM;

	if (!off && (domain == AF_INET || domain == AF_INET6) && (stream || what == SOCK_DGRAM) &&
	    (!protocol || protocol == (stream ? 6 : 17)) && enter()) {
		fd = take((domain == AF_INET6 ? SUP_KIND_INET6 : 0) | (stream ? 0 : SUP_KIND_DGRAM), type);
		leave();
	}
	return fd >= 0 ? fd : returned(call(__NR_socket, domain, type, protocol));
}

static void leave_netns(void)
{
	if (enter()) {
		drop();
		off = 1;
		leave();
	}
}

__attribute__((visibility("default"))) int setns(int fd, int type)
{
	leave_netns();
	return returned(call(__NR_setns, fd, type, 0));
}

__attribute__((visibility("default"))) int unshare(int flags)
{
	if (flags & CLONE_NEWNET)
		leave_netns();
	return returned(call(__NR_unshare, flags, 0, 0));
}

__attribute__((constructor)) static void start(void)
{
	struct rlimit limit;
	long page = -ENOMEM;

	off = 1;
	if (call(__NR_getrlimit, RLIMIT_NOFILE, (long)&limit, 0) || limit.rlim_cur < LIMIT_MIN)
		return;
	base = (int)(limit.rlim_cur < 1024 ? limit.rlim_cur : 1024) - RESERVED;
	{
		register long flags __asm__("r10") = MAP_PRIVATE | MAP_ANONYMOUS;
		register long fd __asm__("r8") = -1;
		register long offset __asm__("r9") = 0;

		__asm__ volatile("syscall"
				 : "=a"(page)
				 : "a"(__NR_mmap), "D"(0), "S"(4096), "d"(PROT_READ | PROT_WRITE), "r"(flags),
				   "r"(fd), "r"(offset)
				 : "rcx", "r11", "memory");
	}
	if (page < 0 && page > -4096)
		return;
	if (call(__NR_madvise, page, 4096, MADV_WIPEONFORK))
		return;
	unforked = (int *)page;
	*unforked = 1;
	for (int kind = 0; kind < SUP_KINDS; kind++)
		pools[kind].rest = ACCUSTOM;
	if (__register_atfork)
		__register_atfork(NULL, NULL, in_child, NULL);
	else if (pthread_atfork)
		pthread_atfork(NULL, NULL, in_child);
	off = 0;
}
