// SPDX-License-Identifier: Apache-2.0
/*
 * graft-sup - answers the socket() calls of one container, beside it
 *
 * usage: graft-sup NAME LISTENER SHARED STAMPS CONTROL (descriptors) SOCKET (a path); started by graftd
 *
 * Theory of operation
 *
 * graftd could answer every trapped call, and does so where this program is missing. But a trapped call costs
 * what waking costs, and an interpreter between the wake-ups costs as much again. So socket(), whose arguments
 * are registers and whose answer never differs, is answered here: from a small pool of sockets that are made,
 * stamped and given their owner ahead of the call. Everything else is handed to graftd.
 *
 * Threads. The kernel keeps whoever adds a descriptor waiting until the target runs again, so one thread would
 * serve one target at a time: there are up to THREADS, made when needed. Every thread that waits in RECV is woken
 * for each call, so at most WAITERS wait there, and the others on a condition.
 *
 * Nothing is lost. A call is received into a slot of memory shared with graftd and stays in it until it is
 * answered. Should this process be killed, graftd finds it there; should graftd be killed, its successor finds
 * what was handed over. A descriptor is injected in two steps, ADDFD and then the answer with its number; why
 * not in one with SECCOMP_ADDFD_FLAG_SEND is told in graft/trap/journal.py.
 *
 * Nobody left. The keeper holds copies of what graftd holds. Should both be killed, this process has the only
 * ones. It goes on answering, and shows what it has to whoever listens at SOCKET next, until a graftd takes it.
 *
 * The preload library of `graft run --accel` asks for a channel instead (sup.h), which the main thread keeps
 * filled with such sockets. That is no privilege: they are what socket() gives, and the hooks decide on them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/sockios.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"
#include "sup.h"

#define THREADS 8
#define WAITERS 2
#define STACK (128 * 1024)
#define POOL 32
#define CHANNELS 16
#define SETTLE_NS 20000000 /* a moment for a slot to become free */
#define SHOW_MS 50	   /* between two attempts to find a graftd */
#define SHOW_SECONDS 10	   /* for it to answer */

#define TYPE_MASK 0xf
#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
#ifndef SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#endif

/* A socket that is ready to be given away. */
struct made {
	int fd;
	__u64 inode;
};

static struct sup_shared *shared;
static int listener, memory, stamps, control, events;
static struct sockaddr_un graftd = {.sun_family = AF_UNIX};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t parked = PTHREAD_COND_INITIALIZER;
static int threads, waiting;

static struct made pool[SUP_KINDS][POOL];
static int pooled[SUP_KINDS], wanted[SUP_KINDS];
static int channels;

static __u64 now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (__u64)t.tv_sec * 1000000000 + (__u64)t.tv_nsec;
}

/* ---- sockets ---- */

static int stamp(int fd, int kind)
{
	struct graft_stamp value = {.tenant = shared->tenant, .flags = kind & SUP_KIND_INET6 ? shared->flags6 : 0};
	union bpf_attr attr = {.map_fd = (__u32)stamps, .key = (__u64)(long)&fd, .value = (__u64)(long)&value};

	return (int)syscall(SYS_bpf, BPF_MAP_UPDATE_ELEM, &attr, sizeof(attr));
}

/*
 * Does the policy run for this socket? An errno, 0 for yes: ENFILE, its tenant has more than it may. Where the
 * programs are not attached, or stamps are kept elsewhere by now, this process is of no use; graftd starts another
 * and answers what it had.
 */
static int vouch(int fd)
{
	struct graft_probe answer = {0};
	socklen_t size = sizeof(answer);

	if (getsockopt(fd, GRAFT_LEVEL, GRAFT_PROBE, &answer, &size) || answer.tenant != shared->tenant)
		_exit(1);
	return answer.over ? ENFILE : 0;
}

