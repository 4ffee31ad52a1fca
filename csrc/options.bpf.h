/* SPDX-License-Identifier: GPL-2.0 */
/*
 * options.bpf.h - socket options that would reach around the policy
 *
 * A grafted socket is in the host's netns, so an option that picks a device, a mark, a source address, a route or a
 * multicast group picks among the host's. The options of Linux 6.18 were looked at (ip(7), ipv6(7), socket(7),
 * tcp(7), udp(7), linux/in*.h), and each number has a verdict, level by level: it is the program's business, or
 * refused with EPERM, or unknown: ENOPROTOOPT, as from a kernel without it, whatever a newer one would do.
 *
 * A refused option's default asks for nothing, and programs set it: IP_TRANSPARENT 0, SO_BINDTODEVICE "". The hook
 * answers it, by the kernel's rule for the option's length, and the kernel does not see it: what it would change is
 * graft's, such as IPV6_FREEBIND, or the device that a listener without a bind is tied to.
 *
 * An option whose value decides is looked at by its length, too: the kernel gets the copy that was seen.
 * scripts/options.py has the same table with names and reasons; tests compare both, number by number.
 */
#ifndef OPTIONS_BPF_H
#define OPTIONS_BPF_H

#include "late.bpf.h"
#include "leash.bpf.h"
#include "made.bpf.h"
#include "pace.bpf.h"
#include "report.bpf.h"

#define SOL_IP_ 0
#define SOL_TCP_ 6
#define SOL_UDP_ 17
#define SOL_IPV6_ 41
#define SOL_UDPLITE_ 136 /* to the kernel the same as SOL_UDP for a UDP socket */
#define SOL_TLS_ 282
#define IPV6_FREEBIND_ 78
#define IPV6_V6ONLY_ 26
#define IP_LOCAL_PORT_RANGE_ 51
#define IP_BIND_ADDRESS_NO_PORT_ 24
#define SO_NETNS_COOKIE_ 71
#define SO_BINDTODEVICE_ 25
#define SO_BINDTOIFINDEX_ 62
#define IFNAMSIZ_ 16
#define SO_PRIORITY_ 12
#define SO_BROADCAST_ 6
#define SO_REUSEADDR_ 2
#define SO_REUSEPORT_ 15
#define SO_TIMESTAMPING_OLD_ 37
#define SO_TIMESTAMPING_NEW_ 65
#define SOF_TIMESTAMPING_OPT_TSONLY_ 0x800
#define TCP_SAVE_SYN_ 27
#define TCP_ULP_ 31
#define SOCK_STREAM_ 1
#define IP_FREEBIND_ 15

/* What becomes of an option. From OPTION_REFUSED on it is refused, but for a default of the form that is named. */
enum option {
	OPTION_FREE,
	OPTION_UNKNOWN,
	OPTION_REFUSED,	 /* whatever its value */
	OPTION_INT,	 /* but 0, in 4 bytes or more */
	OPTION_INT_SHUT, /* likewise; a stream has no such option */
	OPTION_WORD,	 /* but 0, in 4 bytes */
	OPTION_BYTE,	 /* but 0, in a byte or an int */
	OPTION_FLAG,	 /* likewise, and nothing at all is 0 */
	OPTION_EMPTY,	 /* but without a value */
	OPTION_DEVICE,	 /* but a name that is empty */
	OPTION_GROUP_IF, /* but 0.0.0.0, as an in_addr, an ip_mreq or an ip_mreqn; a stream has no such option */
	OPTION_PKTINFO,	 /* but 20 bytes of 0 */
};

