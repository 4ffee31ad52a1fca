/* SPDX-License-Identifier: GPL-2.0 */
/*
 * abi.h - what the kernel half and graftd share: map keys, values, reasons
 *
 * Python packs and unpacks these structures (graft/kernel, graft/rules/tables.py). tests/unit/kernel/test_layout.py
 * reads this header and compares every structure, enumerator and constant, so that the two cannot drift apart.
 *
 * IP addresses are 16 bytes in network order everywhere, IPv4 as ::ffff:a.b.c.d: with one form for both families one
 * function serves both hooks. Ports are in host order unless the name ends in _be.
 */
#ifndef ABI_H
#define ABI_H

#define GRAFT_ABI 4
#define GRAFT_OWNERS 0x70000000u /* and the number of a slice: the uid of a container's sockets */
#define GRAFT_EXEMPT 0		 /* the tenant in the stamp of graftd's sockets, which no policy holds for */

/*
 * Slices: a tenant's private loopback. Each tenant has a slice number, and by it 256 addresses of 127.64.0.0/10 and
 * 32 of fd67:7261:6674::/64. Port P of the container's 127.0.0.1 is port SLICE_PORT_BASE + P % 4096 of address P /
 * 4096 of the slice. A wildcard bind claims its number on every local address, so that a private port under its own
 * number would be in the way of the host's programs, and of what other tenants publish. Address SLICE_DYNAMIC of the
 * slice is the source of connections to the container's loopback. A container's UDP socket on the host's wildcard is
 * reached from inside there, under its port. A TCP bind to port P of an address of the container's own has the port
 * of its loopback's, on address SLICE_OWN and up: which of the 16 is P / 4096, and turned for each further own
 * address (graft_holder.number), so that port P of each of them is another place; so has one to an address of the
 * host's that nobody publishes (HOSTS_NUMBER). Further addresses of 127.0.0.0/8 have 16 addresses each behind those,
 * by a number from 1 on that the first use gives them (`loopbacks`).
 *
 * Slice numbers count 32 addresses. A tenant has the first of SLICE_GROUP numbers, the others are its further
 * addresses'. Tenants of a graftd that knew no such addresses may have any number, that one alone, and no entry in
 * `loopbacks`: all of 127.0.0.0/8 is 127.0.0.1 to them.
 */
#define SLICE4_NET 0x7f400000u /* 127.64.0.0/10, host order */
#define SLICE4_MASK 0xffc00000u
#define SLICE_SHIFT 5 /* 32 addresses a number */
#define SLICE_GROUP 8
#define SLICE_DYNAMIC 16
#define SLICE_OWN 16 /* the first of the 16 addresses for binds to an address of the container's own */
#define SLICE_PORT_BASE 61440
#define SLICE_PORT_BITS 12
#define SLICE_COUNT (1u << (22 - SLICE_SHIFT))
#define SLICE_LOOPBACKS 14	 /* addresses beside 127.0.0.1; what is beyond has the last one's place */
#define SLICE6_WORD0 0xfd677261u /* fd67:7261:6674::/64, host order */
#define SLICE6_WORD1 0x66740000u

struct graft_addr {
	__u32 ip[4]; /* network order */
	__u32 port;
};

/* loopbacks: a tenant's addresses of 127.0.0.0/8 beside 127.0.0.1, number 1 first, 0: not in use yet */
struct graft_loopbacks {
	__u64 ip[SLICE_LOOPBACKS]; /* network order; of 64 bits to be exchanged */
};

/*
 * direct: storage of the cgroup of a direct container, whose sockets are made there. @tenant 0: nobody's yet. @low:
 * the ip_unprivileged_port_start of the container's netns, in which its programs are not.
 */
struct graft_direct {
	__u32 tenant;
	__u32 low;
};

/* leashes: by the address of a direct container's seccomp listener, in which cgroup its processes are */
struct graft_leash {
	__u64 cgroup;
	__u64 notification; /* its next one when this was noted */
	__u32 tenant;
	__u32 pad;
};

