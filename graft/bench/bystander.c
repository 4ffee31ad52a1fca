// SPDX-License-Identifier: Apache-2.0
/*
 * bystander.c - CPU time of a UDP request, and of a TCP connection, to servers of several hosts in turn
 *
 * usage: bystander ADDR PORT BATCHES CLIENT HOST [CLIENT HOST]...
 *
 * CLIENT and HOST are network namespaces (names, ip-netns(8)) that are joined by a wire; ADDR is the address of each
 * HOST. Prints a line for each HOST: CPU microseconds of a request with its response by UDP, and of a TCP connection
 * made, accepted and reset. Each is the median of BATCHES batches.
 *
 * Client and server are one thread on one processor, so that nothing waits for a wake-up or a switch; the kernel
 * receives in the sender's context, which is counted as well. The hosts take turns, batch by batch: what else the
 * machine does, and how fast its processor is at the moment, meets all of them alike.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HOSTS_MAX 8
#define WARM_UP 20 /* batches that are not counted */
#define EACH 50	   /* requests or connections in a batch: half a millisecond */
#define KINDS 2

enum kind { UDP, TCP };

struct host {
	int client_ns, client, server, listener;
	double *took[KINDS]; /* microseconds each, by batch */
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double spent(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int enter(const char *ns)
{
	char path[256];
	int fd;

	snprintf(path, sizeof(path), "/run/netns/%s", ns);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || setns(fd, CLONE_NEWNET))
		die(path);
	return fd;
}

static void stay_on_this_processor(void)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET((size_t)sched_getcpu(), &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
}

static bool request(const struct host *host, const struct sockaddr_in *server)
{
	struct sockaddr_in from;
	socklen_t size = sizeof(from);
	char text[64] = "x";

	return sendto(host->client, text, 1, 0, (const struct sockaddr *)server, sizeof(*server)) == 1 &&
	       recvfrom(host->server, text, sizeof(text), 0, (struct sockaddr *)&from, &size) == 1 &&
	       sendto(host->server, text, 1, 0, (const struct sockaddr *)&from, size) == 1 &&
	       recv(host->client, text, sizeof(text), 0) == 1;
}

static bool connection(const struct host *host, const struct sockaddr_in *server)
{
	struct linger reset = {1, 0};
	int client = socket(AF_INET, SOCK_STREAM, 0), accepted;

	if (setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)) ||
	    connect(client, (const struct sockaddr *)server, sizeof(*server)))
		return false;
	accepted = accept(host->listener, NULL, NULL);
	close(client);
	return !close(accepted);
}

static double batch(const struct host *host, const struct sockaddr_in *server, enum kind kind)
{
	double before;

	if (setns(host->client_ns, CLONE_NEWNET))
		die("setns");
	before = spent();
	for (int n = 0; n < EACH; n++)
		if (!(kind == UDP ? request : connection)(host, server))
			die(kind == UDP ? "a request" : "a connection");
	return (spent() - before) / EACH;
}

static int compare(const void *a, const void *b)
{
	return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static double median(double *took, int count)
{
	qsort(took, (size_t)count, sizeof(*took), compare);
	return took[count / 2];
}

static void set_up(struct host *host, const char *client, const char *ns, in_port_t port, int batches)
{
	struct timeval patience = {.tv_sec = 1};
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = port};

	host->client_ns = enter(client);
	host->client = socket(AF_INET, SOCK_DGRAM, 0);
	close(enter(ns));
	host->server = socket(AF_INET, SOCK_DGRAM, 0);
	host->listener = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(host->client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(host->server, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (bind(host->server, (struct sockaddr *)&any, sizeof(any)) ||
	    bind(host->listener, (struct sockaddr *)&any, sizeof(any)) || listen(host->listener, 64))
		die("bind");
	for (int kind = 0; kind < KINDS; kind++) {
		host->took[kind] = calloc((size_t)batches, sizeof(double));
		if (!host->took[kind])
			die("calloc");
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in server = {.sin_family = AF_INET};
	struct host hosts[HOSTS_MAX];
	int batches, count = (argc - 4) / 2;

	if (argc < 6 || argc % 2 || count > HOSTS_MAX || inet_pton(AF_INET, argv[1], &server.sin_addr) != 1) {
		fputs("usage: bystander ADDR PORT BATCHES CLIENT HOST [CLIENT HOST]...\n", stderr);
		return 2;
	}
	server.sin_port = htons((unsigned short)atoi(argv[2]));
	batches = atoi(argv[3]);
	stay_on_this_processor();
	for (int n = 0; n < count; n++)
		set_up(&hosts[n], argv[4 + 2 * n], argv[5 + 2 * n], server.sin_port, batches);
	for (int kind = 0; kind < KINDS; kind++) {
		for (int at = -WARM_UP; at < batches; at++) {
			for (int n = 0; n < count; n++) {
				struct host *host = &hosts[(n + at + WARM_UP) % count];
				double took = batch(host, &server, kind);

				if (at >= 0)
					host->took[kind][at] = took;
			}
		}
	}
	for (int n = 0; n < count; n++)
		printf("%.4f %.4f\n", median(hosts[n].took[UDP], batches), median(hosts[n].took[TCP], batches));
	return 0;
}
