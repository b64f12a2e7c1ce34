/* The ways out. */
#ifndef POWER_H
#define POWER_H

#include <stdint.h>

_Noreturn void power_off(void);
_Noreturn void reset(void);
_Noreturn void triple_fault(void);

/* A check failed: say so, end with exit code (code << 1) | 1 through isa-debug-exit. Never looks like success. */
_Noreturn void die(uint8_t code, const char *why);

#endif
