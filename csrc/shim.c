// SPDX-License-Identifier: Apache-2.0
/*
 * graft-shim.so - socket() without a trap, for dynamically linked programs (`graft run --accel`, LD_PRELOAD)
 *
 * Theory of operation
 *
 * A trapped socket() costs two or four wake-ups. This library asks graft-sup for sockets ahead of the calls, up to
 * SUP_BATCH in a message and one message ahead, and gives the program those: the same sockets, with the same stamp,
 * that the trap would give. It decides nothing and is trusted with nothing. A program that reads the channel itself
 * gets what socket() gives it anyway. Whatever is out of the ordinary is left to the trap: a kind of socket that is
 * not kept here, an empty channel, a lock that is held, a small table of descriptors.
 *
 * What a program may rely on stays as it is, with one exception: a new socket does not have the lowest free number,
 * but one that was lowest when its message was received. Sockets that wait are close-on-exec. A child gives them up
 * at fork(), so that a connection ends when its owner closes it, and asks for its own. A program may close or replace
 * descriptors that it does not know, because each is compared with its inode before it is given away. A program that
 * makes few sockets never opens a channel.
 *
 * The library is linked with no libc, so that it loads with every one. What it needs of a libc it looks up.
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

#define ACCUSTOM 4 /* sockets of a kind that the trap gives to a program before it opens a channel */
#define FIRST_BATCH 8
#define AGAIN 256 /* sockets that the trap gives after a channel is lost, until another is asked for */
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
	int rest; /* sockets that the trap still gives, until a channel is asked for */
	int batch;
} pools[SUP_KINDS];

static int lock, off, base;
static int *unforked; /* in a page that the kernel zeroes in a child (MADV_WIPEONFORK) */

extern int *__errno_location(void);
extern int __register_atfork(void (*)(void), void (*)(void), void (*)(void), void *) __attribute__((weak));
extern int pthread_atfork(void (*)(void), void (*)(void), void (*)(void)) __attribute__((weak));

#if defined(__x86_64__)
#define RELAX "pause"

static long call6(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}
#elif defined(__aarch64__)
#define RELAX "yield"

static long call6(long number, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
}
#endif

static long call(long number, long a, long b, long c)
{
	return call6(number, a, b, c, 0, 0, 0);
}

static int as_libc_returns(long result)
{
	if (result >= 0)
		return (int)result;
	*__errno_location() = (int)-result;
	return -1;
}

static bool is_same(struct kept kept)
{
	struct stat status;

	return !call(__NR_fstat, kept.fd, (long)&status, 0) && S_ISSOCK(status.st_mode) &&
	       status.st_ino == kept.inode;
}

static void close_kept(struct kept *kept)
{
	if (kept->fd && is_same(*kept))
		call(__NR_close, kept->fd, 0, 0);
	kept->fd = 0;
}

/* Close all that is kept: the process is a child, or leaves its netns. */
static void drop_sockets(void)
{
	for (struct pool *pool = pools; pool < pools + SUP_KINDS; pool++) {
		while (pool->left)
			close_kept(&pool->socket[--pool->left]);
		close_kept(&pool->channel);
		pool->rest = ACCUSTOM;
	}
}

static void in_child(void)
{
	drop_sockets();
	if (unforked)
		*unforked = 1;
	lock = 0;
}

/* Move a channel, which stays open, out of the way of the numbers that the program gets. */
static int move_away(int fd)
{
	long moved = call(__NR_fcntl, fd, F_DUPFD_CLOEXEC, base);

	if (moved < 0)
		return fd;
	call(__NR_close, fd, 0, 0);
	return (int)moved;
}

static void ask_for_batch(struct pool *pool)
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
	if (fd < 0) { /* there is no graft-sup */
		off = off || fd == -EAFNOSUPPORT || fd == -EPROTONOSUPPORT;
		pool->rest = AGAIN;
		return false;
	}
	pool->channel.fd = move_away((int)fd);
	call(__NR_fstat, pool->channel.fd, (long)&status, 0);
	pool->channel.inode = status.st_ino;
	pool->batch = FIRST_BATCH;
	ask_for_batch(pool);
	ask_for_batch(pool);
	return true;
}

