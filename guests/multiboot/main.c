/* Prints what the boot loader handed over, and checks that it is consistent. */
#include <stdint.h>

#include "console.h"

#define MAGIC           0x2badb002u
#define HAS_MEMORY      (1u << 0)
#define HAS_LINE        (1u << 2)
#define HAS_MODULES     (1u << 3)
#define HAS_MAP         (1u << 6)
#define HAS_LOADER      (1u << 9)

struct module { uint32_t start, end, text, reserved; };
struct range { uint32_t size; uint64_t address, length; uint32_t type; } __attribute__((packed));

struct info {
    uint32_t flags, memory_lower, memory_upper, boot_device, command_line, module_count, modules, symbols[4];
    uint32_t map_length, map, drives_length, drives, config_table, loader;
};

static void fail(const char *why)
{
    print("FAILED: %s\n", why);
    asm volatile("outb %0, $0xf4; ud2" :: "a"((uint8_t)2));
}

static void show_modules(const struct info *info)
{
    const struct module *module = (const struct module *)info->modules;
    for (uint32_t i = 0; i < info->module_count; i++, module++) {
        uint32_t sum = 0;
        for (uint32_t at = module->start; at < module->end; at++)
            sum += *(const uint8_t *)at;
        print("module %u: %u bytes, sum %u, \"%s\"\n", i, module->end - module->start, sum, (const char *)module->text);
        if (module->start & 4095)
            fail("a module is not on a page boundary");
    }
}

static void show_map(const struct info *info)
{
    uint32_t upper = 0;
    for (uint32_t at = info->map; at < info->map + info->map_length;) {
        const struct range *range = (const struct range *)at;
        print("memory %08x%08x + %08x%08x type %u\n", (uint32_t)(range->address >> 32), (uint32_t)range->address,
              (uint32_t)(range->length >> 32), (uint32_t)range->length, range->type);
        if (range->address == 0x100000 && range->type == 1)
            upper = (uint32_t)(range->length >> 10);
        at += range->size + 4;          /* the size does not count itself */
    }
    if (upper != info->memory_upper)
        fail("mem_upper is not what the memory map says");
}

void main(uint32_t magic, const struct info *info);
void main(uint32_t magic, const struct info *info)
{
    puts("multiboot: 32-bit protected mode\n");
    if (magic != MAGIC)
        fail("wrong magic number");
    if (info->flags & HAS_LOADER)
        print("loader: %s\n", (const char *)info->loader);
    if (info->flags & HAS_LINE)
        print("command line: %s\n", (const char *)info->command_line);
    if (!(info->flags & HAS_MEMORY) || !(info->flags & HAS_MAP))
        fail("no memory map");
    print("memory: %u KiB lower, %u KiB upper\n", info->memory_lower, info->memory_upper);
    show_map(info);
    if (info->flags & HAS_MODULES)
        show_modules(info);
    puts("multiboot: ok\n");
}
