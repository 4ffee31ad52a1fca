/* SPDX-License-Identifier: GPL-2.0 */
/*
 * datagrams.bpf.h - what UDP sockets carry, where the administrator wants to know
 *
 * The kernel counts nothing of a UDP socket. To count costs each datagram 65 to 75 ns on either side, of which a
 * flood of them would lose some hundredths. So it is done where graft.toml says `count_datagrams`; elsewhere a
 * datagram costs a look at a flag.
 */
#ifndef DATAGRAMS_BPF_H
#define DATAGRAMS_BPF_H

#include "maps.bpf.h"

#define HEADERS4 28 /* of IP without options, and of UDP */
#define HEADERS6 48

static __always_inline bool counts_datagrams(void)
{
	struct graft_config *conf;
	__u32 zero = 0;

	conf = bpf_map_lookup_elem(&config, &zero);
	return conf && conf->counts;
}

/* Count a datagram of the socket of @skb. */
static __noinline int count_datagram(struct __sk_buff *skb, __u32 headers, bool out)
{
	struct bpf_sock *sk = skb->sk;
	struct graft_datagrams *sum;
	struct graft_stamp *stamp;
	__u32 tenant;

	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	stamp = stamp_on(sk);
	if (!stamp)
		return 0;
	tenant = stamp->tenant;
	sum = bpf_map_lookup_elem(&datagrams, &tenant);
	if (!sum)
		return 0;
	__sync_fetch_and_add(out ? &sum->bytes_sent : &sum->bytes_received, (__u64)(skb->len - headers));
	__sync_fetch_and_add(out ? &sum->sent : &sum->received, 1);
	return 0;
}

/* Count the datagram of IP and UDP that begins with @packet, where datagrams are counted. */
static __always_inline void count_if_asked(struct __sk_buff *skb, const __u8 *packet, bool out)
{
	if (counts_datagrams())
		count_datagram(skb, packet[0] >> 4 == 4 ? HEADERS4 : HEADERS6, out);
}

#endif
