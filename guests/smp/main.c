/*
 * smp: starts every processor and has them work together: on a counter with atomic additions, on another one
 * under a lock, and on interrupts between processors. `rounds=N` says how often (default 200).
 */
#include "acpi.h"
#include "apic.h"
#include "console.h"
#include "power.h"
#include "smp.h"
#include "traps.h"

#define WAIT 20000000u          /* rounds before we give a processor up */

static struct platform platform;
static struct lock guard;
static volatile uint64_t locked_count;
static volatile unsigned atomic_count, woken, ready, finished;
static unsigned rounds;

static void work(void)
{
    for (unsigned i = 0; i < rounds; i++) {
        __atomic_fetch_add(&atomic_count, 1, __ATOMIC_SEQ_CST);
        lock(&guard);
        locked_count = locked_count + 1;        /* a read and a write: lost additions show a broken lock */
        unlock(&guard);
    }
}

static void wake(struct trap *trap)
{
    (void)trap;
    __atomic_fetch_add(&woken, 1, __ATOMIC_SEQ_CST);
    apic_end();
}

/* Each application processor: work, then sleep until another processor's interrupt comes. */
static void helper(uint8_t id)
{
    (void)id;
    work();
    __atomic_fetch_add(&ready, 1, __ATOMIC_SEQ_CST);
    wait_for_interrupt();
    __atomic_fetch_add(&finished, 1, __ATOMIC_SEQ_CST);
}

static void wait_for(volatile unsigned *what, unsigned count, const char *why)
{
    for (unsigned tries = 0; *what < count; tries++) {
        if (tries == WAIT)
            die(2, why);
        relax();
    }
}

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    rounds = (unsigned)option_number(command_line(info), "rounds", 200);
    traps_setup();
    trap_set(VECTOR_WAKE, wake);
    apic_enable(false);
    platform_find(&platform, info);
    print("smp: %u processors by the %s\n", platform.cpu_count, platform.source);

    unsigned started = smp_start(&platform, helper);
    if (started != platform.cpu_count - 1)
        die(3, "a processor did not start");
    work();
    wait_for(&ready, started, "a processor does not come to an end");
    unsigned expected = rounds * (started + 1);
    if (atomic_count != expected || locked_count != expected)
        die(4, "additions were lost");
    print("smp: %u additions by %u processors\n", atomic_count, started + 1);

    for (unsigned i = 0; i < platform.cpu_count; i++)
        if (platform.cpus[i] != apic_id())
            apic_send(platform.cpus[i], VECTOR_WAKE);
    wait_for(&finished, started, "an interrupt between processors was lost");
    if (woken != started)
        die(5, "an interrupt between processors came twice");
    print("smp: %u interrupts between processors\nsmp: ok\n", woken);
    power_off();
}
