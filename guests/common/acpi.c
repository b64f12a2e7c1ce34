/*
 * RSDP -> XSDT -> all tables; MADT -> processors and IOAPIC. Without ACPI, the MP table (Intel MultiProcessor
 * Specification 1.4, 4). Lengths come from the tables and are checked before use.
 */
#include "acpi.h"

#include "apic.h"
#include "console.h"

#define LENGTH_MAX      0x10000

#define MADT_LOCAL_APIC 0
#define MADT_IOAPIC     1
#define MADT_OVERRIDE   2
#define MADT_ENABLED    1

struct rsdp {
    char signature[8];
    uint8_t checksum;
    char oem[6];
    uint8_t revision;
    uint32_t rsdt, length;
    uint64_t xsdt;
} __attribute__((packed));

struct mp_pointer {
    char signature[4];
    uint32_t table;
    uint8_t length, version, checksum, features[5];
} __attribute__((packed));

struct mp_table {
    char signature[4];
    uint16_t length;
    uint8_t version, checksum;
    char oem[8], product[12];
    uint32_t oem_table;
    uint16_t oem_size, entries;
    uint32_t local_apic;
    uint16_t extended;
    uint8_t extended_checksum, reserved;
} __attribute__((packed));

bool checksum_ok(const void *table, uint32_t length)
{
    const uint8_t *bytes = table;
    uint8_t sum = 0;
    for (uint32_t i = 0; i < length; i++)
        sum = (uint8_t)(sum + bytes[i]);
    return sum == 0;
}

/* A signature on a 16-byte boundary, as RSDP and MP pointer are to be searched for. */
static const void *search(uintptr_t start, uintptr_t end, const char *signature, uint32_t length)
{
    for (uintptr_t at = start; at + length <= end; at += 16)
        if (*(const volatile char *)at == signature[0] && starts_with((const char *)at, signature) &&
            checksum_ok((const void *)at, length))
            return (const void *)at;
    return 0;
}

static void add_cpu(struct platform *platform, uint8_t id)
{
    if (platform->cpu_count < CPUS_MAX)
        platform->cpus[platform->cpu_count++] = id;
}

static void read_madt(struct platform *platform, const struct acpi_header *madt)
{
    const uint8_t *at = (const uint8_t *)(madt + 1) + 8;        /* local APIC address, flags */
    const uint8_t *end = (const uint8_t *)madt + madt->length;
    while (at + 2 <= end && at[1] >= 2 && at + at[1] <= end) {
        if (at[0] == MADT_LOCAL_APIC && at[1] >= 8 && at[4] & MADT_ENABLED)
            add_cpu(platform, at[3]);
        else if (at[0] == MADT_IOAPIC && at[1] >= 12 && !platform->ioapic_count++)
            platform->ioapic_address = *(const uint32_t *)(at + 4);
        else if (at[0] == MADT_OVERRIDE && at[1] >= 10 && at[3] == 0)
            platform->timer_pin = at[4];
        at += at[1];
    }
}

static void read_xsdt(struct platform *platform, const struct rsdp *rsdp)
{
    bool wide = rsdp->revision >= 2 && rsdp->xsdt;
    const struct acpi_header *root = (const struct acpi_header *)(wide ? rsdp->xsdt : rsdp->rsdt);
    unsigned size = wide ? 8 : 4;
    if (root->length < sizeof(*root) || root->length > LENGTH_MAX || !checksum_ok(root, root->length))
        return;
    platform->source = "ACPI";
    const uint8_t *entries = (const uint8_t *)(root + 1);
    unsigned count = (root->length - (uint32_t)sizeof(*root)) / size;
    for (unsigned i = 0; i < count && platform->table_count < ACPI_TABLES_MAX; i++) {
        uint64_t address = wide ? *(const uint64_t *)(entries + 8 * i) : *(const uint32_t *)(entries + 4 * i);
        const struct acpi_header *table = (const struct acpi_header *)address;
        if (!address || address >> 32 || table->length < sizeof(*table) || table->length > LENGTH_MAX)
            continue;
        platform->tables[platform->table_count++] = table;
        if (starts_with(table->signature, "APIC"))
            read_madt(platform, table);
    }
}

static void read_mp_table(struct platform *platform, const struct mp_table *table)
{
    if (!starts_with(table->signature, "PCMP") || table->length < sizeof(*table))
        return;
    platform->source = "MP table";
    const uint8_t *at = (const uint8_t *)(table + 1);
    const uint8_t *end = (const uint8_t *)table + table->length;
    uint8_t isa_bus = 0xff;
    for (unsigned i = 0; i < table->entries && at < end; i++) {
        if (at[0] == 0) {                               /* processor, 20 bytes: id at 1, enabled at 3 */
            if (at[3] & 1)
                add_cpu(platform, at[1]);
            at += 20;
            continue;
        }
        if (at[0] == 1 && starts_with((const char *)at + 2, "ISA"))
            isa_bus = at[1];
        if (at[0] == 2 && !platform->ioapic_count++)    /* IOAPIC */
            platform->ioapic_address = *(const uint32_t *)(at + 4);
        if (at[0] == 3 && at[1] == 0 && at[4] == isa_bus && at[5] == 0)     /* interrupt 0 of ISA: its pin */
            platform->timer_pin = at[7];
        at += 8;
    }
}

void platform_find(struct platform *platform, const struct pvh_info *info)
{
    platform->source = "nothing";
    platform->timer_pin = 0;        /* where nothing says otherwise, interrupt and pin have the same number */
    const struct rsdp *rsdp = (const struct rsdp *)info->rsdp;
    if (!rsdp)
        rsdp = search(0xe0000, 0x100000, "RSD PTR ", 20);       /* ACPI 6.4, 5.2.5.1 */
    if (rsdp && starts_with(rsdp->signature, "RSD PTR "))
        read_xsdt(platform, rsdp);
    if (!platform->cpu_count) {
        const struct mp_pointer *mp = search(0x9fc00, 0xa0000, "_MP_", 16);
        if (!mp)
            mp = search(0xf0000, 0x100000, "_MP_", 16);
        if (mp)
            read_mp_table(platform, (const struct mp_table *)(uintptr_t)mp->table);
    }
    if (!platform->cpu_count)
        add_cpu(platform, apic_id());
}
