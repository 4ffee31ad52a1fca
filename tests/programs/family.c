/*
 * family.c - a program written to AF_GRAFT: each argument is a call, each call prints its result
 *
 * On one socket: "socket:stream" "bind:ep-http" "listen" "serve:HELLO" ...
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include <graft.h>

static int sock = -1;

static void result(const char *call, long value)
{
	if (value < 0)
		printf("%s %s\n", call, strerrorname_np(errno));
	else
		printf("%s %ld\n", call, value);
	fflush(stdout);
}

static void show_name(const char *call, int ret, const struct sockaddr_storage *ss, socklen_t len)
{
	char text[INET6_ADDRSTRLEN] = "";

	if (ret < 0) {
		result(call, ret);
		return;
	}
	switch (ss->ss_family) {
	case AF_INET:
		inet_ntop(AF_INET, &((struct sockaddr_in *)ss)->sin_addr, text, sizeof(text));
		printf("%s inet %s %d %d\n", call, text, ntohs(((struct sockaddr_in *)ss)->sin_port), (int)len);
		break;
	case AF_INET6:
		inet_ntop(AF_INET6, &((struct sockaddr_in6 *)ss)->sin6_addr, text, sizeof(text));
		printf("%s inet6 %s %d %d\n", call, text, ntohs(((struct sockaddr_in6 *)ss)->sin6_port), (int)len);
		break;
	case AF_UNIX:
		printf("%s unix %s\n", call, len > 2 ? ((struct sockaddr_un *)ss)->sun_path : "");
		break;
	case AF_GRAFT:
		printf("%s graft %s %d\n", call, ((struct sockaddr_gr *)ss)->sgr_epname, (int)len);
		break;
	default:
		printf("%s family %d %d\n", call, ss->ss_family, (int)len);
	}
	fflush(stdout);
}

static struct sockaddr_gr named(const char *name)
{
	struct sockaddr_gr sgr = {.sgr_family = AF_GRAFT};

	strncpy(sgr.sgr_epname, name, AF_GRAFT_EPNAME_MAX);
	return sgr;
}

static struct sockaddr_in inet(const char *address, const char *port)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};

	inet_pton(AF_INET, address, &sin.sin_addr);
	return sin;
}

static int ready(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	return poll(&p, 1, 20000) == 1;
}

static void results(const char *call, int room)
{
	struct graft_sso_result found[80];
	socklen_t len = room < 0 ? sizeof(found) : (socklen_t)room;
	int ret = getsockopt(sock, IPPROTO_GRAFT, GRAFT_SO_DELAYED_RESULT, found, &len);

	printf("%s %s", call, ret < 0 ? strerrorname_np(errno) : "0");
	for (socklen_t i = 0; i < len / sizeof(found[0]); i++)
		printf(" %d:%d:%d", found[i].level, found[i].optname, found[i].ret);
	printf("\n");
	fflush(stdout);
}

static void serve(const char *text)
{
	struct sockaddr_storage ss = {0};
	socklen_t len = sizeof(ss);
	int client, ret;

	if (!ready(sock))
		exit(3);
	client = accept(sock, (struct sockaddr *)&ss, &len);
	show_name("accept", client, &ss, len);
	if (client < 0)
		return;
	len = sizeof(ss);
	memset(&ss, 0, sizeof(ss));
	ret = getsockname(client, (struct sockaddr *)&ss, &len);
	show_name("accepted", ret, &ss, len);
	if (write(client, text, strlen(text)) < 0)
		exit(4);
	close(client);
}

static void call(char *op)
{
	char *word[6] = {0}, *rest = strdup(op), name[64];
	struct sockaddr_storage ss = {0};
	struct sockaddr_gr sgr;
	struct sockaddr_in sin;
	socklen_t len = sizeof(ss);
	char buffer[4096] = "";
	int value, n = 0;

	while (n < 6 && (word[n] = strsep(&rest, ":")))
		n++;
	snprintf(name, sizeof(name), "%s", word[0]);
	if (!strcmp(name, "socket")) {
		sock = socket(AF_GRAFT,
			      strstr(op, "dgram") ? SOCK_DGRAM
			      : strstr(op, "raw") ? SOCK_RAW
						  : SOCK_STREAM,
			      0);
		result(name, sock < 0 ? -1 : 0);
		if (sock < 0)
			exit(1);
	} else if (!strcmp(name, "bind")) {
		sgr = named(word[1]);
		result(name, bind(sock, (struct sockaddr *)&sgr, sizeof(sgr)));
	} else if (!strcmp(name, "bindshort")) {
		sgr = named(word[1]);
		result(name, bind(sock, (struct sockaddr *)&sgr, sizeof(sgr) - 1));
	} else if (!strcmp(name, "bindinet")) {
		sin = inet(word[1], word[2]);
		memcpy(&ss, &sin, sizeof(sin));
		result(name, bind(sock, (struct sockaddr *)&ss, word[3] ? sizeof(struct sockaddr_in6) : sizeof(sin)));
	} else if (!strcmp(name, "connect")) {
		sgr = named(word[1]);
		result(name, connect(sock, (struct sockaddr *)&sgr, sizeof(sgr)));
	} else if (!strcmp(name, "connectshort")) {
		sgr = named(word[1]);
		result(name, connect(sock, (struct sockaddr *)&sgr, sizeof(sgr) - 1));
	} else if (!strcmp(name, "connectinet")) {
		sin = inet(word[1], word[2]);
		result(name, connect(sock, (struct sockaddr *)&sin, sizeof(sin)));
	} else if (!strcmp(name, "listen")) {
		result(name, listen(sock, 8));
	} else if (!strcmp(name, "serve")) {
		serve(word[1]);
	} else if (!strcmp(name, "getsockname")) {
		n = getsockname(sock, (struct sockaddr *)&ss, &len);
		show_name(name, n, &ss, len);
	} else if (!strcmp(name, "getpeername")) {
		n = getpeername(sock, (struct sockaddr *)&ss, &len);
		show_name(name, n, &ss, len);
	} else if (!strcmp(name, "set")) {
		value = atoi(word[3]);
		result(name, setsockopt(sock, atoi(word[1]), atoi(word[2]), &value, word[4] ? atoi(word[4]) : 4));
	} else if (!strcmp(name, "setnull")) {
		result(name, setsockopt(sock, atoi(word[1]), atoi(word[2]), NULL, 0));
	} else if (!strcmp(name, "get")) {
		len = sizeof(value);
		value = -1;
		result(name, getsockopt(sock, atoi(word[1]), atoi(word[2]), &value, &len) < 0 ? -1 : value);
	} else if (!strcmp(name, "trans")) {
		char room[GRAFT_SSO_TRANS_SIZE + 8] = "";
		struct graft_sso_trans *t = (void *)room;

		t->level = atoi(word[1]);
		t->optname = atoi(word[2]);
		t->optlen = sizeof(value);
		value = atoi(word[3]);
		memcpy(t->optval, &value, sizeof(value));
		result(name, setsockopt(sock, IPPROTO_GRAFT, GRAFT_SO_TRANSPARENT, room,
					word[4] ? atoi(word[4]) : GRAFT_SSO_TRANS_SIZE));
	} else if (!strcmp(name, "results")) {
		results(name, word[1] ? atoi(word[1]) : -1);
	} else if (!strcmp(name, "send")) {
		result(name, send(sock, word[1], strlen(word[1]), MSG_NOSIGNAL));
	} else if (!strcmp(name, "sendto")) {
		sgr = named(word[1]);
		result(name, sendto(sock, word[2], strlen(word[2]), 0, (struct sockaddr *)&sgr, sizeof(sgr)));
	} else if (!strcmp(name, "sendtoinet")) {
		sin = inet(word[1], word[2]);
		result(name, sendto(sock, word[3], strlen(word[3]), 0, (struct sockaddr *)&sin, sizeof(sin)));
	} else if (!strcmp(name, "recv")) {
		if (!ready(sock))
			exit(3);
		n = recvfrom(sock, buffer, sizeof(buffer) - 1, 0, (struct sockaddr *)&ss, &len);
		printf("recv %.*s\n", n < 0 ? 0 : n, buffer);
		if (len)
			show_name("from", 0, &ss, len);
	} else if (!strcmp(name, "answer")) {
		/* echo one datagram to whoever sent it */
		if (!ready(sock))
			exit(3);
		n = recvfrom(sock, buffer, sizeof(buffer), 0, (struct sockaddr *)&ss, &len);
		result(name, sendto(sock, buffer, n, 0, (struct sockaddr *)&ss, len));
	} else if (!strcmp(name, "dup2")) {
		result(name, dup2(sock, atoi(word[1])));
		sock = atoi(word[1]);
	} else if (!strcmp(name, "again")) {
		close(sock);
	} else {
		fprintf(stderr, "unknown call '%s'\n", name);
		exit(2);
	}
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++)
		call(argv[i]);
	return 0;
}
