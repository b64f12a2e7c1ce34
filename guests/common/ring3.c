/*
 * Ring 3. A program may touch only pages whose user bit is set at all four levels, may not use privileged
 * instructions, and comes back to the kernel by a system call, an interrupt or an exception. The last two
 * switch to the stack that the task state segment names (Intel SDM 3A, 7.7); SYSCALL switches none (2B,
 * "SYSCALL"), so its entry code does.
 */
#include "ring3.h"

#include "console.h"
#include "cpu.h"
#include "segments.h"

#define MSR_STAR        0xc0000081
#define MSR_LSTAR       0xc0000082
#define MSR_SFMASK      0xc0000084
#define FLAGS_IF_DF_TF  0x700
#define PAGE            4096
#define PRESENT_WRITE_USER 7

extern uint64_t gdt[], level2[];                        /* start.S */
extern char user_image[], user_start[], user_end[];     /* pvh.ld */
extern char ring3_trap_stack_top[];                     /* ring3_entry.S */

void ring3_syscall_entry(void);
long ring3_enter(uint64_t entry, uint64_t stack, long argument);
_Noreturn void ring3_leave(long result);
uint64_t ring3_call(uint64_t number, uint64_t a, uint64_t b);

static struct {
    uint32_t reserved0;
    uint64_t rsp[3], reserved1, ist[7], reserved2;
    uint16_t reserved3, io_map;
} __attribute__((packed)) tss;

static uint64_t level1[512] __attribute__((aligned(PAGE)));
static char stack[PAGE] __attribute__((aligned(PAGE)));

struct trap ring3_fault;
uint64_t ring3_fault_address;
unsigned ring3_syscalls, ring3_interrupts;
volatile uint64_t ring3_ticks;

/* What SYSCALL and INT 0x80 come to. */
uint64_t ring3_call(uint64_t number, uint64_t a, uint64_t b)
{
    switch (number) {
    case CALL_EXIT:
        ring3_leave((long)a);
    case CALL_WRITE:
        /* Both bounds: a program must not have the kernel read for it what it may not read itself. */
        if (a < USER_START || a >= USER_START + (uint64_t)(user_end - user_start) ||
            b > USER_START + (uint64_t)(user_end - user_start) - a)
            return (uint64_t)-1;
        put((const char *)a, b);
        return b;
    case CALL_TICKS:
        return ring3_ticks;
    default:
        return (uint64_t)-1;
    }
}

static void interrupt_call(struct trap *trap)
{
    ring3_interrupts++;
    trap->rax = ring3_call(trap->rax, trap->rdi, trap->rsi);
}

static void fault(struct trap *trap)
{
    asm volatile("mov %%cr2, %0" : "=r"(ring3_fault_address));
    if ((trap->cs & 3) == 0) {      /* the kernel's own fault: let it be reported as one */
        trap_set((uint8_t)trap->vector, 0);
        return;                     /* the instruction faults again */
    }
    /* A software KVM delivers INT n from ring 3 as an invalid opcode: take it for what the program meant. */
    static const uint8_t int_80[] = { 0xcd, VECTOR_SYSTEM_CALL };
    const uint8_t *at = (const uint8_t *)trap->rip;
    if (trap->vector == TRAP_INVALID_OPCODE && trap->rip >= USER_START && trap->rip + 2 < USER_END &&
        at[0] == int_80[0] && at[1] == int_80[1]) {
        trap->rip += sizeof(int_80);
        interrupt_call(trap);
        return;
    }
    ring3_fault = *trap;
    ring3_leave(-(long)trap->vector);
}

void ring3_setup(void)
{
    uint64_t base = (uint64_t)&tss;
    tss.rsp[0] = (uint64_t)ring3_trap_stack_top;
    tss.io_map = sizeof(tss);       /* beyond the limit: no port for ring 3 */
    gdt[TSS_SELECTOR / 8] = (sizeof(tss) - 1) | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
    gdt[TSS_SELECTOR / 8 + 1] = base >> 32;
    asm volatile("ltr %w0" :: "r"(TSS_SELECTOR));

    wrmsr(MSR_STAR, (uint64_t)KERNEL_CODE << 32 | (uint64_t)USER_CODE32 << 48);
    wrmsr(MSR_LSTAR, (uint64_t)ring3_syscall_entry);
    wrmsr(MSR_SFMASK, FLAGS_IF_DF_TF);
    trap_set(VECTOR_SYSTEM_CALL, interrupt_call);
    trap_set(TRAP_INVALID_OPCODE, fault);
    trap_set(TRAP_PROTECTION, fault);
    trap_set(TRAP_PAGE_FAULT, fault);

    uint64_t pages = (uint64_t)(user_end - user_start + PAGE - 1) / PAGE;
    for (uint64_t i = 0; i < pages; i++)
        level1[i] = ((uint64_t)user_image + i * PAGE) | PRESENT_WRITE_USER;
    level1[511] = (uint64_t)stack | PRESENT_WRITE_USER;
    level2[USER_START >> 21] = (uint64_t)level1 | PRESENT_WRITE_USER;
    asm volatile("invlpg (%0)" :: "r"(USER_START) : "memory");
}

long ring3_run(long argument)
{
    return ring3_enter(USER_START, USER_END - 8, argument);     /* aligned as after a call */
}
