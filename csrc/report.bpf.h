/* SPDX-License-Identifier: GPL-2.0 */
/*
 * report.bpf.h - how a call is refused, and who is told
 */
#ifndef REPORT_BPF_H
#define REPORT_BPF_H

#include "maps.bpf.h"
#include "pids.bpf.h"

#define EPERM 1
#define ENOENT 2
#define EACCES 13
#define EEXIST 17
#define EINVAL 22
#define ENOPROTOOPT 92
#define EAFNOSUPPORT 97
#define EADDRINUSE 98
#define EADDRNOTAVAIL 99
#define ENETUNREACH 101
#define ENOBUFS 105
#define ECONNREFUSED 111
#define ERRNO_MASK 0xfff /* MAX_ERRNO, linux/err.h */

/* What hooks return. BIND_ALLOW lets a bind to a port below 1024 pass without CAP_NET_BIND_SERVICE as well. */
#define BIND_ALLOW 3
#define ALLOW 1
#define DENY 0
#define DROP_IN_SILENCE 2 /* of a packet: the send succeeds, and it is lost, as in a queue that is full */

/*
 * @verdict, within @most, as the verifier wants it of a hook. It does not look into a function that is called; clang
 * (21) does, sees that there is nothing else, and would leave out a plain mask.
 */
static __always_inline int bounded(int verdict, int most)
{
	asm volatile("" : "+r"(verdict));
	return verdict & most;
}

/*
 * The call fails with @error, an errno. The verifier of Linux 7.3 wants to see that it is one, which it cannot of
 * what another function has been given or has returned.
 */
static __always_inline int fail_with(int error)
{
	return bpf_set_retval(-bounded(error, ERRNO_MASK));
}

/*
 * How much is reported. A refusal costs the program that is refused; a report costs graftd, and a container may be
 * refused as often as it likes. So a tenant may report REFUSED_MAX refusals in a window of 2^WINDOW_SHIFT ns, 134 ms,
 * and all together REFUSED_ALL, but REFUSED_SURE each whatever others do. What it is allowed has a share of its own,
 * which costs nothing while nobody reads it: neither hides the other.
 */
#define WINDOW_SHIFT 27
#define REFUSED_SURE 2
#define REFUSED_MAX 64
#define REFUSED_ALL 256
#define ALLOWED_MAX 512
#define ALLOWED_ALL 1024

static __always_inline struct graft_reports *reports_of(__u32 tenant)
{
	return bpf_map_lookup_elem(&reports, &tenant);
}

static __always_inline void turn_window(struct graft_reports *of, __u64 window)
{
	if (of->window == window)
		return;
	of->window = window; /* another processor may do so as well, and a few reports are too many */
	of->refused = 0;
	of->allowed = 0;
}

/* May the tenant report one more? What it may not is counted. */
__noinline int may_report(__u32 tenant, __u32 allowed)
{
	struct graft_reports *own = reports_of(tenant), *all = reports_of(REPORTS_ALL);
	__u64 window = bpf_ktime_get_ns() >> WINDOW_SHIFT;
	bool enough;

	if (!own)
		own = reports_of(GRAFT_EXEMPT);
	if (!own || !all)
		return false;
	turn_window(own, window);
	turn_window(all, window);
	if (allowed)
		enough = *(volatile __u32 *)&own->allowed < ALLOWED_MAX &&
			 *(volatile __u32 *)&all->allowed < ALLOWED_ALL;
	else
		enough = *(volatile __u32 *)&own->refused < REFUSED_SURE ||
			 (*(volatile __u32 *)&own->refused < REFUSED_MAX &&
			  *(volatile __u32 *)&all->refused < REFUSED_ALL);
	if (!enough) {
		__sync_fetch_and_add(&own->dropped, 1);
		return false;
	}
	if (allowed) {
		__sync_fetch_and_add(&own->allowed, 1);
		__sync_fetch_and_add(&all->allowed, 1);
	} else {
		__sync_fetch_and_add(&own->refused, 1);
		__sync_fetch_and_add(&all->refused, 1);
	}
	return true;
}

