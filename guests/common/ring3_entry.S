/* Into ring 3 and back. */
#include "segments.h"

    .text
/* long ring3_enter(entry, stack, argument): IRETQ to ring 3; returns when ring3_leave is called. */
    .globl  ring3_enter
ring3_enter:
    push    %rbx
    push    %rbp
    push    %r12
    push    %r13
    push    %r14
    push    %r15
    pushfq
    mov     %rsp, kernel_stack
    push    $USER_DATA
    push    %rsi                        /* RSP */
    push    $0x202                      /* RFLAGS: interrupts on */
    push    $USER_CODE
    push    %rdi                        /* RIP */
    mov     %rdx, %rdi
    iretq

/* ring3_leave(result): from whatever the program did, back to where ring3_enter was called. */
    .globl  ring3_leave
ring3_leave:
    mov     kernel_stack, %rsp
    mov     %rdi, %rax
    popfq
    pop     %r15
    pop     %r14
    pop     %r13
    pop     %r12
    pop     %rbp
    pop     %rbx
    ret

/* SYSCALL comes here with RIP in RCX, RFLAGS in R11, interrupts off, and still the program's stack. */
    .globl  ring3_syscall_entry
ring3_syscall_entry:
    mov     %rsp, user_stack
    mov     $ring3_trap_stack_top, %rsp
    push    %rcx
    push    %r11
    push    %rdi
    push    %rsi
    push    %rdx
    push    %r8
    push    %r9
    push    %r10
    incl    ring3_syscalls
    mov     %rsi, %rdx
    mov     %rdi, %rsi
    mov     %rax, %rdi
    call    ring3_call
    pop     %r10
    pop     %r9
    pop     %r8
    pop     %rdx
    pop     %rsi
    pop     %rdi
    pop     %r11
    pop     %rcx
    mov     user_stack, %rsp
    sysretq

    .section .bss.ring3, "aw", @nobits
    .balign 16
kernel_stack:
    .skip   8
user_stack:
    .skip   8
    .skip   8192
    .globl  ring3_trap_stack_top
ring3_trap_stack_top:

    .section .note.GNU-stack, "", @progbits
