/* The parts of the demo kernel, one file each. */
#ifndef DEMO_H
#define DEMO_H

#include "acpi.h"

extern const struct pvh_info *boot_info;
extern struct platform platform;

void memory_report(void);       /* memory.c */
void cpus_start(void);          /* cpus.c */
void cpus_report(void);
void registers_report(void);
void timer_start(void);         /* timer.c */
void timer_report(void);
void devices_report(void);      /* devices.c */
void user_report(void);         /* user.c */
void input_start(void);         /* input.c */
void shell(void);               /* shell.c */

/* Wait for a typed byte; -1 after so many seconds without one (0: wait forever). */
int input_wait(unsigned seconds);

#define TICKS_PER_SECOND 20
extern volatile uint64_t ticks;     /* timer interrupts since timer_start was through */

#endif
