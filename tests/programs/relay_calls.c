/* Makes one call behind graft-relay's filter (csrc/relay_cage.c), and says that it lives. usage: relay_calls CALL */
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "relay.h"

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = htonl(0x7f000001)};
	struct linger now = {1, 0};
	int one = 1, ends[2];
	const char *call = argc == 2 ? argv[1] : "";

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) || filter_calls())
		return 2;
	if (!strcmp(call, "linger"))
		setsockopt(ends[0], SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	else if (!strcmp(call, "send"))
		send(ends[0], "x", 1, MSG_DONTWAIT);
	else if (!strcmp(call, "mark"))
		setsockopt(ends[0], SOL_SOCKET, SO_MARK, &one, sizeof(one));
	else if (!strcmp(call, "level"))
		setsockopt(ends[0], IPPROTO_TCP, SO_LINGER, &now, sizeof(now));
	else if (!strcmp(call, "sendto"))
		sendto(ends[0], "x", 1, MSG_DONTWAIT, (struct sockaddr *)&to, sizeof(to));
	else if (!strcmp(call, "high")) /* an address whose lower half is 0 */
		syscall(SYS_sendto, ends[0], "x", 1, MSG_DONTWAIT, 1ul << 32, sizeof(to));
	else if (!strcmp(call, "socket"))
		socket(AF_INET, SOCK_STREAM, 0);
	else if (!strcmp(call, "connect"))
		connect(ends[0], (struct sockaddr *)&to, sizeof(to));
	else
		return 2;
	_exit(0);
}
