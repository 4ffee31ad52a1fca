/* SPDX-License-Identifier: GPL-2.0 */
/* What the process of a container does to what it sees: for graft-front, and for the program in Python. */
#ifndef GRAFT_LIVE_H
#define GRAFT_LIVE_H

#include <stdbool.h>

#define LIVE_NO_POLICY (-1)  /* it does not hold in this process's cgroup */
#define LIVE_NO_CGROUP2 (-2) /* is mounted here */

/*
 * Go to the netns @home, the host's; @netns is the container's. Both descriptors are closed. @procfs is the symbolic
 * link that graftd keeps for /proc/net. Returns 0, LIVE_*, or an errno.
 */
int live_in_host(int home, int netns, const char *procfs);

/*
 * Put /dev/null over the sockets of the host's name services, at which nobody listens then: the C library asks the
 * nameserver. @as_user: what this user may not look at need not be hidden. Returns 0, or an errno with @which of
 * them.
 */
int hide_name_services(bool as_user, const char **which);

#endif
