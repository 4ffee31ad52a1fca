/* SPDX-License-Identifier: GPL-2.0 */
/*
 * options.bpf.h - socket options that would reach around the policy
 *
 * A grafted socket stands in the host's netns, so an option that picks a device, a mark, a source
 * address, a route or a multicast group picks among the host's. The list is by name, level by level;
 * everything else is the program's own business (ip(7), ipv6(7), socket(7), tcp(7), linux/in*.h).
 */
#ifndef OPTIONS_BPF_H
#define OPTIONS_BPF_H

#define SOL_SOCKET_ 1
#define SOL_IP_ 0
#define SOL_TCP_ 6
#define SOL_IPV6_ 41
#define IPV6_V6ONLY_ 26
#define IPV6_FREEBIND_ 78
#define SO_NETNS_COOKIE_ 71
#define SO_BINDTOIFINDEX_ 62
#define SO_PRIORITY_ 12
#define SO_REUSEADDR_ 2
#define SO_REUSEPORT_ 15
#define TCP_ULP_ 31
#define IP_FIREWALL_ 64	  /* netfilter's, multicast routing's, IPVS's: from here on, */
#define IPV6_FIREWALL_ 79 /* and here, but for the four below */

static __always_inline bool socket_option_forbidden(__u32 name)
{
	switch (name) {
	case 1:	 /* SO_DEBUG */
	case 25: /* SO_BINDTODEVICE */
	case 32: /* SO_SNDBUFFORCE */
	case 33: /* SO_RCVBUFFORCE */
	case 36: /* SO_MARK */
	case 62: /* SO_BINDTOIFINDEX */
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
	case 1:		/* IPV6_ADDRFORM: would turn the socket over to the IPv4 hooks half way */
	case 6:		/* IPV6_2292PKTOPTIONS */
	case 17:	/* IPV6_MULTICAST_IF */
	case 20:	/* IPV6_ADD_MEMBERSHIP */
	case 21:	/* IPV6_DROP_MEMBERSHIP */
	case 27:	/* IPV6_JOIN_ANYCAST */
	case 28:	/* IPV6_LEAVE_ANYCAST */
	case 32:	/* IPV6_FLOWLABEL_MGR: leases are the host's */
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
		return true;
	}
	return false;
}

#endif
