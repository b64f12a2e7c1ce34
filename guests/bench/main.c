/*
 * bench: drives virtio-mmio devices from ring 3, where a software KVM runs at native speed, and prints what it took.
 *
 *   sequential=MIB random=N single=N write=MIB depth=N     blocks: 1 MiB reads, 4 KiB reads at depth 32 and 1, writes
 *   segments=N round-trips=N address= peer= tcp= udp=      network: TCP of 64 KiB segments, UDP echo
 *   console=BYTES entropy=BYTES                            console, entropy device
 *   check   compare what is read (each 8-byte word of a disk holds its offset)      idle    sleep at the end
 *
 * Ring 0 finds the devices (virtio_mmio.device=SIZE@ADDRESS:IRQ on the command line), opens their registers and the
 * arena to ring 3, and learns the time stamp counter's frequency. hv/bench/io_guest.py reads the lines it prints.
 */
#include "bench.h"

#include "console.h"
#include "cpu.h"
#include "power.h"
#include "pvh.h"
#include "ring3.h"
#include "traps.h"

#define WORD            "virtio_mmio.device="
#define LARGE_PAGE      (1ul << 21)
#define PAGE_USER       4
#define KVM_SIGNATURE   0x40000000      /* Documentation/virt/kvm/x86/cpuid.rst */
#define KVM_FEATURES    0x40000001
#define KVM_FEATURE_CLOCKSOURCE2 (1 << 3)
#define MSR_KVM_SYSTEM_TIME 0x4b564d01  /* Documentation/virt/kvm/x86/msr.rst */

extern uint64_t level2[];               /* start.S */

static struct {
    uint32_t version, pad0;
    uint64_t tsc_timestamp, system_time;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags, pad[2];
} __attribute__((packed, aligned(64))) volatile clock;

static void open_to_user(uint64_t start, uint64_t end)
{
    for (uint64_t at = start & ~(LARGE_PAGE - 1); at < end; at += LARGE_PAGE) {
        level2[at / LARGE_PAGE] |= PAGE_USER;
        asm volatile("invlpg (%0)" :: "r"(at) : "memory");
    }
}

/* ns = (ticks << shift) * mul >> 32, says the host's clock page; so kHz = 10^6 << 32 >> shift / mul. */
static uint64_t tsc_khz(void)
{
    if (cpuid(KVM_SIGNATURE, 0).ebx != 0x4b4d564b || !(cpuid(KVM_FEATURES, 0).eax & KVM_FEATURE_CLOCKSOURCE2))
        die(2, "no kvmclock to tell the frequency of the time stamp counter");
    wrmsr(MSR_KVM_SYSTEM_TIME, (uint64_t)&clock | 1);
    uint64_t scaled = (1000000ul << 32) / clock.tsc_to_system_mul;
    wrmsr(MSR_KVM_SYSTEM_TIME, 0);
    return clock.tsc_shift < 0 ? scaled << -clock.tsc_shift : scaled >> clock.tsc_shift;
}

static void find_devices(struct bench *bench, const char *line)
{
    for (; *line; line++) {
        if (!starts_with(line, WORD))
            continue;
        line += strlen(WORD);
        while (*line && *line != '@' && *line != ' ')
            line++;
        uint64_t address;
        if (*line++ != '@' || !parse_number(&line, &address) || address >> 32 || bench->count == DEVICES_MAX)
            die(3, "a device on the command line that can't be");
        bench->devices[bench->count++] = address;
        open_to_user(address, address + 4096);
    }
}

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    const char *line = command_line(info);
    struct bench *bench = (struct bench *)ARENA;
    traps_setup();
    ring3_setup();
    open_to_user(ARENA, ARENA_END);
    *bench = (struct bench){
        .tsc_khz = tsc_khz(),
        .sequential = option_number(line, "sequential", 0), .random = option_number(line, "random", 0),
        .single = option_number(line, "single", 0), .write = option_number(line, "write", 0),
        .segments = option_number(line, "segments", 0), .round_trips = option_number(line, "round-trips", 0),
        .console = option_number(line, "console", 0), .entropy = option_number(line, "entropy", 0),
        .depth = option_number(line, "depth", 4), .check = option(line, "check"),
        .address = (uint32_t)option_number(line, "address", 0x0a4d0002),        /* 10.77.0.2 */
        .peer = (uint32_t)option_number(line, "peer", 0x0a4d0001),
        .tcp_port = (uint16_t)option_number(line, "tcp", 5001), .udp_port = (uint16_t)option_number(line, "udp", 5002),
    };
    find_devices(bench, line);
    long result = ring3_run((long)bench);
    if (result < 0)
        print("bench: trap %ld at %lx, address %lx\n", -result, ring3_fault.rip, ring3_fault_address);
    if (result)
        die((uint8_t)(result < 0 ? 5 : 4), "the benchmark did not come to its end");
    puts("bench: done\n");
    while (option(line, "idle"))
        asm volatile("sti; hlt");
    power_off();
}
