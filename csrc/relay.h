/* SPDX-License-Identifier: Apache-2.0 */
/*
 * relay.h - the two parts of graft-relay: relay.c copies, relay_cage.c takes its rights away
 */
#ifndef RELAY_H
#define RELAY_H

#include <sys/types.h>

void leave_graftd(const char *name, const char *cgroup);
int drop_privileges(uid_t uid);
int filter_calls(void);

#endif
