// SPDX-License-Identifier: Apache-2.0
/*
 * sup_calls.c - graft-sup: a call, from its slot to its answer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "architecture.h"
#include "sup_parts.h"

#define TYPE_MASK 0xf
#ifndef IPPROTO_SMC
#define IPPROTO_SMC 256
#endif
#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

static __u64 now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (__u64)t.tv_sec * 1000000000 + (__u64)t.tv_nsec;
}

/* ---- answers: it is no error if the target has ended ---- */

static void answer_call(const struct seccomp_notif *call, __s64 value, int error, __u32 flags)
{
	struct seccomp_notif_resp response = {.id = call->id, .val = value, .error = -error, .flags = flags};

	call_served();
	while (ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response) < 0 && errno == EINTR)
		;
}

static void let_proceed(const struct seccomp_notif *call)
{
	answer_call(call, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE);
}

/*
 * Give the target a descriptor as the value of its call. It is closed here before the answer: once the target closes
 * its own, the port is free.
 */
static void give_socket(struct sup_slot *slot, struct made socket, bool cloexec)
{
	struct seccomp_notif_addfd add = {
		.id = slot->call.id, .srcfd = (__u32)socket.fd, .newfd_flags = cloexec ? O_CLOEXEC : 0};
	int number, error;

	__atomic_store_n(&slot->inode, socket.inode, __ATOMIC_RELEASE);
	do {
		number = ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
	} while (number < 0 && errno == EINTR);
	error = number < 0 ? errno : 0;
	close(socket.fd);
	if (!error)
		answer_call(&slot->call, number, 0, 0);
	else if (error != ENOENT && error != EINPROGRESS)
		answer_call(&slot->call, 0, error, 0); /* EMFILE: its table is full */
}

/* ---- slots ---- */

struct sup_slot *hold_slot(void)
{
	for (int n = 0; n < SUP_SLOTS; n++) {
		__u32 free = SLOT_FREE;

		if (__atomic_compare_exchange_n(&shared->slots[n].state, &free, SLOT_HELD, false, __ATOMIC_ACQUIRE,
						__ATOMIC_RELAXED))
			return &shared->slots[n];
	}
	return NULL;
}

void release_slot(struct sup_slot *slot)
{
	memset(&slot->call, 0, sizeof(slot->call));
	slot->inode = 0;
	__atomic_store_n(&slot->state, SLOT_FREE, __ATOMIC_RELEASE);
}

static void forward_call(struct sup_slot *slot)
{
	__u32 number = (__u32)(slot - shared->slots);

	call_served();
	__atomic_store_n(&slot->state, SLOT_FORWARDED, __ATOMIC_RELEASE);
	/* a message that is lost with graftd is no call lost: its successor looks through all slots */
	while (send(control, &number, sizeof(number), MSG_NOSIGNAL) < 0 && errno == EINTR)
		;
}

/* ---- calls ---- */

/* Is the caller in the netns with the inode @netns? 0 no, 1 yes, or minus an errno. */
static int is_in_netns(__u32 pid, __u64 netns)
{
	struct stat status;
	char path[32];

	snprintf(path, sizeof(path), "/proc/%u/ns/net", pid);
	if (stat(path, &status))
		return -errno;
	return status.st_ino == netns;
}

bool makes_unix_sockets(void)
{
	return shared->home && is_in_netns((__u32)getpid(), shared->netns) == 1;
}

/*
 * Answer a caller that is in no netns whose sockets are made here, or that has ended: @inside is what is_in_netns()
 * has returned.
 */
static void answer_outsider(const struct seccomp_notif *call, int inside)
{
	if (inside)
		answer_call(call, 0, inside == -ENOENT ? ESRCH : -inside, 0);
	else
		let_proceed(call);
}

/* Let a socket belong to the caller's file system uid and gid, as sock_alloc() has it (net/socket.c). 0 or an errno.
 */
static int give_to_caller(int fd, __u32 pid)
{
	unsigned int uid = 0, gid = 0;
	char path[32], line[128];
	bool found = false;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%u/status", pid);
	file = fopen(path, "re");
	if (!file)
		return ESRCH;
	while (!found && fgets(line, sizeof(line), file))
		if (sscanf(line, "Uid: %*u %*u %*u %u", &uid) != 1)
			found = sscanf(line, "Gid: %*u %*u %*u %u", &gid) == 1;
	fclose(file);
	if (!found)
		return ESRCH;
	return fchown(fd, uid, gid) ? errno : 0;
}

/*
 * socket(AF_UNIX) of a direct container, in whose netns this process lives. It needs no right, so the kernel has for
 * this process the errnos that it has for the program.
 */
