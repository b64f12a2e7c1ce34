/* The least a container runtime can be, for comparison: the system calls of the benchmark's bundle, hard-wired: `pyhv
   oci spec`'s configuration with a memory, a cpu and a pids limit and a seccomp filter.
       container N ROOTFS STATE FILTER FOLDER[@KIND]...
   N times: a state folder below STATE, a group in each cgroup hierarchy (KIND: a version 1 controller), a process in
   six new namespaces with mounts, devices, hidden paths, capabilities and the filter (struct sock_filter) of
   the file FILTER; it runs /bin/true of ROOTFS; its end, and everything removed. Prints the microseconds of each. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { GROUPS = 32, QUIET = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC, SLAVE = 1 << 19,
       PRIVATE = 1 << 18, DETACH = 2, PAUSE = 30000 /* us, as in warm.py */,
       NEW = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET };

struct hierarchy {
        const char *key, *folder;
        char path[512];
};

static struct hierarchy groups[GROUPS];
static int group_count, root;
static struct sock_fprog filter;
static const char *rootfs;
/* kill, net_bind_service, audit_write */
static const struct __user_cap_data_struct capabilities[2] = {
        {1 << 5 | 1 << 10 | 1 << 29, 1 << 5 | 1 << 10 | 1 << 29, 0}};

static int need(long result, const char *what)
{
        if (result < 0) {
                perror(what);
                _exit(1);
        }
        return (int)result;
}

static void put(const char *folder, const char *leaf, const char *text, size_t length)
{
        char path[600];
        int fd;

        snprintf(path, sizeof path, "%s/%s", folder, leaf);
        fd = need(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644), path);
        need(write(fd, text, length), path);
        close(fd);
}

static void attributes(int fd, const char *path, int flags, unsigned long set, unsigned long clear, unsigned long kind)
{
        struct mount_attr attr = {set, clear, kind, 0};

        need(syscall(SYS_mount_setattr, fd, path, flags, &attr, sizeof attr), "mount_setattr");
}

static int look_up(const char *path)
{
        struct open_how how = {O_PATH | O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};

        return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

static int target(const char *path)
{
        int fd = look_up(path), above;
        char folder[64];
        const char *leaf = strrchr(path, '/');

        if (fd >= 0)
                return fd;
        snprintf(folder, sizeof folder, "%.*s", (int)(leaf - path), path);
        above = need(*folder ? look_up(folder) : dup(root), folder);
        need(mkdirat(above, leaf + 1, 0755), path);
        close(above);
        return need(look_up(path), path);
}

static void attach(int fd, int place)
{
        need(syscall(SYS_move_mount, fd, "", place, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH), "mount");
        close(place);
}

/* `options`: name=value or name, separated by blanks */
static int fresh(const char *kind, const char *options)
{
        int fs = need(syscall(SYS_fsopen, kind, FSOPEN_CLOEXEC), kind), fd;
        char copy[128], *word, *rest = copy, *value;

        need(syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "source", kind, 0), kind);
        snprintf(copy, sizeof copy, "%s", options);
        while ((word = strsep(&rest, " ")) != NULL) {
                if (!*word)
                        continue;
                value = strchr(word, '=');
                if (value)
                        *value++ = 0;
                need(syscall(SYS_fsconfig, fs, value ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG, word, value, 0), word);
        }
        need(syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0), kind);
        fd = need(syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0), kind);
        close(fs);
        return fd;
}

static void mount_at(const char *path, const char *kind, const char *options, unsigned long set)
{
        int place = target(path), fd = fresh(kind, options);

        if (set)
                attributes(fd, "", AT_EMPTY_PATH, set, set & MOUNT_ATTR_STRICTATIME ? MOUNT_ATTR__ATIME : 0, 0);
        attach(fd, place);
        close(fd);
}

static int copy(int fd, const char *path, int recursive)
{
        return need(syscall(SYS_open_tree, fd, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | recursive),
                    "open_tree");
}

static void mount_groups(void)
{
        int place = target("/sys/fs/cgroup"), top = fresh("tmpfs", "mode=755"), fd, below, at;
        const char *leaf;

        attributes(top, "", AT_EMPTY_PATH, QUIET, 0, 0);
        attach(top, place);
        for (at = 0; at < group_count; at++) {
                if (!groups[at].key)            /* version 2: not in here on a hybrid host */
                        continue;
                leaf = strrchr(groups[at].folder, '/') + 1;
                need(mkdirat(top, leaf, 0755), leaf);
                fd = copy(AT_FDCWD, groups[at].path, 0);
                attributes(fd, "", AT_EMPTY_PATH, QUIET | MOUNT_ATTR_RDONLY, 0, 0);
                below = need(openat(top, leaf, O_PATH | O_DIRECTORY | O_CLOEXEC), leaf);
                attach(fd, below);
                close(fd);
        }
        attributes(top, "", AT_EMPTY_PATH, MOUNT_ATTR_RDONLY, 0, 0);
        close(top);
}

