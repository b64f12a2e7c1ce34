/* Running user_program.c and telling how it went. */
#include "demo.h"

#include "console.h"
#include "ring3.h"

void user_report(void)
{
    ring3_syscalls = ring3_interrupts = 0;
    puts("ring 3\n");
    long code = ring3_run(0);
    if (code < 0)
        print("  the program was stopped by exception %ld at %lx\n", -code, ring3_fault.rip);
    else
        print("  the program exited with %ld after %u system calls by syscall and %u by int 0x80\n", code,
              ring3_syscalls, ring3_interrupts);
}
