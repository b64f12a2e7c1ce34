/* The first program of the benchmark's Linux guest (hv/bench/snapshot_guest.py): answers bytes, changes memory.
 *
 *     ?    answers !                                       on the console, and to whoever connects to vsock port 5000
 *     t    touches WORK bytes for the first time           T
 *     d    changes each of their pages once                D
 *     s    changes WORK bytes of pages in each second, until the next byte comes   S at once
 *     q    restarts the machine, which ends it
 *
 * The work is done in ring 3, which runs natively where a software KVM emulates ring 0; it asks the clock by the vDSO. */

#include <linux/vm_sockets.h>
#include <poll.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { WORK = 20 << 20, PAGE = 4096, PORT = 5000, STEPS = 100 };

static volatile char work[WORK] __attribute__((aligned(PAGE)));
static unsigned at;

static void change(unsigned pages)
{
        while (pages--) {
                work[at]++;
                at = (at + PAGE) % WORK;
        }
}

static double now(void)
{
        struct timespec time;

        clock_gettime(CLOCK_MONOTONIC, &time);
        return time.tv_sec + time.tv_nsec / 1e9;
}

/* A second's work in even steps; a guest that was held does not catch up. Whether a byte has come, is asked each second. */
static void steadily(void)
{
        struct pollfd typed = { .fd = 0, .events = POLLIN };

        do {
                double due = now();

                for (int step = 0; step < STEPS; step++) {
                        change(WORK / PAGE / STEPS);
                        for (due += 1.0 / STEPS; now() < due;)
                                ;
                        if (now() > due + 0.1)
                                due = now();
                }
        } while (!poll(&typed, 1, 0));
}

static char answer(char asked)
{
        switch (asked) {
        case '?':
                return '!';
        case 't':
        case 'd':
                change(WORK / PAGE);
                return asked - 'a' + 'A';
        case 's':
                write(1, "S", 1);
                steadily();
                return '.';
        case 'q':
                reboot(RB_AUTOBOOT);
        }
        return 0;
}

static void serve(int fd)
{
        char byte = 0;

        if (read(fd, &byte, 1) == 1 && (byte = answer(byte)))
                write(fd == 0 ? 1 : fd, &byte, 1);
}

int main(void)
{
        struct sockaddr_vm place = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = PORT };
        struct pollfd watched[2] = { { .fd = 0, .events = POLLIN }, { .events = POLLIN } };
        struct termios raw;

        tcgetattr(0, &raw);
        cfmakeraw(&raw);
        tcsetattr(0, TCSANOW, &raw);
        watched[1].fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        if (bind(watched[1].fd, (struct sockaddr *)&place, sizeof place) || listen(watched[1].fd, 8))
                watched[1].fd = -1;
        write(1, "answer: ready\n", 14);
        for (;;) {
                if (poll(watched, 2, -1) <= 0)
                        continue;
                if (watched[0].revents)
                        serve(0);
                if (watched[1].revents) {
                        int fd = accept(watched[1].fd, NULL, NULL);

                        serve(fd);
                        close(fd);
                }
        }
}
