/* What only an init does: the first mounts, modules, and the guest's end. */
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/reboot.h>
#include <signal.h>
#include <time.h>

#include "agent.h"

#define ORDER_MOST 8192			/* bytes of the list of modules */
#define KILL_MS 2000			/* from SIGKILL until the guest ends anyway */
#define DRAIN_NS 30000000		/* for the last packets, which a thread of the kernel's sends */

int init;

static enum { RUNNING, ASKED, KILLED } ending;
static int64_t deadline;		/* ms, CLOCK_MONOTONIC */
static int restart;

static const struct {
	const char *kind, *target;
	unsigned flags;
	const char *data;
} first[] = {
	{ "proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0 },
	{ "sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0 },
	{ "cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0 },
	{ "devtmpfs", "/dev", MS_NOSUID, "mode=755" },
	{ "devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666" },
	{ "tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777" },
	{ "mqueue", "/dev/mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0 },
	{ "tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=755" },
};

static const struct {
	const char *text, *path;
} links[] = {
	{ "/proc/self/fd", "/dev/fd" }, { "/proc/self/fd/0", "/dev/stdin" }, { "/proc/self/fd/1", "/dev/stdout" },
	{ "/proc/self/fd/2", "/dev/stderr" }, { "pts/ptmx", "/dev/ptmx" },
};

/* Those that /lib/modules/order names, where an initramfs has them (hv/kernels/initramfs.py). */
static void load_modules(void)
{
	static char order[ORDER_MOST], path[300];
	static const char folder[] = "/lib/modules/";
	long fd = CALL(open, "/lib/modules/order", O_RDONLY | O_CLOEXEC, 0);
	long size = fd < 0 ? 0 : CALL(read, fd, order, sizeof order - 1);
	CALL(close, fd, 0, 0);
	for (char *at = order, *name = at; size > 0 && at < order + size; at++) {
		if (*at != '\n')
			continue;
		size_t length = at - name;
		if (length + sizeof folder + 4 < sizeof path) {
			memcpy(path, folder, sizeof folder - 1);
			memcpy(path + sizeof folder - 1, name, length);
			memcpy(path + sizeof folder - 1 + length, ".ko", 4);
			fd = CALL(open, path, O_RDONLY | O_CLOEXEC, 0);
			if (fd >= 0) {
				CALL(finit_module, fd, "", 0);
				CALL(close, fd, 0, 0);
			}
		}
		name = at + 1;
	}
}

void set_up(void)
{
	init = CALL(getpid, 0, 0, 0) == 1;
	if (!init)
		return;
	for (unsigned n = 0; n < sizeof first / sizeof *first; n++) {
		char path[32];
		memcpy(path, first[n].target, length_of(first[n].target) + 1);
		make_dirs(path, 0755);
		CALL5(mount, first[n].kind, path, first[n].kind, first[n].flags, first[n].data);	/* as far as they are there */
	}
	CALL(unlink, "/dev/ptmx", 0, 0);
	for (unsigned n = 0; n < sizeof links / sizeof *links; n++)
		CALL(symlink, links[n].text, links[n].path, 0);
	load_modules();
	char up[] = "up", loopback[] = "lo", *words[] = { up, loopback, up, 0 };
	link_state(words);			/* which gives it 127.0.0.1, too (net/ipv4/devinet.c) */
}

/* the end ---------------------------------------------------------------------------------------- */

static int64_t now(void)
{
	struct timespec time;
	CALL(clock_gettime, CLOCK_MONOTONIC, &time, 0);
	return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

/* shutdown MILLISECONDS off|reboot: those are the grace of processes. The answer comes before the end. */
void shut_down(char **words)
{
	int64_t grace = whole(words[1], 3600000);
	restart = same(words[2], "reboot");
	if (grace < 0 || (!restart && !same(words[2], "off"))) {
		start("error shutdown takes milliseconds, and off or reboot");
		return;
	}
	start("ok");
	CALL(kill, -1, SIGTERM, 0);
	CALL(kill, -1, SIGCONT, 0);
	ending = ASKED;
	deadline = now() + grace;
}

/* For epoll_wait: without an end until there is to be one. */
int ending_wait(void)
{
	if (!ending)
		return -1;
	int64_t left = deadline - now();
	return left < 0 ? 0 : left > 100 ? 100 : left;
}

static void end(void)
{
	struct timespec moment = { .tv_nsec = DRAIN_NS };
	int acpi = CALL5(faccessat, sys, "firmware/acpi", 0, 0, 0) >= 0;
	CALL(sync, 0, 0, 0);
	unmount_all();
	CALL(nanosleep, &moment, 0, 0);
	/* a guest without ACPI can't switch itself off: it would halt, and its host wait */
	CALL5(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
	      acpi && !restart ? LINUX_REBOOT_CMD_POWER_OFF : LINUX_REBOOT_CMD_RESTART, 0, 0);
	for (;;)
		CALL(nanosleep, &(struct timespec){ .tv_sec = 3600 }, 0, 0);
}

void ending_step(void)
{
	if (!ending)
		return;
	int left = reap();
	if (left && now() < deadline)
		return;
	if (left && ending == ASKED) {
		CALL(kill, -1, SIGKILL, 0);
		ending = KILLED;
		deadline = now() + KILL_MS;
		return;
	}
	serve_processes();
	end();
}
