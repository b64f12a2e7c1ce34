/*
 * Instructions that software KVM leaves to us, each a function of one struct state (state.h). Assembled twice:
 * into a program that runs them on the processor in user mode, and into a guest that runs them in ring 0.
 *
 * On entry RDI is the state. R15 keeps it; RSI points at its memory, aligned to 64 bytes.
 */
#include "state.h"

    .text
load_state:                             /* everything but RSI, R15, RSP */
    mov     %rdi, %r15
    fninit
    ldmxcsr STATE_MXCSR(%r15)
    .irp    n, 0, 1, 2, 3
    movups  STATE_XMM + 16 * \n(%r15), %xmm\n
    .endr
    lea     STATE_MEMORY(%r15), %rsi
    push    STATE_FLAGS(%r15)
    popfq
    mov     STATE_RAX(%r15), %rax
    mov     STATE_RBX(%r15), %rbx
    mov     STATE_RCX(%r15), %rcx
    mov     STATE_RDX(%r15), %rdx
    mov     STATE_RDI(%r15), %rdi
    ret

store_state:
    mov     %rax, STATE_RAX(%r15)       /* moves change no flags */
    mov     %rbx, STATE_RBX(%r15)
    mov     %rcx, STATE_RCX(%r15)
    mov     %rdx, STATE_RDX(%r15)
    mov     %rdi, STATE_RDI(%r15)
    pushfq
    pop     STATE_FLAGS(%r15)
    .irp    n, 0, 1, 2, 3
    movups  %xmm\n, STATE_XMM + 16 * \n(%r15)
    .endr
    stmxcsr STATE_MXCSR(%r15)
    ret

    .macro  test flags, text:vararg
    .section .rodata.tests, "a"
    .quad   1000f, 2000f, \flags
    .text
1000:
    push    %rbx
    push    %r15
    call    load_state
    \text
    call    store_state
    pop     %r15
    pop     %rbx
    ret
    .section .rodata.names, "a"
2000:
    .asciz  "\text"
    .endm

    .section .rodata.tests, "a"
    .globl  tests, tests_end
    .balign 8
tests:
    .text

    .set    all, 0x8d5                  /* OF SF ZF AF PF CF: which flags the instruction defines */
    .set    none_undefined, 0x8d5
    .set    no_ap, 0x8c1
    .set    zc, 0x41

    test    all, popcnt %rbx, %rax
    test    all, popcnt %ebx, %eax
    test    all, popcnt %bx, %ax
    test    all, popcnt (%rsi), %rax
    test    all, crc32b %bl, %eax
    test    all, crc32l %ebx, %eax
    test    all, crc32q %rbx, %rax
    test    all, crc32q (%rsi), %rax
    test    all, cmpxchg16b (%rsi)
    test    all, lock cmpxchg16b 16(%rsi)
    test    all, adcx %rbx, %rax
    test    all, adox %rbx, %rax
    test    no_ap, andn %rbx, %rcx, %rax
    test    zc, bextr %rcx, %rbx, %rax
    test    no_ap, blsi %rbx, %rax
    test    no_ap, blsmsk %rbx, %rax
    test    no_ap, blsr %rbx, %rax
    test    no_ap, bzhi %rcx, %rbx, %rax
    test    all, mulx %rbx, %rax, %rcx
    test    all, pdep %rbx, %rcx, %rax
    test    all, pext %rbx, %rcx, %rax
    test    all, rorx $13, %rbx, %rax
    test    all, sarx %rcx, %rbx, %rax
    test    all, shlx %rcx, %rbx, %rax
    test    all, shrx %rcx, %rbx, %rax
    test    all, fwait
    .macro  x87_and_sse_enabled         /* the rest of XCR0 is the system's choice */
    xor     %ecx, %ecx
    xgetbv
    and     $3, %eax
    .endm
    test    no_ap, x87_and_sse_enabled

    test    all, movd %eax, %xmm0
    test    all, movq %xmm1, %rax
    test    all, movdqa (%rsi), %xmm0
    test    all, movdqu 3(%rsi), %xmm0
    test    all, movdqu %xmm1, 5(%rsi)
    test    all, movaps %xmm1, 16(%rsi)
    test    all, movntdq %xmm1, (%rsi)
    test    all, movnti %rax, 8(%rsi)
    test    all, paddd %xmm1, %xmm0
    test    all, paddq (%rsi), %xmm0
    test    all, psubb %xmm1, %xmm0
    test    all, pxor %xmm1, %xmm0
    test    all, por %xmm1, %xmm0
    test    all, pand %xmm1, %xmm0
    test    all, pandn %xmm1, %xmm0
    test    all, pmuludq %xmm1, %xmm0
    test    all, pmullw %xmm1, %xmm0
    test    all, pshufd $0x93, %xmm1, %xmm0
    test    all, pshufb %xmm1, %xmm0
    test    all, palignr $5, %xmm1, %xmm0
    test    all, punpckldq %xmm1, %xmm0
    test    all, punpcklqdq %xmm1, %xmm0
    test    all, psrld $7, %xmm0
    test    all, pslld $25, %xmm0
    test    all, psrldq $3, %xmm0
    test    all, pcmpeqb %xmm1, %xmm0
    test    all, pcmpgtd %xmm1, %xmm0
    test    all, pmovmskb %xmm1, %eax
    test    all, packuswb %xmm1, %xmm0
    test    all, pextrw $3, %xmm1, %eax
    test    all, pinsrw $5, %eax, %xmm0
    test    all, pextrq $1, %xmm1, %rax
    test    all, pinsrq $1, %rax, %xmm0
    test    all, ptest %xmm1, %xmm0
    test    all, pmulld %xmm1, %xmm0
    test    all, pminud %xmm1, %xmm0
    test    all, pclmulqdq $0x11, %xmm1, %xmm0
    test    all, aesenc %xmm1, %xmm0
    test    all, aesdeclast %xmm1, %xmm0
    test    all, aeskeygenassist $3, %xmm1, %xmm0
    test    all, pcmpistri $0x18, %xmm1, %xmm0
    test    all, addps %xmm1, %xmm0
    test    all, mulpd %xmm1, %xmm0
    test    all, divsd %xmm1, %xmm0
    test    all, sqrtss %xmm1, %xmm0
    test    all, minps %xmm1, %xmm0
    test    all, cmpltps %xmm1, %xmm0
    test    all, comisd %xmm1, %xmm0
    test    all, ucomiss %xmm1, %xmm0
    test    all, cvtsi2sdq %rax, %xmm0
    test    all, cvttsd2siq %xmm1, %rax
    test    all, cvtps2pd %xmm1, %xmm0
    test    all, shufps $0x1b, %xmm1, %xmm0
    test    all, roundsd $1, %xmm1, %xmm0
    test    all, haddps %xmm1, %xmm0
    test    all, dpps $0x71, %xmm1, %xmm0
    test    all, blendvps %xmm0, %xmm1, %xmm2
    test    all, stmxcsr 12(%rsi)

    /* saved, changed, restored: the values must come back; EDX:EAX names x87 and SSE */
    .macro  through save, restore, mask
    xor     %edx, %edx
    mov     $\mask, %eax
    \save   (%rsi)
    pxor    %xmm0, %xmm0
    pxor    %xmm3, %xmm3
    \restore (%rsi)
    .endm
    test    all, through xsave xrstor 3
    test    all, through xsaveopt xrstor 2
    test    all, through xsave64 xrstor64 3
    test    all, through xsavec xrstor 3
    test    all, through fxsave fxrstor 3

    .section .rodata.tests, "a"
tests_end:
    .section .note.GNU-stack, "", @progbits
