/* SPDX-License-Identifier: GPL-2.0 */
/*
 * options.bpf.h - socket options that would reach around the policy
 *
 * A grafted socket is in the host's netns, so an option that picks a device, a mark, a source address, a route or a
 * multicast group picks among the host's. The options of Linux 6.18 were looked at, and what is forbidden is listed
 * by number, level by level; every other one is the program's business (ip(7), ipv6(7), socket(7), tcp(7), udp(7),
 * linux/in*.h). An option whose value decides is looked at by its length, too: the kernel gets the copy that was
 * seen. What is in no list is refused: levels that neither TCP nor UDP has, and numbers beyond those looked at.
 */
#ifndef OPTIONS_BPF_H
#define OPTIONS_BPF_H

#include "report.bpf.h"

#define SOL_SOCKET_ 1
#define SOL_IP_ 0
#define SOL_TCP_ 6
#define SOL_UDP_ 17
#define SOL_IPV6_ 41
#define SOL_UDPLITE_ 136 /* to the kernel the same as SOL_UDP for a UDP socket */
#define SOL_TLS_ 282
#define IPV6_FREEBIND_ 78
#define IP_LOCAL_PORT_RANGE_ 51
#define SO_NETNS_COOKIE_ 71
#define SO_BINDTOIFINDEX_ 62
#define SO_PRIORITY_ 12
#define SO_BROADCAST_ 6
#define SO_REUSEADDR_ 2
#define SO_REUSEPORT_ 15
#define TCP_ULP_ 31
/* From here on options are netfilter's, multicast routing's and IPVS's; of IPv6 so are four below
 * (ipv6_reads_firewall). */
#define IP_FIREWALL_ 64
#define IPV6_FIREWALL_ 79

static __always_inline bool socket_option_forbidden(__u32 name)
{
	switch (name) {
	case 1:	 /* SO_DEBUG */
	case 25: /* SO_BINDTODEVICE */
	case 32: /* SO_SNDBUFFORCE */
	case 33: /* SO_RCVBUFFORCE */
	case 36: /* SO_MARK */
	case 62: /* SO_BINDTOIFINDEX */
	case 69: /* SO_PREFER_BUSY_POLL: holds back a device's interrupts, */
	case 70: /* SO_BUSY_POLL_BUDGET, likewise */
	case 75: /* SO_RCVMARK */
	case 82: /* SO_RCVPRIORITY */
		return true;
	}
	return false;
}

static __always_inline bool ip_option_forbidden(__u32 name)
{
	switch (name) {
	case 3:		/* IP_HDRINCL */
	case 4:		/* IP_OPTIONS */
	case 7:		/* IP_RETOPTS */
	case 15:	/* IP_FREEBIND */
	case 16:	/* IP_IPSEC_POLICY */
	case 17:	/* IP_XFRM_POLICY */
	case 19:	/* IP_TRANSPARENT */
	case 32:	/* IP_MULTICAST_IF */
	case 35 ... 41: /* IP_ADD_MEMBERSHIP .. IP_MSFILTER */
	case 42 ... 48: /* MCAST_JOIN_GROUP .. MCAST_MSFILTER */
	case 50:	/* IP_UNICAST_IF */
	case 51:	/* IP_LOCAL_PORT_RANGE */
		return true;
	}
	return name >= IP_FIREWALL_;
}