static __always_inline void count_dropped(__u32 tenant)
{
	struct graft_reports *own = reports_of(tenant);

	if (own)
		__sync_fetch_and_add(&own->dropped, 1);
}

/*
 * Report to graftd. @comm: this type of program may ask for the command's name and pid, which sockops may not on
 * Linux 6.1.
 */
static __always_inline void tell(__u32 tenant, __u32 op_reason, int error, __u32 proto, const struct graft_addr *addr,
				 const struct graft_addr *real, bool comm)
{
	struct graft_denial *told;

	/* what is learnt is told once for each destination, of which the map has so many */
	if ((op_reason & 0xffff) != REASON_LEARNT && !may_report(tenant, (op_reason & 0xffff) >= REASON_CONVERTED))
		return;
	told = bpf_ringbuf_reserve(&denials, sizeof(*told), 0);
	if (!told) {
		count_dropped(tenant);
		return;
	}
	told->tenant = tenant;
	told->op = op_reason >> 16;
	told->reason = op_reason & 0xffff;
	told->error = error;
	told->proto = proto;
	__builtin_memset(&told->addr, 0, sizeof(told->addr));
	if (addr)
		told->addr = *addr;
	__builtin_memset(&told->real, 0, sizeof(told->real));
	if (real)
		told->real = *real;
	__builtin_memset(told->comm, 0, sizeof(told->comm));
	if (comm)
		bpf_get_current_comm(told->comm, sizeof(told->comm));
	told->when = bpf_ktime_get_boot_ns();
	told->pid = comm ? current_pid() : 0;
	told->pad = 0;
	bpf_ringbuf_submit(told, 0);
}

static __always_inline void count_refusal(__u32 tenant, __u32 op_reason)
{
	struct graft_counter_key key = {.tenant = tenant, .op = op_reason >> 16, .reason = op_reason & 0xffff};
	__u64 one = 1, *count;

	count = bpf_map_lookup_elem(&counters, &key);
	if (!count && !bpf_map_lookup_elem(&tenants, &key.tenant)) {
		key.tenant = GRAFT_EXEMPT; /* sockets outlive their tenant, and its counters must not */
		count = bpf_map_lookup_elem(&counters, &key);
	}
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&counters, &key, &one, BPF_NOEXIST);
}

/* A refusal is counted also where it is not reported. */
static __always_inline void count_and_tell(__u32 tenant, __u32 op_reason, int error, __u32 proto,
					   const struct graft_addr *addr, bool comm)
{
	count_refusal(tenant, op_reason);
	tell(tenant, op_reason, error, proto, addr, NULL, comm);
}

/* The call fails with @error, an errno, and graftd is told. */
__noinline int report_refusal(__u32 tenant, __u32 op_reason, int error, __u32 proto, struct graft_addr *addr)
{
	count_and_tell(tenant, op_reason, error, proto, addr, true);
	return fail_with(error);
}

/* Refuse the call: report_refusal(). */
static __always_inline int deny(__u32 tenant, __u32 op_reason, int error, __u32 proto, struct graft_addr *addr)
{
	report_refusal(tenant, op_reason, error, proto, addr);
	return DENY;
}

#define DENIED(op, reason) ((op) << 16 | (reason))

/* Where the tenant is verbose, report that @asked became, or leaves from, @real. */
static __noinline int tell_conversion(__u32 id, struct graft_tenant *tenant, __u32 op_proto, struct graft_addr *asked,
				      struct graft_addr *real)
{
	if (tenant && asked && real && tenant->flags & TENANT_VERBOSE)
		tell(id, DENIED(op_proto >> 16, REASON_CONVERTED), 0, op_proto & 0xffff, asked, real, true);
	return 0;
}

/* A socket without a stamp is an accepted one that was disconnected: it may not begin anew. */
static __always_inline int deny_unstamped(struct bpf_sock_addr *ctx, __u32 op, struct graft_addr *a)
{
	return deny(GRAFT_EXEMPT, DENIED(op, REASON_UNSTAMPED), EPERM, ctx->protocol, a);
}

#endif
