/* Exceptions and interrupts: one table of handlers. */
#ifndef TRAPS_H
#define TRAPS_H

#include <stdint.h>

/* What traps.S pushes, lowest address first. */
struct trap {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    uint64_t vector, error;
    uint64_t rip, cs, rflags, rsp, ss;      /* pushed by the processor */
};

typedef void (*trap_handler)(struct trap *);

#define TRAP_INVALID_OPCODE     6
#define TRAP_PROTECTION         13
#define TRAP_PAGE_FAULT         14

/* Vectors above the exceptions, as these guests use them. */
#define VECTOR_IRQ              0x20        /* 16 of them: timer, keyboard, ... as the PIC numbers them */
#define VECTOR_LOCAL_TIMER      0x30
#define VECTOR_WAKE             0x31
#define VECTOR_SYSTEM_CALL      0x80        /* ring 3 may call this one */
#define VECTOR_SPURIOUS         0xff

/* Fill the interrupt descriptor table and load it; then an unhandled trap is reported and ends the guest. */
void traps_setup(void);

/* Load the table on another processor. */
void traps_load(void);

void trap_set(uint8_t vector, trap_handler handler);

#endif