/* Receive the message that waits in the channel. */
static void receive_batch(struct pool *pool, long kind)
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

	if (pool->channel.fd && !is_same(pool->channel))
		pool->channel.fd = 0; /* the program has closed it, or has put another there */
	if (!pool->channel.fd && !open_channel(pool, kind))
		return;
	length = call(__NR_recvmsg, pool->channel.fd, (long)&message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (length == -EAGAIN)
		return;
	header = length > 0 ? CMSG_FIRSTHDR(&message) : NULL;
	if (!header || header->cmsg_type != SCM_RIGHTS) { /* graft-sup has ended, or this process's table is full */
		close_kept(&pool->channel);
		pool->rest = AGAIN;
		return;
	}
	fds = (int *)CMSG_DATA(header);
	count = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
	for (int n = 0; n < count; n++) {
		pool->socket[count - 1 - n] = (struct kept){fds[n], inodes[n]}; /* the lowest number is taken first */
	}
	pool->left = count;
	ask_for_batch(pool);
}

/* Take a socket of this kind out of its pool; -1: it is empty. */
static int take_socket(long kind, int flags)
{
	struct pool *pool = &pools[kind];
	struct kept kept;

	if (!*unforked)
		in_child(); /* a bare clone() has made this process, which runs no handlers of fork() */
	if (!pool->left)
		receive_batch(pool, kind);
	while (pool->left) {
		kept = pool->socket[--pool->left];
		if (!is_same(kept))
			continue;
		if (!(flags & SOCK_CLOEXEC))
			call(__NR_fcntl, kept.fd, F_SETFD, 0);
		if (flags & SOCK_NONBLOCK)
			call(__NR_fcntl, kept.fd, F_SETFL, O_RDWR | O_NONBLOCK);
		return kept.fd;
	}
	return -1;
}

static bool lock_pools(void)
{
	for (int n = 0; n < SPINS; n++) { /* in vain if a signal has interrupted the holder */
		if (!__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
			return true;
		__asm__ volatile(RELAX);
	}
	return false;
}

static void unlock_pools(void)
{
	__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
}

__attribute__((visibility("default"))) int socket(int domain, int type, int protocol)
{
	int what = type & ~(SOCK_NONBLOCK | SOCK_CLOEXEC), fd = -1;
	bool stream = what == SOCK_STREAM;

	if (!off && (domain == AF_INET || domain == AF_INET6) && (stream || what == SOCK_DGRAM) &&
	    (!protocol || protocol == (stream ? 6 : 17)) && lock_pools()) {
		fd = take_socket((domain == AF_INET6 ? SUP_KIND_INET6 : 0) | (stream ? 0 : SUP_KIND_DGRAM), type);
		unlock_pools();
	}
	return fd >= 0 ? fd : as_libc_returns(call(__NR_socket, domain, type, protocol));
}

static void leave_netns(void)
{
	if (lock_pools()) {
		drop_sockets();
		off = 1;
		unlock_pools();
	}
}

__attribute__((visibility("default"))) int setns(int fd, int type)
{
	leave_netns();
	return as_libc_returns(call(__NR_setns, fd, type, 0));
}

__attribute__((visibility("default"))) int unshare(int flags)
{
	if (flags & CLONE_NEWNET)
		leave_netns();
	return as_libc_returns(call(__NR_unshare, flags, 0, 0));
}

__attribute__((constructor)) static void start(void)
{
	struct rlimit limit;
	long page;

	off = 1;
	if (call(__NR_getrlimit, RLIMIT_NOFILE, (long)&limit, 0) || limit.rlim_cur < LIMIT_MIN)
		return;
	base = (int)(limit.rlim_cur < 1024 ? limit.rlim_cur : 1024) - RESERVED;
	page = call6(__NR_mmap, 0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
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
