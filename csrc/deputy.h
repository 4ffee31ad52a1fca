/* SPDX-License-Identifier: Apache-2.0 */
/* deputy.h - what graftd and graft-deputy say to each other (graft/trap/deputy.py); one message each way */
#ifndef DEPUTY_H
#define DEPUTY_H

#include <linux/types.h>

#define DEPUTY_ID 0x6fffffff /* a uid and a gid of nobody's: below those of tenants' sockets */
#define DEPUTY_DATA 65507    /* the greatest datagram */
#define DEPUTY_PATH 108	     /* sizeof(sun_path) */

enum deputy_call {
	DEPUTY_CONNECT = 1, /* connect(2) to @path */
	DEPUTY_SENDTO = 2,  /* sendto(2) of the data to @path, with @flags */
};

/* What to do, as whom. @data_length bytes of data follow. */
struct deputy_order {
	__u32 uid;
	__u32 gid;
	__u32 call;
	__s32 flags;
	__u32 path_length;
	__u32 data_length;
	char path[DEPUTY_PATH];
};

struct deputy_answer {
	__s64 value;
	__s32 error;
	__u32 unused;
};

#endif