static __always_inline __u32 socket_option(__u32 name)
{
	switch (name) {
	case 1:	 /* SO_DEBUG */
	case 36: /* SO_MARK */
	case 62: /* SO_BINDTOIFINDEX */
	case 69: /* SO_PREFER_BUSY_POLL: holds back a device's interrupts, */
	case 70: /* SO_BUSY_POLL_BUDGET, likewise */
	case 75: /* SO_RCVMARK */
	case 82: /* SO_RCVPRIORITY */
		return OPTION_INT;
	case 25: /* SO_BINDTODEVICE */
		return OPTION_DEVICE;
	case 26: /* SO_ATTACH_FILTER: a filter reads the headers and the mark of what arrives, and tells by its length
		  */
	case 50: /* SO_ATTACH_BPF, likewise */
	case 73: /* SO_RESERVE_MEM: the host's memory for TCP, without a byte sent, at graftd's account */
	case 32: /* SO_SNDBUFFORCE */
	case 33: /* SO_RCVBUFFORCE */
		return OPTION_REFUSED;
	}
	return name <= 84 ? OPTION_FREE : OPTION_UNKNOWN; /* SO_INQ */
}

static __always_inline __u32 ip_option(__u32 name)
{
	switch (name) {
	case 7: /* IP_RETOPTS */
		return OPTION_FLAG;
	case 15: /* IP_FREEBIND */
	case 19: /* IP_TRANSPARENT */
		return OPTION_BYTE;
	case 4: /* IP_OPTIONS */
		return OPTION_EMPTY;
	case 32: /* IP_MULTICAST_IF */
		return OPTION_GROUP_IF;
	case 50: /* IP_UNICAST_IF */
	case 51: /* IP_LOCAL_PORT_RANGE */
		return OPTION_WORD;
	case 16:	    /* IP_IPSEC_POLICY */
	case 17:	    /* IP_XFRM_POLICY */
	case 35 ... 41:	    /* IP_ADD_MEMBERSHIP .. IP_MSFILTER */
	case 42 ... 48:	    /* MCAST_JOIN_GROUP .. MCAST_MSFILTER */
	case 64 ... 65:	    /* IPT_SO_SET_REPLACE, IPT_SO_SET_ADD_COUNTERS */
	case 96 ... 97:	    /* those of arptables */
	case 128 ... 129:   /* and of ebtables */
	case 200 ... 212:   /* MRT_INIT .. MRT_MAX */
	case 1152 ... 1167: /* those of IPVS */
		return OPTION_REFUSED;
	case 1 ... 2: /* those between have no name, or are for raw sockets: IP_HDRINCL, IP_NODEFRAG */
	case 5 ... 6:
	case 8 ... 14:
	case 18:
	case 20 ... 21:
	case 23 ... 26:
	case 33 ... 34:
	case 49:
		return OPTION_FREE;
	}
	return OPTION_UNKNOWN;
}

static __always_inline __u32 ipv6_option(__u32 name)
{
	switch (name) {
	case 75: /* IPV6_TRANSPARENT */
	case 78: /* IPV6_FREEBIND */
		return OPTION_INT;
	case 17: /* IPV6_MULTICAST_IF */
		return OPTION_INT_SHUT;
	case 76: /* IPV6_UNICAST_IF */
		return OPTION_WORD;
	case 6:	 /* IPV6_2292PKTOPTIONS */
	case 57: /* IPV6_RTHDR */
		return OPTION_EMPTY;
	case 50: /* IPV6_PKTINFO, sticky source */
		return OPTION_PKTINFO;
	case 1:		  /* IPV6_ADDRFORM: the IPv4 hooks would have to go on with the stamp of an IPv6 socket */
	case 20:	  /* IPV6_ADD_MEMBERSHIP */
	case 21:	  /* IPV6_DROP_MEMBERSHIP */
	case 27:	  /* IPV6_JOIN_ANYCAST */
	case 28:	  /* IPV6_LEAVE_ANYCAST */
	case 32:	  /* IPV6_FLOWLABEL_MGR: a lease is the whole host's */
	case 34:	  /* IPV6_IPSEC_POLICY */
	case 35:	  /* IPV6_XFRM_POLICY */
	case 42 ... 48:	  /* MCAST_* */
	case 54:	  /* IPV6_HOPOPTS: the kernel asks for CAP_NET_RAW, whatever the value */
	case 55:	  /* IPV6_RTHDRDSTOPTS, likewise */
	case 59:	  /* IPV6_DSTOPTS, likewise */
	case 64:	  /* IP6T_SO_SET_REPLACE */
	case 65:	  /* IP6T_SO_SET_ADD_COUNTERS */
	case 200 ... 212: /* MRT6_INIT .. MRT6_MAX */
		return OPTION_REFUSED;
	case 2 ... 5: /* those between have no name, or are for raw sockets: IPV6_HDRINCL */
	case 7 ... 8:
	case 11:
	case 16:
	case 18 ... 19:
	case 22 ... 26:
	case 29 ... 31:
	case 33:
	case 49:
	case 51 ... 53:
	case 56:
	case 58:
	case 60 ... 62:
	case 66 ... 67:
	case 70:
	case 72 ... 74:
	case 77:
		return OPTION_FREE;
	}
	return OPTION_UNKNOWN;
}

