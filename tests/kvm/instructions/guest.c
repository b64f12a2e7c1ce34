/* In ring 0 of a guest: the state after each test and round, into memory from 16 MiB up, where the host reads it. */
#include "console.h"
#include "cpu.h"
#include "power.h"
#include "pvh.h"
#include "state.h"
#include "traps.h"

#define RESULTS     ((struct state *)0x1000000)
#define OSFXSR      (1ul << 9)
#define OSXMMEXCPT  (1ul << 10)
#define OSXSAVE     (1ul << 18)

static const struct test *volatile current;

static void report(struct trap *trap)
{
    print("%s: exception %lu at %lx\n", current->name, trap->vector, trap->rip);
    die(2, "an instruction failed");
}

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    uint64_t cr4;
    asm volatile("mov %%cr4, %0" : "=r"(cr4));
    asm volatile("mov %0, %%cr4" :: "r"(cr4 | OSFXSR | OSXMMEXCPT | OSXSAVE));
    asm volatile("xsetbv" :: "c"(0), "a"((uint32_t)option_number(command_line(info), "xcr0", 3)), "d"(0));
    traps_setup();
    trap_set(TRAP_INVALID_OPCODE, report);
    trap_set(TRAP_PROTECTION, report);
    trap_set(TRAP_PAGE_FAULT, report);
    struct state *result = RESULTS;
    for (const struct test *test = tests; test < tests_end; test++) {
        current = test;
        for (unsigned round = 0; round < ROUNDS; round++, result++) {
            prepare(result, (unsigned)(test - tests), round);
            test->run(result);
        }
    }
    puts("instructions: done\n");
    power_off();
}
