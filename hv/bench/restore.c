/* What a restore can cost at least: the system calls of one, as they were recorded (hv/bench/snapshot_replay.py), again.
 *
 *     restore RECORD MEMORY N      N times; prints the microseconds of each, from nothing open to the processor's thread
 *                                  about to enter the guest
 *
 * RECORD is read each time, as a state file is. It is a row of `struct call`, each with `length` bytes of argument
 * behind it, then `fixes` places in them where something belongs that only this process knows. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { KVM, VM, VCPU, PROCESSORS = 64, EVENTS = 256, RECORD_MOST = 1 << 20,
       RUN_SIZE = 3 << 12,      /* KVM_GET_VCPU_MMAP_SIZE: kvm_run, port data, coalesced MMIO */
       HOLD_OFF = 40,           /* us, more than SRCU's (kernel/rcu/srcutree.c, exp_holdoff): see replay() */
       PAUSE = 30000 };         /* us: the kernel takes the last VM apart, on the time of the next one's ioctls */
enum { TO_MEMORY, TO_EVENT, TO_ARGUMENT };      /* what a fix puts there: an address or a descriptor */

struct call { uint32_t target, integer; uint64_t request, value; uint32_t length, fixes; };
struct fix { uint32_t offset, size, kind, pad; uint64_t value; };

struct machine {
        int kvm, vm, vcpus[PROCESSORS], events[EVENTS], count;
        struct kvm_run *run[PROCESSORS];
        char *ram;
        double entered;
};

static _Alignas(16) char record[RECORD_MOST];

static long need(long result, const char *what)
{
        if (result < 0) {
                perror(what);
                exit(1);
        }
        return result;
}

static double now(void)
{
        struct timespec t;

        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static uint64_t known(struct machine *machine, const struct fix *fix, const char *argument)
{
        if (fix->kind == TO_MEMORY)
                return (uint64_t)machine->ram + fix->value;
        if (fix->kind == TO_ARGUMENT)
                return (uint64_t)argument + fix->value;
        if (machine->events[fix->value % EVENTS] < 0)
                machine->events[fix->value % EVENTS] = need(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
        return machine->events[fix->value % EVENTS];
}

static char *replay(struct machine *machine, char *at)
{
        struct call *call = (struct call *)at;
        char *argument = at + sizeof *call;
        struct fix *fix = (struct fix *)(argument + ((call->length + 7) & ~7u));
        int target = call->target == KVM ? machine->kvm : call->target == VM ? machine->vm
                                                                              : machine->vcpus[call->target - VCPU];
        long result;

        for (uint32_t n = 0; n < call->fixes; n++) {
                uint64_t value = known(machine, fix + n, argument);

                memcpy(argument + fix[n].offset, &value, fix[n].size);
        }
        /* The filter waits for readers of the VM: some us, unless another such wait, that of the memory slot, has ended
           only just: then KVM is put off for up to 20 ms. Python is never so quick. */
        if (call->request == KVM_X86_SET_MSR_FILTER)
                for (double due = now() + HOLD_OFF; now() < due;)
                        ;
        result = ioctl(target, call->request, call->integer ? (void *)call->value : argument);
        if (result < 0) {
                fprintf(stderr, "ioctl %#lx: ", (unsigned long)call->request);
                need(result, "");
        }
        if (call->request == KVM_CREATE_VM)
                machine->vm = result;
        if (call->request == KVM_CREATE_VCPU) {
                machine->vcpus[machine->count] = result;
                machine->run[machine->count++] = mmap(NULL, RUN_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
                                                      result, 0);
        }
        return (char *)(fix + call->fixes);
}

static void *processor(void *argument)
{
        struct machine *machine = argument;

        machine->entered = now();
        machine->run[0]->immediate_exit = 1;    /* in and out: it was the way there that counts */
        ioctl(machine->vcpus[0], KVM_RUN, 0);
        return NULL;
}

static double restore(const char *state, const char *memory)
{
        struct machine machine = { .count = 0 };
        double start = now();
        struct stat size;
        pthread_t thread;
        long length;
        int fd;

        memset(machine.events, -1, sizeof machine.events);
        fd = need(open(state, O_RDONLY | O_CLOEXEC), state);
        length = need(read(fd, record, sizeof record), state);
        close(fd);
        fd = need(open(memory, O_RDONLY | O_CLOEXEC), memory);
        need(fstat(fd, &size), memory);
        machine.ram = mmap(NULL, size.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
        need(-(machine.ram == MAP_FAILED), "mmap");
        machine.kvm = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
        for (char *at = record; at < record + length;)
                at = replay(&machine, at);
        need(-pthread_create(&thread, NULL, processor, &machine), "thread");
        pthread_join(thread, NULL);

        for (int n = 0; n < machine.count; n++) {
                munmap(machine.run[n], RUN_SIZE);
                close(machine.vcpus[n]);
        }
        close(machine.vm);
        close(machine.kvm);
        close(fd);
        for (int n = 0; n < EVENTS; n++)
                if (machine.events[n] >= 0)
                        close(machine.events[n]);
        munmap(machine.ram, size.st_size);
        return machine.entered - start;
}

int main(int count, char **words)
{
        if (count != 4)
                return 2;
        for (int rounds = atoi(words[3]); rounds > 0; rounds--) {
                usleep(PAUSE);
                printf("%.1f\n", restore(words[1], words[2]));
                fflush(stdout);
        }
        return 0;
}
