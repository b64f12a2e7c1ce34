/* The interrupt descriptor table (Intel SDM 3A, 6.14) and the way from a vector to its handler. */
#include "traps.h"

#include "console.h"
#include "cpu.h"
#include "power.h"
#include "segments.h"

#define GATE_RING0      0x8e        /* present, 64-bit interrupt gate */
#define GATE_RING3      0xee        /* the same, and INT from ring 3 may use it */

struct gate {
    uint16_t low, selector;
    uint8_t stack, type;
    uint16_t middle;
    uint32_t high, reserved;
};

extern const uint32_t trap_stubs[];     /* traps.S: addresses of the entry points; 0: none */

static struct gate table[256] __attribute__((aligned(16)));
static trap_handler handlers[256];

static void unhandled(struct trap *trap)
{
    uint64_t cr2;
    asm volatile("mov %%cr2, %0" : "=r"(cr2));
    print("\nunhandled trap %lu, error %lx, rip %lx:%lx, rsp %lx, rflags %lx, cr2 %lx\n", trap->vector, trap->error,
          trap->cs, trap->rip, trap->rsp, trap->rflags, cr2);
    print("rax %lx rbx %lx rcx %lx rdx %lx rsi %lx rdi %lx rbp %lx\n", trap->rax, trap->rbx, trap->rcx, trap->rdx,
          trap->rsi, trap->rdi, trap->rbp);
    die(0x70, "an exception that nobody handles");
}

/* Called by traps.S. */
void trap(struct trap *trap);
void trap(struct trap *trap)
{
    trap_handler handler = handlers[(uint8_t)trap->vector];
    if (handler)
        handler(trap);
    else if (trap->vector != VECTOR_SPURIOUS)
        unhandled(trap);
}

void trap_set(uint8_t vector, trap_handler handler)
{
    handlers[vector] = handler;
}

void traps_load(void)
{
    struct { uint16_t limit; uint64_t base; } __attribute__((packed)) pointer = { sizeof(table) - 1, (uint64_t)table };
    asm volatile("lidt %0" :: "m"(pointer));
}

void traps_setup(void)
{
    for (unsigned vector = 0; vector < 256; vector++) {
        uint32_t stub = trap_stubs[vector];
        if (!stub)
            continue;
        table[vector].low = (uint16_t)stub;         /* the kernel lies below 4 GiB: `high` stays 0 */
        table[vector].middle = (uint16_t)(stub >> 16);
        table[vector].selector = KERNEL_CODE;
        table[vector].type = vector == VECTOR_SYSTEM_CALL ? GATE_RING3 : GATE_RING0;
    }
    traps_load();
}
