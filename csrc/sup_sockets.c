// SPDX-License-Identifier: Apache-2.0
/*
 * sup_sockets.c - graft-sup: sockets that are ready to be given away, one by one or through a channel
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/bpf.h>
#include <linux/net_tstamp.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sup_parts.h"

#ifndef IP_LOCAL_PORT_RANGE
#define IP_LOCAL_PORT_RANGE 51
#endif
#define POOL 32
#define CHANNELS 16
#define OPTIONS 16     /* more than graft/rules/sysctl.py has */
#define OPTION_TEXT 16 /* TCP_CA_NAME_MAX */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct made pool[SUP_KINDS][POOL];
static int pooled[SUP_KINDS], wanted[SUP_KINDS];

/* ---- sockets ---- */

int map_call(int command, int map, int fd, void *value, __u64 flags)
{
	union bpf_attr attr = {
		.map_fd = (__u32)map, .key = (__u64)(long)&fd, .value = (__u64)(long)value, .flags = flags};

	return (int)syscall(SYS_bpf, command, &attr, sizeof(attr));
}

static int stamp_socket(int fd, bool tcp)
{
	struct graft_stamp value = {.tenant = shared->tenant, .flags = tcp ? STAMP_LATE : 0};

	return map_call(BPF_MAP_UPDATE_ELEM, stamps, fd, &value, BPF_ANY);
}

/*
 * Does the policy run for this socket? 0: yes; ENFILE: yes, but its tenant has more sockets than it may. This process
 * ends where the programs are not attached or the stamps are in another map by now, because it is of no use then:
 * graftd starts another and answers the calls that this one had.
 */
static int check_policy(int fd)
{
	struct graft_probe answer = {0};
	socklen_t size = sizeof(answer);

	if (getsockopt(fd, GRAFT_LEVEL, GRAFT_PROBE, &answer, &size) || answer.tenant != shared->tenant)
		_exit(1);
	return answer.over ? ENFILE : 0;
}

static __u32 port_ranges[2];
static pthread_once_t port_ranges_once = PTHREAD_ONCE_INIT;

/* The ports that the kernel may choose for TCP and for UDP, as graft/trap/sockets.py has them: lowest | highest
 * << 16. */
void set_port_ranges(unsigned int low, unsigned int high)
{
	port_ranges[0] = low | (low + (high - low) * 15 / 16) << 16;
	port_ranges[1] = low | (low + (high - low) / 2) << 16;
}

static void read_port_ranges(void)
{
	FILE *file = fopen("/proc/sys/net/ipv4/ip_local_port_range", "re");
	unsigned int low, high;

	if (file && fscanf(file, "%u %u", &low, &high) == 2 && low <= high && high <= 65535)
		set_port_ranges(low, high);
	if (file)
		fclose(file);
}

/* Leave the host's programs some of the ephemeral ports. 0 or an errno: Linux before 6.3 has no such option. */
int limit_ports(int fd, bool udp)
{
	if (!port_ranges[udp]) /* else graftd has said them */
		pthread_once(&port_ranges_once, read_port_ranges);
	if (!port_ranges[udp])
		return 0;
	return setsockopt(fd, IPPROTO_IP, IP_LOCAL_PORT_RANGE, &port_ranges[udp], sizeof(port_ranges[udp])) ? errno
													    : 0;
}

/* What is set on each socket, because the container has a sysctl for it. */
static struct {
	unsigned int kinds; /* a bit for each */
	int level, name;
	socklen_t length;
	unsigned char value[OPTION_TEXT];
} options[OPTIONS];
static int option_count;

/* Take an option from the command line: KINDS:LEVEL:NAME:VALUE, VALUE in hexadecimal. Before any thread is started.
 */
bool add_option(const char *word)
{
	char text[2 * OPTION_TEXT + 1];
	int n, end = 0;

	if (option_count == OPTIONS ||
	    sscanf(word, "%u:%d:%d:%32[0-9a-f]%n", &options[option_count].kinds, &options[option_count].level,
		   &options[option_count].name, text, &end) != 4 ||
	    word[end] || strlen(text) % 2)
		return false;
	for (n = 0; text[2 * n]; n++)
		sscanf(text + 2 * n, "%2hhx", &options[option_count].value[n]);
	options[option_count++].length = (socklen_t)n;
	return true;
}

