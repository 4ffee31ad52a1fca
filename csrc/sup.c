// SPDX-License-Identifier: Apache-2.0
/*
 * graft-sup - answers the socket() calls of one container, beside it
 *
 * usage: graft-sup NAME LISTENER SHARED STAMPS CONTROL (descriptors) SOCKET (a path) [OPTION...]
 *                  [bind:MAP:LOWEST:HIGHEST] [beside:LISTENER:SHARED]; started by graftd
 *
 * Theory of operation
 *
 * graftd could answer every trapped call, and does so where this program is missing. But a trapped call costs what
 * waking costs, and an interpreter between the wake-ups costs as much again. The arguments of socket() are in
 * registers and its answer never differs, so this program answers it, from a small pool of sockets that are made and
 * stamped ahead of the call. It hands every other call to graftd. But a direct container makes its internet sockets
 * itself; for that one this program lives in the container's netns, answers socket(AF_UNIX) there, and sets before a
 * bind() what it sets on those that it makes itself.
 *
 * Threads. Whoever adds a descriptor to a target waits in the kernel until the target runs again, so one thread would
 * serve one target at a time. There are up to THREADS, made when needed. Each call wakes every thread that waits in
 * RECV, so at most WAITERS wait there and the others on a condition. If not even one can be made (RLIMIT_NPROC, a
 * pids limit), this process ends, and graftd receives the calls. How many wait is chosen by what comes: where one
 * call follows another, one that waits is a fifth faster than two; where calls come at once, it is a tenth slower. So
 * CROWD counts calls that came while another was answered, against those that did not.
 *
 * Nothing is lost. A call is received into a slot of memory shared with graftd (sup.h) and stays there until it is
 * answered. If this process is killed, graftd finds the call there; if graftd is killed, its successor finds what was
 * handed over. A descriptor is injected in two steps, ADDFD and then the answer with its number.
 * graft/trap/journal.py says why SECCOMP_ADDFD_FLAG_SEND, which does both in one, will not do.
 *
 * Nobody left. The keeper holds copies of what graftd holds. If both are killed this process has the only ones. It
 * goes on answering, and shows what it has to whoever listens at SOCKET, until a graftd takes it. The listener of its
 * pod's pause container, for which no graft-sup runs because it makes no call, it keeps as well, and shows after its
 * own.
 *
 * The preload library of `graft run --accel` asks for a channel instead (sup.h). The main thread keeps it filled with
 * such sockets. That is no privilege: they are what socket() gives, and the hooks decide on them.
 *
 * sup.c has the threads, and the life without a graftd; sup_calls.c a call, from its slot to its answer; sup_bind.c
 * the binds; sup_sockets.c the pool and the channels.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "sup_parts.h"

#define THREADS 8
#define WAITERS 2
#define CROWD_CALL 4 /* what a call adds that came while another was answered; any other takes 1 */
#define CROWD 64     /* the most that it comes to; from half of it on WAITERS wait, below one */
#define STACK (128 * 1024)
#define SETTLE_NS 20000000 /* between two looks for a free slot */
#define SHOW_MS 50	   /* between two attempts to find a graftd */
#define SHOW_SECONDS 10	   /* for it to answer */

#ifndef SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#endif

struct sup_shared *shared;
int listener, stamps, control, events;
bool has_unix_sockets;
static int memory;
static int beside[SUP_BESIDE][2], beside_count; /* listeners and journals that are only kept */
static struct sockaddr_un graftd = {.sun_family = AF_UNIX};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t parked = PTHREAD_COND_INITIALIZER;
static int threads, idle, waiting, serving, crowd;
static _Thread_local bool serves; /* this thread is one of those */

static const char *name; /* the container's */

/* End with one line of the log: @what, and errno's text unless it is 0. */
static void __attribute__((noreturn)) fail(const char *what)
{
	if (errno)
		fprintf(stderr, "graft-sup %s: %s: %s\n", name, what, strerror(errno));
	else
		fprintf(stderr, "graft-sup %s: %s\n", name, what);
	exit(1);
}

/* ---- threads ---- */

static void *serve_calls(void *unused);

static void start_thread(void)
{
	pthread_attr_t attributes;
	pthread_t thread;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	if (pthread_create(&thread, &attributes, serve_calls, NULL)) {
		pthread_mutex_lock(&lock);
		threads--;
		pthread_mutex_unlock(&lock);
	}
	pthread_attr_destroy(&attributes);
}

