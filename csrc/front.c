// SPDX-License-Identifier: GPL-2.0
/*
 * graft-front - `graft run` without the start of an interpreter
 *
 * It sends its arguments to graftd, which reads them by the same code as `graft run` (graft/commands/plan.py), and
 * answers with what is left to do: the seccomp filter, the message that hands the listener over, and which word the
 * command is. This process does that itself: so the command has the caller's privileges, session, limits and signals,
 * and graftd does nothing in its name. It becomes the command, as graft/commands/launch.py does.
 *
 * Whatever it does not do it leaves to the program in Python, whose arguments are its own: every other command of
 * graft, options that take more steps, everybody but root, a graftd that does not run or is of another version, and
 * what goes wrong before the listener is handed over, which that program meets again and has the words for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "live.h"

#define REPLY_SECONDS 120     /* client.REPLY_TIMEOUT */
#define DIAL_SECONDS 30	      /* client.DIAL_SECONDS */
#define WORDS_MAX (128 << 10) /* bytes of arguments; a request of graftd's has 1 MiB at most, and they are in hex */
#define REPLY_MAX (1 << 20)
#define FILTER_MAX 4096 /* instructions: BPF_MAXINSNS */

#define PLANNED "{\"ok\": {\"plan\": \"" /* as json.dumps() writes it (graft/daemon/admin.py) */

/* As bin/graft has it: an interrupt before the interpreter is up would print a traceback. */
#define BEGIN                                                                                                        \
	"import _signal as s, sys; s.getsignal(2) == s.SIG_IGN or s.signal(2, s.SIG_DFL); "                          \
	"s.pthread_sigmask(s.SIG_UNBLOCK, [2]); "                                                                    \
	"sys.path.insert(0, sys.argv.pop(1)); sys.path.append(sys.path[0] + '/graft/vendored'); "

#define PLAN_DIRECT 1 /* the process lives in the host's netns (live.h) */
#define PLAN_ACCEL 2  /* graft-shim.so is preloaded */

/* What graftd has planned: numbers in the byte order of this machine, then the filter, then the message. */
struct plan {
	uint32_t skip;	 /* words of `graft run` before the command's */
	uint32_t filter; /* bytes */
	uint32_t modes;	 /* PLAN_* */
	char bytes[];
};

static const char *self_root; /* the directory of the package `graft` */

/*
 * The interpreter of this installation: that of the checkout's .venv, or that of the prefix in whose lib the package
 * is. No other directory above it is looked into: it may be anybody's.
 */
static bool find_python(char *to, size_t room)
{
	char at[PATH_MAX], *lib = NULL;
	struct stat found;

	snprintf(at, sizeof(at), "%s", self_root);
	if (snprintf(to, room, "%s/.venv/bin/python3", at) >= (int)room)
		return false;
	if (!lstat(to, &found))
		return true; /* execv(2) says what is wrong with it */
	/* PREFIX/lib/python3.N/site-packages, or /usr/lib/graft of Debian's package */
	for (char *next = at; (next = strstr(next, "/lib/")); next++)
		lib = next;
	if (!lib)
		return false;
	*lib = 0;
	return snprintf(to, room, "%s/bin/python3", at) < (int)room && !access(to, X_OK);
}

/* Become a program in Python: @entry, with @words after the root. Does not return. */
static void become_python(const char *entry, char *const *words, int count)
{
	char python[PATH_MAX];
	sigset_t interrupt;
	char **argv = calloc((size_t)count + 6, sizeof(*argv));

	sigemptyset(&interrupt);
	sigaddset(&interrupt, SIGINT);
	errno = ENOENT;
	if (argv && find_python(python, sizeof(python)) && !sigprocmask(SIG_BLOCK, &interrupt, NULL)) {
		argv[0] = python;
		argv[1] = "-I";
		argv[2] = "-c";
		argv[3] = (char *)entry;
		argv[4] = (char *)self_root;
		memcpy(argv + 5, words, (size_t)count * sizeof(*argv));
		execv(python, argv);
	}
	dprintf(STDERR_FILENO, "graft: no Python for %s: %s\n", self_root, strerror(errno));
	_exit(125);
}

static char **given;
static int givens;
static int home = -1; /* the netns that a direct container's process comes from, and goes back to */

