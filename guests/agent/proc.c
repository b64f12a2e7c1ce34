/* What /proc says of the guest and its processes, in one line. */
#define _GNU_SOURCE		/* O_PATH */
#include <fcntl.h>
#include <sys/stat.h>

#include "agent.h"

#define PF_KTHREAD 0x00200000		/* include/linux/sched.h */
#define COMMAND_MOST 320		/* bytes of a command line that are told; escaped, three times as many */
#define ENTRY_MOST (3 * COMMAND_MOST + 260)
#define PAGE 4096

int proc, sys, dev;

void open_proc(void)
{
	int flags = O_PATH | O_DIRECTORY | O_CLOEXEC;
	proc = CALL(open, "/proc", flags, 0);
	sys = CALL(open, "/sys", flags, 0);
	dev = CALL(open, "/dev", flags, 0);
}

/* What one read(2) gives: all of a file, but for tables (`whole_file`), of which that is some lines. */
long read_proc(const char *name, char *to, size_t most, int whole_file)
{
	long fd = CALL5(openat, proc, name, O_RDONLY | O_CLOEXEC, 0, 0), filled = 0, size;
	if (fd < 0)
		return fd;
	do {
		size = CALL(read, fd, to + filled, most - filled);
		filled += size > 0 ? size : 0;
	} while (whole_file && size > 0 && filled < (long)most);
	CALL(close, fd, 0, 0);
	return filled;
}

/* The word that `*at` begins with, which moves behind it and the spaces that follow. */
static char *word(char **at)
{
	char *begin = *at;
	while (**at && **at != ' ' && **at != '\n')
		++*at;
	while (**at == ' ' || **at == '\n')
		*(*at)++ = 0;
	return begin;
}

static void put_line(const char *name, const char *file, int skip, int count)
{
	static char text[1024];
	char *at = text;
	long size = read_proc(file, text, sizeof text - 1, 0);
	text[size < 0 ? 0 : size] = 0;
	put(name);
	while (skip--)
		word(&at);
	while (count-- && *at) {
		put(word(&at));
		if (count)
			put(",");
	}
}

/* The decimal number behind `name` in /proc/meminfo. */
static void put_memory(char *text, const char *name)
{
	size_t length = length_of(name);
	for (char *at = text; *at; at++) {
		if (!equal(at, name, length)) {
			while (*at && *at != '\n')
				at++;
			if (!*at)
				break;
			continue;
		}
		at += length;
		while (*at == ' ')
			at++;
		put(word(&at));
		return;
	}
	put("0");
}

/* Numbers of processes one after the other, as /proc lists them: 0 behind the last. */
static int next_process(long fd)
{
	static uint8_t entries[2048];
	static long at, size;
	if (fd < 0) {
		at = size = 0;
		return 0;
	}
	for (;;) {
		if (at >= size) {
			at = 0;
			size = CALL(getdents64, fd, entries, sizeof entries);
			if (size <= 0)
				return 0;
		}
		/* struct linux_dirent64: u64 inode, s64 offset, u16 length, u8 kind, name */
		const char *name = (const char *)entries + at + 19;
		at += *(uint16_t *)(entries + at + 16);
		int64_t pid = whole(name, 1 << 22);
		if (pid > 0)
			return pid;
	}
}

static long list_processes(void)
{
	next_process(-1);
	return CALL5(openat, proc, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, 0);
}

/* "NUMBER/LEAF" */
static const char *path_of(int pid, const char *leaf)
{
	static char path[40];
	char *at = path + 16;
	memcpy(at, leaf, length_of(leaf) + 1);
	*--at = '/';
	for (; pid; pid /= 10)
		*--at = '0' + pid % 10;
	return at;
}

void stats(char **words)
{
	static char text[4096];
	char link[8];
	unsigned long count = 0;
	long size, fd = list_processes();
	(void)words;
	if (fd < 0) {
		result(fd, "/proc");
		return;
	}
	for (int pid; (pid = next_process(fd));)	/* the kernel's threads have no program */
		count += CALL5(readlinkat, proc, path_of(pid, "exe"), link, sizeof link, 0) > 0;
	CALL(close, fd, 0, 0);
	start("ok");
	put_line(" uptime=", "uptime", 0, 1);
	put_line(" load=", "loadavg", 0, 3);
	put_line(" cpu=", "stat", 1, 8);
	size = read_proc("meminfo", text, sizeof text - 1, 0);
	text[size < 0 ? 0 : size] = 0;
	put(" memory=");
	for (int n = 0; n < 3; n++) {
		static const char *const names[] = { "MemTotal:", "MemFree:", "MemAvailable:" };
		char copy[1024];
		memcpy(copy, text, sizeof copy);
		copy[sizeof copy - 1] = 0;
		put(n ? "," : "");
		put_memory(copy, names[n]);
	}
	put(" processes=");
	put_number(count - 1);				/* without us */
}

/* " PID,PPID,UID,TICKS,STARTED,RSS,STATE,NAME,COMMAND" of one process, unless it is the kernel's. */
static void put_process(int pid)
{
	static char text[1024], command[COMMAND_MOST];
	struct stat about;
	char *fields[24], *at, *name = text, *end = text;
	long size = read_proc(path_of(pid, "stat"), text, sizeof text - 1, 0), length;
	if (size <= 0 || CALL5(newfstatat, proc, path_of(pid, ""), &about, 0, 0) < 0)
		return;
	text[size] = 0;
	while (*name && *name++ != '(')
		;
	for (at = name; *at; at++)			/* a name may have parentheses */
		if (*at == ')')
			end = at;
	if (end == text || !end[1])
		return;
	at = end + 2;
	for (int n = 2; n < 24; n++)			/* numbered as in proc(5), less one */
		fields[n] = word(&at);
	const char *flags = fields[8], *user = fields[13], *system = fields[14], *pages = fields[23];
	if (number(&flags, UINT32_MAX) & PF_KTHREAD)
		return;
	put(" ");
	put_number(pid);
	put(",");
	put(fields[3]);
	put(",");
	put_number(about.st_uid);
	put(",");
	put_number(number(&user, INT64_MAX / 16) + number(&system, INT64_MAX / 16));
	put(",");
	put(fields[21]);
	put(",");
	put_number(number(&pages, INT64_MAX / PAGE / 16) * PAGE);
	put(",");
	put(fields[2]);
	put(",");
	put_escaped(name, end - name);
	put(",");
	length = read_proc(path_of(pid, "cmdline"), command, sizeof command, 0);
	while (length > 0 && !command[length - 1])
		length--;
	put_escaped(command, length > 0 ? length : 0);
}

/* ps [AFTER]: those with greater numbers than AFTER; " +" at the end where there are more. */
void ps(char **words)
{
	int64_t after = words[1] ? whole(words[1], 1 << 22) : 0;
	long fd = list_processes();
	if (after < 0 || fd < 0) {
		result(after < 0 ? -EINVAL : fd, "ps");
		CALL(close, fd, 0, 0);
		return;
	}
	int own = CALL(getpid, 0, 0, 0);
	start("ok");
	for (int pid; (pid = next_process(fd));) {
		if (pid <= after || pid == own)
			continue;
		if (room() < ENTRY_MOST) {
			put(" +");
			break;
		}
		put_process(pid);
	}
	CALL(close, fd, 0, 0);
}
