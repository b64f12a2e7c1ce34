/*
 * fault: ends in the way the command line asks for, so that tests see how pyhv takes it.
 *
 *   triple  halt  sleep  spin  flood  reset  i8042  badinsn  unmapped  off  debugexit=N
 */
#include "console.h"
#include "cpu.h"
#include "power.h"
#include "pvh.h"

#define FLOOD_LINE "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n"

static _Noreturn void halt(void)
{
    for (;;)
        asm volatile("cli; hlt");
}

static _Noreturn void sleep(void)
{
    for (;;)
        asm volatile("sti; hlt");
}

static void flood(uint64_t lines)
{
    for (uint64_t i = 0; i < lines; i++)
        puts(FLOOD_LINE);
}

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    const char *line = command_line(info);
    puts("fault: ");
    puts(line);
    puts("\n");
    if (option(line, "triple"))
        triple_fault();
    if (option(line, "halt"))
        halt();
    if (option(line, "sleep"))          /* like halt, but an interrupt could wake it */
        sleep();
    if (option(line, "spin"))
        for (;;)
            relax();
    if (option(line, "flood")) {
        flood(option_number(line, "flood", ~0ull));
        power_off();
    }
    if (option(line, "reset"))
        reset();
    if (option(line, "i8042"))
        out8(0x64, 0xfe);
    if (option(line, "debugexit"))
        out8(0xf4, (uint8_t)option_number(line, "debugexit", 0));
    if (option(line, "badinsn"))        /* VPERMD on YMM without XCR0 set: nobody completes this one */
        asm volatile(".byte 0x62, 0xf2, 0xfd, 0x48, 0x36, 0xc0");
    if (option(line, "unmapped"))       /* execute where there is neither RAM nor ROM */
        asm volatile("jmp *%0" :: "r"(0xd0000000ul));
    if (option(line, "off"))
        power_off();
    die(1, "the command line asks for nothing I know");
}
