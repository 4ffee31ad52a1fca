/* SPDX-License-Identifier: GPL-2.0 */
/*
 * receive.bpf.h - datagrams: whom a UDP socket has sent to, who may send to it, and where its own may arrive; and who
 * may not be connected to
 *
 * A UDP socket that nobody bound to a port of a rule's is on the host's wildcard, at a port that the kernel chose: it
 * is there because it sends. Only the hosts that it has sent to reach it, from any port, because a TFTP server
 * answers from another one; after a send to a group everybody does. The kernel binds such a socket before any hook
 * runs, so this holds with `--egress none`, too, where it can have sent to nobody.
 */
#ifndef RECEIVE_BPF_H
#define RECEIVE_BPF_H

#include "answer.bpf.h"
#include "datagrams.bpf.h"
#include "numbers.bpf.h"

/* Or, with SO_BROADCAST, what looks like a subnet's broadcast address. */
static __always_inline bool is_group(const struct graft_stamp *stamp, const struct graft_addr *a)
{
	return names_a_group(a) ||
	       (is_v4(a) && stamp->flags & STAMP_BROADCAST && (bpf_ntohl(a->ip[3]) & 0xff) == 0xff);
}

static __always_inline bool is_peer(struct graft_peers *of, const struct graft_addr *a)
{
	__u32 bits = hash_addr(a, 0, of->key), low = bits % PEERS_BITS, high = (bits >> 16) % PEERS_BITS;

	return of->anybody || (of->bits[low / 64] >> low % 64 & 1 && of->bits[high / 64] >> high % 64 & 1);
}

static __always_inline void add_peer(struct graft_peers *of, const struct graft_addr *a)
{
	__u32 bits = hash_addr(a, 0, of->key), low = bits % PEERS_BITS, high = (bits >> 16) % PEERS_BITS;

	__sync_fetch_and_or(&of->bits[low / 64], 1ull << low % 64);
	__sync_fetch_and_or(&of->bits[high / 64], 1ull << high % 64);
}

/*
 * Remember that this socket sends to @a from @source, and count its port. A server on the host's wildcard answers an
 * address of the container's own from that address, because the host has it. False: the tenant has too many ports.
 * The kernel has bound the socket before; it keeps its port until it is closed, and its datagrams do not leave.
 */
__noinline int note_sent(struct bpf_sock_addr *ctx, struct graft_addr *a, struct graft_addr *source)
{
	struct graft_stamp *stamp = stamp_of(ctx->sk);
	struct graft_addr from = {};
	struct graft_peers *of;
	__u64 key;

	if (!a || !stamp || !ctx->sk)
		return false;
	if (is_where_decided(ctx->sk, stamp))
		return true;
	if (source)
		from = *source; /* on this stack: Linux 6.1 takes no argument for a key */
	if (stamp->flags & STAMP_ABROAD && !is_any(from.ip) && is_own_address(stamp->tenant, &from))
		return true; /* whoever answers there is let in */
	of = bpf_sk_storage_get(&peers, ctx->sk, NULL, 0);
	if (!of) {
		if (!hold_port(ctx, stamp->tenant))
			return false;
		of = bpf_sk_storage_get(&peers, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
		if (!of)
			return false;
		key = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32() | 1;
		/* of threads that send at the same time, one comes first */
		if (!__sync_val_compare_and_swap(&of->key, 0, key) &&
		    !(stamp->flags & (STAMP_PRIVATE | STAMP_INGRESS | STAMP_EPHEMERAL | STAMP_CONNECTED)))
			name_sender(ctx, stamp);
	}
	if (source && holder_of(&from)) {
		if (!is_peer(of, &from))
			add_peer(of, &from);
		enter_udp(ctx->sk, stamp->tenant, ctx->sk->src_port); /* for the answers */
	}
	if (is_group(stamp, a))
		of->anybody = 1;
	else if (!in_slices(a) && !is_peer(of, a))
		add_peer(of, a);
	return true;
}

/*
 * Does this datagram come from the socket's own container: from its private loopback, or from a socket of it that has
 * its address, which others leave from as well when they send there?
 */
static __noinline int is_from_inside(struct __sk_buff *skb, struct graft_stamp *stamp, struct graft_addr *from,
				     struct graft_addr *to)
{
	struct bpf_sock_tuple tuple = {};
	struct graft_stamp *theirs;
	struct graft_tenant *tenant;
	struct bpf_sock *sender;
	bool inside;
	__u32 size;

	if (!stamp || !from || !to)
		return false;
	if (in_slices(from)) {
		tenant = tenant_of(stamp);
		return tenant && slice_number(from) == tenant->slice;
	}
	if (!same_ip(from->ip, to->ip) || !same_ip(to->ip, stamp->local_real.ip))
		return false;
	size = tuple_of(&tuple, to, from);
	sender = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sender)
		return false;
	theirs = stamp_on(sender);
	inside = theirs && theirs->tenant == stamp->tenant;
	bpf_sk_release(sender);
	return inside;
}