static __always_inline __u32 tcp_option(__u32 name)
{
	switch (name) {
	case 19: /* TCP_REPAIR */
	case 20: /* TCP_REPAIR_QUEUE */
	case 21: /* TCP_QUEUE_SEQ */
	case 22: /* TCP_REPAIR_OPTIONS */
	case 29: /* TCP_REPAIR_WINDOW */
	case 42: /* TCP_AO_REPAIR */
		return OPTION_REFUSED;
	}
	return name <= 46 ? OPTION_FREE : OPTION_UNKNOWN; /* TCP_DELACK_MAX_US */
}

static __always_inline __u32 udp_option(__u32 name)
{
	switch (name) {
	case 1:		  /* UDP_CORK */
	case 101 ... 104: /* UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX, UDP_SEGMENT, UDP_GRO */
		return OPTION_FREE;
	case 100: /* UDP_ENCAP: the kernel would answer and forward what arrives, past every hook */
		return OPTION_INT;
	}
	return OPTION_UNKNOWN;
}

/* The options of netfilter, multicast routing and IPVS that can be read; of IPv6, 64 to 69 are IPV6_RECVPKTINFO's
 * kin. */
static __always_inline bool reads_firewall(__s32 level, __u32 name)
{
	if (level == SOL_IP_)
		return name >= 64;
	switch (name) {
	case 64: /* IP6T_SO_GET_INFO */
	case 65: /* IP6T_SO_GET_ENTRIES */
	case 68: /* IP6T_SO_GET_REVISION_MATCH */
	case 69: /* IP6T_SO_GET_REVISION_TARGET */
		return level == SOL_IPV6_;
	}
	return level == SOL_IPV6_ && name > 78;
}

/*
 * Put an option's value there that is an int to the kernel; false: it is too short, and the kernel says so. What is
 * longer is cut, because the kernel reads the program's memory again where it is longer than a page.
 */
static __always_inline bool int_value(struct bpf_sockopt *ctx, __u32 *value)
{
	__u8 *text = ctx->optval, *end = ctx->optval_end;

	if (ctx->optlen < 4 || text + 4 > end)
		return false;
	*value = *(__u32 *)text;
	if (ctx->optlen > 4)
		ctx->optlen = 4;
	return true;
}

static __always_inline bool is_timestamping(__s32 level, __s32 name)
{
	return level == SOL_SOCKET_ && (name == SO_TIMESTAMPING_OLD_ || name == SO_TIMESTAMPING_NEW_);
}

/*
 * A time stamp of what is sent comes without the packet, whatever this SO_TIMESTAMPING says: that has hardware
 * addresses of the host's and its neighbour's, and the real ones. A control message may ask for stamps as well, and
 * by the socket's flag gets them alone; its maker has set that.
 */
static __always_inline void stamp_only(struct bpf_sockopt *ctx)
{
	__u8 *text = ctx->optval, *end = ctx->optval_end;

	if (ctx->optlen < 4 || text + 4 > end)
		return; /* EINVAL */
	*(__u32 *)text |= SOF_TIMESTAMPING_OPT_TSONLY_;
	if (ctx->optlen != 4 && ctx->optlen != 8) /* as int_value(); of 8 bytes it is a struct so_timestamping */
		ctx->optlen = 4;
}

