/* SPDX-License-Identifier: GPL-2.0 */
/*
 * abi.h - what the kernel half and graft/kernel/programs.py share: map keys, values, reasons
 *
 * graft/kernel/programs.py packs and unpacks these structures; tests/unit/test_layout.py compiles this header and
 * compares every size, offset and enumerator, so the two cannot drift apart.
 *
 * IP addresses are 16 bytes in network order everywhere; IPv4 is kept as ::ffff:a.b.c.d. One form for
 * both families lets one function serve both hooks. Ports are in host order unless the name ends in _be.
 */
#ifndef ABI_H
#define ABI_H

#define GRAFT_ABI 4
#define GRAFT_EXEMPT 0 /* the tenant in the stamp of graftd's own sockets: no policy */

/*
 * A tenant's private loopback. Port P of the container's 127.0.0.1 is port 61440 + P % 4096 of address
 * P / 4096 of the tenant's block, so that a private port never stands in the way of a host's (or
 * another tenant's published) wildcard bind, which would claim the same number on every local address.
 * Address 16 of the block takes ports that the kernel chooses (bind to port 0) and sources.
 */
#define SLICE4_NET 0x7f400000u /* 127.64.0.0/10, host order */
#define SLICE4_MASK 0xffc00000u
#define SLICE_SHIFT 5 /* 32 addresses a tenant */
#define SLICE_DYNAMIC 16
#define SLICE_PORT_BASE 61440
#define SLICE_PORT_BITS 12
#define SLICE_COUNT (1u << (22 - SLICE_SHIFT))
#define SLICE6_WORD0 0xfd677261u /* fd67:7261:6674::/64, host order */
#define SLICE6_WORD1 0x66740000u

struct graft_addr {
	__u32 ip[4]; /* network order */
	__u32 port;
};

/* config: one entry, index 0 */
struct graft_config {
	__u64 host_cookie; /* SO_NETNS_COOKIE of the netns that grafted sockets live in */
	__u32 abi;
	__u32 pad;
};

enum tenant_flags {
	TENANT_EGRESS = 1,   /* some egress is allowed: UDP may take a port of the host to send from */
	TENANT_STRICT = 2,   /* the wrapper: a wildcard or loopback bind needs a rule */
	TENANT_REPLIES = 4,  /* egress is narrowed: remember who asked a published UDP server */
	TENANT_HOME = 8,     /* a wrapper in the host's own netns: any endpoint reaches the host's loopback */
	TENANT_VERBOSE = 16, /* report conversions as well as refusals */
};

struct graft_tenant {
	__u64 netns_cookie; /* the container's own, shown instead of the host's */
	__u32 slice;	    /* number of its loopback block */
	__u32 flags;
	__u32 parent; /* a wrapper inside a container: whose egress policy holds as well, 0: nobody's */
	__u32 own4;   /* the address that wildcard binds go to, network order, 0: none */
	__u32 own6[4];
};

/*
 * addresses: whose own an address of the host's stack is. A connection there goes to its owner, at the host's port
 * where the owner has published the port, and to nobody else who listens on the wildcard.
 */
struct graft_holder {
	__u32 tenant;
	__u32 network; /* only tenants with an address of the same network may connect, 0: whoever may go there */
};

enum stamp_flags {
	STAMP_PRIVATE = 1,   /* bound into the tenant's block */
	STAMP_INGRESS = 2,   /* bound through an ingress rule */
	STAMP_EPHEMERAL = 4, /* UDP, bound to a port that the kernel chose, to send from */
	STAMP_V6ONLY = 8,
	STAMP_CONNECTED = 16,  /* peer and peer_real are set */
	STAMP_FAMILY = 32,     /* made as AF_GRAFT and not bound yet: leaves from `default-source` */
	STAMP_NAMED = 64,      /* graftd binds it to an endpoint by name: local_real is that endpoint's */
	STAMP_PERMIT = 128,    /* graftd has looked a name up: peer_real may be connected or sent to */
	STAMP_REUSEADDR = 256, /* what the program of a UDP socket set; it holds where a rule lets it bind, */
	STAMP_REUSEPORT = 512, /* never for a port that the kernel chooses */
	STAMP_COUNTED = 1024,  /* is in its tenant's usage */
};

/*
 * usage: the sockets that a tenant has from socket() and not closed yet, accepted ones are not among them, and how
 * many it may have.
 */
struct graft_usage {
	__u64 sockets;
	__u64 udp;
	__u64 sockets_max;
	__u64 udp_max;
};

/*
 * Whoever stamps a socket asks by getsockopt() of this name whether the policy runs for it, and is answered by the
 * policy: where the programs are not attached, or others are, there is no such option.
 */
#define GRAFT_LEVEL 254
#define GRAFT_PROBE 1
struct graft_probe {
	__u32 tenant;
	__u32 over; /* the tenant has more sockets than it may */
};

/*
 * Where a socket lives: 0 is graftd's own netns, others are netns of endpoints. A rule whose endpoint is
 * elsewhere than the socket does not hold for it; graftd then gives the program another socket.
 */
#define PLACE_UNIX 0xffffffffu /* an AF_UNIX socket, which no hook here sees */

/* stamps: socket storage. local/peer as the program asked, *_real as the host's stack has them. */
struct graft_stamp {
	__u32 tenant;
	__u32 flags;
	__u32 place;
	struct graft_addr local;
	struct graft_addr local_real;
	struct graft_addr peer;
	struct graft_addr peer_real;
};