/* Is @to the address on its container's network at which this socket is reached? */
static __always_inline bool is_for_network(const struct graft_stamp *stamp, const struct graft_addr *to)
{
	if (!(stamp->flags & STAMP_ABROAD))
		return false;
	return is_any(stamp->local.ip) ? is_own_address(stamp->tenant, to) : same_ip(stamp->local.ip, to->ip);
}

/* A datagram has come from the address that it goes to: remember whose it is, who may be gone when it is read. */
__noinline int note_called(struct __sk_buff *skb)
{
	struct graft_addr from, to, name;
	struct bpf_sock_tuple tuple = {};
	struct graft_stamp *stamp, *theirs;
	struct bpf_sock *sk = skb->sk, *sender;
	struct graft_told *of;
	bool found;
	__u32 size;

	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	stamp = stamp_on(sk);
	if (!sk || !stamp || !read_udp(skb, &from, &to) || !same_ip(from.ip, to.ip) ||
	    !is_own_address(stamp->tenant, &to))
		return 0;
	size = tuple_of(&tuple, &to, &from);
	sender = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sender)
		return 0;
	name = from;
	theirs = stamp_on(sender);
	found = theirs && sender->dst_port && name_connected(theirs, stamp->tenant, &name);
	bpf_sk_release(sender);
	of = bpf_sk_storage_get(&called, sk, NULL, found ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	if (!of)
		return 0;
	for (int n = 0; n < TOLD_MAX; n++)
		if (same_addr(&of->of[n].real, &from)) {
			of->of[n].asked = name; /* its own, if the container has the port by now */
			return 0;
		}
	if (found)
		put_told(of, &from, &name);
	return 0;
}

/* Is the container still there by whose rule this server was bound? Somebody else may have the server by now. */
static __always_inline bool has_tenant(struct graft_stamp *stamp)
{
	return tenant_of(stamp);
}

/* Is it connected to whom this datagram is from? The kernel has found the socket before another thread connected it.
 */
static __always_inline bool is_from_peer(const struct bpf_sock *sk, const struct graft_addr *from)
{
	__u32 ip[4];

	if (!sk->dst_port || bpf_ntohs((__u16)sk->dst_port) != from->port)
		return false;
	/* clang would compute one address for both families, which the verifier refuses */
	if (is_v4(from)) {
		ip[3] = sk->dst_ip4;
		asm volatile("" : "+r"(ip[3]));
		return ip[3] == from->ip[3];
	}
	ip[0] = sk->dst_ip6[0];
	ip[1] = sk->dst_ip6[1];
	ip[2] = sk->dst_ip6[2];
	ip[3] = sk->dst_ip6[3];
	return same_ip(ip, from->ip);
}