/* config: one entry, index 0. */
struct graft_config {
	__u64 host_cookie; /* SO_NETNS_COOKIE of the netns that grafted sockets live in */
	__u32 abi;
	__u16 watched; /* is a tenant TENANT_WATCHED? */
	__u16 counts;  /* are datagrams counted? */
};

enum tenant_flags {
	TENANT_EGRESS = 1,   /* some egress is allowed: a UDP socket may take a port of the host to send from */
	TENANT_STRICT = 2,   /* a wrapper: a bind to the wildcard or the loopback needs a rule as well */
	TENANT_REPLIES = 4,  /* egress is narrowed: remember who asked a published UDP server */
	TENANT_HOME = 8,     /* a wrapper in the host's netns: any endpoint reaches the host's loopback */
	TENANT_VERBOSE = 16, /* conversions are reported as well as refusals */
	TENANT_SERVES4 =
		32, /* a UDP port is published at each of the host's addresses: it answers from any of them */
	TENANT_SERVES6 = 64,
	TENANT_ABROAD = 128,   /* all its addresses are of networks of this host alone, and it may send beyond */
	TENANT_DIRECT = 256,   /* its programs make their sockets themselves (direct.bpf.h) */
	TENANT_PLAIN = 512,    /* TCP goes everywhere as the host's does, but to loopbacks and containers */
	TENANT_ALLOW = 1024,   /* it reaches what `allowed` and `pinned` have */
	TENANT_LEARN = 2048,   /* with TENANT_ALLOW: it reaches everything, and graftd is told what */
	TENANT_NAMES = 4096,   /* what it sends to port 53 goes to graftd's resolver */
	TENANT_WATCHED = 8192, /* somebody reads what it is allowed as well (watch.bpf.h) */
	TENANT_PACED = 16384,  /* has an entry in `rates` */
};

struct graft_tenant {
	__u64 netns_cookie; /* of the container's netns, shown instead of the host's */
	__u32 slice;	    /* its slice number */
	__u32 flags;
	__u32 parent; /* of a wrapper inside a container: the container, whose egress rules hold as well; else 0 */
	__u32 own4;   /* the address that wildcard binds go to, network order, 0: none */
	__u32 own6[4];
};

/*
 * holders: the tenant that an address of the host's stack belongs to, its holder. What arrives there goes to a socket
 * of the holder's, and to nobody else who listens on the wildcard.
 */
enum holder_flags {
	HOLDER_LOCAL = 1,  /* of an engine's network on this host: it answers nobody who comes by a device */
	HOLDER_DEVICE = 2, /* a device of the host's has it: what the holder does not listen for is the host's */
};

struct graft_holder {
	__u32 tenant;
	__u32 network; /* only tenants with an address of the same network may connect; 0: whoever has a rule may */
	__u32 flags;
	__u32 number; /* which of its holder's addresses of this family it is, from 0 */
};

/* owned: a bit for each address in `holders`, by a hash of the address: is a look-up there worth its time? */
#define OWNED_WORDS 64
struct graft_owned {
	__u64 bits[OWNED_WORDS];
};

/*
 * listeners: the TCP listeners of the containers, by what their programs bound. Several may be at one place
 * (SO_REUSEPORT): of those the kernel chooses, whichever is found here. So each place has LISTENER_SLOTS entries, and
 * where there are more sockets the first and the last ones have them.
 */
struct graft_listener_key {
	__u32 tenant;
	__u32 ip[4]; /* of 127.0.0.0/8 as in `loopbacks`; a dual-stack listener is at both wildcards */
	__u16 port;
	__u16 slot;
};
#define LISTENER_SLOTS 64
#define LISTENERS_MAX 1024 /* entries of a tenant */

/*
 * udp_ports: the ports of the host's at which a container's UDP sockets are, on the wildcard or at its own address.
 * The value is a mark of the socket, which has it in its storage `udp_place`. Slots as in `listeners`.
 */
struct graft_udp_key {
	__u32 tenant;
	__u16 port;
	__u16 slot;
};
#define UDP_PORTS_MAX 4096 /* entries of a tenant */

