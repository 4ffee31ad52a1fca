/* SPDX-License-Identifier: GPL-2.0 */
/*
 * owners.bpf.h - the uid of a container's socket stays as it is
 *
 * SO_REUSEPORT works among sockets of one uid. A container's have one that nobody else has, GRAFT_OWNERS and its
 * slice. A program with CAP_CHOWN could give its socket another by fchown(2), which no filter can decide (another
 * thread may put another socket under the number), and no hook of graft.bpf.c runs where the kernel then chooses a
 * port for the first datagram: also one that a server of that uid shares. So a process of a container, which is one
 * under a seccomp listener, is refused it (security_inode_setattr(), security/security.c).
 */
#ifndef OWNERS_BPF_H
#define OWNERS_BPF_H

#include <linux/errno.h>
#include <bpf/bpf_helpers.h>
#include "abi.h"
#include "listener.bpf.h"

#define SOCKFS_MAGIC 0x534f434b /* linux/magic.h */
#define ATTR_UID (1 << 1)	/* include/linux/fs.h */

struct super_block {
	unsigned long s_magic;
} __attribute__((preserve_access_index));

struct inode {
	struct super_block *i_sb;
} __attribute__((preserve_access_index));

struct dentry {
	struct inode *d_inode;
} __attribute__((preserve_access_index));

struct iattr {
	unsigned int ia_valid;
} __attribute__((preserve_access_index));

typedef struct {
	__u32 val;
} kuid_t;

struct sock___owned {
	kuid_t sk_uid;
} __attribute__((preserve_access_index));

struct socket {
	struct sock___owned *sk;
} __attribute__((preserve_access_index));

struct socket_alloc {
	struct socket socket;
	struct inode vfs_inode;
} __attribute__((preserve_access_index));

SEC("fmod_ret/security_inode_setattr")
int guard_owners(__u64 *arguments)
{
	struct dentry *dentry = (struct dentry *)arguments[1];
	struct iattr *attributes = (struct iattr *)arguments[2];
	int ret = arguments[3];
	struct socket_alloc *alloc;
	struct inode *inode;
	__u32 uid;

	if (ret || !(BPF_CORE_READ(attributes, ia_valid) & ATTR_UID))
		return ret;
	inode = BPF_CORE_READ(dentry, d_inode);
	if (BPF_CORE_READ(inode, i_sb, s_magic) != SOCKFS_MAGIC)
		return 0;
	alloc = (void *)inode - bpf_core_field_offset(struct socket_alloc, vfs_inode);
	uid = BPF_CORE_READ(alloc, socket.sk, sk_uid.val);
	return uid - GRAFT_OWNERS < SLICE_COUNT && listener_address() ? -EPERM : 0;
}

#endif
