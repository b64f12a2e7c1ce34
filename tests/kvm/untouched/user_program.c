/* First touches in ring 3, by instructions that an emulator may not know. */
#include "program.h"
#include "user.h"

_Noreturn void user_main(long mode);
_Noreturn void user_main(long mode)
{
    unsigned long value[2] = { 0, 0 };
    volatile unsigned long *memory = (volatile unsigned long *)MEMORY;
    switch (mode) {
    case 'l':
        value[0] = *memory;
        break;
    case 's':
        *memory = 0x1122334455667788;
        value[0] = *memory == 0x1122334455667788;
        break;
    case 'p':                       /* KVM's emulator knows neither */
        value[0] = 7;
        asm volatile("movdqu %0, %%xmm0; paddd (%1), %%xmm0; movdqu %%xmm0, %0" : "+m"(value) : "r"(memory));
        break;
    case 'q':
        value[0] = 7;
        asm volatile("movq %0, %%xmm0; movq %%xmm0, (%1)" : : "m"(value[0]), "r"(memory) : "memory");
        value[0] = *memory;
        break;
    case 'x':
        asm volatile("lock xaddq %0, (%1)" : "+r"(value[1]) : "r"(memory) : "memory");
        asm volatile("lock incq (%0)" : : "r"(memory) : "memory");
        value[0] = *memory;
        break;
    case 'f':                       /* zeros are `add %al, (%rax)`; behind them is the code that returns RDX */
        asm volatile("call *%2" : "=a"(value[0]) : "a"(&value[1]), "r"(CODE - 2), "d"(9l) : "memory");
        break;
    }
    call(CALL_EXIT, (long)value[0], 0);
    for (;;)
        ;
}
