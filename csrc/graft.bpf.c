// SPDX-License-Identifier: GPL-2.0
/*
 * graft.bpf.c - the policy, inside the calls that bind, connect and send
 *
 * Theory of operation
 *
 * graftd makes a grafted socket in the host's network namespace. It stamps the socket with its tenant (socket
 * storage) before the container sees it. These programs run for every socket that was created in graftd's cgroup,
 * wherever it is used later. An accepted socket inherits the cgroup but not the stamp, so that accept() costs a
 * server nothing. It may do what a connection does, and the policy of options holds for it. It could be disconnected
 * and then bound, connected or made to listen again: that is refused. graftd's sockets are exempt (GRAFT_EXEMPT). The
 * guard alone is on the cgroup root and runs for everybody: it keeps sockets without a stamp out of the containers'
 * loopback. So does the program of sk_lookup in the host's netns.
 *
 * bind.bpf.h     An ingress rule names the host address that a bind becomes. A bind to the loopback or the wildcard
 *                that no rule names goes to the tenant's slice (slice.bpf.h). Any other is refused.
 * connect.bpf.h  A destination on the loopback is looked up in the kernel's socket table (bpf_sk_lookup_*), and the
 * send.bpf.h     stamp of the socket found there says whose server it is. So there is no table of bound ports to be
 *                kept true, and a wildcard listener of the host's is never taken for the container's. Any other
 *                destination is matched against the egress rules, and the socket leaves from the rule's address.
 * listeners.bpf.h  A table of TCP listeners by what their programs bound. A program of sk_lookup in the host's netns
 *                leads there what arrives at a slice or at an address of a container's own.
 * led.bpf.h      What was moved to another container: the same program leads there.
 * receive.bpf.h  A UDP socket on the host's wildcard hears whom it has sent to, and nobody else.
 * answer.bpf.h   A published UDP server on the wildcard answers from the address that was asked.
 * show.bpf.h     getsockname(), getpeername() and recvmsg() show what the program asked for, from the stamp.
 * options.bpf.h  Socket options that would reach around the policy are refused.
 * direct.bpf.h   Sockets that programs of direct containers make themselves, in their own cgroup.
 * leash.bpf.h    Whose process it is, by its filter.
 * moved.bpf.h    What was moved out of such a cgroup makes no socket.
 * pace.bpf.h     How fast a TCP socket may send.
 * traffic.bpf.h  What TCP connections have carried.
 * datagrams.bpf.h  What UDP sockets have carried, on request.
 * guard.bpf.h    What the host's own programs may reach.
 * forward.bpf.h  Who dials inside a container's netns, and finds the container's server.
 *
 * Below these: destination.bpf.h is what connect and send decide alike, own.bpf.h addresses that are a container's
 * own, endpoint.bpf.h addresses that stand for an endpoint's name, numbers.bpf.h ports that nobody names,
 * abroad.bpf.h UDP sockets on a network that go beyond it, low_ports.bpf.h ports that ask for a capability,
 * loopback.bpf.h who listens on a container's loopback, kernel_sock.bpf.h what the kernel's socket says, rules.bpf.h
 * the look-up of rules, report.bpf.h refusals, watch.bpf.h what is allowed, maps.bpf.h the maps, slice.bpf.h and
 * address.bpf.h arithmetic, abi.h what graftd shares.
 *
 * A function without `static` is one that the verifier proves by itself, once for each program. A static one is
 * followed into at every call, in every state: with those alone the verifier walks three times as far, and a graftd
 * takes a second longer to start. Linux 6.1 takes no argument of a global function for a key of a map, nor a socket
 * for an argument.
 *
 * It rests on these facts, each of which a test under tests/kernel proves. An accepted socket is in its listener's
 * cgroup. IPv4-mapped addresses arrive in the hooks of IPv6 for bind and connect, in sendmsg4 for sends. MPTCP runs
 * the hooks on a subflow, which has no stamp. listen() without bind runs no hook but that of sockops. A send on a
 * connected socket with a control message arrives with family 0. post_bind's context is the kernel's socket, locked.
 */
#include "bind.bpf.h"
#include "connect.bpf.h"
#include "direct.bpf.h"
#include "send.bpf.h"
#include "show.bpf.h"
#include "options.bpf.h"
#include "guard.bpf.h"
#include "moved.bpf.h"
#include "forward.bpf.h"

char LICENSE[] SEC("license") = "GPL";
