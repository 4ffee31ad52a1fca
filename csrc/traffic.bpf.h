/* SPDX-License-Identifier: GPL-2.0 */
/*
 * traffic.bpf.h - what TCP connections have carried, added up when they are closed
 *
 * The kernel counts the bytes and segments of each TCP socket anyway (RFC 4898). They are read when a program closes
 * it, so a connection costs a few reads at its end, and no packet costs anything. graftd adds what is open by
 * sock_diag(7). What is sent after the close is what the program had written by then; what arrives then is not
 * counted.
 * To the kernel, a FIN is one byte more, of whichever side.
 */
#ifndef TRAFFIC_BPF_H
#define TRAFFIC_BPF_H

#include "led.bpf.h"
#include "made.bpf.h"
#include "slice.bpf.h"

struct tcp_sock {
	__u64 bytes_received;
	__u64 bytes_acked;
	__u32 segs_in;
	__u32 segs_out;
	__u32 write_seq;
	__u32 snd_una;
} __attribute__((preserve_access_index));

struct in6_addr___bytes {
	__u32 words[4];
};

struct sock_common___addressed {
	__u32 skc_rcv_saddr;
	struct in6_addr___bytes skc_v6_rcv_saddr;
} __attribute__((preserve_access_index));

/* The tenant that serves at @a by an ingress rule, at that address or at the wildcard; 0: nobody. */
static __always_inline __u32 server_at(struct graft_addr *a)
{
	struct graft_served_key key = {.port = a->port};
	struct graft_led *where = led_at(a);
	struct graft_served *found;

	if (where)
		return where->tenant;
	__builtin_memcpy(key.ip, a->ip, sizeof(key.ip));
	found = bpf_map_lookup_elem(&served_ports, &key);
	if (!found) {
		key.ip[0] = 0;
		key.ip[1] = 0;
		key.ip[3] = 0;
		if (!is_v4(a))
			key.ip[2] = 0;
		found = bpf_map_lookup_elem(&served_ports, &key);
	}
	if (!found && is_v4(a)) {
		key.ip[2] = 0; /* a dual-stack server */
		found = bpf_map_lookup_elem(&served_ports, &key);
	}
	return found ? found->tenant : 0;
}

/* The tenant whose an accepted socket is that was reached at @a; 0: nobody's. */
static __noinline __u32 tenant_at(struct graft_addr *a)
{
	struct graft_holder *holder;
	__u32 slice, *tenant;

	if (!a)
		return 0;
	if (in_slices(a)) {
		slice = slice_number(a);
		tenant = bpf_map_lookup_elem(&slices, &slice);
		if (!tenant) { /* a further address of the loopback has a number of its tenant's group */
			slice -= slice % SLICE_GROUP;
			tenant = bpf_map_lookup_elem(&slices, &slice);
		}
		return tenant ? *tenant : 0;
	}
	holder = holder_of(a);
	return holder && holder->tenant ? holder->tenant : server_at(a);
}

/* Where a socket was reached, in programs whose context is the kernel's socket. */
static __always_inline void read_local(struct bpf_sock *sk, struct graft_addr *a)
{
	struct sock_common___addressed *common = (void *)sk;

	if (sk->family == AF_INET)
		set_v4(a, BPF_CORE_READ(common, skc_rcv_saddr));
	else
		BPF_CORE_READ_INTO(&a->ip, common, skc_v6_rcv_saddr);
	/* not skc_num, which a connection that both sides have closed has lost */
	a->port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
}

/* The same, where it stands in the kernel's structure no more. */
struct carried {
	__u64 bytes_received;
	__u64 bytes_acked;
	__u32 segs_in;
	__u32 segs_out;
	__u32 write_seq;
	__u32 snd_una;
};

#define PART 304 /* bytes of struct tcp_sock: what is read is within 296 of them (Linux 6.18) */
#define AT(field) bpf_core_field_offset(struct tcp_sock, field)
#define FIRST(a, b) ((a) < (b) ? (a) : (b))
#define LAST(a, b) ((a) > (b) ? (a) : (b))
#define OF_ALL(which)                                                                                                \
	which(which(which(AT(bytes_received), AT(bytes_acked)), which(AT(segs_in), AT(segs_out))),                   \
	      which(AT(write_seq), AT(snd_una)))
#define TAKE(field) __builtin_memcpy(&of->field, part + (AT(field) - first), sizeof(of->field))

/*
 * Read what the kernel has counted. Each read costs 30 ns, so it is one, of the part that has all of it; it is
 * several where that is too long for the stack.
 */
static __always_inline void read_carried(struct bpf_sock *sk, struct carried *of)
{
	struct tcp_sock *tcp = (void *)sk;
	__u32 first = OF_ALL(FIRST);
	__u8 part[PART];

	if (OF_ALL(LAST) + sizeof(__u64) - first > PART) {
		of->bytes_received = BPF_CORE_READ(tcp, bytes_received);
		of->bytes_acked = BPF_CORE_READ(tcp, bytes_acked);
		of->segs_in = BPF_CORE_READ(tcp, segs_in);
		of->segs_out = BPF_CORE_READ(tcp, segs_out);
		of->write_seq = BPF_CORE_READ(tcp, write_seq);
		of->snd_una = BPF_CORE_READ(tcp, snd_una);
		return;
	}
	bpf_probe_read_kernel(part, sizeof(part), (void *)sk + first);
	TAKE(bytes_received);
	TAKE(bytes_acked);
	TAKE(segs_in);
	TAKE(segs_out);
	TAKE(write_seq);
	TAKE(snd_una);
}

/*
 * Add what a connection of @id's has carried. @accepted: it is none that a program has made, whose SYN is
 * acknowledged as a byte. What is not acknowledged yet is sent after the close.
 */
static __noinline int count_closed(struct bpf_sock *sk, __u32 id, bool accepted)
{
	struct graft_traffic *sum;
	struct carried of;

	read_carried(sk, &of);
	if (!accepted && !of.bytes_acked) /* it was never connected: not even its SYN was answered */
		return 0;
	sum = bpf_map_lookup_elem(&traffic, &id);
	if (!sum)
		return 0;
	__sync_fetch_and_add(accepted ? &sum->accepted : &sum->connected, 1);
	__sync_fetch_and_add(&sum->received, of.bytes_received);
	__sync_fetch_and_add(&sum->sent, of.bytes_acked + (__u32)(of.write_seq - of.snd_una) - !accepted);
	__sync_fetch_and_add(&sum->segments_received, of.segs_in);
	__sync_fetch_and_add(&sum->segments_sent, of.segs_out);
	return 0;
}

/* A program closes its last descriptor of a TCP socket, of the tenant @direct or of whoever serves where it is. */
static __always_inline void count_accepted(struct bpf_sock *sk, __u32 direct)
{
	struct graft_addr a = {};
	__u32 tenant = direct;

	if (!tenant) {
		read_local(sk, &a);
		tenant = tenant_at(&a);
	}
	if (tenant)
		count_closed(sk, tenant, true);
}

#endif
