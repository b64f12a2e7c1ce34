/* Starting the other processors. */
#ifndef SMP_H
#define SMP_H

#include "acpi.h"

typedef void (*cpu_main)(uint8_t id);

/*
 * Start every processor but this one; each runs `run` on a stack of its own and then halts for good.
 * Returns how many were started and came up in time.
 */
unsigned smp_start(const struct platform *platform, cpu_main run);

struct lock { volatile int taken; };
void lock(struct lock *lock);
void unlock(struct lock *lock);

#endif
