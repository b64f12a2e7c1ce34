/*
 * The program that runs in ring 3: it may compute, use its own memory and ask the kernel; nothing else.
 * It counts the primes below a million, which takes milliseconds on a processor and would take half a minute
 * if it were emulated: on a software KVM ring 3 runs natively all the same.
 */
#include "user.h"

#define LIMIT   1000000u

static char sieve[LIMIT / 2 / 8 + 1];       /* a bit per odd number: set when it is no prime */

static void write(const char *text)
{
    long length = 0;
    while (text[length])
        length++;
    call(CALL_WRITE, (long)text, length);
}

static unsigned count_primes(void)
{
    unsigned count = 1;                     /* 2 */
    for (unsigned i = 0; i < sizeof(sieve); i++)
        sieve[i] = 0;
    for (unsigned n = 3; n < LIMIT; n += 2) {
        if (sieve[n / 16] >> (n / 2 % 8) & 1)
            continue;
        count++;
        if (n < LIMIT / n)
            for (unsigned m = n * n; m < LIMIT; m += 2 * n)
                sieve[m / 16] |= (char)(1 << (m / 2 % 8));
    }
    return count;
}

_Noreturn void user_main(long argument);
_Noreturn void user_main(long argument)
{
    unsigned privilege;
    asm("mov %%cs, %0" : "=r"(privilege));
    write("  hello from ring 3\n");
    if ((privilege & 3) != 3)
        write("  (but this is no ring 3)\n");

    static char text[] = "  primes below a million: 00000\n";
    unsigned count = count_primes();
    for (unsigned at = sizeof(text) - 3; count; at--, count /= 10)
        text[at] = (char)('0' + count % 10);
    call_by_interrupt(CALL_WRITE, (long)text, sizeof(text) - 1);
    call(CALL_EXIT, argument, 0);
    for (;;)
        ;
}
