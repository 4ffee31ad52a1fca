// SPDX-License-Identifier: GPL-2.0
/*
 * graft-runtime - an OCI runtime: runc or crun, with graft's traps in the container's seccomp profile
 *
 * For `create` and `run` it asks graftd, over its admin socket, to put the traps into the bundle's config.json, and
 * becomes the real runtime. Before `start` it asks whether the container's networks are graft's, and for an `exec`
 * with CAP_NET_ADMIN whether the container may have that. All other verbs go straight through. As graft-hook it is an
 * OCI hook of the stage `precreate` (oci-hooks(5)): config.json from stdin to stdout. runtime_hooks.c has the hooks
 * of direct containers. In C because an engine waits for it at every create: a Python interpreter takes longer to
 * start than runc needs for the container.
 *
 * An engine without root has no part in graftd's admin socket. There `graft --engine` asks for it, which reads the
 * engine's files as its user (graft/engines/prepare.py): at `create`, and in the place of Podman's `rootlessport`.
 *
 * What graftd refuses is the engine's own error: it goes to stderr and, as runc's does, to the file of --log, which
 * containerd reads. Without graftd nothing is created.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "runtime.h"

#define REPLY_SECONDS 30
#define ROOM (4 << 20)

static const char *log_file;
static const char *run_dir = "/run/graft";
static int told = STDERR_FILENO;

/* Write @text as a string of JSON. */
void put_string(FILE *to, const char *text)
{
	fputc('"', to);
	for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
		if (*c == '"' || *c == '\\')
			fprintf(to, "\\%c", *c);
		else if (*c < 0x20)
			fprintf(to, "\\u%04x", *c);
		else
			fputc(*c, to);
	}
	fputc('"', to);
}

void fail(const char *why, const char *hint)
{
	char text[8192], when[40];
	time_t now = time(NULL);
	struct tm utc;
	FILE *log;

	snprintf(text, sizeof(text), hint && *hint ? "graft: %s (%s)" : "graft: %s", why, hint);
	dprintf(told, "%s\n", text);
	log = log_file ? fopen(log_file, "ae") : NULL;
	if (log) {
		strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
		fprintf(log, "{\"level\":\"error\",\"msg\":");
		put_string(log, text);
		fprintf(log, ",\"time\":\"%s\"}\n", when);
		fclose(log);
	}
	exit(1);
}

static int dial(void)
{
	struct timeval patience = {.tv_sec = REPLY_SECONDS};
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (snprintf(to.sun_path, sizeof(to.sun_path), "%s/graftd.sock", run_dir) >= (int)sizeof(to.sun_path))
		fail("the path of graftd's directory is too long", run_dir);
	setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	if (sock < 0 || connect(sock, (struct sockaddr *)&to, sizeof(to))) {
		if (errno == ENOENT || errno == ECONNREFUSED)
			fail("graftd is not running", "start it: systemctl start graftd, or graftd as root");
		fail(strerror(errno), to.sun_path);
	}
	return sock;
}

/* The string after @key in a reply, which is JSON in ASCII; "" if @key is not there. */
void get_string(const char *reply, const char *key, char *to, size_t room)
{
	const char *at = strstr(reply, key);
	char *end = to + room - 1;

	for (at = at ? at + strlen(key) : ""; *at && *at != '"' && to < end; at++) {
		if (*at == '\\' && at[1]) {
			at++;
			if (*at == 'u' && strnlen(at, 5) == 5) {
				*to++ = '?';
				at += 4;
				continue;
			}
			*to++ = *at == 'n' || *at == 't' ? ' ' : *at;
			continue;
		}
		*to++ = *at;
	}
	*to = 0;
}

/*
 * Send a request, which is freed, and return what follows "ok": in the reply, without the end of the line. The bytes
 * are those that Python's json.dumps() writes (graft/daemon/connection.py, Connection._send;
 * tests/unit/daemon/test_connection.py).
 */
char *ask(char *request, size_t size)
{
	char *reply = malloc(ROOM), why[4096], hint[2048];
	int sock = dial();
	ssize_t got;
	size_t have = 0;

	for (size_t sent = 0; sent < size; sent += (size_t)got) {
		got = send(sock, request + sent, size - sent, MSG_NOSIGNAL);
		if (got < 0)
			fail("graftd does not take the request", strerror(errno));
	}
	free(request);
	while (have + 1 < ROOM && (!have || reply[have - 1] != '\n')) {
		got = recv(sock, reply + have, ROOM - 1 - have, 0);
		if (got <= 0)
			fail("graftd does not answer", got ? strerror(errno) : "see its log");
		have += (size_t)got;
	}
	close(sock);
	reply[have] = 0;
	if (strncmp(reply, "{\"ok\": ", 7)) {
		get_string(reply, "\"message\": \"", why, sizeof(why));
		get_string(reply, "\"hint\": \"", hint, sizeof(hint));
		fail(*why ? why : reply, hint);
	}
	reply[have - 2] = 0; /* the brace and the newline */
	memmove(reply, reply + 7, have - 8);
	return reply;
}

