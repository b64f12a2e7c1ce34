/* From a spec to a process that runs its program.
 *
 * The new process shares our memory, and we stand still, until it has run its program or failed (CLONE_VFORK): no page
 * table is copied, and how it went is left in memory, so no pipe is needed. All our descriptors are close-on-exec.
 */
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "agent.h"

#define CAPABILITIES 64
#define PATH_MOST 4096
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

struct child {
	const struct spec *spec;
	volatile struct failure *failure;
};

static uint8_t stack[16384] __attribute__((aligned(16)));

/* In the new process: end it, unless `done` says that this step went well. */
static void check(struct child *child, long done, const char *step, const char *about)
{
	if (done >= 0)
		return;
	child->failure->error = -done;
	child->failure->step = step;
	child->failure->about = about;
	CALL(exit, 127, 0, 0);
}

static void set_oom_score_adj(struct child *child, int32_t value)
{
	char text[8], *at = text + sizeof text;
	unsigned left = value < 0 ? -value : value;
	do
		*--at = '0' + left % 10;
	while ((left /= 10) && at > text + 1);
	if (value < 0)
		*--at = '-';
	long fd = CALL5(openat, proc, "self/oom_score_adj", O_WRONLY | O_CLOEXEC, 0, 0);
	check(child, fd, "oom_score_adj", "");
	check(child, CALL(write, fd, at, text + sizeof text - at), "oom_score_adj", "");
}

static void set_identity(struct child *child)
{
	const struct spec *spec = child->spec;
	const uint64_t *sets = spec->capabilities;
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2];
	if (spec->has_capabilities)
		for (int n = 0; n < CAPABILITIES; n++)
			if (!(sets[0] >> n & 1) && CALL5(prctl, PR_CAPBSET_DROP, n, 0, 0, 0) == -EINVAL)
				break;			/* there are no more */
	if (spec->group_count || spec->uid || spec->gid)
		check(child, CALL(setgroups, spec->group_count, spec->groups, 0), "setgroups", "");
	if (spec->gid)
		check(child, CALL(setresgid, spec->gid, spec->gid, spec->gid), "setgid", "");
	if (spec->uid) {
		if (spec->has_capabilities)
			CALL5(prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0);
		check(child, CALL(setresuid, spec->uid, spec->uid, spec->uid), "setuid", "");
	}
	if (spec->has_capabilities) {
		for (int half = 0; half < 2; half++) {
			data[half].effective = sets[1] >> 32 * half;
			data[half].inheritable = sets[2] >> 32 * half;
			data[half].permitted = sets[3] >> 32 * half;
		}
		check(child, CALL(capset, &header, data, 0), "capset", "");
		for (int n = 0; sets[4] >> n; n++) {
			if (sets[4] >> n & 1)
				check(child, CALL5(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, n, 0, 0), "ambient capabilities", "");
			if (n == CAPABILITIES - 1)
				break;
		}
	}
	if (spec->no_new_privs)
		check(child, CALL5(prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs", "");
}

static void execute(struct child *child, const char *path, const char *name, int last)
{
	long done = CALL(execve, path, child->spec->argv, child->spec->env);
	if (last || (done != -EACCES && done != -ENOENT && done != -ENOTDIR))
		check(child, done, "exec", name);
}

/* The program that argv[0] names, as execvp(3) finds it; a look before each attempt, for a failing one is dear. */
static void execute_by_path(struct child *child, const char *name)
{
	static char candidate[PATH_MOST];
	const char *at = DEFAULT_PATH;
	size_t length = length_of(name);
	long worst = -ENOENT;
	for (char **variable = child->spec->env; *variable; variable++)
		if (equal(*variable, "PATH=", 5)) {
			at = *variable + 5;
			break;
		}
	while (length) {
		size_t folder = 0;
		while (at[folder] && at[folder] != ':')
			folder++;
		if (folder + length + 2 <= sizeof candidate) {
			memcpy(candidate, at, folder);
			candidate[folder] = '/';
			memcpy(candidate + folder + !!folder, name, length + 1);	/* an empty one is where we are */
			long found = CALL(access, candidate, 1 /* X_OK */, 0);
			if (found == -EACCES)
				worst = found;
			if (found >= 0) {
				execute(child, candidate, name, 0);
				worst = -EACCES;
			}
		}
		if (!at[folder])
			break;
		at += folder + 1;
	}
	check(child, worst, "exec", name);
}

/* In the new process, on a stack of its own. */
static __attribute__((noreturn, used)) void run(struct child *child)
{
	const struct spec *spec = child->spec;
	const char *name = spec->program ? spec->program : spec->argv[0];
	uint64_t none = 0;
	int slash = 0;
	check(child, CALL(setsid, 0, 0, 0), "setsid", "");
	if (spec->has_terminal)
		check(child, CALL(ioctl, spec->in, TIOCSCTTY, 0), "TIOCSCTTY", "");
	check(child, CALL(dup2, spec->in, 0, 0), "dup2", "");
	check(child, CALL(dup2, spec->out, 1, 0), "dup2", "");
	check(child, CALL(dup2, spec->err, 2, 0), "dup2", "");
	if (spec->has_umask)
		CALL(umask, spec->umask, 0, 0);
	for (unsigned n = 0; n < spec->limit_count; n++) {
		uint32_t resource;
		uint64_t values[2];
		memcpy(&resource, spec->limits[n], sizeof resource);
		memcpy(values, spec->limits[n] + sizeof resource, sizeof values);
		check(child, CALL(setrlimit, resource, values, 0), "setrlimit", "");
	}
	if (spec->has_oom_score_adj)
		set_oom_score_adj(child, spec->oom_score_adj);
	if (spec->cwd)
		check(child, CALL(chdir, spec->cwd, 0, 0), "chdir", spec->cwd);
	set_identity(child);
	CALL5(rt_sigprocmask, SIG_SETMASK, &none, 0, 8, 0);
	for (const char *at = name; *at; at++)
		slash |= *at == '/';
	if (slash)
		execute(child, name, name, 1);
	execute_by_path(child, name);
	__builtin_unreachable();
}

/* clone(2) on another stack; its number, for us only. */
static long spawn(struct child *child)
{
	long pid;
	register long r10 __asm__("r10") = 0, r8 __asm__("r8") = 0;
	register struct child *argument __asm__("r12") = child;
	__asm__ volatile(
		"syscall\n\t"
		"test %%rax, %%rax\n\t"
		"jnz 1f\n\t"
		"xor %%ebp, %%ebp\n\t"
		"mov %%r12, %%rdi\n\t"
		"call run\n"
		"1:"
		: "=a"(pid)
		: "a"(SYS_clone), "D"(CLONE_VM | CLONE_VFORK | SIGCHLD), "S"(stack + sizeof stack), "d"(0), "r"(r10), "r"(r8),
		  "r"(argument)
		: "rcx", "r11", "memory");
	return pid;
}

/* The process's number, -errno where it could not be made; whether it runs is for `failure` to say. */
long start_process(const struct spec *spec, struct failure *failure)
{
	struct child child = { spec, failure };
	long pid;
	failure->error = 0;
	pid = spawn(&child);
	if (pid < 0) {
		failure->error = -pid;
		failure->step = "clone";
		failure->about = "";
	} else if (failure->error) {
		CALL5(wait4, pid, 0, __WALL, 0, 0);
	}
	return pid;
}