static __always_inline bool ipv6_option_forbidden(__u32 name)
{
	switch (name) {
	case 1:		/* IPV6_ADDRFORM: the IPv4 hooks would have to go on with the stamp of an IPv6 socket */
	case 6:		/* IPV6_2292PKTOPTIONS */
	case 17:	/* IPV6_MULTICAST_IF */
	case 20:	/* IPV6_ADD_MEMBERSHIP */
	case 21:	/* IPV6_DROP_MEMBERSHIP */
	case 27:	/* IPV6_JOIN_ANYCAST */
	case 28:	/* IPV6_LEAVE_ANYCAST */
	case 32:	/* IPV6_FLOWLABEL_MGR: a lease is the whole host's */
	case 34:	/* IPV6_IPSEC_POLICY */
	case 35:	/* IPV6_XFRM_POLICY */
	case 36:	/* IPV6_HDRINCL */
	case 42 ... 48: /* MCAST_* */
	case 50:	/* IPV6_PKTINFO, sticky source */
	case 54:	/* IPV6_HOPOPTS */
	case 55:	/* IPV6_RTHDRDSTOPTS */
	case 57:	/* IPV6_RTHDR */
	case 59:	/* IPV6_DSTOPTS */
	case 64:	/* IP6T_SO_SET_REPLACE */
	case 65:	/* IP6T_SO_SET_ADD_COUNTERS */
	case 75:	/* IPV6_TRANSPARENT */
	case 76:	/* IPV6_UNICAST_IF */
	case 78:	/* IPV6_FREEBIND */
		return true;
	}
	return name >= IPV6_FIREWALL_;
}

static __always_inline bool ipv6_reads_firewall(__u32 name)
{
	switch (name) {
	case 64: /* IP6T_SO_GET_INFO */
	case 65: /* IP6T_SO_GET_ENTRIES */
	case 68: /* IP6T_SO_GET_REVISION_MATCH */
	case 69: /* IP6T_SO_GET_REVISION_TARGET */
		return true;
	}
	return name >= IPV6_FIREWALL_;
}

static __always_inline bool tcp_option_forbidden(__u32 name)
{
	switch (name) {
	case 19: /* TCP_REPAIR */
	case 20: /* TCP_REPAIR_QUEUE */
	case 21: /* TCP_QUEUE_SEQ */
	case 22: /* TCP_REPAIR_OPTIONS */
	case 29: /* TCP_REPAIR_WINDOW */
	case 42: /* TCP_AO_REPAIR */
		return true;
	}
	return false;
}

