/* Running a program in ring 3: its pages, the way in and out, its system calls. */
#ifndef RING3_H
#define RING3_H

#include <stdint.h>

#include "traps.h"

/* The program's view. RAX is the number, RDI, RSI, RDX the arguments, by SYSCALL or INT 0x80 alike. */
#define CALL_EXIT       0       /* (code) */
#define CALL_WRITE      1       /* (text, length) -> length, or -1 where the text is not the program's own */
#define CALL_TICKS      2       /* () -> timer ticks so far */

/* The program lives here (pvh.ld): code and data from the start, one page of stack at the end. */
#define USER_START      0x40000000ul
#define USER_END        0x40200000ul

/* TSS, the system call registers, the page table of USER_START. Once, after traps_setup. */
void ring3_setup(void);

/* Run user_main in ring 3 until it exits: its code, or -vector where it faulted. `argument` is its first one. */
long ring3_run(long argument);

/* How the last program ended where it faulted. */
extern struct trap ring3_fault;
extern uint64_t ring3_fault_address;

/* System calls so far, by the way they came. */
extern unsigned ring3_syscalls, ring3_interrupts;

/* Timer ticks, for CALL_TICKS; a guest with a timer counts them up. */
extern volatile uint64_t ring3_ticks;

#endif