/* What fails was accepted when the container was created; the program has the host's value then. */
static void set_options(int fd, int kind)
{
	for (int n = 0; n < option_count; n++)
		if (options[n].kinds & 1u << kind)
			setsockopt(fd, options[n].level, options[n].name, options[n].value, options[n].length);
}

/* Make a socket as graft/trap/sockets.py does. It belongs to this thread's fsuid, or is given away. 0 or an errno. */
static int make_socket(int kind, struct made *result)
{
	int family = kind & SUP_KIND_INET6 ? AF_INET6 : AF_INET, one = 1, error;
	int fd = socket(family, (kind & SUP_KIND_DGRAM ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
	int stamps_alone =
		SOF_TIMESTAMPING_OPT_TSONLY; /* also where a control message asks for them: options.bpf.h */
	bool tcp = !(kind & SUP_KIND_DGRAM);
	struct stat status;

	if (fd < 0)
		return errno;
	if (stamp_socket(fd, tcp) ||
	    (tcp && setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one))) ||
	    (family == AF_INET6 && setsockopt(fd, IPPROTO_IPV6, IPV6_FREEBIND, &one, sizeof(one))) ||
	    setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPING, &stamps_alone, sizeof(stamps_alone)) ||
	    (shared->maker && fchown(fd, shared->reuse_uid, (gid_t)-1)) || fstat(fd, &status)) {
		error = errno;
		close(fd);
		return error;
	}
	limit_ports(fd, !tcp);
	set_options(fd, kind);
	error = check_policy(fd);
	if (error)
		close(fd);
	*result = (struct made){fd, status.st_ino};
	return error;
}

int take_socket(int kind, struct made *result)
{
	pthread_mutex_lock(&lock);
	if (pooled[kind]) {
		*result = pool[kind][--pooled[kind]];
		pthread_mutex_unlock(&lock);
		return 0;
	}
	pthread_mutex_unlock(&lock);
	return make_socket(kind, result);
}

static void pool_socket(int kind, struct made socket)
{
	pthread_mutex_lock(&lock);
	if (pooled[kind] < POOL) {
		pool[kind][pooled[kind]++] = socket;
		socket.fd = -1;
	}
	pthread_mutex_unlock(&lock);
	if (socket.fd >= 0)
		close(socket.fd);
}

/* Make up to two sockets after each call, up to as many as were called for: one call leaves one in the pool. */
void refill_pool(int kind)
{
	struct made socket;
	bool room;
	int n;

	for (n = 0; n < 2; n++) {
		pthread_mutex_lock(&lock);
		if (!n && wanted[kind] < POOL)
			wanted[kind]++;
		room = pooled[kind] < wanted[kind];
		pthread_mutex_unlock(&lock);
		if (!room || make_socket(kind, &socket))
			return;
		pool_socket(kind, socket);
	}
}

/* ---- descriptors in messages ---- */

bool send_fds(int sock, const void *text, size_t length, const int *fds, int count)
{
	char control_text[CMSG_SPACE(SUP_BATCH * sizeof(int))] = {0};
	struct iovec vector = {(void *)text, length};
	struct msghdr message = {.msg_iov = &vector,
				 .msg_iovlen = 1,
				 .msg_control = control_text,
				 .msg_controllen = CMSG_SPACE((size_t)count * sizeof(int))};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
	memcpy(CMSG_DATA(header), fds, (size_t)count * sizeof(int));
	return sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

/* ---- channels ---- */

static int channels;

/* Open a channel; the program's end is put into @theirs. 0 or an errno. */
int open_channel(int kind, struct made *theirs)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP};
	struct stat status;
	sa_family_t named = AF_UNIX;
	int ends[2], error;

	if (__atomic_load_n(&channels, __ATOMIC_RELAXED) >= CHANNELS)
		return EMFILE;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends))
		return errno;
	event.data.u64 = (__u64)kind << 32 | (__u32)ends[0];
	/* it is of the host's netns: with a name of the kernel's choice (unix(7), autobind) it gets no other there */
	if (bind(ends[1], (struct sockaddr *)&named, sizeof(named)) || fstat(ends[1], &status) ||
	    epoll_ctl(events, EPOLL_CTL_ADD, ends[0], &event)) {
		error = errno;
		close(ends[0]);
		close(ends[1]);
		return error;
	}
	__atomic_add_fetch(&channels, 1, __ATOMIC_RELAXED); /* the main thread closes ends[0] when its peer is gone */
	*theirs = (struct made){ends[1], status.st_ino};
	return 0;
}