/*
 * Is this TCP_ULP anything but "tls"? The kernel takes the text up to a zero, which ends the copy that it then gets.
 * There is no other that a program could use: "mptcp", "smc" and "espintcp" are for sockets of the kernel's, or pass
 * by the hooks.
 */
static __always_inline bool ulp_forbidden(struct bpf_sockopt *ctx)
{
	__u8 *text = ctx->optval, *end = ctx->optval_end;

	if (ctx->optlen < 1)
		return false; /* EINVAL */
	if (ctx->optlen < 3 || text + 4 > end || text[0] != 't' || text[1] != 'l' || text[2] != 's')
		return true;
	if (ctx->optlen == 3)
		return false;
	if (ctx->optlen > 4)
		ctx->optlen = 4;
	return text[3];
}

/* An option of a level that the socket does not have is the kernel's to refuse. */
static __always_inline __u32 option_of(const struct bpf_sockopt *ctx, __s32 level, __u32 name)
{
	__u32 protocol = ctx->sk->protocol;

	switch (level) {
	case SOL_SOCKET_:
		return socket_option(name);
	case SOL_IP_:
		return ip_option(name);
	case SOL_IPV6_:
		return ctx->sk->family == AF_INET6 ? ipv6_option(name) : OPTION_FREE;
	case SOL_TCP_:
		return protocol == IPPROTO_UDP ? OPTION_FREE : tcp_option(name);
	case SOL_UDP_:
	case SOL_UDPLITE_:
		return protocol == IPPROTO_TCP ? OPTION_FREE : udp_option(name);
	case SOL_TLS_:
		return OPTION_FREE;
	}
	return OPTION_UNKNOWN;
}

/* Is there nothing but 0 in the first @size bytes? @size is a constant, 20 at most. */
static __always_inline bool all_zero(struct bpf_sockopt *ctx, int size)
{
	__u8 *text = ctx->optval, *end = ctx->optval_end, any = 0;

	if (text + size > end)
		return false;
	for (int n = 0; n < size; n++)
		any |= text[n];
	return !any;
}

/* The errno of an option that is refused, 0 for its default: @option is its form. The kernel checks lengths first. */
static __always_inline int refused_option(struct bpf_sockopt *ctx, __u32 option)
{
	__s32 length = ctx->optlen;

	switch (option) {
	case OPTION_INT_SHUT:
		if (ctx->sk->type == SOCK_STREAM_)
			return ENOPROTOOPT;
		/* fallthrough */
	case OPTION_INT:
		return length < 4 ? EINVAL : all_zero(ctx, 4) ? 0 : EPERM;
	case OPTION_WORD:
		return length != 4 ? EINVAL : all_zero(ctx, 4) ? 0 : EPERM;
	case OPTION_BYTE:
		if (length < 1)
			return EINVAL;
		/* fallthrough */
	case OPTION_FLAG:
		return length < 1 || (length < 4 ? all_zero(ctx, 1) : all_zero(ctx, 4)) ? 0 : EPERM;
	case OPTION_EMPTY:
		return length ? EPERM : 0;
	case OPTION_DEVICE:
		return ctx->sk->bound_dev_if || (length && !all_zero(ctx, 1)) ? EPERM : 0;
	case OPTION_GROUP_IF:
		if (ctx->sk->type == SOCK_STREAM_ || length < 4)
			return EINVAL;
		if (length < 8)
			return all_zero(ctx, 4) ? 0 : EPERM;
		return length < 12 ? all_zero(ctx, 8) ? 0 : EPERM : all_zero(ctx, 12) ? 0 : EPERM;
	case OPTION_PKTINFO:
		return length < 20 ? EINVAL : all_zero(ctx, 20) ? 0 : EPERM;
	}
	return EPERM;
}

/* The kernel copies an int of these levels before it looks for the option. */
static __always_inline int unknown_option(const struct bpf_sockopt *ctx, __s32 level)
{
	if (ctx->optlen < 4 &&
	    (level == SOL_SOCKET_ || level == SOL_TCP_ || level == SOL_UDP_ || level == SOL_UDPLITE_))
		return EINVAL;
	return ENOPROTOOPT;
}