struct graft_udp_place {
	__u32 mark;
	__u16 port;
	__u16 slot;
};

/* listening: how many entries a tenant has made in `listeners` and in `udp_ports`, and which slots it has ever used.
 */
struct graft_listening {
	__u64 used;
	__u64 udp;
	__u64 slots;
};

enum stamp_flags {
	STAMP_PRIVATE = 1,	/* bound into the tenant's slice */
	STAMP_INGRESS = 2,	/* bound through an ingress rule */
	STAMP_EPHEMERAL = 4,	/* a UDP socket, bound to a port that the kernel chose, to send from */
	STAMP_V6ONLY = 8,	/* its bind was decided with IPV6_V6ONLY set: it may not take IPv4 as well */
	STAMP_CONNECTED = 16,	/* peer and peer_real are set */
	STAMP_FAMILY = 32,	/* made as AF_GRAFT and not bound yet: leaves from `default-source` */
	STAMP_NAMED = 64,	/* graftd binds it to an endpoint by name, whose address is in local_real */
	STAMP_PERMIT = 128,	/* graftd has looked a name up: the socket may connect or send to peer_real */
	STAMP_REUSEADDR = 256,	/* what the program has set; of UDP it holds where the program names the port to */
	STAMP_REUSEPORT = 512,	/* bind, not for a port that the kernel chooses (set_reuse()) */
	STAMP_COUNTED = 1024,	/* counted in its tenant's usage */
	STAMP_VOUCHED = 2048,	/* whoever made the socket has asked for GRAFT_PROBE */
	STAMP_BROADCAST = 4096, /* SO_BROADCAST is set */
	STAMP_SOURCE = 16384, /* with STAMP_NAMED: the endpoint is there to leave from, and nobody may serve there */
	STAMP_STAYS = 32768,  /* with STAMP_NAMED: it is there to serve, and no leave to go elsewhere */
	STAMP_LENT = 65536,   /* connect() chose its source: it has none of its own while it is not connected */
	STAMP_LATE = 131072,  /* of TCP: whoever made it has set IP_BIND_ADDRESS_NO_PORT, so that a bind may wait */
	STAMP_WAITS = 262144, /* bound to `local` for its program, and to no port of the kernel's: late.bpf.h */
	STAMP_NO_PORT = 524288, /* the program has set IP_BIND_ADDRESS_NO_PORT */
	STAMP_ABROAD = 1048576, /* STAMP_EPHEMERAL as well, and reached at its container's address: abroad.bpf.h */
	STAMP_SENT = 2097152,	/* a UDP socket that was not connected, and has named peer_real as a destination, */
	STAMP_SENT_MORE = 4194304, /* or others as well: met.bpf.h */
	STAMP_HAD6 = 8388608,	   /* a UDP socket that has had a destination of IPv6, */
	STAMP_HAD4 = 16777216,	   /* of IPv4: met.bpf.h */
};

/*
 * usage: how many sockets a tenant has made by socket() and not closed yet, and how many it may have. Accepted
 * sockets are not counted.
 */
struct graft_usage {
	__u64 sockets;
	__u64 udp;
	__u64 sockets_max;
	__u64 udp_max;
};

/*
 * ports: how many of the host's ports a tenant has that the kernel chose, and how many it may have. Key GRAFT_EXEMPT
 * has the sum of all tenants, and the ceiling over all.
 */
struct graft_ports {
	__u64 used;
	__u64 max;
	__u64 served; /* entries in `served_ports` that are the tenant's */
};
#define SERVED_MAX 1024 /* of a tenant */

/*
 * numbers: which ports of a tenant's private loopback are taken, of those that a bind to port 0 may get. The bind
 * hook chooses, so that no private socket takes a number out of the host's ephemeral range: connect() of the whole
 * host passes over a number that is bound at any address.
 */