/* A socket as graft/trap/supervisor.py makes it, this process's fsuid for its owner; an errno, 0 for success. */
static int make(int kind, struct made *result)
{
	int family = kind & SUP_KIND_INET6 ? AF_INET6 : AF_INET, one = 1, error;
	int fd = socket(family, (kind & SUP_KIND_DGRAM ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
	struct stat status;

	if (fd < 0)
		return errno;
	if ((family == AF_INET6 && setsockopt(fd, IPPROTO_IPV6, IPV6_FREEBIND, &one, sizeof(one))) ||
	    stamp(fd, kind) || fstat(fd, &status)) {
		error = errno;
		close(fd);
		return error;
	}
	error = vouch(fd);
	if (error)
		close(fd);
	*result = (struct made){fd, status.st_ino};
	return error;
}

static int take(int kind, struct made *result)
{
	pthread_mutex_lock(&lock);
	if (pooled[kind]) {
		*result = pool[kind][--pooled[kind]];
		pthread_mutex_unlock(&lock);
		return 0;
	}
	pthread_mutex_unlock(&lock);
	return make(kind, result);
}

static void put(int kind, struct made socket)
{
	pthread_mutex_lock(&lock);
	if (pooled[kind] < POOL) {
		pool[kind][pooled[kind]++] = socket;
		socket.fd = -1;
	}
	pthread_mutex_unlock(&lock);
	if (socket.fd >= 0)
		close(socket.fd);
}

/* After each call two more, up to what was called for: a program that makes one socket leaves one waiting. */
static void refill(int kind)
{
	struct made socket;
	bool room;
	int n;

	for (n = 0; n < 2; n++) {
		pthread_mutex_lock(&lock);
		if (!n && wanted[kind] < POOL)
			wanted[kind]++;
		room = pooled[kind] < wanted[kind];
		pthread_mutex_unlock(&lock);
		if (!room || make(kind, &socket))
			return;
		put(kind, socket);
	}
}

/* ---- answers; a target that is gone by now is no error ---- */

static void answer(const struct seccomp_notif *call, __s64 value, int error, __u32 flags)
{
	struct seccomp_notif_resp response = {.id = call->id, .val = value, .error = -error, .flags = flags};

	while (ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response) < 0 && errno == EINTR)
		;
}

static void proceed(const struct seccomp_notif *call)
{
	answer(call, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE);
}

/* Give the target a descriptor as the value of its call; false if it did not get one. */
static bool inject(struct sup_slot *slot, struct made socket, bool cloexec)
{
	struct seccomp_notif_addfd add = {
		.id = slot->call.id, .srcfd = (__u32)socket.fd, .newfd_flags = cloexec ? O_CLOEXEC : 0};
	int number;

	__atomic_store_n(&slot->inode, socket.inode, __ATOMIC_RELEASE);
	do {
		number = ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
	} while (number < 0 && errno == EINTR);
	if (number >= 0) {
		answer(&slot->call, number, 0, 0);
		return true;
	}
	if (errno != ENOENT && errno != EINPROGRESS)
		answer(&slot->call, 0, errno, 0); /* EMFILE: its table is full */
	return false;
}

/* ---- slots ---- */

static struct sup_slot *hold(void)
{
	for (int n = 0; n < SUP_SLOTS; n++) {
		__u32 free = SLOT_FREE;

		if (__atomic_compare_exchange_n(&shared->slots[n].state, &free, SLOT_HELD, false, __ATOMIC_ACQUIRE,
						__ATOMIC_RELAXED))
			return &shared->slots[n];
	}
	return NULL;
}

static void release(struct sup_slot *slot)
{
	memset(&slot->call, 0, sizeof(slot->call));
	slot->inode = 0;
	__atomic_store_n(&slot->state, SLOT_FREE, __ATOMIC_RELEASE);
}

static void forward(struct sup_slot *slot)
{
	__u32 number = (__u32)(slot - shared->slots);

	__atomic_store_n(&slot->state, SLOT_FORWARDED, __ATOMIC_RELEASE);
	/* a successor of graftd's looks through all slots: a message that is lost with it is no call lost */
	while (send(control, &number, sizeof(number), MSG_NOSIGNAL) < 0 && errno == EINTR)
		;
}

/* ---- calls ---- */

/* Is the caller in the container's netns? 0 no, 1 yes, or minus an errno. */
static int at_home(__u32 pid)
{
	struct stat status;
	char path[32];

	snprintf(path, sizeof(path), "/proc/%u/ns/net", pid);
	if (stat(path, &status))
		return -errno;
	return status.st_ino == shared->netns;
}

static int open_channel(struct sup_slot *slot, int kind)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP};
	struct stat status;
	int ends[2], error;

	if (__atomic_load_n(&channels, __ATOMIC_RELAXED) >= CHANNELS)
		return EMFILE;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends))
		return errno;
	event.data.u64 = (__u64)kind << 32 | (__u32)ends[0];
	if (fstat(ends[1], &status) || epoll_ctl(events, EPOLL_CTL_ADD, ends[0], &event)) {
		error = errno;
		close(ends[0]);
		close(ends[1]);
		return error;
	}
	__atomic_add_fetch(&channels, 1, __ATOMIC_RELAXED); /* the main thread closes ends[0] when its peer is gone */
	inject(slot, (struct made){ends[1], status.st_ino}, true);
	close(ends[1]);
	return 0;
}