static void on_unix_socket(struct sup_slot *slot)
{
	const struct seccomp_notif *call = &slot->call;
	__u32 flags = (__u32)call->data.args[1];
	int inside = is_in_netns(call->pid, shared->home), error = 0;
	struct made made = {.fd = -1};
	struct stat status;

	if (inside <= 0) {
		answer_outsider(call, inside);
		goto out;
	}
	if (flags & ~(__u32)(TYPE_MASK | SOCK_NONBLOCK | SOCK_CLOEXEC))
		error = EINVAL;
	else
		made.fd = socket(AF_UNIX, (int)(flags | SOCK_CLOEXEC), (int)call->data.args[2]);
	if (!error && made.fd < 0)
		error = errno;
	if (!error && fstat(made.fd, &status))
		error = errno;
	if (!error)
		error = give_to_caller(made.fd, call->pid);
	if (error) {
		if (made.fd >= 0)
			close(made.fd);
		answer_call(call, 0, error, 0);
		goto out;
	}
	made.inode = status.st_ino;
	give_socket(slot, made, flags & SOCK_CLOEXEC);
out:
	release_slot(slot);
}

static void on_socket(struct sup_slot *slot)
{
	const struct seccomp_notif *call = &slot->call;
	__u32 family = (__u32)call->data.args[0], flags = (__u32)call->data.args[1];
	__u32 protocol = (__u32)call->data.args[2], type = flags & TYPE_MASK;
	bool stream = type == SOCK_STREAM, cloexec = flags & SOCK_CLOEXEC, channel;
	int kind, inside, error;
	struct made socket;

	channel = family == AF_GRAFT && stream && protocol >= SUP_CHANNEL && protocol < SUP_CHANNEL + SUP_KINDS;
	if (family != AF_INET && family != AF_INET6 && !channel) {
		forward_call(slot); /* AF_GRAFT, and families that graftd refuses */
		return;
	}
	if (!channel) {
		bool plain = !protocol || protocol == (stream ? IPPROTO_TCP : IPPROTO_UDP) ||
			     (stream && protocol == IPPROTO_MPTCP);

		if (stream && protocol == IPPROTO_SMC) { /* AF_SMC by another name, which graftd refuses */
			answer_call(call, 0, EPROTONOSUPPORT, 0);
			goto out;
		}
		if ((!stream && type != SOCK_DGRAM) || !plain ||
		    flags & ~(__u32)(TYPE_MASK | SOCK_NONBLOCK | SOCK_CLOEXEC)) {
			let_proceed(call);
			goto out;
		}
	}
	inside = is_in_netns(call->pid, shared->netns);
	if (inside <= 0) {
		answer_outsider(call, inside);
		goto out;
	}
	if (channel) {
		error = open_channel((int)(protocol - SUP_CHANNEL), &socket);
		if (error) {
			answer_call(call, 0, error, 0);
			goto out;
		}
		give_socket(slot, socket, true);
		goto out;
	}
	kind = (family == AF_INET6 ? SUP_KIND_INET6 : 0) | (stream ? 0 : SUP_KIND_DGRAM);
	error = take_socket(kind, &socket);
	if (error) {
		answer_call(call, 0, error, 0);
		goto out;
	}
	if (flags & SOCK_NONBLOCK)
		fcntl(socket.fd, F_SETFL, O_RDWR | O_NONBLOCK);
	give_socket(slot, socket, cloexec);
	release_slot(slot);
	refill_pool(kind);
	return;
out:
	release_slot(slot);
}

static void count_time(__u64 ns)
{
	unsigned int n = 0;

	while (n < SUP_SPENT - 1 && ns >= (__u64)SUP_SPENT_FIRST << n)
		n++;
	__atomic_add_fetch(&shared->spent[n], 1, __ATOMIC_RELAXED);
	__atomic_add_fetch(&shared->ns, ns, __ATOMIC_RELAXED);
}

void handle_call(struct sup_slot *slot)
{
	const struct seccomp_notif *call = &slot->call;
	__u64 began = now();
	bool native = call->data.arch == AUDIT_ARCH_NATIVE;
	bool asks = native && call->data.nr == SYS_socket;
	bool unix_socket = asks && has_unix_sockets && (__u32)call->data.args[0] == AF_UNIX;
	bool whole = __atomic_load_n(&shared->flags, __ATOMIC_RELAXED) & SUP_FORWARD; /* graftd has every socket() */
	bool binds = native && call->data.nr == SYS_bind && prepares_binds() && prepare_bind(call);

	if (!unix_socket && !binds && (!asks || whole)) {
		forward_call(slot);
		return;
	}
	/* before the answer: graftd may read it as soon as the caller has ended */
	__atomic_add_fetch(&shared->calls, 1, __ATOMIC_RELAXED);
	if (unix_socket) {
		on_unix_socket(slot);
	} else if (binds) {
		let_proceed(call);
		release_slot(slot);
	} else {
		on_socket(slot);
	}
	count_time(now() - began);
}
