/* SPDX-License-Identifier: GPL-2.0 */
/*
 * watch.bpf.h - what is allowed, told to who reads `graft log --all`
 *
 * Nobody does as a rule. Then a call costs one look at `config`, an array that needs no look-up. The tenant's flag is
 * looked at only while somebody reads.
 */
#ifndef WATCH_BPF_H
#define WATCH_BPF_H

#include "report.bpf.h"

static __always_inline bool somebody_watches(void)
{
	struct graft_config *conf;
	__u32 zero = 0;

	conf = bpf_map_lookup_elem(&config, &zero);
	return conf && conf->watched;
}

/* Report that the call of @op_proto was allowed, if the tenant is watched: @asked became @real. */
static __noinline int tell_watched(__u32 id, __u32 op_proto, const struct graft_addr *asked,
				   const struct graft_addr *real)
{
	struct graft_tenant *tenant = bpf_map_lookup_elem(&tenants, &id);

	if (tenant && asked && real && tenant->flags & TENANT_WATCHED)
		tell(id, DENIED(op_proto >> 16, REASON_ALLOWED), 0, op_proto & 0xffff, asked, real, true);
	return 0;
}

static __always_inline void tell_allowed(__u32 id, __u32 op, __u32 proto, const struct graft_addr *asked,
					 const struct graft_addr *real)
{
	if (somebody_watches())
		tell_watched(id, op << 16 | proto, asked, real);
}

#endif
