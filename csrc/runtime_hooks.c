// SPDX-License-Identifier: GPL-2.0
/*
 * runtime_hooks.c - graft-runtime as OCI hooks of direct containers (runtime-spec, "POSIX-platform Hooks")
 *
 * graft-begin, of the stage prestart, in the runtime's namespaces: graftd puts the first process's cgroup under the
 * policy. graft-network, of the stage createContainer, in the container's namespaces before it has its root: /sys and
 * /proc/net, which would show the host's network, show the container's.
 *
 * A procfs shows the network of a process. No process of a direct container is in the container's netns, so
 * graft-begin leaves one there, the holder, which waits for the end of the first process. /proc/net is a symbolic
 * link, over which no directory can be mounted. So the holder's /proc/PID/net is mounted in the container's /dev,
 * which the runtime has made, and another link over that one leads there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime.h"

#define MOUNTS_MAX 256
#define PLACE "/dev/.graft-net" /* in the container: where /proc/net leads */

/* ---- the holder ---- */

/* Wait for the end of the process @pidfd, in the netns @netns, with nothing else. @ready: told when it is there. */
static void __attribute__((noreturn)) hold_netns(int pidfd, int netns, int ready)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {0};
	struct pollfd end = {.fd = 0, .events = POLLIN};

	if (setns(netns, CLONE_NEWNET) || dup2(pidfd, 0) < 0 || dup2(ready, 1) < 0)
		_exit(1);
	setsid();
	if (chdir("/") || syscall(SYS_close_range, 2u, ~0u, 0u) || prctl(PR_SET_NAME, "graft-hold") ||
	    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_capset, &header, none) ||
	    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || /* its root and memory are nobody's, as those of graft-sup */
	    write(1, "", 1) != 1)
		_exit(1);
	close(1);
	while (poll(&end, 1, -1) < 0 && errno == EINTR)
		;
	_exit(0);
}

/* Leave a holder in @netns until the process @first ends, and write its PID to @place. */
static void start_holder(const char *place, int netns, pid_t first)
{
	int pidfd = (int)syscall(SYS_pidfd_open, first, 0), ends[2];
	FILE *file;
	pid_t child;
	char told;

	if (pidfd < 0 || pipe2(ends, O_CLOEXEC))
		fail("the container's first process is not there", strerror(errno));
	child = fork();
	if (!child)
		hold_netns(pidfd, netns, ends[1]);
	close(ends[1]);
	if (child < 0 || read(ends[0], &told, 1) != 1)
		fail("nobody can hold the container's network", strerror(errno));
	close(ends[0]);
	close(pidfd);
	file = fopen(place, "we");
	if (!file || fprintf(file, "%d\n", (int)child) < 0 || fclose(file))
		fail(strerror(errno), place);
}

/* ---- graft-begin ---- */

/*
 * The stage prestart of a direct container: its first process waits in its cgroup, for which graftd has the policy.
 * @argv: Docker's hook with its words, if there is one. That looks for the container's network at the PID in the
 * state, so it is told this process's, which enters that network.
 */
