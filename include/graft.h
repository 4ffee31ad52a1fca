/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graft.h - AF_GRAFT's socket interface, for programs written to it
 *
 * The names, numbers and structures are those of the AF_GRAFT kernel module's header, so that a program
 * compiled against either runs with the other. Under 'graft' (graft(1)) it works on a stock kernel; without it
 * socket(AF_GRAFT, ...) fails with EAFNOSUPPORT.
 */
#ifndef _GRAFT_H_
#define _GRAFT_H_

#include <sys/socket.h>

#define AF_GRAFT 4 /* the number of AF_IPX, which Linux no longer has */
#define PF_GRAFT AF_GRAFT

/* The name of an endpoint: up to 15 bytes and a NUL. */
#define AF_GRAFT_EPNAME_MAX 16

struct sockaddr_gr {
	sa_family_t sgr_family; /* AF_GRAFT */
	char sgr_epname[AF_GRAFT_EPNAME_MAX];
};

/* The level of the options below, for setsockopt() and getsockopt(). */
#define IPPROTO_GRAFT 254

/*
 * int, default 0: while it is 1, setsockopt() of other levels than IPPROTO_GRAFT and SOL_SOCKET, and
 * GRAFT_SO_TRANSPARENT, wait for bind() or GRAFT_SO_DELAYED_EXECUTE, and return 0. At most 64 can wait, the
 * next is ENOBUFS. While it is 0, such options are EADDRNOTAVAIL before bind().
 */
#define GRAFT_SO_DELAYED 1

/* Set only, no value: carry out what waits, also before bind(). It always succeeds; see the results. */
#define GRAFT_SO_DELAYED_EXECUTE 2

/*
 * Get only: an array of struct graft_sso_result, one for each option that has been carried out, in order; its
 * size in bytes is in *optlen. A result is given once. If the room is too small, ENOBUFS, and the rest can be
 * had with another call.
 */
#define GRAFT_SO_DELAYED_RESULT 3

struct graft_sso_result {
	int level;
	int optname;
	int ret; /* 0, or the negative errno */
} __attribute__((__packed__));

/* Set only: an option of any level, in particular SOL_SOCKET, for the host socket. It waits like the others. */
#define GRAFT_SO_TRANSPARENT 4

struct graft_sso_trans {
	int level;
	int optname;
	unsigned int optlen;
	char optval[];
} __attribute__((__packed__));

#define GRAFT_SSO_TRANS_SIZE 128 /* at most, with optval */

/*
 * int, default 0: getsockname() returns the endpoint, a struct sockaddr_gr (family 0 before bind()); with 1,
 * the address of the host socket.
 */
#define GRAFT_NAME_TRANSPARENT 5

#endif
