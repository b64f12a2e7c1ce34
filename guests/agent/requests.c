/* Requests of the host, vsock port 1: a line of words, answered by a line `ok [TEXT]` or `error TEXT`.
 *
 * A stream takes many, one after the other; lines that come together are answered together, since a packet is dear.
 * Words are separated by spaces. Where a word is anything (paths, texts), it has %XX for what does not print, for
 * spaces and for %; a lone - is the empty one. docs/agent.md lists the commands; hv/snapshot/agent.py is the other end.
 */
#include <fcntl.h>
#include <linux/random.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <time.h>

#include "agent.h"

#define NAME_MOST 64		/* HOST_NAME_MAX */
#define LINE_MOST 4096
#define CLIENTS_MOST 16
#define WORDS_MOST 8

static void ping(char **words);

static void set_time(char **words)
{
	const char *text = words[1];
	struct timespec now = { .tv_sec = number(&text, INT64_MAX / 16), .tv_nsec = 0 };
	const char *fraction = text + 1;
	if (now.tv_sec < 0 || *text != '.' || length_of(fraction) != 9 || (now.tv_nsec = number(&fraction, 999999999)) < 0
	    || *fraction)
		start("error the time is SECONDS.NANOSECONDS, nine digits behind the point");
	else
		result(CALL(clock_settime, CLOCK_REALTIME, &now, 0), "clock_settime");
}

static void hostname(char **words)
{
	struct utsname names;
	size_t length;
	if (!words[1]) {
		result(CALL(uname, &names, 0, 0), "uname");
		put(" ");
		put(names.nodename);
		return;
	}
	length = length_of(words[1]);
	for (const char *at = words[1]; *at; at++)
		if (!((*at | 0x20) >= 'a' && (*at | 0x20) <= 'z') && !(*at >= '0' && *at <= '9') && *at != '-' && *at != '.')
			length = NAME_MOST + 1;
	if (length > NAME_MOST)
		start("error a hostname has up to 64 letters, digits, '-' and '.'");
	else
		result(CALL(sethostname, words[1], length, 0), "sethostname");
}

static void entropy(char **words)
{
	struct {
		struct rand_pool_info head;
		uint8_t bytes[512];
	} pool;
	int size = bytes_of(words[1], 0, pool.bytes, sizeof pool.bytes);
	long fd, done;
	if (size <= 0) {
		start("error entropy is up to 512 bytes in hexadecimal");
		return;
	}
	pool.head.buf_size = size;
	pool.head.entropy_count = 8 * size;
	fd = CALL5(openat, dev < 0 ? AT_FDCWD : dev, dev < 0 ? "/dev/urandom" : "urandom", O_RDWR | O_CLOEXEC, 0, 0);
	if (fd < 0) {
		result(fd, "/dev/urandom");
		return;
	}
	done = CALL(ioctl, fd, RNDADDENTROPY, &pool);
	result(done, "RNDADDENTROPY");
	if (done >= 0)
		result(CALL(ioctl, fd, RNDRESEEDCRNG, 0), "RNDRESEEDCRNG");	/* drivers/char/random.c */
	CALL(close, fd, 0, 0);
	memset(&pool, 0, sizeof pool);
	__asm__ volatile("" : : "r"(&pool) : "memory");		/* not to be left out */
}

static void kill(char **words)
{
	int64_t pid = whole(words[1], 1 << 22), signal = whole(words[2], 64);
	if (pid < 2 || signal < 0)
		start("error a process has a number from 2 up, a signal one of 0 to 64");
	else
		result(CALL(kill, pid, signal, 0), "kill");
}

static const struct {
	const char *name;
	int least, most;		/* words behind the name */
	void (*run)(char **words);
} commands[] = {
	{ "ping", 0, 0, ping }, { "time", 1, 1, set_time }, { "hostname", 0, 1, hostname }, { "entropy", 1, 1, entropy },
	{ "mac", 2, 2, mac }, { "address", 2, 3, address }, { "mtu", 2, 2, mtu }, { "link", 2, 2, link_state },
	{ "route", 2, 3, route }, { "mount", 5, 5, mount }, { "unmount", 1, 2, unmount }, { "root", 1, 7, root },
	{ "dir", 2, 2, make_dir }, { "node", 5, 5, make_node }, { "symlink", 2, 2, make_symlink },
	{ "write", 2, 2, write_text }, { "stats", 0, 0, stats }, { "ps", 0, 1, ps }, { "kill", 2, 2, kill },
	{ "shutdown", 2, 2, shut_down },
};
#define COMMANDS (sizeof commands / sizeof *commands)

static void ping(char **words)
{
	(void)words;
	start("ok pyhv-agent 1");
	for (unsigned n = 0; n < COMMANDS; n++) {
		put(" ");
		put(commands[n].name);
	}
}

static void serve(char *line)
{
	char *words[WORDS_MOST + 2] = { 0 };
	int count = 0;
	for (char *at = line; *at && count < WORDS_MOST + 1;) {
		while (*at == ' ')
			*at++ = 0;
		if (*at)
			words[count++] = at;
		while (*at && *at != ' ')
			at++;
	}
	start("error unknown command");
	for (unsigned n = 0; count && n < COMMANDS; n++)
		if (same(words[0], commands[n].name)) {
			if (count - 1 < commands[n].least || count - 1 > commands[n].most)
				start("error too few words, or too many");
			else
				commands[n].run(words);
			return;
		}
}

/* streams ---------------------------------------------------------------------------------------- */

static struct client {
	int fd;			/* 0: none */
	size_t filled;
	char line[LINE_MOST];
} clients[CLIENTS_MOST];

static char answers[16 << 10];

static int answer(int fd, size_t length)
{
	return !length || CALL5(sendto, fd, answers, length, MSG_DONTWAIT | MSG_NOSIGNAL, 0) == (long)length;
}

/* Take what has come, serve the lines that are whole. 0 where the stream has ended. */
static int receive(struct client *from)
{
	long size = CALL(read, from->fd, from->line + from->filled, LINE_MOST - from->filled);
	size_t begin = 0, length = 0;
	if (size == -EAGAIN)
		return 1;
	if (size <= 0)
		return 0;
	from->filled += size;
	for (size_t at = from->filled - size; at < from->filled; at++) {
		if (from->line[at] != '\n')
			continue;
		from->line[at] = 0;
		serve(from->line + begin);
		begin = at + 1;
		size_t more = length_of(reply);
		memcpy(answers + length, reply, more);
		length += more;
		answers[length++] = '\n';
		if (length > sizeof answers - REPLY_MOST - 1) {
			if (!answer(from->fd, length))
				return 0;
			length = 0;
		}
	}
	from->filled -= begin;
	memcpy(from->line, from->line + begin, from->filled);	/* forward, so an overlap is no harm */
	return answer(from->fd, length) && from->filled < LINE_MOST;
}

void serve_client(unsigned index)
{
	struct client *from = &clients[index];
	if (from->fd && !receive(from)) {
		CALL(close, from->fd, 0, 0);
		from->fd = 0;
	}
}

void take_client(long fd)
{
	for (unsigned n = 0; n < CLIENTS_MOST; n++)
		if (!clients[n].fd) {
			clients[n].fd = fd;
			clients[n].filled = 0;
			watch(fd, CLIENT, n, EPOLLIN, EPOLL_CTL_ADD);
			return;
		}
	CALL(close, fd, 0, 0);
}
