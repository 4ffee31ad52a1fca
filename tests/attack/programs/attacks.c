/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attacks.c - what a hostile program in a container tries below Python's reach: calls of other ABIs, races on memory
 *
 * usage: attacks NAME HOST CLIENT; prints what came of it: an errno's name, or OK and what was gained
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define X32 0x40000000
#define ROUNDS 4000

static const char *host, *client;

static const char *outcome(long result)
{
	return result < 0 ? strerrorname_np(errno) : "OK";
}

static struct sockaddr_in at(const char *address, int port)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(port)};

	inet_pton(AF_INET, address, &sin.sin_addr);
	return sin;
}

#ifdef __x86_64__
/* An i386 call from a 64-bit program; pointers have to be below 4 GiB. */
static long int80(long nr, long a, long b, long c, long d, long e)
{
	long result;

	__asm__ volatile("int $0x80"
			 : "=a"(result)
			 : "a"(nr), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
			 : "memory", "r8", "r9", "r10", "r11");
	if ((int)result < 0 && (int)result > -4096) {
		errno = -(int)result;
		return -1;
	}
	return (int)result;
}
#else
#define MAP_32BIT 0

/* No other architecture lets a program call another ABI's. */
static long int80(long nr, long a, long b, long c, long d, long e)
{
	(void)nr, (void)a, (void)b, (void)c, (void)d, (void)e;
	errno = ENOSYS;
	return -1;
}
#endif

static void *low(const void *data, size_t size)
{
	void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);

	memcpy(page, data, size);
	return page;
}

static const char *i386_socket(void)
{
	return outcome(int80(359, AF_INET, SOCK_STREAM, 0, 0, 0));
}

static const char *i386_socketcall(void)
{
	const uint32_t arguments[] = {AF_INET, SOCK_STREAM, 0};

	return outcome(int80(102, 1, (long)low(arguments, sizeof(arguments)), 0, 0, 0));
}

static const char *i386_bind(void)
{
	struct sockaddr_in to = at("0.0.0.0", 22);

	return outcome(int80(361, socket(AF_INET, SOCK_STREAM, 0), (long)low(&to, sizeof(to)), sizeof(to), 0, 0));
}

static const char *i386_connect(void)
{
	struct sockaddr_in to = at(host, 9101);

	return outcome(int80(362, socket(AF_INET, SOCK_STREAM, 0), (long)low(&to, sizeof(to)), sizeof(to), 0, 0));
}

static const char *i386_listen(void)
{
	return outcome(int80(363, socket(AF_INET, SOCK_STREAM, 0), 5, 0, 0, 0));
}

static const char *i386_setsockopt(void)
{
	return outcome(
		int80(366, socket(AF_INET, SOCK_DGRAM, 0), SOL_SOCKET, SO_BINDTODEVICE, (long)low("veth0", 6), 6));
}

static const char *i386_getsockopt(void)
{
	const uint32_t size = 8;
	char *page = low(&size, sizeof(size));

	return outcome(int80(365, socket(AF_INET, SOCK_DGRAM, 0), SOL_SOCKET, 71, (long)page + 16, (long)page));
}

static const char *i386_socketpair(void)
{
	const int pair[2] = {0};

	return outcome(int80(360, AF_UNIX, SOCK_STREAM, 0, (long)low(pair, sizeof(pair)), 0));
}

static const char *i386_tun(void)
{
	const struct ifreq request = {.ifr_name = "intruder%d", .ifr_flags = 1};
	int fd = open("/dev/net/tun", O_RDWR);

	return fd < 0 ? outcome(-1) : outcome(int80(54, fd, 0x400454ca, (long)low(&request, sizeof(request)), 0, 0));
}

static const char *x32_socket(void)
{
	return outcome(syscall(X32 + 41, AF_INET, SOCK_STREAM, 0));
}

static const char *x32_setsockopt(void)
{
	return outcome(syscall(X32 + 541, socket(AF_INET, SOCK_DGRAM, 0), SOL_SOCKET, SO_BINDTODEVICE, "veth0", 6));
}

static const char *io_uring(void)
{
	struct io_uring_params parameters = {0};

	return outcome(syscall(SYS_io_uring_setup, 8, &parameters));
}

/* ---- races: another thread, or a process that shares the memory, changes the address ---- */

static _Atomic int done;

struct flip {
	_Atomic(uint64_t) *where; /* the family, port and address of a sockaddr_in: one store changes all of them */
	uint64_t one, other;
};

static void *flip(void *argument)
{
	struct flip *f = argument;

	while (!done) {
		atomic_store(f->where, f->one);
		atomic_store(f->where, f->other);
	}
	return NULL;
}

