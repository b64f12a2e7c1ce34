/* The program in ring 3; see program.h for what it does. */
#include "program.h"
#include "user.h"

#define KERNEL_MEMORY 0x100000ul

static long sse(void)
{
    static const float four[4] __attribute__((aligned(16))) = { 1, 2, 3, 4 };
    static float sum[4] __attribute__((aligned(16)));
    asm volatile("movaps %1, %%xmm0; addps %%xmm0, %%xmm0; movaps %%xmm0, %0" : "=m"(sum) : "m"(four));
    return *(unsigned *)&sum[3] == 0x41000000;      /* 8.0f */
}

_Noreturn void user_main(long mode);
_Noreturn void user_main(long mode)
{
    long result = 0;
    switch (mode) {
    case MODE_EXIT:
        result = 42;
        break;
    case MODE_CALLS:
        for (unsigned i = 0; i < 1000; i++)
            result += call(CALL_TICKS, 0, 0) >= 0;
        break;
    case MODE_SSE:
        result = sse();
        break;
    case MODE_LEAK:
        result = call(CALL_WRITE, KERNEL_MEMORY, 8) & 0xff;
        break;
    case MODE_PRIVILEGED:
        asm volatile("cli; hlt");
        break;
    case MODE_READ_KERNEL:
        result = *(volatile long *)KERNEL_MEMORY;
        break;
    case MODE_WRITE_KERNEL:
        *(volatile long *)KERNEL_MEMORY = 0;
        break;
    case MODE_INVALID:
        asm volatile("ud2");
        break;
    }
    call(CALL_EXIT, result, 0);
    for (;;)
        ;
}
