// SPDX-License-Identifier: Apache-2.0
/*
 * graft-plugin - the process of Docker's managed plugin graft:swarm
 *
 * usage: graft-plugin SOCKET LINK
 *
 * swarm takes network drivers from managed plugins alone (docker-plugin(1)), each of which is a container with a
 * socket in /run/docker/plugins/ID of the host. graftd has such a socket already, and outlives none of dockerd's
 * plugins by being one. So all that this program does is a symbolic link, LINK to SOCKET: dockerd connects to what it
 * leads to in dockerd's own mount namespace (moby, plugin/manager_linux.go, pluginPostStart), each time anew. Then it
 * waits for its end. It is PID 1, which ignores signals that it does not ask for.
 */
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	sigset_t end;
	int number;

	if (argc != 3) {
		fprintf(stderr, "usage: graft-plugin SOCKET LINK\n");
		return 2;
	}
	sigemptyset(&end);
	sigaddset(&end, SIGTERM);
	sigaddset(&end, SIGINT);
	sigprocmask(SIG_BLOCK, &end, NULL);
	unlink(argv[2]);
	if (symlink(argv[1], argv[2])) {
		perror(argv[2]);
		return 1;
	}
	sigwait(&end, &number);
	unlink(argv[2]);
	return 0;
}