#define NUMBERS_FIRST 32768 /* as Linux has it (ip(7), ip_local_port_range) */
#define NUMBERS_WORDS 448   /* of 64 numbers: up to 61439 */
#define NUMBERS_KINDS 4	    /* TCP and UDP, at 127.0.0.1 and at ::1 */
#define NUMBERS_ALL (NUMBERS_KINDS * NUMBERS_WORDS)
struct graft_numbers {
	__u32 next; /* where the next search begins, so that a number comes again as late as possible: think of
		       TIME_WAIT */
	__u32 pad;
	__u64 taken[NUMBERS_ALL];
};

/* held: socket storage, what is to be given back when the socket is closed. graftd does not write it. */
enum held_flags {
	HELD_PORT = 1,	   /* counted in `ports` */
	HELD_DYNAMIC = 2,  /* has an entry in `dynamic_ports` */
	HELD_DYNAMIC6 = 4, /* of IPv6 */
	HELD_BOTH = 8,	   /* `number` is one of both families */
};

struct graft_held {
	__u32 flags;
	__u32 number; /* a private one, or the name of the kernel's choice; 0: none */
	__u32 kind;   /* in which of `taken` */
	__u16 port;   /* HELD_DYNAMIC: the program's */
	__u16 host_port;
};

/*
 * claims: how many sockets of a tenant are bound to a port, by what their programs asked for, at an address or
 * wildcard, and at all of a family's; and how many of them do not let others have it by SO_REUSEADDR, and by
 * SO_REUSEPORT.
 */
enum claim_kind {
	CLAIM_AT,
	CLAIM_ALL4,
	CLAIM_ALL6,
	CLAIM_UDP = 4, /* and up: the same of UDP */
};

struct graft_claim_key {
	__u32 tenant;
	__u32 ip[4]; /* of CLAIM_AT */
	__u16 port;
	__u16 kind;
};

struct graft_claim {
	__u64 all;
	__u64 no_reuseaddr;
	__u64 no_reuseport;
};

#define CLAIMS_MAX 4096 /* sockets of a tenant: `claiming` counts them */

/* claimed: socket storage, what a socket has in `claims` */
struct graft_claimed {
	struct graft_addr at; /* port 0: nothing */
	__u32 dual;	      /* 1: to both wildcards; CLAIM_UDP: of UDP */
	__u32 shares;	      /* STAMP_REUSEADDR while it does not listen, STAMP_REUSEPORT */
};

/*
 * abroad: the ports of the host's at which UDP sockets are that their container's neighbours find at @port of @ip, by
 * what their programs bound; a dual-stack socket is at both wildcards. abroad_place: socket storage, where a socket
 * is in it. abroad_ports: with tenant 0, the port of the host's that a neighbour has connected to there.
 */
struct graft_abroad_key {
	__u32 tenant;
	__u32 ip[4];
	__u32 port;
};

#define ABROAD_MEMBERS 32 /* sockets of one place that neighbours find; what is beyond can send */
struct graft_abroad {
	__u64 used; /* how many members there have ever been */
	__u64 port[ABROAD_MEMBERS];
};

struct graft_abroad_place {
	struct graft_addr at;
	__u32 port;
	__u32 member; /* from 1 on; 0: in no place */
	__u32 member4;
};

/*
 * peers: socket storage of a UDP socket on the host's wildcard: whom it has sent to. Nobody else's datagrams reach
 * it. It is a Bloom filter: two of PEERS_BITS bits for each address, by a hash with a key of the socket's own.
 */
#define PEERS_BITS 8192
#define PEERS_WORDS (PEERS_BITS / 64)
struct graft_peers {
	__u64 key;
	__u64 anybody; /* it has sent to a group */
	__u64 bits[PEERS_WORDS];
};

/* met: socket storage of a UDP socket that connects again: the peers that it has had, and the last one, as the
 * program named it and for real. */
#define MET_MAX 8
struct graft_met {
	__u32 count;
	struct graft_addr asked;
	struct graft_addr real;
	struct graft_addr peers[MET_MAX];
};

/*
 * told: socket storage of a UDP socket: under which name the program has sent to an address of the host's stack,
 * where that is not the one which the address shows. The oldest gives way. called: likewise, the name of a neighbour
 * that has sent from this socket's own address, because it is connected there.
 */
