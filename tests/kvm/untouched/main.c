/*
 * Touches RAM that nobody has touched before, in the way that is typed: a letter for ring 0, the same behind a dot for
 * ring 3. Says what came of it.
 */
#include "console.h"
#include "cpu.h"
#include "power.h"
#include "program.h"
#include "pvh.h"
#include "ring3.h"
#include "traps.h"

#define TABLE   (MEMORY + 0x1000)       /* a page table that is all zeros */
#define MAPPED  0x50000000ul            /* what it maps */
#define USER    4

extern uint64_t level2[];               /* start.S */

static volatile uint64_t fault_error;
static const uint8_t returns_rdx[] = { 0x48, 0x89, 0xd0, 0xc3 };    /* mov %rdx, %rax; ret */

static char typed(void)
{
    while (!(in8(COM1 + 5) & 1))        /* LSR: data ready */
        asm volatile("pause");
    return (char)in8(COM1);
}

static void map(struct trap *trap)
{
    fault_error = trap->error;
    *(volatile uint64_t *)TABLE = 0x200003;     /* a page of the guest's own */
}

static void behind_ud2(struct trap *trap)
{
    trap->rip += 2;
}

static uint64_t ring0(char how)
{
    volatile uint64_t *memory = (volatile uint64_t *)MEMORY;
    uint64_t value = 0, size = 3 * 4096;
    void *at = (void *)(MEMORY - 0x1800);       /* begins below the block that a first touch backs */
    switch (how) {
    case 'l':
        return *memory;
    case 's':
        *(volatile uint8_t *)memory = 0x11;
        *((volatile uint16_t *)memory + 1) = 0x2222;
        *((volatile uint32_t *)memory + 1) = 0x33333333;
        return *memory == 0x3333333322220011;
    case 'x':
        asm volatile("lock xaddq %0, (%1)" : "+r"(value) : "r"(memory) : "memory");
        asm volatile("lock incq (%0)" : : "r"(memory) : "memory");
        return *memory;
    case 'c':
        asm volatile("lock cmpxchgq %2, (%1)" : "+a"(value) : "r"(memory), "r"(5ul) : "memory");
        return *memory;
    case 'r':
        asm volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(0x5a) : "memory");
        return *(volatile uint64_t *)(MEMORY - 0x1800) == 0x5a5a5a5a5a5a5a5a && memory[0] == 0x5a5a5a5a5a5a5a5a &&
               *(volatile uint8_t *)(MEMORY + 0x17ff) == 0x5a && *(volatile uint8_t *)(MEMORY + 0x1800) == 0;
    case 'u':                                   /* across two pages */
        *(volatile uint64_t *)(MEMORY - 4) = 0x1122334455667788;
        return *(volatile uint32_t *)MEMORY == 0x11223344;
    case 'k':                                   /* a stack, and what an exception pushes there */
        trap_set(TRAP_INVALID_OPCODE, behind_ud2);
        asm volatile("mov %%rsp, %%rbx; mov %1, %%rsp; push $3; ud2; pop %0; mov %%rbx, %%rsp"
                     : "=&r"(value) : "r"(MEMORY + 0x4000) : "rbx", "memory");
        return value;
    case 't':                                   /* a page table: not present, as zeros say */
        trap_set(TRAP_PAGE_FAULT, map);
        level2[MAPPED >> 21] = TABLE | 3;
        asm volatile("invlpg (%0)" : : "r"(MAPPED) : "memory");
        (void)*(volatile uint64_t *)MAPPED;
        return fault_error & 1;
    case 'd':                                   /* what the processor reads as a descriptor table's register */
        asm volatile("sidt (%0)" : : "r"(memory) : "memory");
        return *(volatile uint16_t *)memory;
    case 'v':                                   /* the state of the FPU, 512 bytes */
        asm volatile("fxsave64 (%0)" : : "r"(memory) : "memory");
        return *(volatile uint16_t *)memory;
    }
    return 0xbad;
}

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    uint64_t cr4;
    (void)info;
    traps_setup();
    ring3_setup();
    asm volatile("mov %%cr4, %0; or $0x600, %0; mov %0, %%cr4" : "=&r"(cr4));  /* OSFXSR, OSXMMEXCPT */
    level2[MEMORY >> 21] |= USER;
    level2[CODE >> 21] |= USER;
    level2[(CODE >> 21) - 1] |= USER;
    for (unsigned i = 0; i < sizeof(returns_rdx); i++)
        ((volatile uint8_t *)CODE)[i] = returns_rdx[i];
    puts("untouched: ready\n");
    char how = typed();
    if (how == '.')
        print("untouched: %ld\n", ring3_run(typed()));
    else
        print("untouched: %ld\n", (long)ring0(how));
    power_off();
}