int begin_direct(char **argv)
{
	const char *metadata = getenv("GRAFT_METADATA"), *holder = getenv("GRAFT_HOLDER");
	char *state = read_line(stdin), *request = NULL, *reply, *at, *end, netns[4096];
	int status = 1, fd, ends[2];
	size_t size = 0;
	FILE *text;
	pid_t child;

	at = strstr(state, "\"pid\":");
	if (!metadata || !holder || !at)
		fail("this is a hook that graftd has put into a config.json", "");
	text = open_memstream(&request, &size);
	fprintf(text, "{\"op\":\"begin\",\"version\":\"" VERSION "\",\"metadata\":");
	put_string(text, metadata);
	fprintf(text, ",\"state\":%s}\n", state);
	fclose(text);
	reply = ask(request, size);
	get_string(reply, "\"netns\": \"", netns, sizeof(netns));
	fd = open(netns, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		fail(strerror(errno), netns);
	start_holder(holder, fd, (pid_t)strtol(at + strlen("\"pid\":"), &end, 10));
	if (!*argv)
		return 0;
	if (setns(fd, CLONE_NEWNET) || pipe2(ends, O_CLOEXEC))
		fail(strerror(errno), netns);
	unsetenv("GRAFT_METADATA");
	unsetenv("GRAFT_HOLDER");
	child = fork();
	if (child < 0)
		fail(strerror(errno), *argv);
	if (!child) {
		dup2(ends[0], STDIN_FILENO);
		execv(argv[0], argv + 1);
		fail(strerror(errno), argv[0]);
	}
	close(ends[0]);
	signal(SIGPIPE, SIG_IGN);
	at += strlen("\"pid\":");
	dprintf(ends[1], "%.*s%d%s", (int)(at - state), state, (int)getpid(), end);
	close(ends[1]);
	if (waitpid(child, &status, 0) != child || !WIFEXITED(status))
		return 1;
	return WEXITSTATUS(status);
}

/* ---- graft-network ---- */

/* The path of a mount in a line of mountinfo (proc(5)), in which a blank is \040; NULL if there is none. */
static char *mount_place(char *line)
{
	char *at = line, *to;

	for (int i = 0; at && i < 4; i++) {
		at = strchr(at, ' ');
		at = at ? at + 1 : NULL;
	}
	if (!at)
		return NULL;
	at[strcspn(at, " ")] = 0;
	line = to = at;
	for (; *at; at++) {
		if (*at == '\\' && strnlen(at, 4) == 4) {
			*to++ = (char)((at[1] - '0') << 6 | (at[2] - '0') << 3 | (at[3] - '0'));
			at += 3;
		} else {
			*to++ = *at;
		}
	}
	*to = 0;
	return line;
}

/* Copies of the mounts below @place, with what is below them, and their paths; how many. */
static int copy_mounts(const char *place, int *trees, char **places)
{
	FILE *from = fopen("/proc/self/mountinfo", "re");
	size_t room = 0, length = strlen(place);
	char *line = NULL, *at;
	int count = 0, i;

	while (from && count < MOUNTS_MAX && getline(&line, &room, from) > 0) {
		at = mount_place(line);
		if (!at || strncmp(at, place, length) || at[length] != '/')
			continue;
		for (i = 0; i < count; i++)
			if (!strncmp(at, places[i], strlen(places[i])) && strchr("/", at[strlen(places[i])]))
				break;
		if (i < count)
			continue; /* it comes with the one above it, or is another at the same place */
		trees[count] =
			(int)syscall(SYS_open_tree, AT_FDCWD, at, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
		if (trees[count] < 0)
			fail(strerror(errno), at);
		places[count++] = strdup(at);
	}
	free(line);
	if (!from || count == MOUNTS_MAX)
		fail("the mounts below /sys are not known", "");
	fclose(from);
	return count;
}

/* Open @name below the container's @root; -1: there is nothing, or it is not of the file system @kind. */
static int open_below(const char *root, const char *name, unsigned int kind)
{
	struct statfs there;
	struct stat found;
	char place[PATH_MAX];
	int at;

	if (snprintf(place, sizeof(place), "%s/%s", root, name) >= (int)sizeof(place))
		fail("the path of the container's root is too long", root);
	at = open(place, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (at < 0 && errno == ENOENT)
		return -1;
	if (at < 0 || fstat(at, &found) || !S_ISDIR(found.st_mode) || fstatfs(at, &there))
		fail("it is no directory in the container", name); /* an image's link may lead out of its root */
	if ((unsigned int)there.f_type == kind)
		return at;
	close(at);
	return -1;
}

/* Put the mount @tree over what @at is, a directory or a link. */
static void mount_over(int tree, int at, const char *what)
{
	if (syscall(SYS_move_mount, tree, "", at, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH))
		fail(what, strerror(errno));
	close(tree);
	close(at);
}

/* A sysfs of this process's netns goes in the place of the runtime's, with the mounts that are below it. */
static void show_sysfs(const char *root)
{
	int count, tree, context, at = open_below(root, "sys", SYSFS_MAGIC), trees[MOUNTS_MAX];
	char place[PATH_MAX], *places[MOUNTS_MAX];

	if (at < 0)
		return;
	snprintf(place, sizeof(place), "%s/sys", root);
	context = (int)syscall(SYS_fsopen, "sysfs", FSOPEN_CLOEXEC);
	if (context < 0 || syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0))
		fail("sysfs", strerror(errno));
	tree = (int)syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC,
			    MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	if (tree < 0)
		fail("sysfs", strerror(errno));
	count = copy_mounts(place, trees, places);
	mount_over(tree, at, "sysfs");
	for (int i = 0; i < count; i++)
		if (syscall(SYS_move_mount, trees[i], "", AT_FDCWD, places[i], MOVE_MOUNT_F_EMPTY_PATH) &&
		    errno != ENOENT)
			fail(strerror(errno), places[i]);
}

/* The PID of the holder, whose netns has the inode @inode. */
static int find_holder(const char *place, unsigned long long inode)
{
	FILE *file = place ? fopen(place, "re") : NULL;
	char netns[64];
	struct stat found;
	int pid = 0;

	if (!file || fscanf(file, "%d", &pid) != 1)
		fail("nobody holds the container's network", "this is a hook that graftd has put into a config.json");
	fclose(file);
	snprintf(netns, sizeof(netns), "/proc/%d/ns/net", pid);
	if (stat(netns, &found) || found.st_ino != inode)
		fail("nobody holds the container's network any more", strerror(errno));
	return pid;
}

/* /proc/net leads to that of the process @holder. A container whose /dev is not the runtime's keeps the host's. */
static void show_proc_net(const char *root, int holder)
{
	int proc = open_below(root, "proc", PROC_SUPER_MAGIC), dev = open_below(root, "dev", TMPFS_MAGIC), net, link;
	struct mount_attr read_only = {.attr_set = MOUNT_ATTR_RDONLY};
	const char *name = strrchr(PLACE, '/') + 1, *made = ".graft-link";
	char source[64];

	if (proc < 0 || dev < 0)
		return;
	snprintf(source, sizeof(source), "/proc/%d/net", holder);
	net = (int)syscall(SYS_open_tree, AT_FDCWD, source, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	if (net < 0 || syscall(SYS_mount_setattr, net, "", AT_EMPTY_PATH, &read_only, sizeof(read_only)) ||
	    mkdirat(dev, name, 0555) || symlinkat(PLACE, dev, made))
		fail("the container's /proc/net", strerror(errno));
	link = (int)syscall(SYS_open_tree, dev, made, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_SYMLINK_NOFOLLOW);
	if (link < 0)
		fail("the container's /proc/net", strerror(errno));
	mount_over(net, openat(dev, name, O_PATH | O_NOFOLLOW | O_CLOEXEC), PLACE);
	mount_over(link, openat(proc, "net", O_PATH | O_NOFOLLOW | O_CLOEXEC), "/proc/net");
	unlinkat(dev, made, 0);
	close(proc);
	close(dev);
}

int show_network(void)
{
	const char *netns = getenv("GRAFT_NETNS"), *inode = getenv("GRAFT_NETNS_INODE"),
		   *root = getenv("GRAFT_ROOTFS");
	char *root_path = root ? realpath(root, NULL) : NULL;
	int fd = netns ? open(netns, O_RDONLY | O_CLOEXEC) : -1;
	unsigned long long number;
	struct stat found;

	free(read_line(stdin)); /* crun fails where nobody reads the state */
	if (fd < 0 || !root_path || !inode || fstat(fd, &found))
		fail("the container's network or root is not found", strerror(errno));
	number = strtoull(inode, NULL, 10);
	if (found.st_ino != number || setns(fd, CLONE_NEWNET))
		fail("the container's network is not entered", netns);
	show_sysfs(root_path);
	show_proc_net(root_path, find_holder(getenv("GRAFT_HOLDER"), number));
	return 0;
}