#define TOLD_MAX 8
struct graft_told {
	__u32 next;
	struct {
		struct graft_addr real;
		struct graft_addr asked;
	} of[TOLD_MAX];
};

/*
 * asked: socket storage of a published UDP server on the host's wildcard: who has asked at which of the host's
 * addresses, in sets of ASKED_WAYS (answer.bpf.h).
 */
#define ASKED_LOCALS 16
#define ASKED_SETS 128
#define ASKED_WAYS 4
#define ASKED_ALL (ASKED_SETS * ASKED_WAYS)
struct graft_asked {
	__u64 key;
	struct {
		__u32 ip[4];
		__u32 used; /* when */
	} locals[ASKED_LOCALS];
	__u64 entries[ASKED_ALL];
};

/*
 * Whoever stamps a socket asks by getsockopt() of this name whether the policy runs for it, before anybody else has
 * the socket. The policy answers once, so that no program learns its tenant's number. The kernel has no such option,
 * so that there is no answer where the programs are not attached, or others are.
 */
#define GRAFT_LEVEL 254
#define GRAFT_PROBE 1
struct graft_probe {
	__u32 tenant;
	__u32 over; /* the tenant has more sockets than it may */
};

/*
 * A place is where a socket lives: 0 is graftd's netns, every other number a netns of some endpoint. A rule whose
 * endpoint is in another place than the socket does not hold for it. graftd then gives the program another socket.
 */
#define PLACE_UNIX 0xffffffffu /* an AF_UNIX socket, which no hook here sees */
#define PLACE_NOWHERE                                                                                                \
	0xfffffffeu /* of a rule whose endpoint is not there, or does not serve it: as if no rule matched */

/* prepared: socket storage. Instead of the pid of who prepares it: the socket is prepared (late.bpf.h). */
#define GRAFT_PREPARED 0xffffffffu

/* stamps: socket storage. local and peer are what the program asked for, *_real what the host's stack has. */
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
 * families: the state of a socket that was made as AF_GRAFT (graft/trap/family.py). No program here reads it. It is
 * socket storage because that ends with its socket.
 */
#define FAMILY_QUEUE 64	 /* setsockopt() calls that may wait */
#define FAMILY_VALUE 116 /* bytes of an option */
struct graft_family {
	char name[16]; /* of the endpoint that it is bound to; empty: of none */
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

#define GRAFT_DEFAULT 1 /* in place of a family in a key of egress: the endpoint `default-source` */
#define GRAFT_INET 4
#define GRAFT_INET6 6

/* ingress: a longest-prefix match. prefixlen covers all from tenant to ip, and 0 to 16 bits of the port. */
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
	__u16 first; /* the rule's first port; if span is set a bind to first + n goes to port + n */
	__u32 span;  /* 0: every port of the rule goes to the one endpoint port */
	__u32 place;
	__u32 exclusive; /* no other container has this endpoint, as it is with a publication */
};

/* egress: a longest-prefix match. prefixlen covers tenant and family, and 0 to 128 bits of the address. */
struct graft_egress_key {
	__u32 prefixlen;
	__u32 tenant;
	__u32 family;
	__u32 ip[4];
};
#define EGRESS_FIXED_BITS 64

struct graft_egress { /* begins like a graft_addr, and is used as one */
	__u32 ip[4];  /* source; the wildcard: as the host routes */
	__u32 port;   /* source port, 0: dynamic */
	__u32 place;
};

/*
 * allowed: a longest-prefix match. prefixlen covers tenant and port, and 0 to 128 bits of the address; port 0 is all
 * ports. pinned has the addresses of names, by the same key without prefixlen, until when, in ns of
 * bpf_ktime_get_ns(). learnt: likewise, what a tenant that is TENANT_LEARN has reached and graftd has been told.
 */
struct graft_allowed_key {
	__u32 prefixlen;
	__u32 tenant;
	__u32 port;
	__u32 ip[4];
};
#define ALLOWED_FIXED_BITS 64

