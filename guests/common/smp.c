/*
 * INIT and start-up interrupts (Intel SDM 3A, 9.4.4). A start-up interrupt names the page below 1 MiB where the
 * processor begins in real mode, so the trampoline is copied there. Processors are started one after the other:
 * the trampoline has one parameter block.
 */
#include "smp.h"

#include "apic.h"
#include "console.h"
#include "traps.h"

#define TRAMPOLINE  0x1000          /* free of loader data; see also trampoline.S */
#define STACK_SIZE  2048
#define STACKS      64
#define TRIES       3000000u        /* rounds of waiting; one is some ten instructions */

extern const char trampoline[], trampoline_end[];

static char stacks[STACKS][STACK_SIZE] __attribute__((aligned(16)));
static cpu_main to_run;
static volatile unsigned arrived;

uint64_t trampoline_stack;          /* read by trampoline.S */

void lock(struct lock *lock)
{
    while (__atomic_exchange_n(&lock->taken, 1, __ATOMIC_ACQUIRE))
        while (lock->taken)
            relax();
}

void unlock(struct lock *lock)
{
    __atomic_store_n(&lock->taken, 0, __ATOMIC_RELEASE);
}

/* Where the trampoline ends, in 64-bit mode, on the stack it was given. */
_Noreturn void smp_entry(void);
_Noreturn void smp_entry(void)
{
    traps_load();
    apic_enable(false);
    __atomic_fetch_add(&arrived, 1, __ATOMIC_SEQ_CST);      /* from here on the next one may start */
    to_run(apic_id());
    for (;;)
        asm volatile("cli; hlt");
}

unsigned smp_start(const struct platform *platform, cpu_main run)
{
    uint8_t self = apic_id();
    volatile char *target = (volatile char *)TRAMPOLINE;
    for (long i = 0; i < trampoline_end - trampoline; i++)
        target[i] = trampoline[i];
    to_run = run;
    unsigned started = 0;
    for (unsigned i = 0; i < platform->cpu_count && started < STACKS; i++) {
        if (platform->cpus[i] == self)
            continue;
        trampoline_stack = (uint64_t)stacks[started] + STACK_SIZE;
        unsigned before = arrived;
        /* A real machine needs 10 ms between the two, and a second start-up; a virtual one neither. */
        apic_send(platform->cpus[i], APIC_INIT);
        apic_send(platform->cpus[i], APIC_STARTUP | TRAMPOLINE >> 12);
        for (unsigned tries = 0; arrived == before; tries++) {
            if (tries == TRIES)
                return started;
            relax();
        }
        started++;
    }
    return started;
}
