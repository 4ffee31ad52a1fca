/*
 * calls.c - time bind() and connect(): reads lines "bind N" or "connect N", prints nanoseconds per call
 *
 * usage: calls ADDR PORT        connect to ADDR port 9; bind to the wildcard address and PORT
 *
 * Only datagram sockets are used, so that no packet is sent. Each bind() has a fresh socket, because a socket can be
 * bound once. connect() is called again and again on one socket.
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static struct sockaddr_in address(const char *ip, int port)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(port)};

	inet_pton(AF_INET, ip, &sin.sin_addr);
	return sin;
}

int main(int argc, char **argv)
{
	struct sockaddr_in here = address("0.0.0.0", argc > 2 ? atoi(argv[2]) : 0), there = address(argv[1], 9);
	char what[16];
	int n;

	while (scanf("%15s %d", what, &n) == 2) {
		double spent = 0, began;
		int fd = socket(AF_INET, SOCK_DGRAM, 0);

		if (!strcmp(what, "connect")) {
			began = now();
			for (int i = 0; i < n; i++)
				if (connect(fd, (struct sockaddr *)&there, sizeof(there)))
					return 1;
			spent = now() - began;
		} else {
			for (int i = 0; i < n; i++) {
				close(fd);
				fd = socket(AF_INET, SOCK_DGRAM, 0);
				began = now();
				if (bind(fd, (struct sockaddr *)&here, sizeof(here)))
					return 1;
				spent += now() - began;
			}
		}
		close(fd);
		printf("%.1f\n", spent / n);
		fflush(stdout);
	}
	return 0;
}
