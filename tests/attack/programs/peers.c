/* usage: peers SECONDS ADDRESS PORT ADDRESS PORT ...
 *
 * Connects one UDP socket to each address in turn, as fast as it can, while another thread sends; then tells how many
 * connections the kernel has allowed, and how many datagrams it took.
 */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

static int sock;
static volatile int over;
static long sent;

static void *send_always(void *unused)
{
	while (!over)
		sent += send(sock, "x", 1, MSG_DONTWAIT) == 1;
	return unused;
}

int main(int argc, char **argv)
{
	struct sockaddr_in at[16], nobody = {.sin_family = AF_UNSPEC};
	time_t end = time(NULL) + atoi(argv[1]);
	int count = (argc - 2) / 2;
	long allowed = 0;
	pthread_t sender;

	for (int n = 0; n < count; n++) {
		at[n] = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[3 + 2 * n]))};
		inet_pton(AF_INET, argv[2 + 2 * n], &at[n].sin_addr);
	}
	sock = socket(AF_INET, SOCK_DGRAM, 0);
	pthread_create(&sender, NULL, send_always, NULL);
	for (long n = 0; time(NULL) < end; n++) {
		allowed += !connect(sock, (void *)&at[n % count], sizeof(at[0]));
		if (n % 7 == 6)
			connect(sock, (void *)&nobody, sizeof(nobody));
	}
	over = 1;
	pthread_join(sender, NULL);
	printf("%ld %ld\n", allowed, sent);
}
