/* What memory there is: the map in the PVH start info, the same one that a PC's firmware gives by INT 15h, E820h. */
#include "demo.h"

#include "console.h"

static const char *kind(uint32_t type)
{
    static const char *const names[] = { "?", "RAM", "reserved", "ACPI tables", "ACPI NVS", "bad" };
    return type < sizeof(names) / sizeof(*names) ? names[type] : "?";
}

void memory_report(void)
{
    extern char kernel_end[];       /* pvh.ld */
    uint64_t total = 0;
    puts("memory\n");
    const struct pvh_range *range = (const struct pvh_range *)boot_info->ranges;
    for (uint32_t i = 0; boot_info->version >= 1 && i < boot_info->range_count; i++, range++) {
        print("  %010lx - %010lx %9lu KiB  %s\n", range->address, range->address + range->size - 1, range->size >> 10,
              kind(range->type));
        if (range->type == RANGE_RAM)
            total += range->size;
    }
    print("  %lu MiB of RAM; this kernel takes %lu KiB from 1 MiB up\n", (total + 0x80000) >> 20,
          ((uint64_t)kernel_end - 0x100000) >> 10);
}
