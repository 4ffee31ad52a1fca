// SPDX-License-Identifier: Apache-2.0
/*
 * load.c - clients and servers of the benchmark: connections and round trips as fast as possible
 *
 * usage: load serve PORT                       TCP server: accept and close, in a batch every millisecond
 *        load connect ADDR PORT COUNT PROCS    connect and reset COUNT times in each process; prints us for each
 *        load answer PORT                      TCP server: bytes there and back, one client after another
 *        load ask ADDR PORT COUNT              one byte there and back; prints us: median and 99th percentile
 *        load reply PORT                       TCP server: 100 bytes there and back at once, and close
 *        load request ADDR PORT COUNT PROCS    connect, 100 bytes there and back, close; prints us for each
 *
 * `serve` drains its backlog by the clock. If each connection woke it, the client's time would include the wake-up.
 * `reply` closes first, as a web server does. So the connections in TIME_WAIT are its own, and no client runs out of
 * ports.
 *
 * A server takes a listening socket that it is passed (LISTEN_FDS, sd_listen_fds(3)) instead of making one.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REQUEST 100 /* bytes, each way */
#define WORKERS 8
#define PASSED 3 /* SD_LISTEN_FDS_START */

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static bool is_passed(void)
{
	const char *count = getenv("LISTEN_FDS"), *pid = getenv("LISTEN_PID");

	return count && pid && !strcmp(count, "1") && atoi(pid) == getpid();
}

static int bound(int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		die("bind");
	return fd;
}

static int listening(int port, int flags)
{
	int fd = is_passed() ? PASSED : bound(port);

	if (listen(fd, 4096))
		die("listen");
	if (fcntl(fd, F_SETFL, flags))
		die("fcntl");
	return fd;
}

static void serve(int port)
{
	int fd = listening(port, O_NONBLOCK), accepted;

	for (;;) {
		while ((accepted = accept(fd, NULL, NULL)) >= 0)
			close(accepted);
		usleep(1000);
	}
}

static void *replies(void *listener)
{
	int fd = *(int *)listener, accepted;
	char text[REQUEST];

	for (;;) {
		accepted = accept(fd, NULL, NULL);
		if (recv(accepted, text, sizeof(text), MSG_WAITALL) == sizeof(text))
			send(accepted, text, sizeof(text), MSG_NOSIGNAL);
		close(accepted);
	}
	return NULL;
}

static void reply(int port)
{
	int fd = listening(port, 0);
	pthread_t worker;

	for (int n = 1; n < WORKERS; n++)
		if (pthread_create(&worker, NULL, replies, &fd))
			die("pthread_create");
	replies(&fd);
}

static void connects(const struct sockaddr_in *peer, int count)
{
	struct linger reset = {1, 0};

	for (int n = 0; n < count; n++) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);

		if (fd <= 0)
			die("socket");
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		if (connect(fd, (const struct sockaddr *)peer, sizeof(*peer)))
			die("connect");
		close(fd);
	}
}

static void requests(const struct sockaddr_in *peer, int count)
{
	char text[REQUEST] = "x", end;

	for (int n = 0; n < count; n++) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);

		if (fd <= 0)
			die("socket");
		if (connect(fd, (const struct sockaddr *)peer, sizeof(*peer)))
			die("connect");
		if (send(fd, text, sizeof(text), MSG_NOSIGNAL) != sizeof(text) ||
		    recv(fd, text, sizeof(text), MSG_WAITALL) != sizeof(text) || recv(fd, &end, 1, 0))
			die("request");
		close(fd);
	}
}

static void answer(int port)
{
	int fd = listening(port, 0), accepted, one = 1;
	char text[64];
	ssize_t length;

	for (;;) {
		accepted = accept(fd, NULL, NULL);
		setsockopt(accepted, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		while ((length = recv(accepted, text, sizeof(text), 0)) > 0)
			send(accepted, text, (size_t)length, MSG_NOSIGNAL);
		close(accepted);
	}
}

static int compare(const void *a, const void *b)
{
	return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static int ask(const struct sockaddr_in *peer, int count)
{
	double *took = calloc((size_t)count, sizeof(*took)), began;
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	char text[64] = "x";

	if (!took || count < 1 || connect(fd, (const struct sockaddr *)peer, sizeof(*peer)))
		die("connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	for (int n = 0; n < count; n++) {
		began = now();
		if (send(fd, text, 1, 0) != 1 || recv(fd, text, sizeof(text), 0) != 1)
			die("round");
		took[n] = now() - began;
	}
	qsort(took, (size_t)count, sizeof(*took), compare);
	printf("%.3f %.3f\n", took[count / 2], took[(long)count * 99 / 100]);
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in peer = {.sin_family = AF_INET};
	int count, processes, status, failed = 0;
	double began;

	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(atoi(argv[2]));
	if (argc == 3 && !strcmp(argv[1], "answer"))
		answer(atoi(argv[2]));
	if (argc == 3 && !strcmp(argv[1], "reply"))
		reply(atoi(argv[2]));
	if (argc < 5 || inet_pton(AF_INET, argv[2], &peer.sin_addr) != 1) {
		fputs("usage: load serve|answer|reply PORT | connect|request ADDR PORT COUNT PROCS | ask ADDR PORT "
		      "COUNT\n",
		      stderr);
		return 2;
	}
	peer.sin_port = htons((unsigned short)atoi(argv[3]));
	count = atoi(argv[4]);
	if (!strcmp(argv[1], "ask"))
		return ask(&peer, count);
	processes = argc > 5 ? atoi(argv[5]) : 1;
	began = now();
	for (int n = 0; n < processes; n++) {
		if (fork())
			continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL); /* one that is stuck ends with the command */
		if (!strcmp(argv[1], "request"))
			requests(&peer, count);
		else
			connects(&peer, count);
		_exit(0);
	}
	while (wait(&status) > 0)
		failed |= status;
	printf("%.3f\n", (now() - began) / count / processes);
	return failed != 0;
}