/* Sockets of other families are graftd's, which made them for itself. */
static __always_inline bool is_internet(const struct bpf_sock *sk)
{
	return sk && (sk->family == AF_INET || sk->family == AF_INET6);
}

static __always_inline void set_flag(struct graft_stamp *stamp, __u32 flag, __u32 value)
{
	stamp->flags = value ? stamp->flags | flag : stamp->flags & ~flag;
}

static __always_inline __u32 reuse_flag(__s32 name)
{
	return name == SO_REUSEADDR_ ? STAMP_REUSEADDR : name == SO_REUSEPORT_ ? STAMP_REUSEPORT : 0;
}

/* Whoever makes the socket sets these, and no program sees it. IP_FREEBIND is the same flag as IPV6_FREEBIND. */
static __always_inline bool makers_option(__s32 level, __s32 name)
{
	if (level == SOL_IPV6_)
		return name == IPV6_FREEBIND_;
	return level == SOL_IP_ && (name == IP_LOCAL_PORT_RANGE_ || name == IP_FREEBIND_);
}

/* Is this IP_BIND_ADDRESS_NO_PORT of a socket that its maker has set it for, and is not setting it now, or of UDP,
 * where nobody sets it: no hook runs when the kernel chooses a port at the first send. graftd unsets it for a bind of
 * its own. */
static __always_inline bool is_no_port(const struct bpf_sockopt *ctx, __s32 level, __s32 name,
				       const struct graft_stamp *stamp)
{
	return level == SOL_IP_ && name == IP_BIND_ADDRESS_NO_PORT_ &&
	       (ctx->sk->protocol == IPPROTO_UDP ||
		(stamp->flags & STAMP_LATE && stamp->flags & (STAMP_VOUCHED | STAMP_COUNTED) && !settles(ctx->sk) &&
		 !prepares(ctx->sk)));
}

/* Is this option kept in the stamp? */
static __always_inline bool is_noted(__s32 level, __s32 name)
{
	return (level == SOL_SOCKET_ && (reuse_flag(name) || name == SO_BROADCAST_)) ||
	       (level == SOL_IP_ && name == IP_BIND_ADDRESS_NO_PORT_);
}

/* Does its value decide, or is it kept? A client sets half a dozen others for each connection. */
static __always_inline bool needs_a_look(__s32 level, __s32 name)
{
	switch (level) {
	case SOL_SOCKET_:
		return is_noted(level, name) || name == SO_PRIORITY_ || name == SO_MAX_PACING_RATE_ ||
		       is_timestamping(level, name);
	case SOL_TCP_:
		return name == TCP_SAVE_SYN_ || name == TCP_ULP_;
	}
	return true;
}

/* The tenant of a socket, accepted or not. */
static __always_inline __u32 owner_of(struct bpf_sock *sk, struct graft_stamp *stamp)
{
	struct graft_addr a = {};
	__u32 ip4;

	if (stamp)
		return stamp->tenant;
	if (direct_tenant())
		return direct_tenant();
	a.port = FIELD(sk->src_port);
	ip4 = FIELD(sk->src_ip4);
	a.ip[0] = FIELD(sk->src_ip6[0]);
	a.ip[1] = FIELD(sk->src_ip6[1]);
	a.ip[2] = FIELD(sk->src_ip6[2]);
	a.ip[3] = FIELD(sk->src_ip6[3]);
	if (FIELD(sk->family) == AF_INET)
		set_v4(&a, ip4);
	return tenant_at(&a);
}