static void on_socket(struct sup_slot *slot)
{
	const struct seccomp_notif *call = &slot->call;
	__u32 family = (__u32)call->data.args[0], flags = (__u32)call->data.args[1];
	__u32 protocol = (__u32)call->data.args[2], type = flags & TYPE_MASK;
	bool stream = type == SOCK_STREAM, cloexec = flags & SOCK_CLOEXEC, channel;
	int kind, home, error;
	struct made socket;

	channel = family == AF_GRAFT && stream && protocol >= SUP_CHANNEL && protocol < SUP_CHANNEL + SUP_KINDS;
	if (family == AF_GRAFT && !channel) {
		forward(slot);
		return;
	}
	if (!channel) {
		bool plain = !protocol || protocol == (stream ? IPPROTO_TCP : IPPROTO_UDP) ||
			     (stream && protocol == IPPROTO_MPTCP);

		if ((family != AF_INET && family != AF_INET6) || (!stream && type != SOCK_DGRAM) || !plain ||
		    flags & ~(__u32)(TYPE_MASK | SOCK_NONBLOCK | SOCK_CLOEXEC)) {
			proceed(call);
			goto out;
		}
	}
	home = at_home(call->pid);
	if (home <= 0) {
		if (home)
			answer(call, 0, home == -ENOENT ? ESRCH : -home, 0);
		else
			proceed(call);
		goto out;
	}
	if (channel) {
		error = open_channel(slot, (int)(protocol - SUP_CHANNEL));
		if (error)
			answer(call, 0, error, 0);
		goto out;
	}
	kind = (family == AF_INET6 ? SUP_KIND_INET6 : 0) | (stream ? 0 : SUP_KIND_DGRAM);
	error = take(kind, &socket);
	if (error) {
		answer(call, 0, error, 0);
		goto out;
	}
	if (flags & SOCK_NONBLOCK)
		fcntl(socket.fd, F_SETFL, O_RDWR | O_NONBLOCK);
	inject(slot, socket, cloexec);
	close(socket.fd);
	release(slot);
	refill(kind);
	return;
out:
	release(slot);
}

static void handle(struct sup_slot *slot)
{
	const struct seccomp_notif *call = &slot->call;
	__u64 began = now();

	if (call->data.arch != AUDIT_ARCH_X86_64 || call->data.nr != SYS_socket ||
	    __atomic_load_n(&shared->flags, __ATOMIC_RELAXED) & SUP_FORWARD) {
		forward(slot);
		return;
	}
	on_socket(slot);
	__atomic_add_fetch(&shared->calls, 1, __ATOMIC_RELAXED);
	__atomic_add_fetch(&shared->ns, now() - began, __ATOMIC_RELAXED);
}

/* ---- threads ---- */

