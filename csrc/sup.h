/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sup.h - what graft-sup shares with graftd (graft/trap/journal.py) and with the preload library
 *
 * graftd makes a memfd of one sup_shared for each listener, the journal. It outlives both: if one dies, the other
 * finds there which calls were received and not answered. tests/unit/kernel/test_layout.py reads this header and
 * compares every structure and constant with graft/trap/journal.py.
 */
#ifndef GRAFT_SUP_H
#define GRAFT_SUP_H

#include <linux/seccomp.h>
#include <linux/types.h>

#define SUP_ABI 2
#define SUP_SLOTS 64
#define SUP_SPENT 9
#define SUP_SPENT_FIRST 10000 /* ns */
#define SUP_BESIDE 4	      /* listeners that a graft-sup keeps beside its own */

enum sup_flags {
	SUP_FORWARD = 1, /* graftd decides socket() as well: what it gives depends on who calls. But see `home` */
	SUP_IDLE = 2, /* no call has come yet, nor is one expected: no graft-sup receives. graftd alone looks at it */
	SUP_BIND = 4, /* of a direct container: a bind() needs no other socket, and is prepared by graft-sup */
};

/*
 * The states of a slot. A slot has one owner at a time, who alone writes to it; it changes the owner by its state,
 * which is written after everything else in the slot.
 *
 * | from      | to        | who                  | when                                                          |
 * | --------- | --------- | -------------------- | ------------------------------------------------------------- |
 * | FREE      | HELD      | graft-sup, by an     | before it waits for a call in RECV: each thread holds one     |
 * |           |           | atomic exchange      | slot, also while it is parked                                 |
 * | HELD      | FREE      | graft-sup            | the call is answered, or RECV brought none (its target died)  |
 * | HELD      | FORWARDED | graft-sup            | the call is graftd's to decide; a message with the slot's     |
 * |           |           |                      | number follows, which may be lost                             |
 * | FREE      | FORWARDED | graftd's loop, while | before it waits for a call in RECV                            |
 * |           |           | no graft-sup lives   |                                                               |
 * | FORWARDED | FREE      | graftd, any thread   | the call is answered, or RECV brought none                    |
 * | HELD      | FORWARDED | graftd's loop, once  | it answers what a dead graft-sup had                          |
 * |           |           | graft-sup is dead    |                                                               |
 *
 * What a killed owner leaves is for graftd, or for its successor. It looks through all slots when it starts, when a
 * graft-sup has died, and when a graft-sup brings it a journal. It leaves alone the HELD slots of a graft-sup that
 * lives, and the slots that a thread of its own is busy with (Watched.claimed).
 *
 * | call.id | inode | what happened                               | what graftd does                             |
 * | ------- | ----- | ------------------------------------------- | -------------------------------------------- |
 * | 0       | any   | the owner waited in RECV, or was releasing  | it frees the slot                            |
 * | set     | 0     | the call was not decided, or has its answer | it decides the call; a second answer is      |
 * |         |       |                                             | ENOENT, which is no error                    |
 * | set     | set   | a descriptor was about to be added          | if the target has a socket of this inode, it |
 * |         |       |                                             | answers the call, else it decides the call   |
 *
 * Where the target has the socket, a call that was HELD returns the descriptor's number. One that was FORWARDED
 * returns what `answer` says: -1 the number, -2 the call proceeds in the target, else an errno, 0 for success.
 */
enum sup_state {
	SLOT_FREE,
	SLOT_HELD,	/* graft-sup's */
	SLOT_FORWARDED, /* graftd's */
};

struct sup_slot {
	__u32 state;
	__s32 answer; /* graftd alone writes it: what the call returns after an injection */
	__u64 inode;  /* of the socket that the target is about to get, 0: of none */
	struct seccomp_notif call;
	__u8 pad[32];
};

struct sup_shared {
	__u32 abi;
	__u32 tenant;	 /* for the stamp of a socket */
	__u32 reuse_uid; /* the uid that sockets belong to: SO_REUSEPORT works among those of one uid */
	__u32 home;	 /* inode of the netns in which the programs of a direct container live; 0: it is none */
	__u64 netns;	 /* inode of the container's netns; in any other, socket() proceeds in the caller */
	__u32 flags;
	__u32 maker;	/* the user that a firewall sees as their maker (f_cred); 0: reuse_uid */
	__u64 calls;	/* how many calls graft-sup has answered, */
	__u64 ns;	/* and how long that took */
	__u32 number;	/* of the listener, */
	__u32 trusted;	/* which root has handed over */
	__u8 token[32]; /* by which graftd recognises memory that a graftd has written */
	__u32 maker_gid;
	__u32 spent[SUP_SPENT]; /* how many calls took less than SUP_SPENT_FIRST << n ns; the last: all others */
	struct sup_slot slots[SUP_SLOTS];
};

/*
 * The preload library's channel: socket(AF_GRAFT, SOCK_STREAM, SUP_CHANNEL + kind) returns one end of a pair of
 * AF_UNIX sockets, SOCK_SEQPACKET. Each byte that is written to it asks for one message of that many sockets, at most
 * SUP_BATCH. The message has their inodes, 8 bytes each, and the descriptors in a control message.
 */
#define AF_GRAFT 4 /* as in include/graft.h */
#define SUP_CHANNEL 0x67720000
#define SUP_KIND_INET6 1
#define SUP_KIND_DGRAM 2
#define SUP_KINDS 4
#define SUP_BATCH 64

#endif
