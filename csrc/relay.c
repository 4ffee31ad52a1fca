// SPDX-License-Identifier: Apache-2.0
/*
 * graft-relay - carries what is dialled inside a container's netns to the container's servers, and back
 *
 * usage: graft-relay NAME UID CGROUP; graftd starts it, with a channel to graftd as descriptor 0
 *
 * Theory of operation
 *
 * Who enters a container's netns and dials a server of the container's gets graftd's listener there
 * (csrc/forward.bpf.h). graftd accepts, makes a socket of the container's, begins its connection to the server, and
 * sends both to this process (graft/daemon/relay.py). There is one process for each container that is so dialled. It
 * copies, and decides nothing: it has no capability, and its filter knows no call that makes, binds or connects a
 * socket or opens a file. What it takes is the containers' business, not graftd's: it leaves graftd's cgroup and its
 * protection from the OOM killer.
 *
 * One thread, one epoll, one event a round: a later event of the same round could belong to a pair that an earlier
 * one has closed. A direction reads when nothing that it has read is left to be written, so that a slow reader slows
 * down its peer alone, and an idle pair has no buffer. The end of a direction is passed on (shutdown(2)), and so is a
 * reset, or a connection that is refused. The server's socket is still connecting when it comes: shutdown(2) would
 * break that off, so an end waits for it.
 *
 * epoll reports a hang-up whether it is asked for or not, and for ever. So a socket of which nothing is wanted is not
 * watched; its peer has something to write then, and goes on from there.
 *
 * graftd's messages are a letter: a pair of descriptors (p), a question (q), or the order to end (e). A report says
 * how many pairs have come and how many have ended, all in all, so that graftd can count them, and one that follows a
 * killed graftd as well. If no graftd is left to count, what is open has ALONE_SECONDS.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/types.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "relay.h"

#define CHANNEL 0
#define ERRORS 2
#define CHUNK 16384
#define ALONE_SECONDS 60

/* One end of a pair: a socket, and what its peer has sent that this socket has not taken yet. */
struct end {
	struct pair *pair;
	int fd;
	bool watched; /* in epoll, */
	__u32 events; /* for these */
	bool stands;  /* it is connected, */
	bool ended;   /* it has sent its last byte, */
	bool shut;    /* and gets no more */
	char *left;
	size_t start, length;
};

struct pair {
	struct end ends[2];
};

static int events;
static struct {
	__u64 taken, ended; /* pairs, since the start */
	__u64 asked;	    /* and questions */
} report;
static bool untold; /* graftd has not been told of the latest */
static bool alone;  /* graftd is gone */
static char chunk[CHUNK];

static struct end *other(struct end *end)
{
	return &end->pair->ends[end == &end->pair->ends[0]];
}

static void watch(int fd, void *what, bool *watched, __u32 *before, __u32 wanted, bool keep)
{
	struct epoll_event event = {.events = wanted, .data.ptr = what};

	if (*watched && !keep)
		epoll_ctl(events, EPOLL_CTL_DEL, fd, NULL);
	else if (keep && (!*watched || *before != wanted))
		epoll_ctl(events, *watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event);
	*watched = keep;
	*before = wanted;
}

/* Watch the channel: for messages, and for room where something is to be told. */
static void watch_channel(void)
{
	static bool watched;
	static __u32 before;

	watch(CHANNEL, NULL, &watched, &before, EPOLLIN | (untold ? EPOLLOUT : 0), !alone);
}

static void tell(void)
{
	if (!alone && untold && send(CHANNEL, &report, sizeof(report), MSG_DONTWAIT | MSG_NOSIGNAL) > 0)
		untold = false;
	watch_channel();
}

static void count_end(void)
{
	report.ended++;
	untold = true;
	tell();
}

static void close_reset(int fd)
{
	const struct linger now = {.l_onoff = 1};

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	close(fd);
}

static void close_pair(struct pair *pair, bool reset)
{
	for (int n = 0; n < 2; n++) {
		struct end *end = &pair->ends[n];

		/* close(2) alone would leave it in epoll while graftd has its own descriptor of it */
		watch(end->fd, end, &end->watched, &end->events, 0, false);
		if (reset)
			close_reset(end->fd);
		else
			close(end->fd);
		free(end->left);
	}
	free(pair);
	count_end();
}

/* Write to @to what it is owed, or @length bytes of @from. False: the connection is broken. */
static bool give(struct end *to, const char *from, size_t length)
{
	ssize_t sent = send(to->fd, from, length, MSG_DONTWAIT | MSG_NOSIGNAL);

	if (sent < 0 && errno != EAGAIN)
		return false;
	if (sent < 0)
		sent = 0;
	if (from == chunk && (size_t)sent < length) {
		to->left = malloc(length - sent);
		if (!to->left)
			return false;
		memcpy(to->left, chunk + sent, length - sent);
		to->start = 0;
		to->length = length - sent;
	} else if (from != chunk) {
		to->start += sent;
		to->length -= sent;
		if (!to->length) {
			free(to->left);
			to->left = NULL;
		}
	}
	return true;
}

