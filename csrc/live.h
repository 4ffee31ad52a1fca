/* SPDX-License-Identifier: GPL-2.0 */
/* How the process of `graft run --direct` comes to live in the host's netns: for graft-front, and for Python. */
#ifndef GRAFT_LIVE_H
#define GRAFT_LIVE_H

#define LIVE_NO_POLICY (-1)  /* it does not hold in this process's cgroup */
#define LIVE_NO_CGROUP2 (-2) /* is mounted here */

/*
 * Go to the netns @home, the host's; @netns is the container's. Both descriptors are closed. @procfs is the symbolic
 * link that graftd keeps for /proc/net. Returns 0, LIVE_*, or an errno.
 */
int live_in_host(int home, int netns, const char *procfs);

#endif
