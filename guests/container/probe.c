/*
 * What a program sees of the container around it, one fact a line: "section name value".
 *
 * Built statically and put into a bundle's root by tests/root/test_differential.py, which runs the same bundle under
 * several runtimes and compares. Nothing here may differ from one run to the next: no times, no inode numbers, no pids
 * but those of a namespace of the container's own.
 *
 *     probe EXIT-CODE
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <unistd.h>

#define KERNEL_LARGEFILE 0100000       /* include/uapi/asm-generic/fcntl.h; the C library's O_LARGEFILE is 0 here */

extern char **environ;

/* A file as lines of `section`; only those that begin with one of `wanted`, where there are any. */
static void file(const char *section, const char *path, const char *const *wanted)
{
    char line[4096];
    FILE *from = fopen(path, "re");

    if (!from) {
        printf("%s %s %s\n", section, path, strerrorname_np(errno));
        return;
    }
    while (fgets(line, sizeof line, from)) {
        int take = !wanted;

        for (const char *const *name = wanted; name && *name; name++)
            take |= !strncmp(line, *name, strlen(*name));
        line[strcspn(line, "\n")] = 0;
        if (take)
            printf("%s %s\n", section, line);
    }
    fclose(from);
}

static void namespaces(void)
{
    static const char *const kinds[] = {"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"};
    char path[64], target[64];

    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i]);
        ssize_t length = readlink(path, target, sizeof target - 1);
        target[length < 0 ? 0 : length] = 0;
        printf("ns %s %s\n", kinds[i], target);
    }
}

static void identity(void)
{
    static const char *const rows[] = {"Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:", "Seccomp", "Umask:", "SigBlk:",
                                       "SigIgn:", "SigCgt:", "Threads:", "NSpid:", "Cpus_allowed:", "Mems_allowed:",
                                       "CoreDumping:", "TracerPid:", NULL};
    struct sched_param priority = {0};

    file("status", "/proc/self/status", rows);
    file("map uid", "/proc/self/uid_map", NULL);
    file("map gid", "/proc/self/gid_map", NULL);
    file("map setgroups", "/proc/self/setgroups", NULL);
    file("score", "/proc/self/oom_score_adj", NULL);
    file("cgroup", "/proc/self/cgroup", NULL);
    file("loginuid", "/proc/self/loginuid", NULL);
    file("comm", "/proc/self/comm", NULL);
    for (int which = 0; which < RLIM_NLIMITS; which++) {
        struct rlimit limit;

        getrlimit(which, &limit);
        printf("rlimit %d %lld %lld\n", which, (long long)limit.rlim_cur, (long long)limit.rlim_max);
    }
    sched_getparam(0, &priority);
    printf("sched policy %d priority %d nice %d io %ld\n", sched_getscheduler(0), priority.sched_priority,
           getpriority(PRIO_PROCESS, 0), syscall(SYS_ioprio_get, 1, 0));
    printf("process persona %#x dumpable %d securebits %#x subreaper-of-parent %d keepcaps %d\n",
           personality(0xffffffff), prctl(PR_GET_DUMPABLE), prctl(PR_GET_SECUREBITS), getppid() != 0,
           prctl(PR_GET_KEEPCAPS));
    int death = -1;
    prctl(PR_GET_PDEATHSIG, &death);
    printf("process death-signal %d slack %d leads-session %d leads-group %d\n", death, prctl(PR_GET_TIMERSLACK),
           getsid(0) == getpid(), getpgrp() == getpid());
    char key[256] = "";
    long length = syscall(SYS_keyctl, KEYCTL_DESCRIBE, KEY_SPEC_SESSION_KEYRING, key, sizeof key);
    printf("keyring %s\n", length < 0 ? strerrorname_np(errno) : strrchr(key, ';') ? strrchr(key, ';') + 1 : key);
}

static void surroundings(char **argv)
{
    char path[4096];
    struct utsname names;

    for (int i = 0; argv[i]; i++)
        printf("arg %s\n", argv[i]);
    for (char **name = environ; *name; name++)
        printf("env %s\n", *name);
    printf("cwd %s\n", getcwd(path, sizeof path) ? path : strerrorname_np(errno));
    uname(&names);
    printf("name host %s domain %s machine %s\n", names.nodename, names.domainname, names.machine);
}

static void mounts(void)
{
    char line[8192];
    FILE *from = fopen("/proc/self/mountinfo", "re");

    while (from && fgets(line, sizeof line, from)) {
        /* proc(5): id parent major:minor root target options [shared:N ...] - type source options */
        char *word[6] = {0}, *rest = line;

        line[strcspn(line, "\n")] = 0;
        for (int i = 0; i < 6; i++)
            word[i] = strsep(&rest, " ");
        printf("mount %s root %s options %s %s\n", word[4], word[3], word[5], rest ? rest : "");
    }
    if (from)
        fclose(from);
}

