// SPDX-License-Identifier: GPL-2.0
/*
 * graft.bpf.c - the policy, inside the very calls that bind, connect and send
 *
 * Theory of operation
 *
 * A grafted socket is made by graftd in the host's network namespace and stamped (socket storage) with
 * its tenant before the container sees it. The programs here run for sockets created in graftd's cgroup,
 * wherever they are used later. An accepted socket inherits the cgroup but not the stamp, which costs a
 * server nothing: it may do what a connection does, the option policy holds for it, and any other use (it can
 * be disconnected and connected, bound or made to listen again) is refused. graftd's own sockets carry the
 * stamp GRAFT_OWN. The guard alone sits on the cgroup root and runs for everybody: it keeps unstamped sockets out of
 * the containers' private loopback.
 *
 * bind      an ingress rule names the host address that a bind to ADDR:PORT becomes; loopback and wildcard
 *           binds without a rule go to the tenant's block (slice.bpf.h); anything else is refused.
 * connect,  loopback destinations are looked up among the tenant's own sockets: a socket table look-up
 * send      (bpf_sk_lookup_*) and its stamp say whose server it is, so no table of bound ports has to be
 *           kept true, and a host's wildcard listener is never taken for the container's. Everything else
 *           is matched against the egress rules, and leaves from the rule's address.
 * get*name, show what the program asked for, from the stamp.
 * recvmsg
 *
 * Facts that this rests on (each proved by a test under tests/kernel): an accepted socket is in its listener's
 * cgroup; v4-mapped addresses arrive in the *6 hooks for bind and connect, in sendmsg4 for sends; MPTCP runs the
 * hooks on an unstamped subflow; listen() without bind runs no hook but sockops'; a connected send with a
 * control message arrives with family 0.
 */
#include "bind.bpf.h"
#include "connect.bpf.h"
#include "send.bpf.h"
#include "show.bpf.h"
#include "options.bpf.h"
#include "guard.bpf.h"

char LICENSE[] SEC("license") = "GPL";