struct graft_pinned_key {
	__u32 tenant;
	__u32 port;
	__u32 ip[4];
};
#define RESOLVER6_INDEX 11 /* graftd's resolver has this address of slice number 0, which is nobody's */

/*
 * endpoints: by the address that stands for the name of an endpoint of the tenant's table, where the endpoint is
 * (graft/rules/endpoint_names.py). An address of these blocks is nothing else's: it stands for an endpoint, or leads
 * nowhere.
 */
#define NAMES4_NET 0xfa400000u /* 250.64.0.0/10, host order */
#define NAMES4_MASK 0xffc00000u
#define NAMES6_WORD1 0x66740001u /* after SLICE6_WORD0: fd67:7261:6674:1::/64 */
struct graft_endpoint_key {
	__u32 tenant;
	__u32 ip[4];
};

struct graft_endpoint {
	__u32 ip[4];
	__u32 port;  /* 0: dynamic; with ENDPOINT_OF_USER */
	__u32 place; /* PLACE_UNIX: of type unix or local */
};
#define ENDPOINT_OF_USER 0x10000 /* a user without root has added it: it leads where they may go without it */

/*
 * services: what a tenant may reach without a rule: the stub resolver on the host's loopback and the resolvers of
 * pods, SERVICE_PLAIN, and graftd's resolver, SERVICE_NAMED. A client of the latter sends from its tenant's slice, so
 * that the resolver knows whose it is.
 */
#define SERVICE_PLAIN 1
#define SERVICE_NAMED 2
struct graft_service_key {
	__u32 tenant;
	__u16 port;
	__u16 pad;
	__u32 ip[4];
};

/* clients: the tenant of a socket that asks graftd's resolver and had a source before, which does not show it. */
struct graft_client_key {
	__u32 proto;
	__u32 port;
};

/*
 * dynamic_ports: the host port that the kernel chose for a bind through a `dynamic` endpoint, or for a UDP port that
 * nobody publishes, while it is bound. And, with GRAFT_USED in the family, of the latter: at which of the program's
 * ports a port of the host's is, and in the upper half how many sockets have it.
 */
struct graft_dynamic_key {
	__u32 tenant;
	__u8 proto;
	__u8 family;
	__u16 port; /* the program's; with GRAFT_USED the host's */
};
#define GRAFT_USED 16

/*
 * served_ports: a host address that a container's TCP server has by an ingress rule, and the program's port. Accepted
 * sockets show that port. They have no stamp to read it from: to clone one would cost 3 % of a server's accept rate.
 */
struct graft_served_key {
	__u32 ip[4];
	__u32 port;
};

struct graft_served {
	__u32 tenant;
	__u32 port; /* the program's */
};

/*
 * led: host addresses whose TCP connections go to a tenant's listener that is bound elsewhere, because an endpoint or
 * a publication was moved to it while it ran. The key is a longest prefix: an address or the wildcard of its family,
 * and a range of ports. led_ports: a bit for each port that is in it, for who asks about ports that mostly are not.
 */
struct graft_led_key {
	__u32 prefixlen;
	__u32 ip[4];
	__u16 port_be;
	__u16 pad;
};
#define LED_FIXED_BITS 128
#define LED_WORDS 1024 /* of 64 ports */

struct graft_led {
	__u32 tenant;
	__u32 ip[4];  /* what its program has bound; all zero: the wildcard, or the address that is asked */
	__u16 first;  /* of the host's ports */
	__u16 inside; /* the program's port for it */
};

/*
 * asker_tables: who sent to a tenant's published UDP servers, which may answer although egress is narrowed. Each
 * tenant has a table of its own, so that none is filled by another's: hashes of addresses with ports, in sets of
 * ASKERS_WAYS. The key of the hash is secret.
 */
#define ASKERS_SETS 480
#define ASKERS_WAYS 4
#define ASKERS_ALL (ASKERS_SETS * ASKERS_WAYS)
struct graft_askers {
	__u64 key;
	__u64 hash[ASKERS_ALL];
};

