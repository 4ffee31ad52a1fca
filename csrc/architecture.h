/* SPDX-License-Identifier: Apache-2.0 */
/*
 * architecture.h - what differs by the machine's architecture, as graft/kernel/architecture.py has it
 *
 * Numbers of system calls come from the kernel's headers, by the compiler that is used.
 */
#ifndef ARCHITECTURE_H
#define ARCHITECTURE_H

#include <linux/audit.h>

#if defined(__x86_64__)
#define AUDIT_ARCH_NATIVE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define AUDIT_ARCH_NATIVE AUDIT_ARCH_AARCH64
#else
#error "graft knows the system calls of x86_64 and aarch64 only"
#endif

#endif