/* Is this not root of the host, which has all uids as they are (user_namespaces(7))? */
static bool is_user(void)
{
	FILE *map = fopen("/proc/self/uid_map", "re");
	unsigned int inside = 1, outside = 1, count = 0;

	if (map && fscanf(map, "%u %u %u", &inside, &outside, &count) != 3)
		inside = 1;
	if (map)
		fclose(map);
	return geteuid() || inside || outside || count != UINT_MAX;
}

/* The program graft of this installation: beside the checkout's package, or above the installed one's. */
static const char *find_graft(void)
{
	static const char *const ways[] = {"/../bin/graft", "/../../../../bin/graft", NULL};
	static char place[PATH_MAX + 64];
	char own[PATH_MAX];
	ssize_t length = readlink("/proc/self/exe", own, sizeof(own) - 1);

	if (length > 0) {
		own[length] = 0;
		*strrchr(own, '/') = 0;
		for (int i = 0; ways[i]; i++) {
			snprintf(place, sizeof(place), "%s%s", own, ways[i]);
			if (!access(place, X_OK))
				return place;
		}
	}
	fail("the program graft is not beside graft-runtime", "install graft again: make install");
}

/* `graft --engine bundle`, whose stderr is also the file of --log */
static void prepare_as_user(const char *bundle, const char *id)
{
	char said[4096];
	ssize_t got, have = 0;
	int status = 1, ends[2];
	pid_t child;

	if (pipe2(ends, O_CLOEXEC))
		fail("pipe", strerror(errno));
	child = fork();
	if (!child) {
		dup2(ends[1], STDERR_FILENO);
		execl(find_graft(), "graft", "--engine", "bundle", bundle, id, (char *)NULL);
		_exit(127);
	}
	close(ends[1]);
	while (have < (ssize_t)sizeof(said) - 1 && (got = read(ends[0], said + have, sizeof(said) - 1 - have)) > 0)
		have += got;
	close(ends[0]);
	said[have] = 0;
	said[strcspn(said, "\n")] = 0;
	if (child < 0 || waitpid(child, &status, 0) != child || status)
		fail(*said ? said + (strncmp(said, "graft: ", 7) ? 0 : 7) : "graft --engine failed", NULL);
}

static void prepare(const char *bundle, const char *id)
{
	char *request = NULL, *path = realpath(bundle, NULL);
	FILE *text;
	size_t size = 0;

	if (!path)
		fail(strerror(errno), bundle);
	if (is_user()) {
		prepare_as_user(path, id);
		free(path);
		return;
	}
	text = open_memstream(&request, &size);
	fprintf(text, "{\"op\":\"bundle\",\"version\":\"" VERSION "\",\"bundle\":");
	put_string(text, path);
	fprintf(text, ",\"id\":");
	put_string(text, id);
	fprintf(text, "}\n");
	fclose(text);
	free(ask(request, size));
	free(path);
}

/*
 * Docker, from 28 on, joins a container to its networks between `create` and `start`: only now graftd knows whether
 * they are its own.
 */
static void check_start(const char *id)
{
	char *request = NULL;
	size_t size = 0;
	FILE *text = open_memstream(&request, &size);

	fprintf(text, "{\"op\":\"start\",\"version\":\"" VERSION "\",\"id\":");
	put_string(text, id);
	fprintf(text, "}\n");
	fclose(text);
	free(ask(request, size));
}

/* All of @from, which is closed, on one line: a newline within a string of JSON is written as \\n. */
char *read_line(FILE *from)
{
	char *text = malloc(ROOM);
	size_t have = fread(text, 1, ROOM - 1, from);

	fclose(from);
	text[have] = 0;
	for (char *c = text; *c; c++)
		if (*c == '\n')
			*c = ' ';
	return text;
}

/* Is it a direct container, of which graftd has to know each process before it starts (graft/tenants/direct.py)? */
static bool is_direct(const char *id)
{
	char mark[4096];

	if (strchr(id, '/') || snprintf(mark, sizeof(mark), "%s/direct/%s", run_dir, id) >= (int)sizeof(mark))
		return false;
	return !access(mark, F_OK);
}

/*
 * Most processes that are executed later have no capability that graftd has to judge, and it is not asked. @path: of
 * the file with the process, NULL if it is described by words.
 */
static void check_exec(const char *path, const char *id)
{
	FILE *from = path ? fopen(path, "re") : NULL, *text;
	char *process, *request = NULL;
	bool direct = is_direct(id);
	size_t size = 0;

	if (!from && (path || !direct))
		return; /* the real runtime says why */
	process = from ? read_line(from) : strdup("{}");
	if (direct || strcasestr(process, "NET_ADMIN")) {
		text = open_memstream(&request, &size);
		fprintf(text, "{\"op\":\"exec\",\"version\":\"" VERSION "\",\"id\":");
		put_string(text, id);
		fprintf(text, ",\"process\":%s}\n", process);
		fclose(text);
		free(ask(request, size));
	}
	free(process);
}

