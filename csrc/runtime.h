/* SPDX-License-Identifier: GPL-2.0 */
/*
 * runtime.h - what graft-runtime's parts share: runtime.c, and runtime_hooks.c, the hooks of direct containers
 */
#ifndef RUNTIME_H
#define RUNTIME_H

#include <stddef.h>
#include <stdio.h>

/* runtime.c: each has its meaning there */
void __attribute__((noreturn)) fail(const char *why, const char *hint);
void put_string(FILE *to, const char *text);
void get_string(const char *reply, const char *key, char *to, size_t room);
char *ask(char *request, size_t size);
char *read_line(FILE *from);

/* runtime_hooks.c: main() as the hooks graft-begin, whose words are @argv, and graft-network */
int begin_direct(char **argv);
int show_network(void);

#endif
