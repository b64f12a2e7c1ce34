/*
 * ring3: runs user_program.c once for each thing a program may and may not do, and checks how it ends.
 */
#include "console.h"
#include "power.h"
#include "program.h"
#include "pvh.h"
#include "ring3.h"
#include "traps.h"

static const struct { const char *what; long mode, result; } cases[] = {
    { "exit with a code", MODE_EXIT, 42 },
    { "1000 system calls", MODE_CALLS, 1000 },
    { "computing with SSE2", MODE_SSE, 1 },
    { "a string of the kernel's is refused", MODE_LEAK, -1 & 0xff },
    { "a privileged instruction", MODE_PRIVILEGED, -TRAP_PROTECTION },
    { "reading the kernel's memory", MODE_READ_KERNEL, -TRAP_PAGE_FAULT },
    { "writing the kernel's memory", MODE_WRITE_KERNEL, -TRAP_PAGE_FAULT },
    { "an invalid opcode", MODE_INVALID, -TRAP_INVALID_OPCODE },
};

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    (void)info;
    traps_setup();
    ring3_setup();
    for (unsigned i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        long result = ring3_run(cases[i].mode);
        print("ring3: %s: %ld\n", cases[i].what, result);
        if (result != cases[i].result)
            die((uint8_t)(2 + i), "the program ended differently");
    }
    puts("ring3: ok\n");
    power_off();
}
