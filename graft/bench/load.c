// SPDX-License-Identifier: Apache-2.0
/*
 * load.c - clients and servers of the benchmark: connections and round trips as fast as possible
 *
 * usage: load serve PORT                       TCP server: accept and close, in a batch every millisecond
 *        load connect ADDR PORT COUNT PROCS    connect and reset COUNT times in each process; prints us for each
 *        load udp ADDR PORT COUNT              send and receive one byte COUNT times; prints us per round trip
 *        load echo PORT                        UDP server for it
 *        load ask ADDR PORT COUNT              the same by TCP; prints us per round trip: median and 99th percentile
 *        load answer PORT                      TCP server for it, which serves one client after another
 *
 * `serve` drains its backlog by the clock. If each connection woke it, the client's time would include the wake-up.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

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

static int listening(int type, int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
	int fd = socket(AF_INET, type, 0), one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		die("bind");
	return fd;
}

static void serve(int port)
{
	int fd = listening(SOCK_STREAM | SOCK_NONBLOCK, port), accepted;

	if (listen(fd, 4096))
		die("listen");
	for (;;) {
		while ((accepted = accept(fd, NULL, NULL)) >= 0)
			close(accepted);
		usleep(1000);
	}
}

static void echo(int port)
{
	int fd = listening(SOCK_DGRAM, port);
	struct sockaddr_storage from;
	char text[64];

	for (;;) {
		socklen_t size = sizeof(from);
		ssize_t length = recvfrom(fd, text, sizeof(text), 0, (struct sockaddr *)&from, &size);

		if (length >= 0)
			sendto(fd, text, (size_t)length, 0, (struct sockaddr *)&from, size);
	}
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

static void rounds(const struct sockaddr_in *peer, int count)
{
	struct timeval patience = {.tv_sec = 1};
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	char text[64] = "x";

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	for (int n = 0; n < count; n++) {
		if (sendto(fd, text, 1, 0, (const struct sockaddr *)peer, sizeof(*peer)) != 1)
			die("sendto");
		if (recv(fd, text, sizeof(text), 0) < 0)
			die("recv");
	}
}

static void answer(int port)
{
	int fd = listening(SOCK_STREAM, port), accepted, one = 1;
	char text[64];
	ssize_t length;

	if (listen(fd, 64))
		die("listen");
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
	if (argc == 3 && !strcmp(argv[1], "echo"))
		echo(atoi(argv[2]));
	if (argc == 3 && !strcmp(argv[1], "answer"))
		answer(atoi(argv[2]));
	if (argc < 5 || inet_pton(AF_INET, argv[2], &peer.sin_addr) != 1) {
		fputs("usage: load serve|echo|answer PORT | connect ADDR PORT COUNT PROCS | udp|ask ADDR PORT "
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
		if (!strcmp(argv[1], "udp"))
			rounds(&peer, count);
		else
			connects(&peer, count);
		_exit(0);
	}
	while (wait(&status) > 0)
		failed |= status;
	printf("%.3f\n", (now() - began) / count / processes);
	return failed != 0;
}
