/* The devices every PC has, asked for their identity where they have one. */
#include "demo.h"

#include "apic.h"
#include "console.h"

#define UART_SCRATCH    (COM1 + 7)
#define UART_IIR        (COM1 + 2)
#define UART_FCR        (COM1 + 2)

static const char *uart_kind(void)
{
    out8(UART_SCRATCH, 0x5a);                   /* the 8250 has no scratch register */
    if (in8(UART_SCRATCH) != 0x5a)
        return "8250, or none";
    out8(UART_FCR, 1);
    return in8(UART_IIR) >> 6 == 3 ? "16550A with FIFOs" : "16450";     /* IIR bits 7:6: FIFOs on */
}

void devices_report(void)
{
    print("devices\n  serial port at 3f8, interrupt 4: %s\n", uart_kind());
    print("  local APIC %u at %lx, version %02x\n", apic_id(), LOCAL_APIC, apic_read(APIC_VERSION) & 0xff);
    if (platform.ioapic_count && platform.ioapic_address == IOAPIC) {
        uint32_t version = ioapic_read(1);
        print("  IOAPIC %u at %lx, version %02x, %u pins\n", ioapic_read(0) >> 24 & 15, IOAPIC, version & 0xff,
              (version >> 16 & 0xff) + 1);
    }
    if (platform.table_count) {
        puts("  ACPI tables:");
        for (unsigned i = 0; i < platform.table_count; i++) {
            const struct acpi_header *table = platform.tables[i];
            puts(" ");
            put(table->signature, 4);
            if (!checksum_ok(table, table->length))
                puts(" (bad checksum)");
        }
        puts("\n");
    }
}
