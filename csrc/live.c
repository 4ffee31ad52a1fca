// SPDX-License-Identifier: GPL-2.0
/*
 * live.c - what the process of a container does to what it sees, before it becomes the command
 *
 * The process of `graft run --direct` comes to live in the host's netns, with its own things around it. It has been
 * in the container's netns, has its sysfs mounted, has its filter, and graftd has put it into its cgroup. What is
 * done comes in this order:
 *
 * 1. It asks whether the policy holds: SO_NETNS_COOKIE of a socket that it makes in the host's netns is answered by
 *    the policy, with the cookie of the container's. Anything else is the end.
 * 2. The container's cgroup is mounted over cgroup2, and is the root of a new cgroup namespace. So no path leads to
 *    another cgroup, which root without any capability could enter (clone3(2) with CLONE_INTO_CGROUP asks no mount
 *    whether it is read-only).
 * 3. /proc/sys/net, which shows who looks the host's, becomes read-only. Devices of RDMA are hidden.
 * 4. /proc/net leads to that of the container's netns. /proc/PID/net still shows the host's (docs/security.md).
 *
 * graft-front has it linked in; graft-live.so is for the program in Python.
 *
 * Sources: cgroup_namespaces(7), mount_setattr(2), move_mount(2), proc(5), proc_pid_mountinfo(5).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "live.h"

#define EXPORT __attribute__((visibility("default")))
#define RDMA "/dev/infiniband"
#define PLACES_STEP 64

/* Places where a kind of file system is mounted, and not covered by others. They stay: this process becomes another.
 */
struct places {
	char root[PATH_MAX]; /* the first of them that shows the root of its file system; "" if none does */
	char **at;
	int count;
};

/* Is what one finds at @path of this device, as mountinfo names it? Otherwise another mount covers it. */
static bool is_on(const char *path, const char *device)
{
	unsigned int high, low;
	struct stat found;

	return sscanf(device, "%u:%u", &high, &low) == 2 && !stat(path, &found) && found.st_dev == makedev(high, low);
}

