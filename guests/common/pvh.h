/* What a PVH loader hands over (xen/include/public/arch-x86/hvm/start_info.h), and the command line in it. */
#ifndef PVH_H
#define PVH_H

#include <stdbool.h>
#include <stdint.h>

#define PVH_MAGIC   0x336ec578

struct pvh_module { uint64_t address, size, command_line, reserved; };
struct pvh_range { uint64_t address, size; uint32_t type, reserved; };

struct pvh_info {
    uint32_t magic, version, flags, module_count;
    uint64_t modules, command_line, rsdp;
    /* version 1 and later */
    uint64_t ranges;
    uint32_t range_count, reserved;
};

#define RANGE_RAM   1

/* The command line, "" where there is none. */
const char *command_line(const struct pvh_info *info);

/* Whether `word` stands in the command line; the number after `word=`, or `otherwise`. */
bool option(const char *line, const char *word);
uint64_t option_number(const char *line, const char *word, uint64_t otherwise);

/* A number, decimal or 0x hexadecimal, from *text on, which moves behind it. False where there is none. */
bool parse_number(const char **text, uint64_t *value);

#endif