static int count_threads(void)
{
	int count;

	pthread_mutex_lock(&lock);
	count = threads;
	pthread_mutex_unlock(&lock);
	return count;
}

void call_served(void)
{
	if (!serves)
		return;
	serves = false;
	pthread_mutex_lock(&lock);
	serving--;
	pthread_mutex_unlock(&lock);
}

/* Let this thread wait in RECV, or park it until one of those that do is busy. */
static void enter_receive(void)
{
	call_served(); /* if there was nobody to answer any more */
	pthread_mutex_lock(&lock);
	idle++;
	while (waiting >= (crowd < CROWD / 2 ? 1 : WAITERS))
		pthread_cond_wait(&parked, &lock);
	idle--;
	waiting++;
	pthread_mutex_unlock(&lock);
}

/* @received: this thread has a call to answer. */
static void leave_receive(bool received)
{
	bool more = false;

	pthread_mutex_lock(&lock);
	serves = received;
	if (received && serving++)
		crowd = crowd > CROWD - CROWD_CALL ? CROWD : crowd + CROWD_CALL;
	else if (received && crowd)
		crowd--;
	if (!--waiting) {
		more = !idle && threads < THREADS;
		threads += more;
		pthread_cond_signal(&parked);
	}
	pthread_mutex_unlock(&lock);
	if (more)
		start_thread();
}

static void *serve_calls(void *unused)
{
	(void)unused;
	for (;;) {
		struct timespec settle = {.tv_nsec = SETTLE_NS};
		struct sup_slot *slot = hold_slot();
		int error;

		if (!slot) { /* graftd has that many to answer, so this container's calls wait in the kernel */
			nanosleep(&settle, NULL);
			continue;
		}
		enter_receive();
		error = ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &slot->call) ? errno : 0;
		leave_receive(!error);
		if (!error) {
			handle_call(slot);
			continue;
		}
		release_slot(slot);
		if (error != ENOENT && error != EINTR)
			_exit(1);
	}
	return NULL;
}

/* ---- nobody left ---- */

static void watch_fd(int fd, __u32 mask)
{
	struct epoll_event event = {.events = mask, .data.u64 = (__u32)fd};

	if (epoll_ctl(events, EPOLL_CTL_ADD, fd, &event))
		fail("epoll_ctl");
}

/* Whose sockets they are for a firewall of the host that looks at who has made them (iptables-extensions(8), owner).
 */
static __u32 maker(void)
{
	return shared->maker ? shared->maker : shared->reuse_uid;
}

/* Keep what it takes to stamp, to see a target's netns and borrow its sockets, and to give sockets away. 0 or -1. */
static int take_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {0};
	const int kept[] = {CAP_BPF, CAP_SYS_PTRACE, CAP_CHOWN};
	size_t count =
		sizeof(kept) / sizeof(kept[0]) - !(has_unix_sockets || shared->maker); /* without the last one */

	for (size_t n = 0; n < count; n++)
		data[CAP_TO_INDEX(kept[n])].permitted |= CAP_TO_MASK(kept[n]);
	data[0].effective = data[0].permitted;
	data[1].effective = data[1].permitted;
	return (int)syscall(SYS_capset, &header, data);
}

/* A connection to the graftd that listens at SOCKET; -1 if none does. */
static int reach_graftd(void)
{
	struct timeval patience = {.tv_sec = SHOW_SECONDS};
	int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	bool connected;

	if (sock < 0)
		return -1;
	syscall(SYS_setfsuid, 0); /* the path is root's; this changes the one thread */
	connected = !connect(sock, (struct sockaddr *)&graftd, sizeof(graftd));
	syscall(SYS_setfsuid, maker());
	take_capabilities(); /* the way back from root took CAP_CHOWN (capabilities(7)) */
	if (connected && !setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)))
		return sock;
	close(sock);
	return -1;
}

/* What graftd says of these descriptors: 'y' it has taken them, 'n' it has no use for them, 0 nothing. */
static char hand_over(int sock, const int *fds, int count)
{
	char verdict = 0;

	if (!send_fds(sock, "graft-sup", 9, fds, count) || recv(sock, &verdict, 1, 0) != 1)
		return 0;
	return verdict;
}

/* Show a graftd the listener and the journal; true: it has taken them. If it has no use for them, this process ends.
 */
