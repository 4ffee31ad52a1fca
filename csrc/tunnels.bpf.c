// SPDX-License-Identifier: GPL-2.0
/*
 * tunnels.bpf.c - no kernel tunnel takes a container's UDP socket
 *
 * With owners.bpf.h this is what needs programs that modify a return value (BPF_MODIFY_RETURN).
 *
 * A device of kind gtp or ovpn is given a UDP socket by its descriptor (IFLA_GTP_FD0, OVPN_A_PEER_SOCKET), of
 * whatever netns, and what it sends by that carries no socket and runs no hook of graft.bpf.c. Who may make such a
 * device needs CAP_NET_ADMIN over its netns alone, which a new user namespace gives. So a process of a container
 * makes none: this program sees each netlink message (security_netlink_send(), security/security.c; a program that
 * modifies its return value needs no BPF in the list of LSMs) and refuses RTM_NEWLINK of a kind that is not known to
 * be harmless. The message is the kernel's copy, so that nothing changes between look and use.
 *
 * A process of a container is one under a seccomp listener, graft's or another's. Everybody else returns at once.
 */
#include <linux/bpf.h>
#include <linux/if_link.h>
#include <linux/rtnetlink.h>
#include <linux/errno.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include "listener.bpf.h"
#include "owners.bpf.h"

#define STEPS (1 << 15) /* messages and attributes of one send, which has at most 212,992 bytes of 16 and more */

struct sock {
	__u16 sk_protocol;
} __attribute__((preserve_access_index));

struct sk_buff {
	unsigned char *data;
	unsigned int len;
} __attribute__((preserve_access_index));

/*
 * Kinds that take no socket of another netns. l2tp does, but compares the netns (l2tp_validate_socket()). The others
 * make their own sockets, in their own netns, or have none. A kind that is newer than this list is refused.
 */
union kind {
	char name[16];
	__u64 word[2];
};

static const union kind harmless[] = {
	{"amt"},    {"bareudp"},   {"batadv"},	{"bond"},    {"bridge"},    {"dsa"},	{"dummy"},
	{"erspan"}, {"geneve"},	   {"gre"},	{"gretap"},  {"hsr"},	    {"ifb"},	{"ip6erspan"},
	{"ip6gre"}, {"ip6gretap"}, {"ip6tnl"},	{"ipip"},    {"ipoib"},	    {"ipvlan"}, {"ipvtap"},
	{"lowpan"}, {"macsec"},	   {"macvlan"}, {"macvtap"}, {"netkit"},    {"nlmon"},	{"pfcp"},
	{"sit"},    {"team"},	   {"tun"},	{"vcan"},    {"veth"},	    {"vlan"},	{"vrf"},
	{"vti"},    {"vti6"},	   {"vxcan"},	{"vxlan"},   {"wireguard"}, {"xfrm"},	{"vsockmon"},
};
#define HARMLESS (sizeof(harmless) / sizeof(harmless[0]))

struct walk {
	unsigned char *data;
	__u32 at, end;	   /* of what was sent */
	__u32 message_end; /* of the RTM_NEWLINK around @at; not beyond it: there is none */
	__u32 info_end;	   /* of its IFLA_LINKINFO, likewise */
	bool refused;
};

static bool is_harmless(const unsigned char *at, __u32 length)
{
	union kind kind = {};
	__u32 n;
	bool ended = false;

	if (bpf_probe_read_kernel_str(kind.name, sizeof(kind.name), at) < 0)
		return false;
	for (n = 0; n < sizeof(kind.name); n++) { /* what the attribute has, and zeros */
		ended |= n >= length || !kind.name[n];
		if (ended)
			kind.name[n] = 0;
	}
	for (n = 0; n < HARMLESS; n++)
		if (kind.word[0] == harmless[n].word[0] && kind.word[1] == harmless[n].word[1])
			return true;
	return false;
}

/* One step through messages and attributes, as the kernel goes (netlink_rcv_skb(), nla_parse()); not 0: the end. */
static long step(__u32 n, struct walk *walk)
{
	struct nlmsghdr message = {};
	struct nlattr attribute = {};
	__u32 length, at = walk->at;

	(void)n;
	if (at >= walk->message_end) {
		if (at >= walk->end || walk->end - at < sizeof(message))
			return 1;
		if (bpf_probe_read_kernel(&message, sizeof(message), walk->data + at))
			return 1;
		length = message.nlmsg_len;
		if (length < sizeof(message) || length > walk->end - at)
			return 1;
		if (message.nlmsg_type != RTM_NEWLINK) {
			walk->at = at + NLMSG_ALIGN(length);
			return 0;
		}
		walk->message_end = at + length;
		walk->info_end = 0;
		walk->at = at + NLMSG_LENGTH(sizeof(struct ifinfomsg));
		return 0;
	}
	length = (at < walk->info_end ? walk->info_end : walk->message_end) - at;
	if (length < sizeof(attribute) || bpf_probe_read_kernel(&attribute, sizeof(attribute), walk->data + at) ||
	    attribute.nla_len < sizeof(attribute) || attribute.nla_len > length) { /* no attribute any more */
		if (at < walk->info_end)
			walk->at = walk->info_end = NLMSG_ALIGN(walk->info_end);
		else
			walk->at = walk->message_end = NLMSG_ALIGN(walk->message_end);
		return 0;
	}
	if (at < walk->info_end) {
		if ((attribute.nla_type & NLA_TYPE_MASK) == IFLA_INFO_KIND &&
		    !is_harmless(walk->data + at + sizeof(attribute), attribute.nla_len - sizeof(attribute))) {
			walk->refused = true;
			return 1;
		}
	} else if ((attribute.nla_type & NLA_TYPE_MASK) == IFLA_LINKINFO) {
		walk->info_end = at + attribute.nla_len;
		walk->at = at + sizeof(attribute);
		return 0;
	}
	walk->at = at + NLMSG_ALIGN(attribute.nla_len);
	return 0;
}

SEC("fmod_ret/security_netlink_send")
int guard_tunnels(__u64 *arguments)
{
	struct sock *sk = (struct sock *)arguments[0];
	struct sk_buff *skb = (struct sk_buff *)arguments[1];
	struct walk walk = {};
	int ret = arguments[2];
	__u32 end, zero;

	if (ret || sk->sk_protocol != NETLINK_ROUTE || !listener_address())
		return ret;
	/*
	 * Linux 6.1's verifier goes through step() once, with what it knows of @walk, and removes what is not reached
	 * then. So it must not know where the walk begins.
	 */
	zero = end = skb->len;
	asm volatile("%[zero] -= %[end]" : [zero] "+r"(zero) : [end] "r"(end));
	walk.data = skb->data;
	walk.end = end;
	walk.at = walk.message_end = walk.info_end = zero;
	if (bpf_loop(STEPS, step, &walk, 0) == STEPS || walk.refused)
		return -EPERM;
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