static char kind_of(mode_t mode)
{
    return S_ISDIR(mode) ? 'd' : S_ISCHR(mode) ? 'c' : S_ISBLK(mode) ? 'b' : S_ISFIFO(mode) ? 'p' : S_ISLNK(mode) ? 'l'
         : S_ISSOCK(mode) ? 's' : S_ISREG(mode) ? '-' : '?';
}

/* Everything below a folder, sorted by name; not into other file systems' depths: `depth` levels. */
static void tree(const char *section, const char *folder, int depth)
{
    struct dirent **entries;
    int count = scandir(folder, &entries, NULL, alphasort);

    if (count < 0) {
        printf("%s %s %s\n", section, folder, strerrorname_np(errno));
        return;
    }
    for (int i = 0; i < count; free(entries[i++])) {
        char path[4096], target[256] = "";
        struct stat about;

        if (!strcmp(entries[i]->d_name, ".") || !strcmp(entries[i]->d_name, ".."))
            continue;
        snprintf(path, sizeof path, "%s/%s", strcmp(folder, "/") ? folder : "", entries[i]->d_name);
        if (lstat(path, &about)) {
            printf("%s %s %s\n", section, path, strerrorname_np(errno));
            continue;
        }
        if (S_ISLNK(about.st_mode)) {
            ssize_t length = readlink(path, target, sizeof target - 1);
            target[length < 0 ? 0 : length] = 0;
        }
        printf("%s %s %c%04o %u:%u", section, path, kind_of(about.st_mode), about.st_mode & 07777, about.st_uid,
               about.st_gid);
        if (S_ISCHR(about.st_mode) || S_ISBLK(about.st_mode))
            printf(" %u:%u", major(about.st_rdev), minor(about.st_rdev));
        printf("%s%s\n", *target ? " -> " : "", target);
        if (S_ISDIR(about.st_mode) && depth > 1)
            tree(section, path, depth - 1);
    }
    free(entries);
}

/* Can it be looked into, can it be written to? Nothing is written. */
static void access_to(const char *path)
{
    struct stat about;
    char byte;

    if (lstat(path, &about)) {
        printf("path %s %s\n", path, strerrorname_np(errno));
        return;
    }
    if (S_ISDIR(about.st_mode)) {
        struct statfs system;
        int entries = 0;
        DIR *folder = opendir(path);

        for (struct dirent *entry; folder && (entry = readdir(folder));)
            entries += entry->d_name[0] != '.';
        if (folder)
            closedir(folder);
        statfs(path, &system);
        printf("path %s folder %s type %#lx flags %#lx mode %04o\n", path,
               !folder ? "closed" : entries ? "full" : "empty", (long)system.f_type, (long)system.f_flags,
               about.st_mode & 07777);
        return;
    }
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    const char *reads = fd < 0 ? strerrorname_np(errno) : read(fd, &byte, 1) < 0 ? strerrorname_np(errno) : "reads";
    int end = fd >= 0 && read(fd, &byte, 1) == 0;
    if (fd >= 0)
        close(fd);
    fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    printf("path %s %c %s%s %s\n", path, kind_of(about.st_mode), reads, end ? " empty" : "",
           fd < 0 ? strerrorname_np(errno) : "writable");
    if (fd >= 0)
        close(fd);
}

static void descriptors(void)
{
    for (int fd = 0; fd < 64; fd++) {
        struct stat about;
        char path[64], target[256];

        if (fstat(fd, &about))
            continue;
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(path, target, sizeof target - 1);
        target[length < 0 ? 0 : length] = 0;
        target[strcspn(target, "[")] = 0;       /* pipe:[number] */
        /* how it was opened: without what the kernel keeps, but does not heed after */
        printf("fd %d %c %s flags %#x close-on-exec %d tty %d\n", fd, kind_of(about.st_mode), target,
               fcntl(fd, F_GETFL) & ~(O_CLOEXEC | KERNEL_LARGEFILE), fcntl(fd, F_GETFD), isatty(fd));
    }
    struct winsize size;
    if (!ioctl(0, TIOCGWINSZ, &size))
        printf("terminal rows %d columns %d ours %d\n", size.ws_row, size.ws_col, tcgetpgrp(0) == getpgrp());
    int fd = open("/dev/tty", O_RDWR | O_CLOEXEC);
    printf("terminal controlling %s\n", fd < 0 ? strerrorname_np(errno) : "yes");
}