/*
 * families: socket storage of what was made as AF_GRAFT (graft/trap/family.py), user space's alone; here because
 * socket storage goes with its socket.
 */
#define FAMILY_QUEUE 64	 /* setsockopt() calls that may wait */
#define FAMILY_VALUE 116 /* bytes of an option */
struct graft_family {
	char name[16]; /* the endpoint that it is bound to, empty if none */
	__u32 flags;
	__u32 count;
	struct {
		__s32 level;
		__s32 name;
		__s32 result;
		__u16 length;
		__u16 done;
		__u8 value[FAMILY_VALUE];
	} queue[FAMILY_QUEUE];
};

#define GRAFT_DEFAULT 1 /* in place of the family in a key of egress: `default-source` */
#define GRAFT_INET 4
#define GRAFT_INET6 6

/* ingress: LPM. prefixlen covers tenant..ip exactly and 0 to 16 bits of the port. */
struct graft_ingress_key {
	__u32 prefixlen;
	__u32 tenant;
	__u8 proto;  /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 family; /* GRAFT_INET or GRAFT_INET6 */
	__u16 zero;
	__u32 ip[4];
	__u16 port_be;
	__u16 pad;
} __attribute__((packed));
#define INGRESS_FIXED_BITS (32 + 32 + 128)

struct graft_ingress {
	__u32 ip[4];
	__u16 port;  /* 0: dynamic */
	__u16 first; /* the rule's first port; a bind to first + n goes to port + n if span is set */
	__u32 span;  /* 0: every port of the rule goes to the one endpoint port */
	__u32 place;
	__u32 exclusive; /* a publication: no other container has this endpoint */
};

/* egress: LPM. prefixlen covers tenant and family exactly and 0 to 128 bits of the address. */
struct graft_egress_key {
	__u32 prefixlen;
	__u32 tenant;
	__u32 family;
	__u32 ip[4];
};
#define EGRESS_FIXED_BITS 64

struct graft_egress { /* begins as a graft_addr */
	__u32 ip[4];  /* source; unspecified: as the host routes */
	__u32 port;   /* source port, 0: dynamic */
	__u32 place;
};

/*
 * services: what a tenant may reach on the host's own loopback (the stub resolver). Of SERVICE_NAMED, graftd's own
 * resolver, a client's source is in its tenant's block, so that the resolver knows whose it is.
 */
#define SERVICE_PLAIN 1
#define SERVICE_NAMED 2
struct graft_service_key {
	__u32 tenant;
	__u16 port;
	__u16 pad;
	__u32 ip[4];
};

/* clients: whose socket it is that asks graftd's resolver, where it had a source before it did. */
struct graft_client_key {
	__u32 proto;
	__u32 port;
};

/* dynamic: the host port that the kernel chose for a bind through a `dynamic` endpoint. */
struct graft_dynamic_key {
	__u32 tenant;
	__u8 proto;
	__u8 family;
	__u16 port; /* the program's */
};

/*
 * served: a host address that a container's TCP server has through an ingress rule. An accepted socket has
 * no stamp of its own (a clone would cost 3 % of a server's accept rate), so this says what it shows.
 */
struct graft_served_key {
	__u32 ip[4];
	__u32 port;
};

struct graft_served {
	__u32 tenant;
	__u32 port; /* the program's */
};

/* askers: who sent to a published UDP server, so that it may answer although egress is narrowed. */
struct graft_asker_key {
	__u32 tenant;
	__u32 port;
	__u32 ip[4];
};

enum graft_op {
	OP_BIND,
	OP_CONNECT,
	OP_SEND,
	OP_SETSOCKOPT,
	OP_LISTEN,
	OP_GUARD,
};

enum graft_reason {
	REASON_NO_RULE,	       /* bind without an ingress rule */
	REASON_NO_EGRESS,      /* destination outside the egress rules */
	REASON_PRIVATE_SOURCE, /* a socket bound to the private loopback, sending elsewhere */
	REASON_WRONG_SOURCE,   /* bound to an address other than the egress rule's */
	REASON_DUAL_STACK,     /* one socket, two host addresses */
	REASON_NOT_LISTENING,  /* the container's loopback, and nobody of the container there */
	REASON_OPTION,	       /* a socket option that reaches around the policy */
	REASON_UNBOUND_LISTEN, /* listen() on a socket that no bind hook saw */
	REASON_SLICE,	       /* another's private loopback */
	REASON_NO_TENANT,      /* the tenant is gone */
	REASON_UNSTAMPED,      /* an accepted socket, put to another use */
	REASON_PLACE,	       /* the rule's endpoint is in another netns than the socket */
	REASON_NO_DEFAULT,     /* a socket of AF_GRAFT, unbound, and no endpoint `default-source` */
	REASON_TAKEN,	       /* another container is bound there */
	REASON_NETWORK,	       /* an address of a network that the tenant is not in */
	REASON_CONVERTED,      /* not refused: TENANT_VERBOSE */
};

struct graft_counter_key {
	__u32 tenant;
	__u16 op;
	__u16 reason;
};

struct graft_denial {
	__u32 tenant;
	__u16 op;
	__u16 reason;
	__s32 error; /* errno */
	__u32 proto; /* setsockopt: level << 16 | optname in port */
	struct graft_addr addr;
	struct graft_addr real; /* REASON_CONVERTED: the host address */
	char comm[16];
};

#endif