/* Undo what the kernel does to a path in mountinfo: \040 stands for a space. */
static void decode(char *path)
{
	char *to = path;

	for (const char *from = path; *from; from++) {
		if (from[0] == '\\' && from[1] >= '0' && from[1] <= '3' && strnlen(from, 4) == 4) {
			*to++ = (char)((from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0'));
			from += 3;
		} else {
			*to++ = *from;
		}
	}
	*to = 0;
}

static bool is_known(const struct places *found, const char *place)
{
	for (int i = 0; i < found->count; i++)
		if (!strcmp(found->at[i], place))
			return true;
	return false;
}

static bool add_place(struct places *found, const char *place)
{
	char *copy = strdup(place), **more = found->at;

	if (found->count % PLACES_STEP == 0)
		more = reallocarray(more, (size_t)found->count + PLACES_STEP, sizeof(*more));
	if (!copy || !more)
		return false;
	found->at = more;
	found->at[found->count++] = copy;
	return true;
}

/* Look where file systems of this kind are mounted. Returns 0 or an errno. */
static int find_mounts(const char *kind, struct places *found)
{
	FILE *mounts = fopen("/proc/self/mountinfo", "re");
	char *line = NULL, *device, *root, *place, *after, *rest;
	size_t room = 0;
	int error = 0;

	if (!mounts)
		return errno;
	memset(found, 0, sizeof(*found));
	while (!error && getline(&line, &room, mounts) > 0) {
		after = strstr(line, " - ");
		strtok_r(line, " ", &rest); /* its id and its parent's */
		strtok_r(NULL, " ", &rest);
		device = strtok_r(NULL, " ", &rest);
		root = strtok_r(NULL, " ", &rest);
		place = strtok_r(NULL, " ", &rest);
		if (!after || !place || strncmp(after + 3, kind, strlen(kind)) || after[3 + strlen(kind)] != ' ')
			continue;
		decode(place);
		if (!is_on(place, device) || is_known(found, place))
			continue;
		if (!*found->root && !strcmp(root, "/"))
			snprintf(found->root, sizeof(found->root), "%s", place);
		if (!add_place(found, place))
			error = ENOMEM;
	}
	free(line);
	fclose(mounts);
	return error;
}

/* The cookie of the netns that sockets of this process belong to. Returns 0 or an errno. */
static int get_cookie(uint64_t *cookie)
{
	int sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), error = 0;
	socklen_t size = sizeof(*cookie);

	if (sock < 0)
		return errno;
	if (getsockopt(sock, SOL_SOCKET, SO_NETNS_COOKIE, cookie, &size))
		error = errno;
	close(sock);
	return error;
}

/* The path of this process's cgroup below the root of cgroup2. Returns 0 or an errno. */
static int get_cgroup(char *path, size_t room)
{
	FILE *file = fopen("/proc/self/cgroup", "re");
	char *line = NULL;
	size_t size = 0;
	int error = ENOENT;

	if (!file)
		return errno;
	while (error && getline(&line, &size, file) > 0) {
		line[strcspn(line, "\n")] = 0;
		if (!strncmp(line, "0::", 3))
			error = snprintf(path, room, "%s", line + 3) < (int)room ? 0 : ENAMETOOLONG;
	}
	free(line);
	fclose(file);
	return error;
}

/* Put this process's cgroup over each mount of cgroup2, and make it the root of a cgroup namespace. Returns as
 * live_in_host().
 */
static int hide_cgroups(void)
{
	char cgroup[PATH_MAX], path[2 * PATH_MAX];
	struct places places;
	int error, own;

	error = find_mounts("cgroup2", &places);
	if (!error)
		error = get_cgroup(cgroup, sizeof(cgroup));
	if (!error && !*places.root)
		error = LIVE_NO_CGROUP2;
	if (error)
		return error;
	snprintf(path, sizeof(path), "%s%s", places.root, cgroup);
	own = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (own < 0)
		return errno;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", own);
	for (int i = 0; i < places.count; i++)
		if (mount(path, places.at[i], NULL, MS_BIND, NULL))
			return errno;
	close(own);
	return unshare(CLONE_NEWCGROUP) ? errno : 0;
}

/* Make the sysctls of the network read-only, in each procfs: they are those of whoever looks, the host's. */
static int protect_sysctls(void)
{
	char path[PATH_MAX + 16];
	struct places places;
	int error = find_mounts("proc", &places);

	for (int i = 0; !error && i < places.count; i++) {
		snprintf(path, sizeof(path), "%s/sys/net", places.at[i]);
		if (access(path, F_OK))
			continue;
		if (mount(path, path, NULL, MS_BIND, NULL) ||
		    mount(path, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
			error = errno;
	}
	return error;
}

/* Put an empty directory over the devices of RDMA: connections are made in the netns of whoever opens one. */
static int hide_rdma(void)
{
	struct stat found;

	if (stat(RDMA, &found) || !S_ISDIR(found.st_mode))
		return 0;
	return mount("none", RDMA, "tmpfs", MS_RDONLY, NULL) ? errno : 0;
}

/* Put the symbolic link @procfs over /proc/net, which is one as well: mount(2) would follow either. */
static int mount_link(const char *procfs)
{
	unsigned int flags = OPEN_TREE_CLONE | AT_SYMLINK_NOFOLLOW | OPEN_TREE_CLOEXEC;
	int tree = (int)syscall(SYS_open_tree, AT_FDCWD, procfs, flags), there, error = 0;

	if (tree < 0)
		return errno;
	there = open("/proc/net", O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (there < 0 ||
	    syscall(SYS_move_mount, tree, "", there, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH))
		error = errno;
	close(there);
	close(tree);
	return error;
}

EXPORT int live_in_host(int home, int netns, const char *procfs)
{
	uint64_t own, there;
	int error = get_cookie(&own);

	if (!error && setns(home, CLONE_NEWNET))
		error = errno;
	if (!error)
		error = get_cookie(&there);
	if (!error && there != own)
		error = LIVE_NO_POLICY;
	if (!error &&
	    mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) /* what the host mounts later stays there */
		error = errno;
	if (!error)
		error = hide_cgroups();
	if (!error)
		error = protect_sysctls();
	if (!error)
		error = hide_rdma();
	if (!error)
		error = mount_link(procfs);
	close(home);
	close(netns);
	return error;
}

/* Of nscd, of systemd-resolved (nss-resolve), of Avahi (nss-mdns). */
static const char *const name_services[] = {
	"/run/nscd/socket",
	"/run/systemd/resolve/io.systemd.Resolve",
	"/run/avahi-daemon/socket",
};

EXPORT int hide_name_services(bool as_user, const char **which)
{
	for (size_t i = 0; i < sizeof(name_services) / sizeof(*name_services); i++) {
		*which = name_services[i];
		if (mount("/dev/null", *which, NULL, MS_BIND, NULL) && errno != ENOENT && errno != ENOTDIR &&
		    !(as_user && errno == EACCES))
			return errno;
	}
	return 0;
}