static __always_inline bool udp_option_forbidden(__u32 name)
{
	switch (name) {
	case 1:		  /* UDP_CORK */
	case 10:	  /* UDPLITE_SEND_CSCOV, which the kernel refuses for UDP, */
	case 11:	  /* UDPLITE_RECV_CSCOV, likewise */
	case 101 ... 104: /* UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX, UDP_SEGMENT, UDP_GRO */
		return false;
	}
	return true; /* UDP_ENCAP: the kernel would answer and forward what arrives, past every hook */
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

/* Is this TCP_ULP anything but "tls"? The kernel takes the text up to a zero, which ends the copy that it then gets.
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

/*
 * Are this level and number among those that were looked at? They are those of Linux 6.18; the highest of each level
 * is here. A newer kernel's are refused as an older kernel refuses them, until somebody has looked at them.
 */
static __always_inline bool option_known(struct bpf_sockopt *ctx)
{
	__u32 name = ctx->optname;

	switch (ctx->level) {
	case SOL_SOCKET_:
		return name <= 84; /* SO_INQ */
	case SOL_IP_:
		return name <= 52 || name >= IP_FIREWALL_; /* IP_PROTOCOL */
	case SOL_IPV6_:
		return true; /* all from IPV6_FIREWALL_ on are forbidden */
	case SOL_TCP_:
		return name <= 46; /* TCP_DELACK_MAX_US */
	case SOL_UDP_:
	case SOL_UDPLITE_:
	case SOL_TLS_:
		return true;
	}
	return false;
}

static __always_inline bool option_forbidden(struct bpf_sockopt *ctx)
{
	__u32 value;

	switch (ctx->level) {
	case SOL_SOCKET_:
		if (ctx->optname == SO_PRIORITY_)
			return int_value(ctx, &value) && value > 6;
		return socket_option_forbidden(ctx->optname);
	case SOL_IP_:
		return ip_option_forbidden(ctx->optname);
	case SOL_IPV6_:
		return ipv6_option_forbidden(ctx->optname);
	case SOL_TCP_:
		return ctx->optname == TCP_ULP_ ? ulp_forbidden(ctx) : tcp_option_forbidden(ctx->optname);
	case SOL_UDP_:
	case SOL_UDPLITE_:
		return udp_option_forbidden(ctx->optname);
	}
	return false;
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

SEC("cgroup/setsockopt")
int graft_setsockopt(struct bpf_sockopt *ctx)
{
	struct graft_stamp *stamp = stamp_on(ctx->sk);
	struct graft_addr what = {};
	__u32 value;

	if ((stamp && stamp->tenant == GRAFT_EXEMPT) || !is_internet(ctx->sk))
		return ALLOW;
	what.port = (__u32)ctx->level << 16 | (ctx->optname & 0xffff);
	if (!option_known(ctx))
		return deny(stamp ? stamp->tenant : GRAFT_EXEMPT, DENIED(OP_SETSOCKOPT, REASON_OPTION), ENOPROTOOPT,
			    0, &what);
	if (!stamp && ctx->level == SOL_IPV6_ && ctx->optname == IPV6_FREEBIND_ && !in_connection(ctx->sk) &&
	    !ctx->sk->src_port)
		return ALLOW; /* a graft-sup of 0.1.0, before it stamps; what has no stamp cannot be bound */
	if (stamp && !(stamp->flags & (STAMP_VOUCHED | STAMP_COUNTED)) &&
	    ((ctx->level == SOL_IPV6_ && ctx->optname == IPV6_FREEBIND_) ||
	     (ctx->level == SOL_IP_ && ctx->optname == IP_LOCAL_PORT_RANGE_)))
		return ALLOW; /* whoever makes the socket sets them before anybody else has it */
	if (option_forbidden(ctx))
		return deny(stamp ? stamp->tenant : GRAFT_EXEMPT, DENIED(OP_SETSOCKOPT, REASON_OPTION), EPERM, 0,
			    &what);
	if (stamp && ctx->level == SOL_SOCKET_ && ctx->sk->protocol == IPPROTO_UDP && reuse_flag(ctx->optname) &&
	    int_value(ctx, &value)) {
		set_flag(stamp, reuse_flag(ctx->optname), value);
		ctx->optlen = -1; /* the kernel must not set it yet: see set_reuse() */
	}
	if (stamp && ctx->level == SOL_SOCKET_ && ctx->optname == SO_BROADCAST_ && int_value(ctx, &value))
		set_flag(stamp, STAMP_BROADCAST, value); /* the kernel refuses it to nobody */
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
	__u8 *value = ctx->optval, *end = ctx->optval_end;
	struct graft_tenant *tenant;
	struct graft_stamp *stamp;

	if (!is_internet(ctx->sk))
		return ALLOW;
	stamp = stamp_on(ctx->sk);
	if (ctx->level == GRAFT_LEVEL && ctx->optname == GRAFT_PROBE && stamp)
		return answer_probe(ctx, stamp);
	if ((ctx->level == SOL_IP_ && ctx->optname >= IP_FIREWALL_) ||
	    (ctx->level == SOL_IPV6_ && ipv6_reads_firewall(ctx->optname)))
		return stamp && stamp->tenant == GRAFT_EXEMPT;
	if (ctx->retval)
		return ALLOW;
	if (ctx->level == SOL_IP_ && ctx->optname == IP_LOCAL_PORT_RANGE_) { /* whoever made the socket has set it */
		for (int n = 0; n < 4; n++)
			if (value + n + 1 <= end && (!stamp || stamp->tenant != GRAFT_EXEMPT))
				value[n] = 0;
		if (ctx->optlen > 1 && ctx->optlen < 4)
			ctx->optlen = 1; /* as the kernel shows a small number */
		return ALLOW;
	}
	if (ctx->level != SOL_SOCKET_)
		return ALLOW;
	if (ctx->optname == SO_NETNS_COOKIE_ && value + 8 <= end) {
		tenant = stamp ? tenant_of(stamp) : NULL;
		*(__u64 *)value = tenant ? tenant->netns_cookie : 0;
	}
	if (stamp && ctx->sk->protocol == IPPROTO_UDP && reuse_flag(ctx->optname) && value + 1 <= end)
		*value = !!(stamp->flags & reuse_flag(ctx->optname));
	return ALLOW;
}

#endif
