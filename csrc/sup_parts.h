/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sup_parts.h - what the parts of graft-sup share: sup.c (threads, and life without graftd), sup_calls.c, sup_bind.c,
 * sup_sockets.c
 */
#ifndef SUP_PARTS_H
#define SUP_PARTS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/epoll.h>

#include "abi.h"
#include "sup.h"

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif
#ifndef IPV6_FREEBIND
#define IPV6_FREEBIND 78
#endif

/* A socket that is ready to be given away. */
struct made {
	int fd;
	__u64 inode;
};

extern struct sup_shared *shared; /* the journal */
extern int listener, stamps, control, events;
extern bool has_unix_sockets; /* it makes those of a direct container, in whose netns it lives */

/* sup.c: this thread is about to answer its call; what it does after that keeps nobody waiting */
void call_served(void);

/* sup_sockets.c */
int map_call(int command, int map, int fd, void *value, __u64 flags); /* bpf(2), for a socket's storage */
bool add_option(const char *word);
void set_port_ranges(unsigned int low, unsigned int high);
int limit_ports(int fd, bool udp);
int take_socket(int kind, struct made *result);
void refill_pool(int kind);
bool send_fds(int sock, const void *text, size_t length, const int *fds, int count);
int open_channel(int kind, struct made *theirs);
void on_channel(const struct epoll_event *event);

/* sup_bind.c */
bool take_bind(const char *word);
bool prepares_binds(void);
bool prepare_bind(const struct seccomp_notif *call); /* may it proceed? if not, it is graftd's to decide */

/* sup_calls.c */
bool makes_unix_sockets(void);
struct sup_slot *hold_slot(void);
void release_slot(struct sup_slot *slot);
void handle_call(struct sup_slot *slot);

#endif