enum graft_op {
	OP_BIND,
	OP_CONNECT,
	OP_SEND,
	OP_SETSOCKOPT,
	OP_LISTEN,
	OP_GUARD,
	OP_SOCKET,
};

enum graft_reason {
	REASON_NO_RULE,	       /* bind without an ingress rule */
	REASON_NO_EGRESS,      /* destination outside the egress rules */
	REASON_PRIVATE_SOURCE, /* a socket on its private loopback, to a destination elsewhere */
	REASON_WRONG_SOURCE,   /* bound to an address other than the egress rule's */
	REASON_DUAL_STACK,     /* one socket, two host addresses */
	REASON_NOT_LISTENING,  /* a destination of the container's own where it does not listen */
	REASON_OPTION,	       /* a socket option that reaches around the policy */
	REASON_UNBOUND_LISTEN, /* listen() on a socket that no bind hook saw */
	REASON_SLICE,	       /* another's private loopback */
	REASON_NO_TENANT,      /* the tenant is gone */
	REASON_UNSTAMPED,      /* an accepted socket that was put to another use */
	REASON_PLACE,	       /* the rule's endpoint is in another netns than the socket */
	REASON_NO_DEFAULT,     /* an unbound socket of AF_GRAFT, and no endpoint `default-source` */
	REASON_TAKEN,	       /* another container is bound there */
	REASON_NETWORK,	       /* an address of a network that the tenant is not in */
	REASON_BUDGET,	       /* more queries for graftd's resolver than a container may send */
	REASON_PORTS,	       /* no port is left that the kernel may choose for the tenant */
	REASON_CAPABILITY,     /* a port below ip_unprivileged_port_start, without CAP_NET_BIND_SERVICE */
	REASON_RESERVED,       /* a port that the node needs */
	REASON_KIND,	       /* a socket of a direct container of a kind that no policy knows, or too early */
	REASON_MOVED,	       /* a process that was moved out of its direct container's cgroup */
	REASON_SOCKETS,	       /* more sockets than the tenant may have */
	REASON_NOT_ALLOWED,    /* a destination that the tenant's list does not have */
	REASON_NO_ENDPOINT,    /* an address of names that stands for no endpoint which the tenant may go to */
	REASON_MET,	       /* a peer, beside which the socket has had others */
	REASON_LEARNT,	       /* no refusal: a destination of a tenant that is TENANT_LEARN */
	REASON_CONVERTED,      /* no refusal: a conversion of a tenant that is TENANT_VERBOSE */
	REASON_ALLOWED,	       /* no refusal: a call of a tenant that is TENANT_WATCHED */
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
	__u32 proto; /* 0 of OP_SETSOCKOPT, where addr.port is level << 16 | optname */
	struct graft_addr addr;
	struct graft_addr real; /* REASON_CONVERTED, REASON_ALLOWED: the host address */
	char comm[16];
	__u64 when; /* ns of CLOCK_BOOTTIME */
	__u32 pid;  /* of the process, in the first pid namespace; 0 where the hook does not know it */
	__u32 pad;
};

/* traffic: what the TCP connections of a tenant that are closed have carried (traffic.bpf.h) */
struct graft_traffic {
	__u64 accepted; /* connections */
	__u64 connected;
	__u64 received; /* bytes */
	__u64 sent;
	__u64 segments_received;
	__u64 segments_sent;
};

/* datagrams: what the UDP sockets of a tenant have carried while that was counted (datagrams.bpf.h) */
struct graft_datagrams {
	__u64 bytes_received; /* without headers */
	__u64 bytes_sent;
	__u64 received;
	__u64 sent;
};

/*
 * reports: how many reports of a tenant were put into the ring buffer in this window of time, and how many never
 * were, for there was no room or the tenant had had its share. Key GRAFT_EXEMPT has those of sockets that nobody's
 * tenant is known of, REPORTS_ALL the sum.
 */
#define REPORTS_ALL 0xffffffffu
struct graft_reports {
	__u64 window;
	__u32 refused;
	__u32 allowed;
	__u64 dropped;
};

#endif