static void *serve(void *unused);

static void start_thread(void)
{
	pthread_attr_t attributes;
	pthread_t thread;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	if (pthread_create(&thread, &attributes, serve, NULL)) {
		pthread_mutex_lock(&lock);
		threads--;
		pthread_mutex_unlock(&lock);
	}
	pthread_attr_destroy(&attributes);
}

/* One more waits in RECV, or this thread is parked until one is missed there. */
static void enter(void)
{
	pthread_mutex_lock(&lock);
	while (waiting >= WAITERS)
		pthread_cond_wait(&parked, &lock);
	waiting++;
	pthread_mutex_unlock(&lock);
}

static void leave(void)
{
	bool more = false;

	pthread_mutex_lock(&lock);
	if (!--waiting) {
		if (threads < THREADS) {
			more = true;
			threads++;
		}
		pthread_cond_signal(&parked);
	}
	pthread_mutex_unlock(&lock);
	if (more)
		start_thread();
}

static void *serve(void *unused)
{
	(void)unused;
	for (;;) {
		struct timespec settle = {.tv_nsec = SETTLE_NS};
		struct sup_slot *slot = hold();
		int error;

		if (!slot) { /* graftd has that many to answer: this container's calls wait in the kernel */
			nanosleep(&settle, NULL);
			continue;
		}
		enter();
		error = ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &slot->call) ? errno : 0;
		leave();
		if (!error) {
			handle(slot);
			continue;
		}
		release(slot);
		if (error != ENOENT && error != EINTR)
			_exit(1);
	}
	return NULL;
}

/* ---- descriptors in messages ---- */

static bool send_fds(int sock, const void *text, size_t length, const int *fds, int count)
{
	char control_text[CMSG_SPACE(SUP_BATCH * sizeof(int))] = {0};
	struct iovec vector = {(void *)text, length};
	struct msghdr message = {.msg_iov = &vector,
				 .msg_iovlen = 1,
				 .msg_control = control_text,
				 .msg_controllen = CMSG_SPACE((size_t)count * sizeof(int))};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
	memcpy(CMSG_DATA(header), fds, (size_t)count * sizeof(int));
	return sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

/* ---- channels ---- */

/* One message of @count sockets; false if the channel is of no use any more. */
static bool fill(int channel, int kind, int count)
{
	__u64 inodes[SUP_BATCH];
	int fds[SUP_BATCH], n, unread;
	struct made socket;
	bool sent;

	/* a batch that is under way and one ahead, however many are asked for */
	if (ioctl(channel, SIOCOUTQ, &unread) || unread > 2048)
		return true;
	for (n = 0; n < count && !make(kind, &socket); n++) {
		fds[n] = socket.fd;
		inodes[n] = socket.inode;
	}
	if (!n)
		return false;
	sent = send_fds(channel, inodes, (size_t)n * sizeof(inodes[0]), fds, n) || errno == EAGAIN;
	while (n)
		close(fds[--n]);
	return sent;
}

static void on_channel(const struct epoll_event *event)
{
	int channel = (int)(__u32)event->data.u64, kind = (int)(event->data.u64 >> 32);
	unsigned char asked;
	ssize_t length = recv(channel, &asked, 1, MSG_DONTWAIT);

	if (length < 0 && errno == EAGAIN)
		return;
	if (length == 1 && asked && asked <= SUP_BATCH && fill(channel, kind, asked))
		return;
	close(channel);
	__atomic_sub_fetch(&channels, 1, __ATOMIC_RELAXED);
}

/* ---- nobody left ---- */

static void watch(int fd, __u32 mask)
{
	struct epoll_event event = {.events = mask, .data.u64 = (__u32)fd};

	if (epoll_ctl(events, EPOLL_CTL_ADD, fd, &event)) {
		perror("graft-sup: epoll");
		exit(1);
	}
}

/* Show a graftd what there is; true once it has taken it. Ends where it has no use for it. */
static bool show(void)
{
	struct timeval patience = {.tv_sec = SHOW_SECONDS};
	int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), ends[2];
	bool connected, taken = false;
	char verdict = 0;

	if (sock < 0)
		return false;
	syscall(SYS_setfsuid, 0); /* the socket is root's; of this thread alone */
	connected = !connect(sock, (struct sockaddr *)&graftd, sizeof(graftd));
	syscall(SYS_setfsuid, shared->reuse_uid);
	if (connected && !socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
		const int fds[] = {listener, memory, ends[1]};

		/* before graftd looks through the slots: what is forwarded from now on it finds here */
		dup3(ends[0], control, O_CLOEXEC);
		setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
		if (send_fds(sock, "graft-sup", 9, fds, 3) && recv(sock, &verdict, 1, 0) == 1 && verdict == 'n')
			exit(1);
		taken = verdict == 'y';
		close(ends[0]);
		close(ends[1]);
	}
	close(sock);
	return taken;
}