/* Have the program in Python do all of it. */
static void leave(void)
{
	if (home >= 0)
		setns(home, CLONE_NEWNET);
	become_python(BEGIN "from graft.commands.main import main; sys.exit(main())", given + 1, givens - 1);
}

/* Have the program in Python say why graftd has refused the container: @reply is its answer, or what kept it away. */
static void tell(const char *reply)
{
	char *words[] = {(char *)reply};

	become_python(BEGIN "from graft.commands.told import main; sys.exit(main())", words, 1);
}

static int dial(void)
{
	struct timeval patience = {.tv_sec = REPLY_SECONDS}, dialling = {.tv_sec = DIAL_SECONDS};
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	const char *run_dir = getenv("GRAFT_RUN_DIR");
	int low = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), sock;

	sock = fcntl(low, F_DUPFD_CLOEXEC, 3); /* not one of the command's own, which may be closed */
	close(low);
	if (snprintf(to.sun_path, sizeof(to.sun_path), "%s/graftd.sock", run_dir ? run_dir : "/run/graft") >=
		    (int)sizeof(to.sun_path) ||
	    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) ||
	    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &dialling, sizeof(dialling)) ||
	    connect(sock, (struct sockaddr *)&to, sizeof(to)))
		return -1;
	return sock;
}

/* Send a whole request, with the first @count of these descriptors. */
static bool give(int sock, const char *request, size_t size, const int *fds, size_t count)
{
	union {
		char room[CMSG_SPACE(2 * sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	struct iovec part = {(char *)request, size};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	ssize_t sent;

	if (count) {
		message.msg_control = control.room;
		message.msg_controllen = CMSG_SPACE(count * sizeof(int));
		control.align.cmsg_level = SOL_SOCKET;
		control.align.cmsg_type = SCM_RIGHTS;
		control.align.cmsg_len = CMSG_LEN(count * sizeof(int));
		memcpy(CMSG_DATA(&control.align), fds, count * sizeof(int));
	}
	while (part.iov_len) {
		sent = sendmsg(sock, &message, MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent <= 0)
			return false;
		part.iov_base = (char *)part.iov_base + sent;
		part.iov_len -= (size_t)sent;
		message.msg_control = NULL;
		message.msg_controllen = 0;
	}
	return true;
}

/* Receive a line without its end into @reply, of REPLY_MAX bytes. Returns 0, or an errno: EPIPE if there is no more.
 */
static int take(int sock, char *reply)
{
	size_t have = 0;

	while (!have || reply[have - 1] != '\n') {
		ssize_t got = recv(sock, reply + have, REPLY_MAX - have, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return got && errno == EAGAIN ? ETIMEDOUT : EPIPE;
		have += (size_t)got;
	}
	reply[have - 1] = 0;
	return 0;
}

static bool is_good(const char *reply)
{
	return !strncmp(reply, "{\"ok\": ", 7); /* as runtime.c has it */
}

static char *put_hex(char *to, const char *word)
{
	for (; *word; word++)
		to += sprintf(to, "%02x", (unsigned char)*word);
	return to;
}

/* The value of a digit in hex; -1 if it is none. Not sscanf(3), which looks for the end of all that follows. */
static int digit(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The plan for `graft run` with these words, of @size bytes; NULL if graftd makes none. Ends with a zero. */
static struct plan *ask(int sock, char **words, int count, char *reply, size_t *size)
{
	const char *direct = getenv("GRAFT_DIRECT");
	size_t length = direct ? strlen(direct) : 0;
	char *request, *to, *bytes;

	for (int i = 0; i < count; i++)
		length += strlen(words[i]) + 1;
	if (length > WORDS_MAX)
		return NULL;
	request = malloc(2 * length + 256);
	to = request + sprintf(request, "{\"op\": \"plan\", \"version\": \"" VERSION "\", \"direct\": \"");
	to = put_hex(to, direct ? direct : "");
	to += sprintf(to, "\", \"words\": \"");
	for (int i = 0; i < count; i++) {
		to = put_hex(to, words[i]);
		if (i + 1 < count)
			to += sprintf(to, "00");
	}
	to += sprintf(to, "\"}\n");
	if (!give(sock, request, (size_t)(to - request), NULL, 0) || take(sock, reply) ||
	    strncmp(reply, PLANNED, sizeof(PLANNED) - 1))
		return NULL;
	bytes = malloc(REPLY_MAX / 2 + 8);
	*size = 0;
	for (const char *hex = reply + sizeof(PLANNED) - 1; *hex != '"'; hex += 2) {
		int high = digit(hex[0]), low = high < 0 ? -1 : digit(hex[1]);

		if (low < 0)
			return NULL;
		bytes[(*size)++] = (char)(high << 4 | low);
	}
	bytes[*size] = 0;
	return (struct plan *)bytes;
}

/* The file that execvp(3) would run; false if that is not one, for which the program in Python has the words. */
static bool find(const char *command, char *to)
{
	const char *path = getenv("PATH"), *end;
	struct stat found;

	if (strchr(command, '/'))
		return snprintf(to, PATH_MAX, "%s", command) < PATH_MAX && !stat(to, &found) &&
		       S_ISREG(found.st_mode) && !access(to, X_OK);
	for (path = path ? path : "/bin:/usr/bin"; path; path = *end ? end + 1 : NULL) {
		end = strchrnul(path, ':');
		if (snprintf(to, PATH_MAX, "%.*s/%s", end == path ? 1 : (int)(end - path), end == path ? "." : path,
			     command) < PATH_MAX &&
		    !stat(to, &found) && S_ISREG(found.st_mode) && !access(to, X_OK))
			return true;
	}
	return false;
}

static bool loopback_up(void)
{
	struct ifreq lo = {.ifr_name = "lo"};
	int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	bool up = sock >= 0 && !ioctl(sock, SIOCGIFFLAGS, &lo);

	lo.ifr_flags |= IFF_UP;
	up = up && !ioctl(sock, SIOCSIFFLAGS, &lo);
	close(sock);
	return up;
}

/* Mount the sysfs of the new netns, as ip-netns(8) does, and keep the mounts below /sys/fs/cgroup. */
static bool remount_sys(void)
{
	char path[40];
	struct statvfs sys;
	int cgroup;

	if (mount("none", "/", NULL, MS_REC | MS_SLAVE, NULL))
		return false;
	cgroup = open("/sys/fs/cgroup", O_PATH | O_CLOEXEC);
	if (cgroup < 0 || statvfs("/sys", &sys) ||
	    mount("sysfs", "/sys", "sysfs", sys.f_flag & ST_RDONLY ? MS_RDONLY : 0, NULL))
		return false;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", cgroup);
	if (mount(path, "/sys/fs/cgroup", NULL, MS_BIND | MS_REC, NULL))
		return false;
	close(cgroup);
	return true;
}

/* Install the filter; returns its listener, or -1. */
static int install(const struct plan *plan)
{
	struct sock_fprog program = {(unsigned short)(plan->filter / sizeof(struct sock_filter)),
				     (struct sock_filter *)plan->bytes};
	unsigned int flags = SECCOMP_FILTER_FLAG_NEW_LISTENER;
	int low, listener;

	low = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
			   &program);
	listener = low < 0 ? -1 : fcntl(low, F_DUPFD_CLOEXEC, 3);
	close(low);
	return listener;
}

/* This process's netns, as a descriptor that is not one of the command's own; -1. */
static int open_netns(void)
{
	int low = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC), fd;

	fd = fcntl(low, F_DUPFD_CLOEXEC, 3);
	close(low);
	return fd;
}

/* Live in the host's netns from now on: @reply is graftd's, which names the link for /proc/net. */
static void live(int netns, char *reply)
{
	static const char key[] =
		"\"procfs\": \""; /* as json.dumps() writes it; plan() sees that no escape follows */
	char *procfs = strstr(reply, key), why[64];
	int error = EPROTO;

	if (procfs) {
		procfs += sizeof(key) - 1;
		procfs[strcspn(procfs, "\"")] = 0;
		error = live_in_host(home, netns, procfs);
	}
	if (!error)
		return;
	snprintf(why, sizeof(why), "live %d", error);
	tell(why);
}

/* Hide the host's name services: the container's names are graft's resolver's. */
static void hide(void)
{
	const char *which;
	char why[PATH_MAX];
	int error = hide_name_services(false, &which);

	if (!error)
		return;
	snprintf(why, sizeof(why), "hide %d %s", error, which);
	tell(why);
}

static char *shim; /* the library of --accel; NULL without */

/* Is the library of --accel there for this user? */
static bool find_shim(void)
{
	return asprintf(&shim, "%s/graft/graft-shim.so", self_root) > 0 && !access(shim, R_OK);
}

/* Let programs have the library of --accel, or not any more: LD_PRELOAD as ld.so(8) has it. */
static void preload(bool on)
{
	static char *before, *both;

	if (on) {
		before = getenv("LD_PRELOAD");
		if (!before || !*before)
			setenv("LD_PRELOAD", shim, 1);
		else if (asprintf(&both, "%s:%s", shim, before) > 0 && (before = strdup(before)))
			setenv("LD_PRELOAD", both, 1);
	} else if (before) {
		setenv("LD_PRELOAD", before, 1);
	} else {
		unsetenv("LD_PRELOAD");
	}
}

/* Become the command. A script without #! is run by sh, as execvp(3) does. Does not return. */
static void become(const char *file, char **words, int count)
{
	char **argv, why[1024];

	if (shim)
		preload(true);
	execv(file, words);
	if (errno == ENOEXEC) {
		argv = calloc((size_t)count + 2, sizeof(*argv));
		argv[0] = "/bin/sh";
		argv[1] = (char *)file;
		memcpy(argv + 2, words + 1, (size_t)(count - 1) * sizeof(*argv));
		execv("/bin/sh", argv);
	}
	snprintf(why, sizeof(why), "%d %s", errno, words[0]);
	if (shim)
		preload(false); /* for the program in Python */
	tell(why);
}

int main(int argc, char **argv)
{
	static char root[PATH_MAX], file[PATH_MAX], reply[REPLY_MAX];
	const char hello[] = "{\"op\": \"hello\", \"version\": \"" VERSION "\"}\n";
	ssize_t length = readlink("/proc/self/exe", root, sizeof(root) - 1);
	int sock, fds[2], failed, skip; /* fds: the listener, and of a direct container its netns */
	struct plan *plan;
	size_t size;

	if (length <= 0 || root[0] != '/') {
		dprintf(STDERR_FILENO, "graft: /proc/self/exe: %s (mount /proc)\n", strerror(errno));
		return 125;
	}
	for (int level = 0; level < 2 && *root; level++)
		*strrchr(root, '/') = 0;
	self_root = root;
	given = argv;
	givens = argc;
	if (argc < 3 || strcmp(argv[1], "run") || geteuid() || getuid() || getenv("GRAFT_DEBUG"))
		leave();
	sock = dial();
	if (sock < 0 || !give(sock, hello, sizeof(hello) - 1, NULL, 0) || take(sock, reply) || !is_good(reply))
		leave();
	plan = ask(sock, argv + 2, argc - 2, reply, &size);
	if (!plan || size <= sizeof(*plan) || plan->filter > FILTER_MAX * sizeof(struct sock_filter) ||
	    sizeof(*plan) + plan->filter >= size || (int64_t)plan->skip >= argc - 2)
		leave();
	skip = (int)plan->skip + 2;
	home = plan->modes & PLAN_DIRECT ? open_netns() : -1;
	if ((plan->modes & PLAN_DIRECT && home < 0) || (plan->modes & PLAN_ACCEL && !find_shim()))
		leave();
	if (!find(argv[skip], file) || unshare(CLONE_NEWNET | CLONE_NEWNS) || !loopback_up() || !remount_sys())
		leave();
	fds[0] = install(plan);
	fds[1] = plan->modes & PLAN_DIRECT ? open_netns() : -1;
	if (fds[0] < 0)
		leave();
	failed = 0;
	if (!give(sock, plan->bytes + plan->filter, size - sizeof(*plan) - plan->filter, fds, fds[1] < 0 ? 1 : 2))
		failed = EPIPE;
	if (!failed)
		failed = take(sock, reply);
	if (failed || !is_good(reply))
		tell(failed == ETIMEDOUT ? "late" : failed ? "gone" : reply);
	if (strstr(reply, "\"names\": true"))
		hide();
	close(sock);
	close(fds[0]);
	if (plan->modes & PLAN_DIRECT)
		live(fds[1], reply);
	become(file, argv + skip, argc - skip);
}