static void interfaces(void)
{
    struct if_nameindex *all = if_nameindex();
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    for (struct if_nameindex *one = all; one && one->if_index; one++) {
        struct ifreq request = {0};

        strncpy(request.ifr_name, one->if_name, IFNAMSIZ - 1);
        ioctl(fd, SIOCGIFFLAGS, &request);
        printf("interface %s flags %#x\n", one->if_name, (unsigned short)request.ifr_flags);
    }
    if_freenameindex(all);
    close(fd);
}

static void say(const char *what, long result)
{
    printf("try %s %s\n", what, result < 0 ? strerrorname_np(errno) : "works");
}

/* What the kernel lets us do: capabilities, filter, device rules and mount flags together. Nothing made stays. */
static void attempts(void)
{
    int fd = open("/probe-made", O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
    say("a file in the root", fd);
    unlink("/probe-made");
    say("a folder in /sys/fs/cgroup", mkdir("/sys/fs/cgroup/probe-made", 0700));
    rmdir("/sys/fs/cgroup/probe-made");
    static const struct { const char *name; mode_t kind; int major, minor; } nodes[] = {
        {"null", S_IFCHR, 1, 3}, {"kmsg", S_IFCHR, 1, 11}, {"tun", S_IFCHR, 10, 200}, {"fuse", S_IFCHR, 10, 229},
        {"loop0", S_IFBLK, 7, 0}};
    for (unsigned i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        char name[32];

        snprintf(name, sizeof name, "mknod %s", nodes[i].name);
        say(name, mknod("/dev/probe-node", nodes[i].kind | 0600, makedev(nodes[i].major, nodes[i].minor)));
        snprintf(name, sizeof name, "open %s", nodes[i].name);
        fd = open("/dev/probe-node", O_RDWR | O_NONBLOCK | O_CLOEXEC);
        say(name, fd);
        unlink("/dev/probe-node");
    }
    say("sethostname", sethostname("probe", 5));
    say("mount", mount("none", "/tmp", "tmpfs", 0, NULL));
    say("chroot", chroot("/"));
    say("setuid", seteuid(geteuid()));
    say("raw socket", socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, 1));
    say("packet socket", socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0));
    say("keyctl", syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 1));
    say("bpf", syscall(SYS_bpf, 5, NULL, 0));
    say("ptrace", syscall(SYS_ptrace, 0, 0, 0, 0));
    say("personality", personality(0x0008));
    say("getcpu", syscall(SYS_getcpu, NULL, NULL, NULL));
    say("priority", setpriority(PRIO_PROCESS, 0, -1));
    struct rlimit limit = {4096, 1 << 30};
    say("raise a limit", setrlimit(RLIMIT_NOFILE, &limit));
    say("unshare user", unshare(CLONE_NEWUSER));        /* last: it makes us mighty */
}

int main(int argc, char **argv)
{
    static const char *const paths[] = {
        "/", "/dev", "/proc/acpi", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/kcore", "/proc/keys", "/proc/sys",
        "/proc/sysrq-trigger", "/proc/timer_list", "/proc/sched_debug", "/proc/scsi", "/proc/sys/kernel/core_pattern",
        "/sys", "/sys/firmware", "/sys/fs/cgroup", "/sys/kernel", "/tmp", "/dev/shm", "/dev/pts", "/dev/mqueue",
        "/dev/ptmx", "/dev/null", "/dev/zero", "/dev/random", "/masked/file", "/masked/folder", "/readonly/file", "/readonly/folder",
        "/mnt/one", "/mnt/two", "/mnt/three", "/mnt/file"};
    static const char *const values[] = {
        "kernel/hostname", "kernel/domainname", "kernel/shmmax", "kernel/msgmax", "kernel/sem", "fs/mqueue/msg_max",
        "net/ipv4/ip_forward", "net/ipv4/ping_group_range", "net/ipv4/ip_unprivileged_port_start"};
    char path[128];

    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    descriptors();
    identity();
    namespaces();
    surroundings(argv);
    mounts();
    tree("dev", "/dev", 2);
    tree("root", "/", 1);
    tree("mnt", "/mnt", 2);
    for (unsigned i = 0; i < sizeof paths / sizeof *paths; i++)
        access_to(paths[i]);
    for (unsigned i = 0; i < sizeof values / sizeof *values; i++) {
        static const char *const all[] = {"", NULL};

        snprintf(path, sizeof path, "sysctl %s", values[i]);
        char name[128];
        snprintf(name, sizeof name, "/proc/sys/%s", values[i]);
        file(path, name, all);
    }
    interfaces();
    attempts();
    fflush(stdout);
    return argc > 1 ? atoi(argv[1]) : 0;
}