SEC("cgroup/setsockopt")
int graft_setsockopt(struct bpf_sockopt *ctx)
{
	__s32 level = FIELD(ctx->level), name = FIELD(ctx->optname);
	struct graft_addr what = {};
	struct graft_stamp *stamp;
	__u32 value, option;
	bool hidden;
	int error = 0;

	if (!is_internet(ctx->sk))
		return ALLOW;
	option = option_of(ctx, level, name);
	if (option == OPTION_FREE && !needs_a_look(level, name))
		return ALLOW;
	stamp = stamp_on(ctx->sk);
	if (!stamp && is_noted(level, name))
		stamp = stamp_for_option(ctx->sk);
	if (stamp && stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	what.port = (__u32)level << 16 | (name & 0xffff);
	if (!stamp && level == SOL_IPV6_ && name == IPV6_FREEBIND_ && !in_connection(ctx->sk) && !ctx->sk->src_port &&
	    !direct_tenant())
		return ALLOW; /* a graft-sup of 0.1.0, before it stamps; what has no stamp cannot be bound */
	if (stamp && makers_option(level, name) &&
	    (!(stamp->flags & (STAMP_VOUCHED | STAMP_COUNTED)) || (prepares(ctx->sk) && direct_tenant())))
		return ALLOW; /* before anybody else has the socket, or before the bind of a direct container's */
	if (stamp && level == SOL_IPV6_ && name == IPV6_V6ONLY_ && waits(ctx->sk, stamp)) {
		bpf_set_retval(-EINVAL); /* as for a socket that is bound */
		return DENY;
	}
	if (option != OPTION_FREE)
		error = option == OPTION_UNKNOWN ? unknown_option(ctx, level) : refused_option(ctx, option);
	else if (level == SOL_SOCKET_ && name == SO_PRIORITY_ && int_value(ctx, &value) && value > 6)
		error = EPERM;
	else if (level == SOL_SOCKET_ && name == SO_MAX_PACING_RATE_ && outpaces(ctx, owner_of(ctx->sk, stamp)))
		error = EPERM;
	else if (level == SOL_TCP_ && name == TCP_SAVE_SYN_ && ctx->sk->protocol != IPPROTO_UDP &&
		 int_value(ctx, &value) && value == 2)
		error = EPERM; /* TCP_SAVED_SYN would have the hardware addresses of a host's device and its neighbour
				*/
	else if (level == SOL_TCP_ && name == TCP_ULP_ && ctx->sk->protocol != IPPROTO_UDP && ulp_forbidden(ctx))
		error = ENOENT;
	if (error)
		return deny(stamp ? stamp->tenant : direct_tenant(), DENIED(OP_SETSOCKOPT, REASON_OPTION), error, 0,
			    &what);
	if (is_timestamping(level, name))
		stamp_only(ctx);
	hidden = option != OPTION_FREE; /* the default of a refused one */
	if (!hidden && stamp && level == SOL_SOCKET_ && reuse_flag(name) && int_value(ctx, &value)) {
		set_flag(stamp, reuse_flag(name), value);
		hidden = ctx->sk->protocol == IPPROTO_UDP; /* the kernel must not set it yet: see set_reuse() */
	}
	if (stamp && is_no_port(ctx, level, name, stamp) && ctx->optlen >= 1) {
		set_flag(stamp, STAMP_NO_PORT, !(ctx->optlen < 4 ? all_zero(ctx, 1) : all_zero(ctx, 4)));
		hidden = true; /* the kernel has it set: late.bpf.h */
	}
	if (stamp && level == SOL_SOCKET_ && name == SO_BROADCAST_ && int_value(ctx, &value))
		set_flag(stamp, STAMP_BROADCAST, value); /* the kernel refuses it to nobody */
	if (hidden) {
		asm volatile(
			""
			: "+r"(ctx)); /* clang would compute an address in the context, which the verifier refuses */
		ctx->optlen = -1;     /* the kernel does not see it */
	}
	return ALLOW;
}

/* Answer whoever stamped the socket, and count the socket, which is counted once. */
static __always_inline int answer_probe(struct bpf_sockopt *ctx, struct graft_stamp *stamp)
{
	struct graft_probe *answer = ctx->optval;
	struct graft_usage *used = usage_of(stamp);

	if ((void *)(answer + 1) > ctx->optval_end || stamp->flags & (STAMP_VOUCHED | STAMP_COUNTED))
		return ALLOW;
	stamp->flags |= STAMP_VOUCHED;
	answer->tenant = stamp->tenant;
	answer->over = 0;
	if (used && !(stamp->flags & STAMP_COUNTED)) {
		stamp->flags |= STAMP_COUNTED;
		__sync_fetch_and_add(&used->sockets, 1);
		if (ctx->sk->protocol == IPPROTO_UDP)
			__sync_fetch_and_add(&used->udp, 1);
		answer->over =
			(__s64)used->sockets > (__s64)used->sockets_max || (__s64)used->udp > (__s64)used->udp_max;
	}
	ctx->optlen = sizeof(*answer);
	*(volatile __s32 *)&ctx->retval =
		0; /* volatile: clang would store both at once, which the verifier refuses */
	return ALLOW;
}

SEC("cgroup/getsockopt")
int graft_getsockopt(struct bpf_sockopt *ctx)
{
	__s32 level = FIELD(ctx->level), name = FIELD(ctx->optname);
	__u8 *value = ctx->optval, *end = ctx->optval_end;
	struct graft_tenant *tenant;
	struct graft_stamp *stamp;
	__u32 id;

	if (!is_internet(ctx->sk))
		return ALLOW;
	stamp = stamp_on(ctx->sk);
	if (level == GRAFT_LEVEL && name == GRAFT_PROBE && !stamp)
		stamp = stamp_for_option(ctx->sk); /* graftd is about to bind it, or to listen */
	if (level == GRAFT_LEVEL && name == GRAFT_PROBE && stamp)
		return answer_probe(ctx, stamp);
	if (reads_firewall(level, name) && ctx->retval != -ENOPROTOOPT)
		return stamp && stamp->tenant == GRAFT_EXEMPT;
	if (ctx->retval)
		return ALLOW;
	if (makers_option(level, name)) {
		for (int n = 0; n < 4; n++)
			if (value + n + 1 <= end && (!stamp || stamp->tenant != GRAFT_EXEMPT))
				value[n] = 0;
		if (level == SOL_IP_ && ctx->optlen > 1 && ctx->optlen < 4)
			ctx->optlen = 1; /* as the kernel shows a small number */
		return ALLOW;
	}
	if (level == SOL_IP_ && name == IP_BIND_ADDRESS_NO_PORT_ && value + 1 <= end &&
	    (!stamp || (stamp->tenant != GRAFT_EXEMPT && is_no_port(ctx, level, name, stamp))))
		*value = stamp && stamp->flags & STAMP_NO_PORT;
	if (level != SOL_SOCKET_)
		return ALLOW;
	if (name == SO_NETNS_COOKIE_ && value + 8 <= end) {
		if (direct_tenant())
			note_leash(direct_tenant());
		id = stamp ? stamp->tenant : was_made_says_option(ctx->sk) ? direct_tenant() : GRAFT_EXEMPT;
		tenant = bpf_map_lookup_elem(&tenants, &id);
		if (!stamp || stamp->tenant != GRAFT_EXEMPT)
			*(__u64 *)value = tenant ? tenant->netns_cookie : 0;
	}
	if ((name == SO_BINDTODEVICE_ || name == SO_BINDTOIFINDEX_) &&
	    (!stamp || stamp->tenant != GRAFT_EXEMPT)) /* by a link-local address it has one of the host's */
		for (int n = 0; n < IFNAMSIZ_; n++)
			if (value + n + 1 <= end)
				value[n] = 0;
	if (is_timestamping(level, name) && value + 2 <= end && (!stamp || stamp->tenant != GRAFT_EXEMPT))
		value[1] &= ~(SOF_TIMESTAMPING_OPT_TSONLY_ >> 8); /* its maker's, or stamp_only()'s */
	if (stamp && stamp->tenant != GRAFT_EXEMPT &&
	    (ctx->sk->protocol == IPPROTO_UDP || stamp->flags & STAMP_LATE) && reuse_flag(name) && value + 1 <= end)
		*value = !!(stamp->flags & reuse_flag(name));
	return ALLOW;
}

#endif
