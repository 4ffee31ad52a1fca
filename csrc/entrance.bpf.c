// SPDX-License-Identifier: GPL-2.0
/*
 * entrance.bpf.c - the program of sk_lookup in a container's netns: what is dialled there goes to graftd's listener
 *
 * sk_lookup tells a program neither netns nor task. So each netns has a program of its own, which differs in one map,
 * and it is small: graftd loads it for every container (graft/kernel/entrance.py). It selects the listener of its
 * netns. The program behind it, of forward.bpf.h, is common to all: it reads from the listener whose netns this is,
 * and takes the selection back where the container has no server.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>

/* The listener in the netns. It is not held: the entry goes when the last descriptor of the socket is closed. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} entrance SEC(".maps");

/* pinned, of graft.bpf.c */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} forwards SEC(".maps");

SEC("sk_lookup")
int graft_entrance(struct bpf_sk_lookup *ctx)
{
	__u32 zero = 0;
	struct bpf_sock *sk;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	sk = bpf_map_lookup_elem(&entrance, &zero);
	if (!sk)
		return SK_PASS;
	bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	bpf_tail_call(ctx, &forwards, 0);
	bpf_sk_assign(ctx, NULL, BPF_SK_LOOKUP_F_REPLACE); /* there is no program: graft is being uninstalled */
	return SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