static uint64_t head(const struct sockaddr_in *sin)
{
	uint64_t value;

	memcpy(&value, sin, sizeof(value));
	return value;
}

/* @wanted: the port or address that must never be had. Counts how often it was. */
static const char *race(int kind, bool shared, bool binding)
{
	struct sockaddr_in good = binding ? at("0.0.0.0", 80) : at(client, 9000);
	struct sockaddr_in bad = binding ? at("0.0.0.0", 22) : at("127.0.0.1", 9101);
	struct sockaddr_in *address =
		mmap(NULL, 4096, PROT_READ | PROT_WRITE, (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS, -1, 0);
	struct flip f = {(void *)address, head(&good), head(&bad)};
	int gained = 0, succeeded = 0;
	pthread_t thread;
	pid_t child = 0;

	*address = good;
	if (shared) {
		child = fork();
		if (child < 0)
			return outcome(-1);
		if (!child) {
			flip(&f);
			_exit(0);
		}
	} else {
		pthread_create(&thread, NULL, flip, &f);
	}
	for (int n = 0; n < ROUNDS; n++) {
		int sock = socket(AF_INET, kind | SOCK_NONBLOCK, 0), one = 1;
		struct sockaddr_in got = {0};
		socklen_t size = sizeof(got);
		int result;

		setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		if (binding)
			result = bind(sock, (void *)address, sizeof(*address));
		else if (kind == SOCK_DGRAM)
			result = (int)sendto(sock, "race", 4, 0, (void *)address, sizeof(*address));
		else
			result = connect(sock, (void *)address, sizeof(*address));
		succeeded += !result || result == 4 || errno == EINPROGRESS;
		if (!binding && kind == SOCK_STREAM && !getpeername(sock, (void *)&got, &size) &&
		    head(&got) == f.other)
			gained++;
		close(sock);
	}
	done = 1;
	if (child) {
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	} else {
		pthread_join(thread, NULL);
	}
	return gained ? "OK" : succeeded ? "HELD" : "NEVER";
}

static const char *race_bind(void)
{
	return race(SOCK_STREAM, false, true);
}

static const char *race_bind_shared(void)
{
	return race(SOCK_DGRAM, true, true);
}

static const char *race_connect(void)
{
	return race(SOCK_STREAM, false, false);
}

static const char *race_connect_shared(void)
{
	return race(SOCK_STREAM, true, false);
}

static const char *race_sendto(void)
{
	return race(SOCK_DGRAM, true, false);
}

/* socket() by many threads, killed in the middle, in processes without end */
static void *call_socket(void *unused)
{
	(void)unused;
	for (;;)
		close(socket(AF_INET, SOCK_STREAM, 0));
	return NULL;
}

static const char *killed_in_flight(void)
{
	struct timespec moment = {.tv_nsec = 3000000};

	for (int n = 0; n < 60; n++) {
		pid_t child = fork();

		if (!child) {
			pthread_t thread;

			for (int t = 0; t < 6; t++)
				pthread_create(&thread, NULL, call_socket, NULL);
			call_socket(NULL);
		}
		if (child < 0)
			return outcome(-1);
		nanosleep(&moment, NULL);
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	}
	return socket(AF_INET, SOCK_STREAM, 0) > 2 ? "SERVED" : "LOST";
}

static void *raise_and_lower(void *unused)
{
	(void)unused;
	while (!done) {
		dup2(0, 100);
		close(100);
	}
	return NULL;
}

/* Other threads open and close descriptors while sockets are being given; none may end as somebody else's. */
static const char *descriptors_in_flight(void)
{
	pthread_t thread;
	int kind, wrong = 0;
	socklen_t size = sizeof(kind);

	pthread_create(&thread, NULL, raise_and_lower, NULL);
	for (int n = 0; n < ROUNDS; n++) {
		int sock = socket(AF_INET, SOCK_STREAM, 0);

		wrong += getsockopt(sock, SOL_SOCKET, SO_TYPE, &kind, &size) || kind != SOCK_STREAM;
		close(sock);
	}
	done = 1;
	pthread_join(thread, NULL);
	return wrong ? "WRONG" : "RIGHT";
}

/* ---- filters and supervisors ---- */

static int filter(unsigned int flags, uint32_t action)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socket, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, action),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {4, code};

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static const char *listener_of_ones_own(void)
{
	return outcome(filter(SECCOMP_FILTER_FLAG_NEW_LISTENER, SECCOMP_RET_USER_NOTIF));
}

