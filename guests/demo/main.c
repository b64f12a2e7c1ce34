/*
 * demo: pyhv's built-in guest, a kernel to read in an evening. start.S brought the processor into 64-bit mode;
 * main looks around, runs a program in ring 3 and then takes commands on the serial port.
 *
 * Where ring 0 is emulated a million instructions take a second, so nothing here clears megabytes or polls.
 */
#include "demo.h"

#include "apic.h"
#include "console.h"
#include "power.h"
#include "ring3.h"
#include "traps.h"

const struct pvh_info *boot_info;
struct platform platform;

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    boot_info = info;
    puts("\ndemo: a tiny 64-bit kernel, entered by PVH\n");
    if (info->magic != PVH_MAGIC)
        die(0x71, "no PVH start info");
    const char *line = command_line(info);
    if (*line)
        print("command line: %s\n", line);

    traps_setup();
    apic_enable(true);
    platform_find(&platform, info);
    timer_start();
    cpus_start();
    ring3_setup();

    memory_report();
    cpus_report();
    timer_report();
    devices_report();
    user_report();

    input_start();
    shell();
    puts("powering off\n");
    power_off();
}
