/* The ways out: ACPI power-off, resets, the debug exit. Each tries the next when the machine is still there. */
#include "power.h"

#include "console.h"
#include "cpu.h"

#define ACPI_PM1_CONTROL    0x604
#define SOFT_OFF            (5 << 10 | 1 << 13)     /* SLP_TYP 5 and SLP_EN; ACPI 6.4, 4.8.3.2.1 */
#define RESET_CONTROL       0xcf9
#define KEYBOARD_COMMAND    0x64
#define DEBUG_EXIT          0xf4

_Noreturn void triple_fault(void)
{
    /* With no vectors, an exception has no handler, nor has the double fault that follows: shutdown. */
    struct { uint16_t limit; uint64_t base; } __attribute__((packed)) none = { 0, 0 };
    asm volatile("cli; lidt %0; ud2" :: "m"(none));
    for (;;)
        asm volatile("hlt");
}

_Noreturn void reset(void)
{
    out8(RESET_CONTROL, 0x02);      /* a hard reset, on the rising edge of bit 2 */
    out8(RESET_CONTROL, 0x06);
    out8(KEYBOARD_COMMAND, 0xfe);
    triple_fault();
}

_Noreturn void power_off(void)
{
    out16(ACPI_PM1_CONTROL, SOFT_OFF);
    reset();
}

_Noreturn void die(uint8_t code, const char *why)
{
    print("FAILED: %s\n", why);
    out8(DEBUG_EXIT, code);
    triple_fault();                 /* no debug exit here: a crash, so that nobody takes it for a success */
}
