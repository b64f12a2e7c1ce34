/* Time: the PIT interrupts through the PIC; ten of its milliseconds measure the time stamp counter. */
#include "demo.h"

#include "apic.h"
#include "clock.h"
#include "console.h"
#include "ring3.h"
#include "traps.h"

#define TIMER_LINE      0
#define UART_LINE       4
#define CALIBRATION_HZ  1000
#define CALIBRATION     10          /* ticks */

volatile uint64_t ticks;
static uint64_t tsc_khz;

static void tick(struct trap *trap)
{
    (void)trap;
    ticks++;
    ring3_ticks = ticks;
    pic_end(TIMER_LINE);
}

static void wait_until(uint64_t count)
{
    while (ticks < count)
        wait_for_interrupt();
}

void timer_start(void)
{
    trap_set(VECTOR_IRQ + TIMER_LINE, tick);
    pic_setup(1 << TIMER_LINE | 1 << UART_LINE);
    pit_start(CALIBRATION_HZ);
    wait_until(1);                  /* start on an edge */
    uint64_t before = rdtsc();
    wait_until(1 + CALIBRATION);
    tsc_khz = (rdtsc() - before) / (CALIBRATION * 1000 / CALIBRATION_HZ);
    pit_start(TICKS_PER_SECOND);
    ticks = 0;
}

void timer_report(void)
{
    struct date now = clock_read();
    print("time\n  %04u-%02u-%02u %02u:%02u:%02u by the CMOS clock\n", now.year, now.month, now.day, now.hour,
          now.minute, now.second);
    print("  timer at %u Hz, %lu ticks so far; time stamp counter at about %lu MHz\n", TICKS_PER_SECOND, ticks,
          (tsc_khz + 500) / 1000);
}