static void hide(void)
{
        static const char *readonly[] = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"};
        static const char *masked[] = {"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                                       "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                                       "/proc/scsi"};
        int null = look_up("/dev/null"), empty = fresh("tmpfs", ""), fd, place;
        struct stat status;
        size_t at;

        for (at = 0; at < sizeof readonly / sizeof *readonly; at++) {
                place = look_up(readonly[at]);
                if (place < 0)
                        continue;
                fd = copy(place, "", AT_RECURSIVE);
                attributes(fd, "", AT_EMPTY_PATH | AT_RECURSIVE, MOUNT_ATTR_RDONLY, 0, 0);
                attach(fd, place);
                close(fd);
        }
        attributes(empty, "", AT_EMPTY_PATH, MOUNT_ATTR_RDONLY, 0, 0);
        for (at = 0; at < sizeof masked / sizeof *masked; at++) {
                place = look_up(masked[at]);
                if (place < 0)
                        continue;
                fstat(place, &status);
                fd = copy(S_ISDIR(status.st_mode) ? empty : null, "", 0);
                attach(fd, place);
                close(fd);
        }
        close(empty);
        close(null);
}

static void devices(void)
{
        static const struct { const char *leaf; int major, minor; } nodes[] = {
                {"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}};
        static const char *links[][2] = {{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"},
                {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}};
        int dev = look_up("/dev");
        size_t at;

        umask(0);
        for (at = 0; at < sizeof nodes / sizeof *nodes; at++)
                need(mknodat(dev, nodes[at].leaf, S_IFCHR | 0666, makedev(nodes[at].major, nodes[at].minor)), "mknod");
        for (at = 0; at < sizeof links / sizeof *links; at++)
                need(symlinkat(links[at][0], dev, links[at][1]), "symlink");
        umask(022);
        close(dev);
}

static void identity(void)
{
        struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct rlimit limit = {1024, 1024};
        int number;

        setrlimit(RLIMIT_NOFILE, &limit);
        for (number = 0; prctl(PR_CAPBSET_READ, number) >= 0; number++)
                if (number > 31 || !(capabilities[0].effective >> number & 1))
                        prctl(PR_CAPBSET_DROP, number);
        setgroups(0, NULL);
        need(setresgid(0, 0, 0), "setresgid");
        need(setresuid(0, 0, 0), "setresuid");
        need(syscall(SYS_capset, &header, capabilities), "capset");
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        for (number = 1; number < 65; number++)
                signal(number, SIG_DFL);
        syscall(SYS_close_range, 3, ~0U, CLOSE_RANGE_CLOEXEC);
        need(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &filter), "seccomp");
}

static void inside(int channel)
{
        struct ifreq loopback = {.ifr_name = "lo"};
        char *const arguments[] = {"/bin/true", NULL};
        char *const environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm",
                                     "HOME=/", NULL};
        char byte;
        int place, fd, at;

        for (at = 0; at < group_count; at++)
                if (groups[at].key)
                        put(groups[at].path, "tasks", "0", 1);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        prctl(PR_SET_DUMPABLE, 0);
        setsid();
        need(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, "_ses.bench"), "keyctl");
        fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        loopback.ifr_flags = IFF_UP;
        need(ioctl(fd, SIOCSIFFLAGS, &loopback), "lo");
        close(fd);
        sethostname("bench", 5);
        attributes(AT_FDCWD, "/", AT_RECURSIVE, 0, 0, SLAVE);
        place = need(open(rootfs, O_PATH | O_DIRECTORY | O_CLOEXEC), rootfs);
        root = copy(place, "", AT_RECURSIVE);
        attributes(root, "", AT_EMPTY_PATH | AT_RECURSIVE, 0, 0, PRIVATE);
        attach(root, place);
        mount_at("/proc", "proc", "", 0);
        mount_at("/dev", "tmpfs", "mode=755 size=65536k", MOUNT_ATTR_NOSUID | MOUNT_ATTR_STRICTATIME);
        mount_at("/dev/pts", "devpts", "newinstance ptmxmode=0666 mode=0620 gid=5",
                 MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
        mount_at("/dev/shm", "tmpfs", "mode=1777 size=65536k", QUIET);
        mount_at("/dev/mqueue", "mqueue", "", QUIET);
        mount_at("/sys", "sysfs", "", QUIET | MOUNT_ATTR_RDONLY);
        need(write(channel, "c", 1), "channel");
        need(read(channel, &byte, 1) - 1, "channel");
        need(unshare(CLONE_NEWCGROUP), "cgroup namespace");
        mount_groups();
        devices();
        hide();
        fchdir(root);
        need(syscall(SYS_pivot_root, ".", "."), "pivot_root");
        attributes(AT_FDCWD, ".", AT_RECURSIVE, 0, 0, SLAVE);
        need(syscall(SYS_umount2, ".", DETACH), "umount");
        chdir("/");
        identity();
        execve(arguments[0], arguments, environment);
        perror(arguments[0]);
        _exit(1);
}

static void inherit(const char *path, const char *parent, const char *leaf)
{
        char from[600], text[256];
        int fd;

        snprintf(from, sizeof from, "%s/%s", parent, leaf);
        fd = need(open(from, O_RDONLY | O_CLOEXEC), from);
        put(path, leaf, text, need(read(fd, text, sizeof text), from));
        close(fd);
}

static void limits(const char *path, const struct hierarchy *group)
{
        static const char *simple[][3] = {{"memory", "memory.limit_in_bytes", "268435456"},
                {"cpu", "cpu.shares", "512"}, {"pids", "pids.max", "100"}};
        static const char *rules[] = {"a", "c *:* m", "b *:* m", "c 1:3 rwm", "c 1:8 rwm", "c 1:7 rwm", "c 5:0 rwm",
                "c 1:5 rwm", "c 1:9 rwm", "c 136:* rwm", "c 5:2 rwm", "c 10:200 rwm"};
        size_t at;

        for (at = 0; group->key && at < sizeof simple / sizeof *simple; at++)
                if (!strcmp(group->key, simple[at][0]))
                        put(path, simple[at][1], simple[at][2], strlen(simple[at][2]));
        for (at = 0; group->key && !strcmp(group->key, "devices") && at < sizeof rules / sizeof *rules; at++)
                put(path, at ? "devices.allow" : "devices.deny", rules[at], strlen(rules[at]));
}

static void one(const char *state)
{
        static const char text[14000];
        struct clone_args how = {.flags = NEW, .exit_signal = SIGCHLD};
        char folder[512], path[600];
        int channel[2], status, at;
        char byte;
        pid_t pid;

        snprintf(folder, sizeof folder, "%s/c", state);
        need(mkdir(folder, 0700), folder);
        put(folder, "state.json", text, 640);
        put(folder, "config.json", text, sizeof text);
        need(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel), "socketpair");
        for (at = 0; at < group_count; at++) {
                need(mkdir(groups[at].path, 0755), groups[at].path);
                if (groups[at].key && !strcmp(groups[at].key, "cpuset")) {
                        inherit(groups[at].path, groups[at].folder, "cpuset.cpus");
                        inherit(groups[at].path, groups[at].folder, "cpuset.mems");
                } else if (!groups[at].key) {
                        how.flags |= CLONE_INTO_CGROUP;
                        how.cgroup = need(open(groups[at].path, O_DIRECTORY | O_CLOEXEC), groups[at].path);
                }
        }
        pid = need(syscall(SYS_clone3, &how, sizeof how), "clone3");
        if (!pid) {
                close(channel[0]);
                inside(channel[1]);
        }
        close(channel[1]);
        if (how.cgroup)
                close(how.cgroup);
        for (at = 0; at < group_count; at++)
                limits(groups[at].path, &groups[at]);
        need(read(channel[0], &byte, 1) - 1, "channel");
        need(write(channel[0], "g", 1), "channel");
        read(channel[0], &byte, 1);             /* ends when the program runs */
        put(folder, "state.json", text, 660);
        need(waitpid(pid, &status, 0), "waitpid");
        need(-status, "the program");
        close(channel[0]);
        for (at = 0; at < group_count; at++)
                need(rmdir(groups[at].path), groups[at].path);
        for (at = 0; at < 2; at++) {
                snprintf(path, sizeof path, "%s/%s", folder, at ? "config.json" : "state.json");
                unlink(path);
        }
        need(rmdir(folder), folder);
}

static double now(void)
{
        struct timespec t;

        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

int main(int count, char **words)
{
        static struct sock_filter code[4096];
        int at, fd, rounds;
        double start;

        if (count < 6 || count - 5 > GROUPS)
                return 2;
        rootfs = words[2];
        fd = need(open(words[4], O_RDONLY | O_CLOEXEC), words[4]);
        filter.len = (unsigned short)(need(read(fd, code, sizeof code), words[4]) / sizeof *code);
        filter.filter = code;
        close(fd);
        for (at = 5; at < count; at++) {
                struct hierarchy *group = &groups[group_count++];

                group->folder = strsep(&words[at], "@");
                group->key = words[at];
                snprintf(group->path, sizeof group->path, "%s/pyhv-bench-c-%d", group->folder, getpid());
        }
        for (rounds = atoi(words[1]); rounds > 0; rounds--) {
                usleep(PAUSE);
                start = now();
                one(words[3]);
                printf("%.1f\n", now() - start);
                fflush(stdout);
        }
        return 0;
}
