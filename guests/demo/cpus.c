/* The processors: what CPUID says of them, starting the others, the control registers. */
#include "demo.h"

#include "apic.h"
#include "console.h"
#include "smp.h"

static volatile uint64_t running;       /* a bit per APIC id below 64 */
static unsigned started;

/* Runs on each application processor, all at once: hence atomic. */
static void report_in(uint8_t id)
{
    if (id < 64)
        __atomic_fetch_or(&running, 1ull << id, __ATOMIC_SEQ_CST);
}

void cpus_start(void)
{
    report_in(apic_id());
    started = 1 + smp_start(&platform, report_in);
}

/* Four registers of CPUID are a piece of text, in this order. */
static char *append(char *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    const uint32_t words[] = { a, b, c, d };
    for (unsigned i = 0; i < 16; i++)
        *to++ = (char)(words[i / 4] >> 8 * (i % 4));
    *to = 0;
    return to;
}

void cpus_report(void)
{
    char text[49];
    print("processors (from the %s)\n", platform.source[0] == 'A' ? "ACPI MADT" : platform.source);
    print("  %u found, %u running, APIC ids", platform.cpu_count, started);
    for (unsigned id = 0; id < 64; id++)
        if (running >> id & 1)
            print(" %u", id);
    puts("\n");

    uint32_t highest = cpuid(0x80000000, 0).eax;
    if (highest >= 0x80000004) {
        char *end = text;
        for (uint32_t leaf = 0x80000002; leaf <= 0x80000004; leaf++) {
            struct cpuid r = cpuid(leaf, 0);
            end = append(end, r.eax, r.ebx, r.ecx, r.edx);
        }
        const char *name = text;
        while (*name == ' ')
            name++;
        if (*name)                      /* some hypervisors leave it blank */
            print("  %s\n", name);
    }
    if (cpuid(1, 0).ecx >> 31) {        /* the bit that says: you are a guest */
        struct cpuid r = cpuid(0x40000000, 0);
        append(text, r.ebx, r.ecx, r.edx, 0);
        print("  under a hypervisor that calls itself %s\n", text);
    }
}

void registers_report(void)
{
    uint64_t cr0, cr3, cr4, flags;
    asm volatile("mov %%cr0, %0; mov %%cr3, %1; mov %%cr4, %2; pushfq; pop %3"
                 : "=r"(cr0), "=r"(cr3), "=r"(cr4), "=r"(flags));
    print("  cr0 %08lx  cr3 %08lx  cr4 %08lx  efer %04lx  rflags %04lx\n", cr0, cr3, cr4, rdmsr(0xc0000080), flags);
    print("  tsc %lu  apic base %lx\n", rdtsc(), rdmsr(0x1b));
}