/* Read from @end, and write what comes to its peer. False: the connection is broken. */
static bool take(struct end *end)
{
	ssize_t got = recv(end->fd, chunk, sizeof(chunk), MSG_DONTWAIT);

	if (got < 0)
		return errno == EAGAIN;
	if (!got)
		end->ended = true;
	return !got || give(other(end), chunk, got);
}

/* What an end sends no more, its peer is told when it has taken all. */
static void pass_end(struct end *end)
{
	struct end *peer = other(end);

	if (!end->ended || peer->length || peer->shut || !peer->stands)
		return;
	shutdown(peer->fd, SHUT_WR);
	peer->shut = true;
}

/* Never is nothing wanted of both: then both have ended, and the pair is closed. */
static void watch_end(struct end *end)
{
	__u32 wanted = end->length || !end->stands ? EPOLLOUT : 0;

	if (!end->ended && !other(end)->length)
		wanted |= EPOLLIN;
	watch(end->fd, end, &end->watched, &end->events, wanted, wanted);
}

static void on_end(struct end *end, __u32 what)
{
	struct pair *pair = end->pair;
	bool readable = !end->ended && !other(end)->length;
	bool whole = readable || !(what & EPOLLERR); /* what came before a reset is read first */

	if (what & EPOLLOUT && !(what & EPOLLERR))
		end->stands = true;
	if (whole && end->length && !(what & EPOLLERR))
		whole = give(end, end->left + end->start, end->length);
	if (whole && readable && what & (EPOLLIN | EPOLLHUP | EPOLLERR))
		whole = take(end);
	if (!whole) {
		close_pair(pair, true);
		return;
	}
	pass_end(&pair->ends[0]);
	pass_end(&pair->ends[1]);
	if (pair->ends[0].shut && pair->ends[1].shut) {
		close_pair(pair, false);
		return;
	}
	watch_end(&pair->ends[0]);
	watch_end(&pair->ends[1]);
}

static void add_pair(const int *fds)
{
	struct pair *pair = calloc(1, sizeof(*pair));

	if (!pair) {
		close_reset(fds[0]);
		close_reset(fds[1]);
		count_end();
		return;
	}
	for (int n = 0; n < 2; n++)
		pair->ends[n] = (struct end){.pair = pair, .fd = fds[n], .stands = n == 0};
	watch_end(&pair->ends[0]);
	watch_end(&pair->ends[1]);
}

/* A pair has come, or what the kernel could give of it (MSG_CTRUNC: no descriptor was free). */
static void on_pair(struct cmsghdr *header)
{
	size_t length = header && header->cmsg_type == SCM_RIGHTS ? header->cmsg_len - CMSG_LEN(0) : 0;
	int fds[2];

	report.taken++;
	if (length)
		memcpy(fds, CMSG_DATA(header), length);
	if (length == sizeof(fds)) {
		add_pair(fds);
		return;
	}
	if (length)
		close_reset(fds[0]);
	count_end();
}

static void on_channel(void)
{
	union {
		struct cmsghdr align;
		char text[CMSG_SPACE(2 * sizeof(int))];
	} control;
	char order;
	struct iovec part = {&order, 1};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	ssize_t got = recvmsg(CHANNEL, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (got < 0 && errno == EAGAIN) {
		tell();
	} else if (got <= 0) {
		alone = true;
		alarm(ALONE_SECONDS);
		watch_channel();
	} else if (order == 'p') {
		on_pair(CMSG_FIRSTHDR(&message));
	} else if (order == 'q') {
		report.asked++;
		untold = true;
		tell();
	} else {
		exit(0);
	}
}

int main(int argc, char **argv)
{
	struct epoll_event event;

	if (argc != 4) {
		fputs("usage: graft-relay NAME UID CGROUP (graftd starts it)\n", stderr);
		return 2;
	}
	leave_graftd(argv[1], argv[3]);
	if (syscall(SYS_close_range, ERRORS + 1, ~0U, 0) || drop_privileges((uid_t)strtoul(argv[2], NULL, 10))) {
		fprintf(stderr, "graft-relay %s: drop privileges: %s\n", argv[1], strerror(errno));
		return 1;
	}
	events = epoll_create1(EPOLL_CLOEXEC);
	if (events < 0 || filter_calls()) {
		fprintf(stderr, "graft-relay %s: %s\n", argv[1], strerror(errno));
		return 1;
	}
	watch_channel();
	while (!alone || report.taken != report.ended) {
		if (epoll_wait(events, &event, 1, -1) <= 0)
			continue;
		if (event.data.ptr)
			on_end(event.data.ptr, event.events);
		else
			on_channel();
	}
	return 0;
}