/* What a UDP socket of a container receives. Senders to the slices are judged when they send. */
static __always_inline int receive_datagram(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct graft_addr from, to;
	struct graft_stamp *stamp;
	struct graft_peers *of;

	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	stamp = stamp_on(sk);
	if (!sk || !stamp || stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	if (is_where_decided(sk, stamp)) {
		if (sk->protocol == IPPROTO_UDP && !sk->dst_port && stamp->flags & STAMP_INGRESS &&
		    is_any(stamp->local_real.ip))
			note_asked(skb);
		return has_tenant(stamp);
	}
	if (sk->protocol != IPPROTO_UDP)
		return ALLOW;
	if (!read_udp(skb, &from, &to))
		return DENY;
	if (is_from_peer(sk, &from))
		return ALLOW;
	if (in_slices(&to) || is_for_network(stamp, &to) || is_from_inside(skb, stamp, &from, &to))
		return ALLOW;
	of = bpf_sk_storage_get(&peers, sk, NULL, 0);
	if (!of && !(stamp->flags & STAMP_VOUCHED))
		return ALLOW; /* of a graftd before an upgrade: nobody knows whom it has sent to */
	return of && is_peer(of, &from);
}

/*
 * Does this listener listen where its bind was decided? graft_sockops() ties all others to an interface that does not
 * exist. The kernel refuses that for a socket that has a device already, by a link-local peer or destination, if who
 * calls listen() lacks CAP_NET_RAW. So nobody reaches such a listener either.
 */
static __always_inline int receive_connection(struct bpf_sock *sk)
{
	struct graft_stamp *stamp;

	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return ALLOW;
	stamp = stamp_of(sk);
	if (!stamp || stamp->tenant == GRAFT_EXEMPT)
		return !!stamp;
	return is_where_decided(sk, stamp) && has_tenant(stamp);
}

SEC("cgroup_skb/ingress")
int graft_ingress(struct __sk_buff *skb)
{
	__u8 *packet = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct bpf_sock *sk = skb->sk;
	int verdict;

	if (sk && sk->state == BPF_TCP_LISTEN)
		return receive_connection(sk);
	if (packet + 20 > end)
		return ALLOW;
	if (packet[0] >> 4 == 4 ? packet[9] == IPPROTO_TCP : packet[6] == IPPROTO_TCP)
		return ALLOW;
	if (packet[0] >> 4 == 4 ? *(__be32 *)(packet + 12) == *(__be32 *)(packet + 16)
				: packet + 40 <= end && *(__u64 *)(packet + 16) == *(__u64 *)(packet + 32))
		note_called(skb);
	verdict = receive_datagram(skb);
	if (verdict == ALLOW)
		count_if_asked(skb, packet, false);
	return verdict;
}

/*
 * Has this socket connected to @to, an address of the tenant's whose socket is found there? The kernel has given it
 * that address for its own. On a network it has one by which the receiver knows it (show_connected()); whoever has
 * none would be taken for the receiver.
 */
static __always_inline bool is_led_there(const struct graft_stamp *stamp, const struct graft_stamp *found,
					 struct graft_addr *to)
{
	struct graft_egress *rule;

	if (!(stamp->flags & STAMP_CONNECTED) || !same_addr(to, &stamp->peer_real) ||
	    !is_own_address(found->tenant, to))
		return false;
	rule = egress_rule(stamp->tenant, to);
	return rule && is_own_address(stamp->tenant, (struct graft_addr *)rule);
}

/* Is the source an address of another container's? It has that where another thread connects the socket there. */
static __always_inline bool has_taken_source(const struct graft_stamp *stamp, const struct graft_addr *from)
{
	struct graft_holder *holder = find_holder(from);

	return holder && holder->tenant != stamp->tenant && holder->tenant != GRAFT_EXEMPT;
}

/* A datagram that leaves this host. */
__noinline int leave_by_wire(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct graft_addr from, to;
	struct graft_stamp *stamp;

	if (!read_udp(skb, &from, &to) || !may_be_owned(&from))
		return ALLOW;
	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	stamp = stamp_on(sk);
	if (!stamp || stamp->tenant == GRAFT_EXEMPT || stamp->place)
		return ALLOW;
	return has_taken_source(stamp, &from) ? DROP_IN_SILENCE : ALLOW;
}

/* Has a hook decided that this socket sends to @to, an address of the host's loopback? */
__noinline int was_decided(struct __sk_buff *skb, struct graft_addr *to)
{
	struct graft_service_key service = {};
	struct bpf_sock *sk = skb->sk;
	struct graft_tenant *tenant;
	struct graft_stamp *stamp;
	struct graft_told *of;

	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	stamp = stamp_on(sk);
	if (!sk || !stamp || !to)
		return false;
	service.tenant = stamp->tenant;
	service.port = to->port;
	__builtin_memcpy(service.ip, to->ip, sizeof(service.ip));
	if (bpf_map_lookup_elem(&services, &service) || has_asked(stamp->tenant, to))
		return true;
	if (stamp->flags & (STAMP_CONNECTED | STAMP_PERMIT) && same_addr(to, &stamp->peer_real))
		return true;
	tenant = tenant_of(stamp);
	if (tenant && tenant->flags & TENANT_STRICT)
		return true;
	of = bpf_sk_storage_get(&told, sk, NULL, 0);
	if (!of)
		return false;
	for (int n = 0; n < TOLD_MAX; n++)
		if (same_addr(&of->of[n].real, to))
			return true;
	return false;
}

/*
 * May this datagram arrive where it goes? A socket connects to its container's loopback, and sends long after who was
 * there has gone: then another program may have the port. A server of the host that is bound to the device lo is
 * found here alone, where the device is known. From an address of the container's own to the same address it may
 * answer a program of the host's that has asked from there; whoever else is there is not seen. What goes to no
 * address of this host's would arrive at whoever is on the wildcard: the device is a control message's, or the route
 * that of another destination.
 */
__noinline int leave_by_loopback(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk, *receiver;
	struct graft_service_key service = {};
	struct bpf_sock_tuple tuple = {};
	struct graft_stamp *stamp, *theirs;
	bool ours = false, own, within;
	struct graft_addr from, to;
	__u32 size, tenant;

	if (!read_udp(skb, &from, &to))
		return ALLOW;
	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	stamp = stamp_on(sk);
	if (!stamp || stamp->tenant == GRAFT_EXEMPT)
		return ALLOW;
	tenant = stamp->tenant;
	within = is_loopback(&to) || in_slices(&to);
	if (!within && !stamp->place && !names_a_group(&to) && !bpf_map_lookup_elem(&locals, to.ip) &&
	    !holder_of(&to))
		return DENY;
	own = same_ip(from.ip, to.ip) && holder_of(&to);
	if (!own && !stamp->place && has_taken_source(stamp, &from))
		return DROP_IN_SILENCE;
	if (!own && !within && !in_slices(&from))
		return !is_loopback(&from) || was_decided(skb, &to) ? ALLOW : DROP_IN_SILENCE;
	size = tuple_of(&tuple, &from, &to);
	receiver = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!receiver)
		return ALLOW;
	theirs = stamp_on(receiver);
	ours = theirs && (theirs->tenant == tenant || theirs->tenant == GRAFT_EXEMPT ||
			  (own && is_led_there(stamp, theirs, &to)));
	bpf_sk_release(receiver);
	if (ours)
		return ALLOW;
	if (own)
		return has_asked(tenant, &to) ? ALLOW : DROP_IN_SILENCE;
	if (!in_slices(&from) && !in_slices(&to))
		return was_decided(skb, &to) ? ALLOW : DENY;
	service.tenant = tenant;
	service.port = to.port;
	__builtin_memcpy(service.ip, to.ip, sizeof(service.ip));
	return bpf_map_lookup_elem(&services, &service) ? ALLOW : DENY;
}

#endif
