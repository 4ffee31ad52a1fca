/* usage: taken SECONDS OTHERS PORT DESTINATION PORT
 *
 * Two threads connect one UDP socket, to another container's address and to a destination: the kernel gives the first
 * connection that address for its source, and the second keeps it. Then the socket asks the destination who it is,
 * and that is printed: "asked N times, told: ADDRESS ...".
 */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>

static struct sockaddr_in other, destination;
static struct sockaddr nobody;
static volatile int over, halt, halted;
static int sock;

static struct sockaddr_in address(const char *ip, const char *port)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};

	inet_pton(AF_INET, ip, &at.sin_addr);
	return at;
}

static void *connect_there(void *unused)
{
	while (!over) {
		halted = halt;
		if (halt)
			continue;
		connect(sock, (void *)&other, sizeof(other));
		connect(sock, &nobody, sizeof(nobody));
	}
	return unused;
}

/* Is the socket at the other's address, with the destination as its peer? */
static int is_taken(void)
{
	struct sockaddr_in own, peer;
	socklen_t size = sizeof(own);

	if (getsockname(sock, (void *)&own, &size))
		return 0;
	size = sizeof(peer);
	return !getpeername(sock, (void *)&peer, &size) && own.sin_addr.s_addr == other.sin_addr.s_addr &&
	       peer.sin_addr.s_addr == destination.sin_addr.s_addr;
}

int main(int argc, char **argv)
{
	struct timeval patience = {.tv_usec = 200000};
	time_t end = time(NULL) + atoi(argv[1]);
	char answer[64] = "";
	long asked = 0;
	pthread_t thread;
	ssize_t size;

	if (argc != 6)
		return 2;
	other = address(argv[2], argv[3]);
	destination = address(argv[4], argv[5]);
	sock = socket(AF_INET, SOCK_DGRAM, 0);
	setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	pthread_create(&thread, NULL, connect_there, NULL);
	while (time(NULL) < end) {
		if (connect(sock, (void *)&destination, sizeof(destination)) || !is_taken())
			continue;
		halt = 1;
		while (!halted)
			;
		if (is_taken()) {
			asked++;
			size = send(sock, "who am I?", 9, 0) == 9 ? recv(sock, answer, sizeof(answer) - 1, 0) : 0;
			if (size > 0) {
				answer[size] = 0;
				break;
			}
		}
		halt = 0;
	}
	over = 1;
	halt = 0;
	pthread_join(thread, NULL);
	printf("asked %ld times, told: %s\n", asked, answer);
}
