/*
 * memtest: writes to all RAM of the memory map and reads it back: first every place its own address, then the
 * complement, so that pages that alias each other or are not there show. `step=N` is the distance of the
 * places in bytes (default 4096: one in each page, as emulated ring 0 does a million instructions a second).
 */
#include "console.h"
#include "cpu.h"
#include "power.h"
#include "pvh.h"

#define GIB             (1ul << 30)
#define LARGE           0x83            /* present, writable, 2 MiB */
#define TABLE           3               /* present, writable */
#define MAPPED          4               /* GiB, by start.S */
#define REACH           32              /* GiB, by map_high */
#define FIRST           0x100000ul      /* the first MiB holds boot data */

extern uint64_t level3[];
extern char kernel_end[];

static uint64_t level2_high[REACH - MAPPED][512] __attribute__((aligned(4096)));
static uint64_t step;

/* Map what RAM there is above 4 GiB, one to one. */
static void map_high(uint64_t start, uint64_t end, uint64_t unused)
{
    (void)start, (void)unused;
    for (uint64_t gib = MAPPED; gib < REACH && gib * GIB < end; gib++) {
        uint64_t *table = level2_high[gib - MAPPED];
        for (uint64_t i = 0; i < 512; i++)
            table[i] = (gib * GIB + (i << 21)) | LARGE;
        level3[gib] = (uint64_t)table | TABLE;
    }
}

static void fill(uint64_t start, uint64_t end, uint64_t mask)
{
    for (uint64_t at = start; at < end; at += step)
        *(volatile uint64_t *)at = at ^ mask;
}

static void check(uint64_t start, uint64_t end, uint64_t mask)
{
    for (uint64_t at = start; at < end; at += step)
        if (*(volatile uint64_t *)at != (at ^ mask)) {
            print("memtest: %lx holds %lx\n", at, *(volatile uint64_t *)at);
            die(2, "memory does not hold what was written");
        }
}

/* Run over the ranges of RAM; the number of places. */
static uint64_t over_all(const struct pvh_info *info, void (*run)(uint64_t, uint64_t, uint64_t), uint64_t mask)
{
    const struct pvh_range *range = (const struct pvh_range *)info->ranges;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < info->range_count; i++, range++) {
        if (range->type != RANGE_RAM)
            continue;
        uint64_t start = range->address, end = start + range->size;
        if (start < (uint64_t)kernel_end && end > FIRST)
            start = ((uint64_t)kernel_end + 4095) & ~4095ul;
        if (end > REACH * GIB)
            end = REACH * GIB;
        if (end <= start || end <= FIRST)
            continue;
        run(start, end, mask);
        bytes += end - start;
    }
    return bytes;
}

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    step = option_number(command_line(info), "step", 4096) & ~7ul;
    if (step < 8)
        step = 8;
    over_all(info, map_high, 0);
    over_all(info, fill, 0);
    over_all(info, check, 0);
    over_all(info, fill, ~0ul);
    uint64_t bytes = over_all(info, check, ~0ul);
    print("memtest: %lu MiB ok, each %lu bytes\n", (bytes + 0x80000) >> 20, step);
    power_off();
}
