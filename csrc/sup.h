/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sup.h - what graft-sup shares with graftd (graft/trap/journal.py) and with the preload library
 *
 * graftd makes a memfd of one sup_shared for each listener. It outlives both: whoever of the two dies, the other
 * finds there which calls were received and not answered. tests/unit/test_layout.py compares every size, offset
 * and constant with graft/trap/journal.py.
 */
#ifndef GRAFT_SUP_H
#define GRAFT_SUP_H

#include <linux/seccomp.h>
#include <linux/types.h>

#define SUP_ABI 2
#define SUP_SLOTS 64

enum sup_flags {
	SUP_FORWARD = 1, /* every call is graftd's to decide: socket() depends on who calls */
};

enum sup_state {
	SLOT_FREE,
	SLOT_HELD,	/* graft-sup receives into it, or decides what it has received */
	SLOT_FORWARDED, /* graftd answers, and frees it */
};

/* As graft/trap/journal.py has its own: the first 16 bytes, then the notification. */
struct sup_slot {
	__u32 state;
	__s32 answer; /* graftd's: what the call returns after an injection */
	__u64 inode;  /* of the socket that the target is about to get, 0: none */
	struct seccomp_notif call;
	__u8 pad[32];
};

struct sup_shared {
	__u32 abi;
	__u32 tenant; /* of the stamp */
	__u32 owner;  /* the uid that the sockets belong to */
	__u32 flags6; /* of the stamp of an IPv6 socket */
	__u64 netns;  /* inode of the container's; from any other, socket() proceeds */
	__u32 flags;
	__u32 pad;
	__u64 calls;	/* answered by graft-sup, */
	__u64 ns;	/* and the time that took */
	__u32 number;	/* of the listener, */
	__u32 trusted;	/* did root hand it over? */
	__u8 token[32]; /* by which graftd knows its own memory again */
	__u8 rest[40];
	struct sup_slot slots[SUP_SLOTS];
};

/*
 * The preload library's channel: socket(AF_GRAFT, SOCK_STREAM, SUP_CHANNEL + kind) returns one end of an
 * AF_UNIX SOCK_SEQPACKET pair. Each byte written to it asks for one message of that many sockets, at most
 * SUP_BATCH; the message's text is their inodes, 8 bytes each, its control message the descriptors.
 */
#define SUP_CHANNEL 0x67720000
#define SUP_KIND_INET6 1
#define SUP_KIND_DGRAM 2
#define SUP_KINDS 4
#define SUP_BATCH 64

#endif