/* Send one message of @count sockets; false: the channel is of no use any more. */
static bool fill_channel(int channel, int kind, int count)
{
	__u64 inodes[SUP_BATCH];
	int fds[SUP_BATCH], n, unread;
	struct made socket;
	bool sent;

	/* one batch may be under way and one ahead, however many the program asks for */
	if (ioctl(channel, SIOCOUTQ, &unread) || unread > 2048)
		return true;
	for (n = 0; n < count && !make_socket(kind, &socket); n++) {
		fds[n] = socket.fd;
		inodes[n] = socket.inode;
	}
	if (!n)
		return false;
	sent = send_fds(channel, inodes, (size_t)n * sizeof(inodes[0]), fds, n) || errno == EAGAIN;
	while (n)
		close(fds[--n]);
	return sent;
}

/*
 * Close a channel in whose queue there are descriptors. The last close of a socket waits for as long as its SO_LINGER
 * says, but not in a process that ends: so one that ends has the last reference. False: there can be none.
 */
static bool close_foreign(int channel)
{
	pid_t parent = getpid(), child = fork();

	if (child < 0)
		return false;
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		while (getppid() == parent)
			pause();
		_exit(0);
	}
	close(channel);
	kill(child, SIGKILL);
	while (waitpid(-1, NULL, WNOHANG) > 0) /* this one the next time: its end may take long */
		;
	return true;
}

static int unclosed[CHANNELS], unclosed_count; /* of which the process could not be started */

/* A channel: one byte, how many sockets are asked for. Whoever sends anything else, or descriptors, loses it. */
void on_channel(const struct epoll_event *event)
{
	int channel = (int)(__u32)event->data.u64, kind = (int)(event->data.u64 >> 32), tries = 0;
	unsigned char asked;
	struct sockaddr_un name;
	struct iovec one = {.iov_base = &asked, .iov_len = 1};
	struct msghdr message;
	ssize_t length;
	bool ended;

	do { /* ECONNRESET is told once, and before what is in the queue */
		message = (struct msghdr){
			.msg_name = &name, .msg_namelen = sizeof(name), .msg_iov = &one, .msg_iovlen = 1};
		length = recvmsg(channel, &message, MSG_DONTWAIT | MSG_PEEK);
	} while (length < 0 && errno == ECONNRESET && !tries++);
	if (length < 0 && errno == EAGAIN)
		return;
	ended = !length && !message.msg_namelen; /* a message without a byte has the name of its sender */
	if (!ended && length >= 0 && !(message.msg_flags & MSG_CTRUNC)) { /* there is no room for descriptors */
		length = recv(channel, &asked, 1, MSG_DONTWAIT);
		if (length == 1 && asked && asked <= SUP_BATCH && fill_channel(channel, kind, asked))
			return;
	}
	epoll_ctl(events, EPOLL_CTL_DEL, channel, NULL);
	if (ended) {
		close(channel);
		__atomic_sub_fetch(&channels, 1, __ATOMIC_RELAXED);
		return;
	}
	unclosed[unclosed_count++] = channel;
	while (unclosed_count && close_foreign(unclosed[unclosed_count - 1])) {
		unclosed_count--;
		__atomic_sub_fetch(&channels, 1, __ATOMIC_RELAXED);
	}
}
