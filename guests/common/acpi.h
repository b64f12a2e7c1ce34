/* ACPI tables (ACPI 6.4, 5.2), as far as a small guest reads them; the MP table where there is no ACPI. */
#ifndef ACPI_H
#define ACPI_H

#include "pvh.h"

struct acpi_header {
    char signature[4];
    uint32_t length;
    uint8_t revision, checksum;
    char oem[6], oem_table[8];
    uint32_t oem_revision;
    char creator[4];
    uint32_t creator_revision;
} __attribute__((packed));

#define ACPI_TABLES_MAX 16
#define CPUS_MAX        256

struct platform {
    const char *source;                 /* "ACPI", "MP table" or "nothing" */
    unsigned table_count;
    const struct acpi_header *tables[ACPI_TABLES_MAX];
    unsigned cpu_count;
    uint8_t cpus[CPUS_MAX];             /* APIC ids; the boot processor is among them */
    unsigned ioapic_count;
    uint32_t ioapic_address;
    uint8_t timer_pin;                  /* where the PIT arrives on the IOAPIC */
};

/* Find the tables: the address the loader gave, then where PC firmware puts them. */
void platform_find(struct platform *platform, const struct pvh_info *info);

/* Whether the bytes of a table add up to 0, as each must. */
bool checksum_ok(const void *table, uint32_t length);

#endif
