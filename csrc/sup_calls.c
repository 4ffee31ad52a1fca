// SPDX-License-Identifier: Apache-2.0
/*
 * sup_calls.c - graft-sup: a call, from its slot to its answer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "sup_parts.h"

#define TYPE_MASK 0xf
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

/* Is the caller in the container's netns? 0 no, 1 yes, or minus an errno. */
static int in_container_netns(__u32 pid)
{
	struct stat status;
	char path[32];

	snprintf(path, sizeof(path), "/proc/%u/ns/net", pid);
	if (stat(path, &status))
		return -errno;
	return status.st_ino == shared->netns;
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

		if ((!stream && type != SOCK_DGRAM) || !plain ||
		    flags & ~(__u32)(TYPE_MASK | SOCK_NONBLOCK | SOCK_CLOEXEC)) {
			let_proceed(call);
			goto out;
		}
	}
	inside = in_container_netns(call->pid);
	if (inside <= 0) {
		if (inside)
			answer_call(call, 0, inside == -ENOENT ? ESRCH : -inside, 0);
		else
			let_proceed(call);
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

void handle_call(struct sup_slot *slot)
{
	const struct seccomp_notif *call = &slot->call;
	__u64 began = now();

	if (call->data.arch != AUDIT_ARCH_X86_64 || call->data.nr != SYS_socket ||
	    __atomic_load_n(&shared->flags, __ATOMIC_RELAXED) & SUP_FORWARD) {
		forward_call(slot);
		return;
	}
	on_socket(slot);
	__atomic_add_fetch(&shared->calls, 1, __ATOMIC_RELAXED);
	__atomic_add_fetch(&shared->ns, now() - began, __ATOMIC_RELAXED);
}