/* oci-hooks(5), precreate. Podman does not show a hook's stderr, so what went wrong goes to Podman's. */
static int hook(void)
{
	char *config, *request = NULL, *reply, theirs[40];
	size_t size = 0;
	FILE *text;

	snprintf(theirs, sizeof(theirs), "/proc/%d/fd/2", (int)getppid());
	told = open(theirs, O_WRONLY | O_APPEND | O_CLOEXEC);
	if (told < 0)
		told = STDERR_FILENO;
	config = read_line(stdin);
	if (!*config)
		fail("there is no config.json on standard input", "this is an OCI hook of the stage precreate");
	text = open_memstream(&request, &size);
	fprintf(text, "{\"op\":\"hook\",\"version\":\"" VERSION "\",\"config\":%s}\n", config);
	fclose(text);
	reply = ask(request, size);
	return puts(reply) < 0 || fflush(stdout) ? 1 : 0;
}

/* Is this word a verb? Looked up wherever it stands, because an option before it may have a value unknown here. */
static bool is_verb(const char *word)
{
	static const char *const verbs[] = {"create", "run",  "restore",  "start",	"exec",	 "kill",   "delete",
					    "state",  "list", "ps",	  "events",	"pause", "resume", "update",
					    "spec",   "init", "features", "checkpoint", NULL};

	for (int i = 0; verbs[i]; i++)
		if (!strcmp(word, verbs[i]))
			return true;
	return false;
}

/* Put the value of option @name, in either form, into @value; the number of words it takes, 0: another option. */
static int option(char **word, const char *name, const char **value)
{
	size_t length = strlen(name);

	if (strncmp(*word, name, length))
		return 0;
	if ((*word)[length] == '=') {
		*value = *word + length + 1;
		return 1;
	}
	if ((*word)[length] || !word[1])
		return 0;
	*value = word[1];
	return 2;
}

/* Is this one of runc's or crun's options whose value is the next word? */
static bool takes_value(const char *word)
{
	static const char *const names[] = {
		"--root",     "--criu",		"--rootless",	    "--log-format", "--console-socket",
		"--pid-file", "--preserve-fds", "--cgroup-manager", "--config",	    "-f",
		NULL};

	for (int i = 0; names[i]; i++)
		if (!strcmp(word, names[i]))
			return true;
	return false;
}

/*
 * Is this where containerd's shim keeps Docker's managed plugins? dockerd starts them by its default runtime, and
 * they are no containers of graft's: one with the host's network would be refused, and graft's own would wait for
 * graftd.
 * @root: the value of --root, whose last part is containerd's namespace (moby, daemon/config).
 */
static bool of_plugins(const char *root)
{
	const char *space = strrchr(root, '/');

	return space && !strcmp(space, "/plugins.moby");
}

int main(int argc, char **argv)
{
	const char *runtime = "runc", *bundle = ".", *id = NULL, *verb = NULL, *process = NULL, *direct = NULL,
		   *name = strrchr(argv[0], '/'), *root = "";
	int first = 1, used;

	for (; first < argc; first += used) {
		used = option(argv + first, "--graft-runtime", &runtime);
		if (!used)
			used = option(argv + first, "--graft-run-dir", &run_dir);
		if (!used)
			break;
	}
	name = name ? name + 1 : argv[0];
	if (!strcmp(name, "graft-hook"))
		return hook();
	if (!strcmp(name, "graft-begin"))
		return begin_direct(argv + first);
	if (!strcmp(name, "graft-network"))
		return show_network();
	if (!strcmp(name, "rootlessport")) {
		execl(find_graft(), "graft", "--engine", "port", (char *)NULL);
		fail(strerror(errno), find_graft());
	}
	for (int i = first; i < argc; i += used) {
		used = option(argv + i, "--log", &log_file);
		if (!used)
			used = option(argv + i, "--root", &root);
		if (!used && verb)
			used = option(argv + i, "--bundle", &bundle);
		if (!used && verb)
			used = option(argv + i, "-b", &bundle);
		if (!used && verb && !strcmp(verb, "exec"))
			used = option(argv + i, "--process", &process);
		if (!used && verb && !strcmp(verb, "exec"))
			used = option(argv + i, "-p", &process);
		if (used)
			continue;
		used = takes_value(argv[i]) ? 2 : 1;
		if (argv[i][0] == '-')
			continue;
		if (!verb && is_verb(argv[i]))
			verb = argv[i];
		else if (verb)
			id = argv[i];
		if (verb && !direct && !strcmp(verb, "exec") && is_direct(argv[i]))
			direct = argv[i]; /* the words after it are the command's */
	}
	if (of_plugins(root))
		verb = NULL;
	if (verb && (!strcmp(verb, "create") || !strcmp(verb, "run"))) {
		if (!id)
			fail("the container's id is missing", "graft-runtime create --bundle DIR ID");
		prepare(bundle, id);
	}
	if (verb && id && !strcmp(verb, "start") && !is_user())
		check_start(id);
	if (verb && id && !strcmp(verb, "exec") && !is_user())
		check_exec(process, direct ? direct : id);
	if (verb && !strcmp(verb, "restore"))
		fail("a checkpoint cannot be restored", "its sockets were the host's; start the container anew");
	argv += first - 1;
	argv[0] = (char *)runtime;
	execvp(runtime, argv);
	fail(strerror(errno), runtime);
}