/* ---- start ---- */

/* What is left: to stamp and to see a target's netns; and a uid that is nobody's to make sockets of the tenant's. */
static void drop_privileges(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {0};
	const int kept[] = {CAP_BPF, CAP_SYS_PTRACE};

	/* the real one counts descriptors in messages (unix(7), ETOOMANYREFS), which are not to be root's */
	if (syscall(SYS_setresuid, shared->reuse_uid, -1, -1)) {
		perror("graft-sup: setresuid");
		exit(1);
	}
	syscall(SYS_setfsuid, shared->reuse_uid);
	if ((__u32)syscall(SYS_setfsuid, -1) != shared->reuse_uid) {
		fputs("graft-sup: cannot take the owner's uid\n", stderr);
		exit(1);
	}
	for (size_t n = 0; n < sizeof(kept) / sizeof(kept[0]); n++)
		data[CAP_TO_INDEX(kept[n])].permitted |= CAP_TO_MASK(kept[n]);
	data[0].effective = data[0].permitted;
	data[1].effective = data[1].permitted;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_capset, &header, data)) {
		perror("graft-sup: drop privileges");
		exit(1);
	}
}

int main(int argc, char **argv)
{
	struct epoll_event event;
	bool alone = false;
	char order;

	if (argc != 7 || strlen(argv[6]) >= sizeof(graftd.sun_path)) {
		fputs("usage: graft-sup NAME LISTENER SHARED STAMPS CONTROL SOCKET (graftd starts it)\n", stderr);
		return 2;
	}
	listener = atoi(argv[2]);
	memory = atoi(argv[3]);
	stamps = atoi(argv[4]);
	control = atoi(argv[5]);
	strcpy(graftd.sun_path, argv[6]);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
	if (shared == MAP_FAILED || shared->abi != SUP_ABI) {
		fputs("graft-sup: this is not the memory that graftd shares\n", stderr);
		return 1;
	}
	signal(SIGINT, SIG_IGN); /* the terminal's are for the program */
	signal(SIGHUP, SIG_IGN);
	drop_privileges();
	/* 6.6 and later; graftd has asked for it as well */
	ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, (long)SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
	events = epoll_create1(EPOLL_CLOEXEC);
	watch(control, EPOLLIN | EPOLLRDHUP);
	watch(listener, 0); /* hang-up: every process under the filter is gone */
	threads = WAITERS;
	for (int n = 0; n < WAITERS; n++)
		start_thread();
	for (;;) {
		if (alone && show()) {
			alone = false;
			watch(control, EPOLLIN | EPOLLRDHUP);
		}
		if (epoll_wait(events, &event, 1, alone ? SHOW_MS : -1) <= 0)
			continue;
		if (event.data.u64 == (__u32)listener)
			return 0;
		if (event.data.u64 != (__u32)control) {
			on_channel(&event);
			continue;
		}
		if (recv(control, &order, 1, MSG_DONTWAIT) > 0) /* graftd ends for good, and its containers with it */
			return 0;
		epoll_ctl(events, EPOLL_CTL_DEL, control, NULL);
		alone = true;
	}
}
