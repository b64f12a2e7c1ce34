/*
 * Entry points of exceptions and interrupts. The processor pushes SS, RSP, RFLAGS, CS, RIP and, for some
 * exceptions, an error code; each stub makes up the missing code, pushes its vector, and the common part
 * saves the registers so that C sees one struct trap (traps.h).
 */
    .macro stub vector
    .text
trap_\vector:
    .if !(\vector == 8 || (\vector >= 10 && \vector <= 14) || \vector == 17 || \vector == 21)
    push    $0
    .endif
    push    $\vector
    jmp     common
    .section .rodata.trap_stubs, "a"
    .long   trap_\vector
    .endm

    .section .rodata.trap_stubs, "a"
    .globl  trap_stubs
trap_stubs:
    .altmacro
    .set    vector, 0
    .rept   50                          /* exceptions, 16 interrupt lines, VECTOR_LOCAL_TIMER, VECTOR_WAKE */
    stub    %vector
    .set    vector, vector + 1
    .endr
    .section .rodata.trap_stubs, "a"
    .fill   0x80 - 50, 4, 0
    stub    128                         /* VECTOR_SYSTEM_CALL */
    .section .rodata.trap_stubs, "a"
    .fill   0xff - 0x81, 4, 0
    stub    255                         /* VECTOR_SPURIOUS */

    .text
common:
    push    %rax
    push    %rbx
    push    %rcx
    push    %rdx
    push    %rsi
    push    %rdi
    push    %rbp
    push    %r8
    push    %r9
    push    %r10
    push    %r11
    push    %r12
    push    %r13
    push    %r14
    push    %r15
    cld
    mov     %rsp, %rdi
    call    trap
    pop     %r15
    pop     %r14
    pop     %r13
    pop     %r12
    pop     %r11
    pop     %r10
    pop     %r9
    pop     %r8
    pop     %rbp
    pop     %rdi
    pop     %rsi
    pop     %rdx
    pop     %rcx
    pop     %rbx
    pop     %rax
    add     $16, %rsp                   /* vector and error code */
    iretq

    .section .note.GNU-stack, "", @progbits
