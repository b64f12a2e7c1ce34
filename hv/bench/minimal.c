/* The least a VMM can be, for comparison: a flat real-mode image at 0x7C00, one vCPU, port output thrown away.

       minimal IMAGE          boot it once and end
       minimal IMAGE N        boot it N times, print the microseconds of each from /dev/kvm to closed
       minimal IMAGE exits    boot it once, print nanoseconds per exit

   The guest ends by HLT or by writing to port 0x604. */

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { RAM = 64 << 20, LOAD = 0x7C00, POWER_OFF = 0x604 };

static void need(int ok, const char *what)
{
        if (!ok) {
                perror(what);
                exit(1);
        }
}

static double now(void)
{
        struct timespec t;

        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1e9 + t.tv_nsec;
}

static long boot(const char *image, long size, double *first, double *last)
{
        int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, cpu;
        long exits = 0;
        char *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        struct kvm_userspace_memory_region slot = { 0, 0, 0, RAM, (unsigned long)ram };
        struct kvm_sregs sregs;
        struct kvm_regs regs = { .rip = LOAD, .rflags = 2 };
        struct kvm_run *run;
        int length;

        need(kvm >= 0, "/dev/kvm");
        need((vm = ioctl(kvm, KVM_CREATE_VM, 0)) >= 0, "KVM_CREATE_VM");
        need(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
        need((cpu = ioctl(vm, KVM_CREATE_VCPU, 0)) >= 0, "KVM_CREATE_VCPU");
        length = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
        run = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
        memcpy(ram + LOAD, image, size);
        need(!ioctl(cpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
        sregs.cs.base = sregs.cs.selector = 0;
        need(!ioctl(cpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
        need(!ioctl(cpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
        for (;;) {
                need(!ioctl(cpu, KVM_RUN, 0), "KVM_RUN");
                if (!exits++)
                        *first = now();
                if (run->exit_reason != KVM_EXIT_IO || run->io.port == POWER_OFF)
                        break;
        }
        *last = now();
        munmap(run, length);
        close(cpu);
        close(vm);
        close(kvm);
        munmap(ram, RAM);
        return exits;
}

int main(int count, char **words)
{
        static char image[1 << 16];
        FILE *file = count > 1 ? fopen(words[1], "rb") : NULL;
        double start, first, last;
        long size, exits;
        int rounds;

        need(file != NULL, "usage: minimal IMAGE [N|exits]");
        size = fread(image, 1, sizeof image, file);
        if (count > 2 && !strcmp(words[2], "exits")) {
                exits = boot(image, size, &first, &last);
                printf("%.1f\n", (last - first) / (exits - 1));
                return 0;
        }
        rounds = count > 2 ? atoi(words[2]) : 1;
        while (rounds--) {
                start = now();
                boot(image, size, &first, &last);
                if (count > 2)
                        printf("%.1f\n", (now() - start) / 1e3);
        }
        return 0;
}
