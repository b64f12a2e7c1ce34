/* pyhv's agent in a Linux guest: does what the host can't do from outside, such as to set the clock of a clone.
 *
 * It listens at vsock port 1 (below 1024, so no program without CAP_NET_BIND_SERVICE can take its place) and serves the
 * host only. A request is a line of words, the reply a line `ok [TEXT]` or `error TEXT`; a stream takes many, one after
 * the other. docs/clones.md is the protocol, hv/snapshot/agent.py the other end.
 *
 *     ping                                ok pyhv-agent 1 COMMAND...      (1 is the protocol's version)
 *     time SECONDS.NANOSECONDS            set the clock
 *     hostname [NAME]                     set it; without NAME: ok NAME
 *     entropy HEX                         mix that into the kernel's random numbers, and start them anew from it
 *     mac CARD AA:BB:CC:DD:EE:FF          give a network card another address
 *     address CARD A.B.C.D/P [GATEWAY]    its IPv4 address, up, and the default route
 *
 * CARD is an interface's name, or the MAC address that it has now. Repeating a request does no harm, so the host may
 * when a stream breaks. x86-64, no library: it is 6 KiB, not 800, which matters where an initramfs is unpacked by an
 * emulated kernel. Left out on purpose: IPv6, and whatever needs a program of the guest. Driven by
 * tests/unit/test_agent.py and tests/kvm/test_clones.py.
 */
#include <fcntl.h>
#include <linux/random.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <time.h>

#include "agent.h"

#define PORT 1
#define NAME_MOST 64		/* HOST_NAME_MAX */
#define LINE_MOST 4096
#define CLIENTS_MOST 16
#define WORDS_MOST 5
#define WAITS_MOST 60		/* seconds until AF_VSOCK must be there: its module may be loaded behind us */

/* commands --------------------------------------------------------------------------------------- */

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
	fd = CALL(open, "/dev/urandom", O_RDWR | O_CLOEXEC, 0);
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

static const struct {
	const char *name;
	int least, most;		/* words behind the name */
	void (*run)(char **words);
} commands[] = {
	{ "ping", 0, 0, ping }, { "time", 1, 1, set_time }, { "hostname", 0, 1, hostname }, { "entropy", 1, 1, entropy },
	{ "mac", 2, 2, mac }, { "address", 2, 3, address },
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
	char *words[WORDS_MOST + 1] = { 0 };
	int count = 0;
	for (char *at = line; *at && count < WORDS_MOST;) {
		while (*at == ' ')
			*at++ = 0;
		if (*at)
			words[count++] = at;
		while (*at && *at != ' ')
			at++;
	}
	start("error unknown command");
	for (unsigned n = 0; count && n < COMMANDS; n++)
		if (equal(words[0], commands[n].name, length_of(commands[n].name) + 1)) {
			if (count - 1 < commands[n].least || count - 1 > commands[n].most)
				start("error too few words, or too many");
			else
				commands[n].run(words);
		}
}

/* streams ---------------------------------------------------------------------------------------- */

static struct client {
	size_t filled;
	char line[LINE_MOST];
} clients[CLIENTS_MOST];
static struct pollfd watched[CLIENTS_MOST + 1];		/* the listener is the last one */

/* Take what has come, serve the lines that are whole. 0 where the stream has ended. */
static int receive(long fd, struct client *from)
{
	long size = CALL(read, fd, from->line + from->filled, LINE_MOST - from->filled);
	size_t begin = 0;
	if (size <= 0)
		return 0;
	from->filled += size;
	for (size_t at = from->filled - size; at < from->filled; at++) {
		if (from->line[at] != '\n')
			continue;
		from->line[at] = 0;
		serve(from->line + begin);
		begin = at + 1;
		size_t length = length_of(reply);
		reply[length] = '\n';
		if (call(SYS_sendto, fd, (long)reply, length + 1, MSG_DONTWAIT | MSG_NOSIGNAL, 0) != (long)length + 1)
			return 0;
	}
	from->filled -= begin;
	memcpy(from->line, from->line + begin, from->filled);	/* forward, so an overlap is no harm */
	return from->filled < LINE_MOST;
}

/* A stream that somebody opens: the host's is taken, another is closed, as is one too many. */
static void take(long listener)
{
	struct sockaddr_vm peer = { 0 };
	unsigned size = sizeof peer;
	long fd = call(SYS_accept4, listener, (long)&peer, (long)&size, SOCK_CLOEXEC, 0);
	if (fd < 0)
		return;
	for (int n = 0; n < CLIENTS_MOST && peer.svm_cid == VMADDR_CID_HOST; n++)
		if (watched[n].fd < 0) {
			watched[n].fd = fd;
			clients[n].filled = 0;
			return;
		}
	CALL(close, fd, 0, 0);
}

static long listen_at(unsigned port)
{
	struct sockaddr_vm at = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port };
	struct timespec second = { .tv_sec = 1 };
	long fd = CALL(socket, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	for (int n = 0; fd == -EAFNOSUPPORT && n < WAITS_MOST; n++) {
		CALL(nanosleep, &second, 0, 0);
		fd = CALL(socket, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	}
	if (fd >= 0 && (CALL(bind, fd, &at, sizeof at) < 0 || CALL(listen, fd, CLIENTS_MOST, 0) < 0))
		return -1;
	return fd;
}

static void agent(void)
{
	static const char no_port[] = "pyhv-agent: no vsock, or port 1 is taken\n";
	CALL(setsid, 0, 0, 0);
	for (int n = 0; n < CLIENTS_MOST; n++)
		watched[n] = (struct pollfd){ .fd = -1, .events = POLLIN };
	struct pollfd *listener = &watched[CLIENTS_MOST];
	*listener = (struct pollfd){ .fd = listen_at(PORT), .events = POLLIN };
	if (listener->fd < 0) {
		CALL(write, 2, no_port, sizeof no_port - 1);
		CALL(exit_group, 1, 0, 0);
	}
	for (;;) {
		if (CALL(poll, watched, CLIENTS_MOST + 1, -1) < 0)
			continue;
		for (int n = 0; n < CLIENTS_MOST; n++)
			if (watched[n].fd >= 0 && watched[n].revents && !receive(watched[n].fd, &clients[n])) {
				CALL(close, watched[n].fd, 0, 0);
				watched[n].fd = -1;
			}
		if (listener->revents & ~POLLIN)
			CALL(exit_group, 1, 0, 0);
		if (listener->revents)
			take(listener->fd);
	}
}

__attribute__((force_align_arg_pointer, noreturn, used)) void _start(void)
{
	agent();
	__builtin_unreachable();
}
