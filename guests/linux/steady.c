/*
 * steady: work that shows whether a guest went on as if nothing had happened. Each job runs until SIGTERM, then says
 * what it did; `bad` in what it says is a failure. Driven by tests/kvm/test_snapshot_workload.py.
 *
 *   sum DISK           reads the disk again and again, past the page cache: the checksum must stay; writes the number of
 *                      the round to its last block and reads it back
 *   ticks              a timer of 20 ms: as many expirations as time has passed, and time never goes back
 *   listen PORT        takes one TCP stream of numbers, each the one before plus 1
 *   send HOST PORT     sends them
 *   count N            counts on processor N, and says how far it is every tenth of a second
 *   touch MIB          writes to every page of so much memory again and again: each must hold what was last written
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define PIECE       65536
#define BLOCK       4096
#define PERIOD      20000000ll
#define BLKGETSIZE64 _IOR(0x12, 114, size_t)     /* linux/fs.h */

static volatile sig_atomic_t over;
static char buffer[PIECE] __attribute__((aligned(BLOCK)));

static void stop(int number) { (void)number; over = 1; }

static int bad(const char *why, long long one, long long other)
{
    printf("steady: bad: %s: %lld, not %lld\n", why, one, other);
    return 1;
}

static int sum(const char *disk)
{
    int fd = open(disk, O_RDWR | O_DIRECT);
    uint64_t size = 0, first = 0;
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) < 0)
        return bad("the disk can't be opened", fd, 0);
    long long rounds = 0;
    for (; !over; rounds++) {
        uint64_t value = 14695981039346656037ull;       /* FNV-1a, 64 bits */
        for (uint64_t at = 0; at + BLOCK < size; at += PIECE) {
            size_t length = size - BLOCK - at < PIECE ? size - BLOCK - at : PIECE;
            if (pread(fd, buffer, length, (off_t)at) != (ssize_t)length)
                return bad("a read", (long long)at, 0);
            for (size_t i = 0; i < length; i++)
                value = (value ^ (unsigned char)buffer[i]) * 1099511628211ull;
        }
        if (!rounds)
            first = value;
        if (value != first)
            return bad("the sum has changed", (long long)value, (long long)first);
        memset(buffer, 0, BLOCK);
        memcpy(buffer, &rounds, sizeof rounds);
        if (pwrite(fd, buffer, BLOCK, (off_t)(size - BLOCK)) != BLOCK)
            return bad("a write", rounds, 0);
        memset(buffer, 255, BLOCK);
        if (pread(fd, buffer, BLOCK, (off_t)(size - BLOCK)) != BLOCK || memcmp(buffer, &rounds, sizeof rounds))
            return bad("what was written is not read", rounds, *(long long *)buffer);
    }
    printf("steady: sum %016llx, %lld rounds\n", (unsigned long long)first, rounds);
    return 0;
}

static long long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static int ticks(void)
{
    struct itimerspec every = { { 0, PERIOD }, { 0, PERIOD } };
    int fd = timerfd_create(CLOCK_MONOTONIC, 0);
    long long before = now(), start = before, asked = before, ticked = 0;
    timerfd_settime(fd, 0, &every, NULL);
    long long set = now();
    while (!over) {
        uint64_t expired;
        asked = now();
        if (read(fd, &expired, sizeof expired) != sizeof expired)
            continue;
        long long time = now();
        ticked += (long long)expired;
        if (time < before)
            return bad("time went back", time, before);
        /* Those that are due were counted: the first at `set` or up to set-start earlier, plus PERIOD. */
        if (ticked * PERIOD > time - start)
            return bad("ticks too many", ticked, (time - start) / PERIOD);
        if ((ticked + 2) * PERIOD < asked - set)
            return bad("ticks were lost", ticked, (asked - set) / PERIOD);
        before = time;
    }
    printf("steady: %lld ticks in %lld to %lld ms\n", ticked, (asked - start) / 1000000, (before - start) / 1000000);
    return 0;
}

static int whole(int fd, void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t count = read(fd, (char *)data + done, size - done);
        if (count <= 0)
            return 0;
        done += (size_t)count;
    }
    return 1;
}

static int listen_at(int port)
{
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
    int door = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    uint64_t numbers[128], due = 0;
    setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(door, (struct sockaddr *)&at, sizeof at) < 0 || listen(door, 1) < 0)
        return bad("the port", port, 0);
    puts("steady: listening");
    int fd = accept(door, NULL, NULL);
    while (whole(fd, numbers, sizeof numbers))
        for (size_t i = 0; i < 128; i++)
            if (numbers[i] != due++)
                return bad("a number of the stream", (long long)numbers[i], (long long)due - 1);
    printf("steady: received %llu\n", (unsigned long long)due);
    return 0;
}

static int send_to(const char *host, int port)
{
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    uint64_t numbers[128], next = 0;
    inet_pton(AF_INET, host, &to.sin_addr);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
        return bad("the connection", port, 0);
    while (!over) {
        for (size_t i = 0; i < 128; i++)
            numbers[i] = next++;
        for (size_t done = 0; done < sizeof numbers;) {
            ssize_t count = write(fd, (char *)numbers + done, sizeof numbers - done);
            if (count < 0 && !over)
                return bad("the stream broke", (long long)next, 0);
            if (count > 0)
                done += (size_t)count;
        }
    }
    close(fd);
    printf("steady: sent %llu\n", (unsigned long long)next);
    return 0;
}

/* A counter that only its own processor can have moved on. */
static int count(int number)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(number % 64, &one);
    if (sched_setaffinity(0, sizeof one, &one) < 0)
        return bad("no such processor", number % 64, 0);
    long long rounds = 0;
    for (long long said = 0; !over; rounds++)
        if (now() - said > 100000000ll) {
            int here = sched_getcpu();
            if (here != number % 64)
                return bad("on processor", here, number % 64);
            printf("steady: cpu%d %lld\n", here, rounds);
            said = now();
        }
    return 0;
}

static int touch(int mib)
{
    size_t pages = (size_t)mib << 8;
    volatile uint64_t *memory = aligned_alloc(BLOCK, pages * BLOCK);
    if (!memory)
        return bad("no memory", mib, 0);
    uint64_t round = 0;
    for (size_t i = 0; i < pages; i++)
        memory[i * 512 + i % 512] = 0;
    puts("steady: touching");
    for (; !over; round++)
        for (size_t i = 0; i < pages; i++) {
            if (memory[i * 512 + i % 512] != round)
                return bad("a page", (long long)memory[i * 512 + i % 512], (long long)round);
            memory[i * 512 + i % 512] = round + 1;
        }
    printf("steady: touched %d MiB %llu times\n", mib, (unsigned long long)round);
    return 0;
}

int main(int argc, char **argv)
{
    struct sigaction action = { .sa_handler = stop };
    sigaction(SIGTERM, &action, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char *job = argc > 1 ? argv[1] : "";
    if (!strcmp(job, "sum") && argc == 3)
        return sum(argv[2]);
    if (!strcmp(job, "ticks"))
        return ticks();
    if (!strcmp(job, "listen") && argc == 3)
        return listen_at(atoi(argv[2]));
    if (!strcmp(job, "send") && argc == 4)
        return send_to(argv[2], atoi(argv[3]));
    if (!strcmp(job, "count") && argc == 3)
        return count(atoi(argv[2]));
    if (!strcmp(job, "touch") && argc == 3)
        return touch(atoi(argv[2]));
    return bad("what to do", argc, 3);
}
