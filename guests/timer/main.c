/*
 * timer: every way a PC has to interrupt after a while, each checked to come, to stop, and to keep time with
 * the others: the PIT through the old PIC, the PIT through the IOAPIC, the local APIC's timer, once and
 * periodically; and the CMOS clock. Waiting is by HLT throughout.
 */
#include "acpi.h"
#include "apic.h"
#include "clock.h"
#include "console.h"
#include "power.h"
#include "traps.h"

#define HZ              50
#define TICKS           10
#define DIVIDE_BY_16    3
#define PERIODIC        (1u << 17)
#define IOAPIC_VECTOR   (VECTOR_IRQ + 2)
#define QUIET           150000000u      /* TSC cycles: two periods of 20 ms and more, up to 3 GHz */
#define WINDOWS         20

static struct platform platform;
static volatile unsigned pic_ticks, ioapic_ticks, local_ticks;

static void from_pic(struct trap *trap)     { (void)trap; pic_ticks++; pic_end(0); }
static void from_ioapic(struct trap *trap)  { (void)trap; ioapic_ticks++; apic_end(); }
static void from_local(struct trap *trap)   { (void)trap; local_ticks++; apic_end(); }

/* Sleep until `count` has grown by `ticks`; the TSC cycles it took. */
static uint64_t wait(volatile unsigned *count, unsigned ticks)
{
    unsigned start = *count;
    while (*count == start)
        wait_for_interrupt();
    uint64_t before = rdtsc();
    while (*count < start + 1 + ticks)
        wait_for_interrupt();
    return rdtsc() - before;
}

/* A busy host makes ticks late, and KVM then delivers those it owes; so a timer has stopped once a window stays empty. */
static void must_stop(volatile unsigned *count, const char *why)
{
    for (unsigned windows = 0; windows < WINDOWS; windows++) {
        unsigned before = *count;
        for (uint64_t end = rdtsc() + QUIET; rdtsc() < end;) {
            interrupts_on();
            relax();
            interrupts_off();
        }
        if (*count == before)
            return;
    }
    die(2, why);
}

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    traps_setup();
    apic_enable(true);
    platform_find(&platform, info);
    trap_set(VECTOR_IRQ, from_pic);
    trap_set(IOAPIC_VECTOR, from_ioapic);
    trap_set(VECTOR_LOCAL_TIMER, from_local);

    pic_setup(1);
    pit_start(HZ);
    uint64_t pic_cycles = wait(&pic_ticks, TICKS);
    pit_stop();
    must_stop(&pic_ticks, "the PIT does not stop");
    print("timer: PIT through the PIC, %u ticks\n", TICKS);

    pic_setup(0);
    ioapic_route(platform.timer_pin, IOAPIC_VECTOR, apic_id());
    pit_start(HZ);
    uint64_t ioapic_cycles = wait(&ioapic_ticks, TICKS);
    pit_stop();
    must_stop(&ioapic_ticks, "the PIT does not stop");
    print("timer: PIT through pin %u of the IOAPIC, %u ticks\n", platform.timer_pin, TICKS);
    if (ioapic_cycles > 2 * pic_cycles || pic_cycles > 2 * ioapic_cycles)
        die(3, "the two ways of the PIT do not agree");

    apic_write(APIC_DIVIDE, DIVIDE_BY_16);
    apic_write(APIC_TIMER, VECTOR_LOCAL_TIMER);
    apic_write(APIC_INITIAL_COUNT, 100000);
    while (!local_ticks)
        wait_for_interrupt();
    must_stop(&local_ticks, "the local timer runs more than once");
    apic_write(APIC_TIMER, VECTOR_LOCAL_TIMER | PERIODIC);
    apic_write(APIC_INITIAL_COUNT, 1000000);            /* 16 ms at 1 GHz, KVM's APIC frequency */
    wait(&local_ticks, TICKS);
    apic_write(APIC_INITIAL_COUNT, 0);
    must_stop(&local_ticks, "the local timer does not stop");
    print("timer: local APIC timer, once and %u ticks\n", TICKS);

    struct date now = clock_read();
    if (now.year < 2024 || now.month < 1 || now.month > 12 || now.day < 1 || now.day > 31)
        die(4, "the CMOS clock is nonsense");
    print("timer: the CMOS clock says %04u-%02u-%02u\ntimer: ok\n", now.year, now.month, now.day);
    power_off();
}
