/*
 * fuzz: a hostile guest. Random reads and writes of all sizes all over the port space and the memory-mapped
 * hole below 4 GiB. `count=N` accesses (default 10000), `seed=N`; `all` includes the registers by which a
 * guest ends or resets itself on purpose and those of the interrupt controllers.
 */
#include "console.h"
#include "cpu.h"
#include "power.h"
#include "pvh.h"

#define HOLE            0xc0000000ul
#define IOAPIC_PAGES    0xfec00000ul
#define LOCAL_APIC_END  0xfef00000ul

static uint64_t state;
static bool all;
static uint8_t scratch[64];

static uint32_t random(void)        /* xorshift64*, G. Marsaglia and S. Vigna */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)(state * 2685821657736338717ull >> 32);
}

/* Half of the accesses go where devices are likely. */
static uint16_t random_port(void)
{
    static const uint16_t likely[] = { 0x3f8, 0x60, 0x70, 0x20, 0xa0, 0x40, 0x80, 0x600, 0xcf8, 0x2f8 };
    uint32_t r = random();
    if (r & 1)
        return (uint16_t)(likely[(r >> 8) % (sizeof(likely) / 2)] + (r >> 4 & 7));
    return (uint16_t)(r >> 16);
}

/* Whether a write of `size` bytes touches a register that ends the guest. */
static bool ends(uint16_t port, unsigned size)
{
    static const uint16_t exits[] = { 0x64, 0xf4, 0x604, 0x605, 0xcf9, 0x92 };
    for (unsigned i = 0; i < sizeof(exits) / 2; i++)
        if (port <= exits[i] && exits[i] < port + size)
            return !all;
    return false;
}

static void port_access(void)
{
    uint16_t port = random_port();
    uint32_t r = random();
    unsigned size = 1u << r % 3;
    uint64_t count = 1 + (r >> 8 & 7);
    void *at = scratch;
    bool writes = r >> 16 & 1;
    if (writes && ends(port, size))
        return;
    if (r >> 17 & 1) {          /* a string instruction: several transfers in one exit */
        if (writes)
            asm volatile("rep outsb" : "+S"(at), "+c"(count) : "d"(port) : "memory");
        else
            asm volatile("rep insb" : "+D"(at), "+c"(count) : "d"(port) : "memory");
    } else if (writes) {
        if (size == 1) out8(port, (uint8_t)random()); else if (size == 2) out16(port, (uint16_t)random());
        else out32(port, random());
    } else {
        if (size == 1) in8(port); else if (size == 2) in16(port); else in32(port);
    }
}

static void memory_access(void)
{
    uint64_t address = HOLE + random() % (0x100000000ul - HOLE - 8);
    if (!all && address + 8 > IOAPIC_PAGES && address < LOCAL_APIC_END)
        return;
    uint32_t r = random();
    switch (r % 8) {
    case 0: *(volatile uint8_t *)address = (uint8_t)r; break;
    case 1: *(volatile uint16_t *)address = (uint16_t)r; break;
    case 2: *(volatile uint32_t *)address = r; break;
    case 3: *(volatile uint64_t *)address = r; break;
    case 4: (void)*(volatile uint8_t *)address; break;
    case 5: (void)*(volatile uint16_t *)address; break;
    case 6: (void)*(volatile uint32_t *)address; break;
    case 7: (void)*(volatile uint64_t *)address; break;
    }
}

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    const char *line = command_line(info);
    uint64_t count = option_number(line, "count", 10000);
    state = option_number(line, "seed", 1) * 2 + 1;
    all = option(line, "all");
    for (uint64_t i = 0; i < count; i++) {
        if (random() & 1)
            port_access();
        else
            memory_access();
    }
    out8(COM1 + 3, 3);          /* the divisor latch may be open now, or the line looped back */
    out8(COM1 + 4, 3);
    print("\nfuzz: %lu accesses survived\n", count);
    power_off();
}