/* More urgent than graft's: but it can only refuse, or stay without a listener. */
static const char *filter_on_top(void)
{
	struct sockaddr_in to = at("0.0.0.0", 22);

	if (filter(0, SECCOMP_RET_TRACE))
		return outcome(-1);
	if (socket(AF_INET, SOCK_STREAM, 0) >= 0)
		return "OK";
	return errno == ENOSYS ? outcome(bind(socket(AF_INET, SOCK_DGRAM, 0), (void *)&to, sizeof(to))) : outcome(-1);
}

static const char *filter_allows(void)
{
	struct sockaddr_in to = at("0.0.0.0", 22);

	if (filter(0, SECCOMP_RET_ALLOW))
		return outcome(-1);
	return outcome(bind(socket(AF_INET, SOCK_STREAM, 0), (void *)&to, sizeof(to)));
}

/* One that is alive: another test may have ended its own, which nobody has reaped yet. */
static pid_t supervisor(const char *name)
{
	char path[300], comm[64], state;
	DIR *processes = opendir("/proc");
	struct dirent *entry;

	while ((entry = readdir(processes))) {
		snprintf(path, sizeof(path), "/proc/%s/stat", entry->d_name);
		FILE *file = fopen(path, "r");

		if (!file)
			continue;
		int found = fscanf(file, "%*d (%63[^)]) %c", comm, &state);

		fclose(file);
		if (found == 2 && !strcmp(comm, name) && state != 'Z' && state != 'X')
			return atoi(entry->d_name);
	}
	puts("no supervisor");
	exit(1);
}

static const char *ptrace_supervisor(void)
{
	return outcome(ptrace(PTRACE_SEIZE, supervisor("graft-sup"), 0, 0));
}

static const char *steal_descriptor(void)
{
	int pidfd = (int)syscall(SYS_pidfd_open, supervisor("graft-sup"), 0);

	for (int n = 3; n < 64; n++)
		if (syscall(SYS_pidfd_getfd, pidfd, n, 0) >= 0)
			return "OK";
	return outcome(-1);
}

static const char *write_supervisor(void)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/mem", supervisor("graft-sup"));
	return outcome(open(path, O_RDWR));
}

static const char *reopen_listener(void)
{
	pid_t pid = supervisor("graft-sup");
	int error = ENOENT;
	char path[64];

	for (int n = 3; n < 64; n++) {
		snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, n);
		if (open(path, O_RDWR) >= 0)
			return "OK";
		if (errno != ENOENT) /* no such descriptor */
			error = errno;
	}
	errno = error;
	return outcome(-1);
}

static const char *garbage(void)
{
	unsigned int seed = 7;

	for (int n = 0; n < ROUNDS; n++) {
		long nr = (const long[]){SYS_socket,	 SYS_listen, SYS_ioctl,	  SYS_setsockopt,
					 SYS_getsockopt, SYS_bind,   SYS_connect, SYS_sendto}[rand_r(&seed) % 8];
		long a[6];

		for (int i = 0; i < 6; i++)
			a[i] = (const long[]){0, -1, 2, 18, 254, 0x8927, 0x7fffffff, 1L << 40}[rand_r(&seed) % 8] +
			       rand_r(&seed) % 3;
		if (a[0] >= 0 && a[0] < 3 && nr != SYS_socket)
			a[0] = 977;
		long result = syscall(nr, a[0], a[1], a[2], a[3], a[4], a[5]);

		if (nr == SYS_socket && result > 2)
			close((int)result);
	}
	return socket(AF_INET, SOCK_STREAM, 0) > 2 ? "SERVED" : "LOST";
}

static const struct {
	const char *name;
	const char *(*run)(void);
} attacks[] = {
#define A(name) {#name, name}
	A(i386_socket),
	A(i386_socketcall),
	A(i386_bind),
	A(i386_connect),
	A(i386_listen),
	A(i386_setsockopt),
	A(i386_getsockopt),
	A(i386_socketpair),
	A(i386_tun),
	A(x32_socket),
	A(x32_setsockopt),
	A(io_uring),
	A(race_bind),
	A(race_bind_shared),
	A(race_connect),
	A(race_connect_shared),
	A(race_sendto),
	A(killed_in_flight),
	A(descriptors_in_flight),
	A(listener_of_ones_own),
	A(filter_on_top),
	A(filter_allows),
	A(ptrace_supervisor),
	A(steal_descriptor),
	A(write_supervisor),
	A(reopen_listener),
	A(garbage),
};

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	host = argv[2];
	client = argv[3];
	for (size_t n = 0; n < sizeof(attacks) / sizeof(attacks[0]); n++)
		if (!strcmp(argv[1], attacks[n].name)) {
			puts(attacks[n].run());
			return 0;
		}
	return 2;
}
