/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graft.h - AF_GRAFT's socket interface, for programs written to it
 *
 * The names, numbers and structures are those of the AF_GRAFT kernel module's header, so that a program compiled with
 * either header runs with the other. A program that graft has started (graft(1)) gets the family on a stock kernel.
 * For any other program socket(AF_GRAFT, ...) fails with EAFNOSUPPORT.
 *
 * What the module's header includes is here, too, but for its netlink interface (AF_GRAFT_GENL_NAME): endpoints are
 * ip-graft(8)'s.
 */
#ifndef _GRAFT_H_
#define _GRAFT_H_

#include <sys/socket.h>
#include <linux/socket.h>

/*
 * For IFNAMSIZ and struct sockaddr_un there are a header of the library's and one of the kernel's. This is the
 * library's, unless the program has included the kernel's before; the kernel's may follow.
 */
#ifndef _LINUX_IF_H
#include <net/if.h>
#endif
#ifndef IFNAMSIZ
#define IFNAMSIZ IF_NAMESIZE
#endif
#ifndef _LINUX_UN_H
#include <sys/un.h>
#define _LINUX_UN_H
#define UNIX_PATH_MAX 108
#endif

#define GRAFT_VERSION "0.1.0"

#define AF_GRAFT 4 /* the number of AF_IPX, which Linux no longer has */
#define PF_GRAFT AF_GRAFT

/* The size of an endpoint's name: up to 15 bytes and a NUL. */
#define AF_GRAFT_EPNAME_MAX IFNAMSIZ

struct sockaddr_gr {
	sa_family_t sgr_family; /* AF_GRAFT */
	char sgr_epname[AF_GRAFT_EPNAME_MAX];
};

/* The level of the options below, for setsockopt() and getsockopt(). */
#define IPPROTO_GRAFT 254

/*
 * An int, by default 0. While it is 1, setsockopt() with a level other than IPPROTO_GRAFT and SOL_SOCKET returns 0,
 * and the option waits for bind() or GRAFT_SO_DELAYED_EXECUTE; so does GRAFT_SO_TRANSPARENT. At most 64 options can
 * wait; the next one fails with ENOBUFS. While it is 0, such options fail with EADDRNOTAVAIL before bind().
 */
#define GRAFT_SO_DELAYED 1

/*
 * To be set, without a value: the options that wait are carried out now, also before bind(). The call always
 * succeeds; GRAFT_SO_DELAYED_RESULT gives the options' results.
 */
#define GRAFT_SO_DELAYED_EXECUTE 2

/*
 * To be got: an array of struct graft_sso_result, one for each option that has been carried out, in their order. Its
 * size in bytes is put into *optlen. Each result is given once. If there is not enough room the call fills what there
 * is and fails with ENOBUFS; another call gives the rest.
 */
#define GRAFT_SO_DELAYED_RESULT 3

struct graft_sso_result {
	int level;
	int optname;
	int ret; /* 0, or the negative errno */
} __attribute__((__packed__));

/* To be set: an option of any level, in particular SOL_SOCKET, for the host socket. It waits like the others. */
#define GRAFT_SO_TRANSPARENT 4

struct graft_sso_trans {
	int level;
	int optname;
	unsigned int optlen;
	char optval[];
} __attribute__((__packed__));

#define GRAFT_SSO_TRANS_SIZE 128 /* at most, with optval */

/*
 * An int, by default 0: getsockname() returns the endpoint as a struct sockaddr_gr, whose family is 0 before bind().
 * With 1 it returns the address of the host socket.
 */
#define GRAFT_NAME_TRANSPARENT 5

#endif