static bool show_graftd(void)
{
	int sock = reach_graftd(), ends[2];
	char verdict = 0;

	if (sock < 0)
		return false;
	if (!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
		const int fds[] = {listener, memory, ends[1]};

		/* before graftd looks through the slots: it gets the messages of calls forwarded from now on */
		dup3(ends[0], control, O_CLOEXEC);
		verdict = hand_over(sock, fds, 3);
		close(ends[0]);
		close(ends[1]);
	}
	close(sock);
	if (verdict == 'n')
		exit(1);
	for (int n = 0; verdict == 'y' && n < beside_count; n++) {
		sock = reach_graftd();
		if (sock >= 0) { /* whether it is still of use is for graftd to say, and changes nothing here */
			hand_over(sock, beside[n], 2);
			close(sock);
		}
	}
	return verdict == 'y';
}

/* ---- start ---- */

/* Take the uid that the tenant's sockets belong to, and keep few capabilities. */
static void drop_privileges(void)
{
	/*
	 * Descriptors in messages count for the real uid, which must not be root's (unix(7), ETOOMANYREFS). kill(2)
	 * looks at the real and the saved one, so that a container's root without CAP_KILL cannot stop this process.
	 */
	if (syscall(SYS_setresuid, shared->reuse_uid, -1, shared->reuse_uid))
		fail("setresuid");
	if (shared->maker)
		syscall(SYS_setfsgid, shared->maker_gid);
	syscall(SYS_setfsuid, maker());
	if ((__u32)syscall(SYS_setfsuid, -1) != maker()) {
		errno = 0; /* setfsuid(2) has none */
		fail("cannot take the owner's uid");
	}
	/* the last one because a change of ids resets it to what fs.suid_dumpable says */
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || take_capabilities() || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
		fail("drop privileges");
}

/* Take an argument beside:LISTENER:SHARED; false for any other. */
static bool keep_beside(const char *word)
{
	int *pair = beside[beside_count], end = 0;

	if (beside_count == SUP_BESIDE || sscanf(word, "beside:%d:%d%n", &pair[0], &pair[1], &end) != 2 || word[end])
		return false;
	beside_count++;
	return true;
}

int main(int argc, char **argv)
{
	struct epoll_event event;
	bool alone = false;
	char order;

	for (int n = 7; n < argc; n++)
		if (!keep_beside(argv[n]) && !take_bind(argv[n]) && !add_option(argv[n]))
			argc = 0;
	if (argc < 7 || strlen(argv[6]) >= sizeof(graftd.sun_path)) {
		fputs("usage: graft-sup NAME LISTENER SHARED STAMPS CONTROL SOCKET [OPTION...] "
		      "[bind:MAP:LOWEST:HIGHEST] [beside:LISTENER:SHARED] (graftd starts it)\n",
		      stderr);
		return 2;
	}
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	name = argv[1];
	listener = atoi(argv[2]);
	memory = atoi(argv[3]);
	stamps = atoi(argv[4]);
	control = atoi(argv[5]);
	strcpy(graftd.sun_path, argv[6]);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
	if (shared == MAP_FAILED || shared->abi != SUP_ABI) {
		errno = 0;
		fail("this is not the memory that graftd shares");
	}
	signal(SIGINT, SIG_IGN); /* the terminal sends them to the program */
	signal(SIGHUP, SIG_IGN);
	has_unix_sockets = makes_unix_sockets();
	drop_privileges();
	/* Linux 6.6 and later; graftd asks for it as well */
	ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, (long)SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
	events = epoll_create1(EPOLL_CLOEXEC);
	watch_fd(control, EPOLLIN | EPOLLRDHUP);
	watch_fd(listener, 0); /* hang-up: every process under the filter is gone */
	threads = WAITERS;
	for (int n = 0; n < WAITERS; n++)
		start_thread();
	if (!count_threads()) { /* a limit of processes: graftd receives instead, and tries again later */
		errno = EAGAIN;
		fail("cannot start a thread");
	}
	for (;;) {
		if (alone && show_graftd()) {
			alone = false;
			watch_fd(control, EPOLLIN | EPOLLRDHUP);
		}
		if (epoll_wait(events, &event, 1, alone ? SHOW_MS : -1) <= 0)
			continue;
		if (event.data.u64 == (__u32)listener)
			return 0;
		if (event.data.u64 != (__u32)control) {
			on_channel(&event);
			continue;
		}
		if (recv(control, &order, 1, MSG_DONTWAIT) >
		    0) /* an order: graftd ends, and none is to come after it */
			return 0;
		epoll_ctl(events, EPOLL_CTL_DEL, control, NULL);
		alone = true;
	}
}
