/* A ring-3 program's side of the system calls. */
#ifndef USER_H
#define USER_H

#include "ring3.h"

static inline long call(long number, long a, long b)
{
    long result;
    asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b) : "rcx", "r11", "memory");
    return result;
}

static inline long call_by_interrupt(long number, long a, long b)
{
    long result;
    asm volatile("int $0x80" : "=a"(result) : "a"(number), "D"(a), "S"(b) : "memory");
    return result;
}

#endif
