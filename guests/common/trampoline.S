/*
 * Where a start-up interrupt puts an application processor: real mode, CS 0x100, IP 0, no stack. The code is
 * copied to 0x1000 (smp.c), so it may not name its own labels by their linked address. It borrows the kernel's
 * GDT and page tables and goes where the boot processor went: protected mode, then long mode.
 */
#include "segments.h"

    .section .rodata.trampoline, "a"
    .globl  trampoline, trampoline_end
    .code16
trampoline:
    cli
    mov     %cs, %ax
    mov     %ax, %ds
    lgdtl   pointer - trampoline
    mov     $0x11, %eax                 /* CR0.PE, CR0.ET; caches on */
    mov     %eax, %cr0
    ljmpl   *target - trampoline
    .balign 4
pointer:                                /* the GDT of this page, with which 32-bit code can be reached */
    .word   3 * 8 - 1
    .long   0x1000 + flat_gdt - trampoline
    .balign 4
target:
    .long   smp_start32
    .word   0x08
    .balign 8
flat_gdt:
    .quad   0
    .quad   0x00cf9b000000ffff          /* 32-bit code */
    .quad   0x00cf93000000ffff          /* data */
trampoline_end:

    .text
    .code32
smp_start32:
    mov     $0x10, %eax
    mov     %eax, %ds
    mov     %eax, %es
    mov     %eax, %ss
    mov     trampoline_stack, %esp
    call    enter_paging
    ljmp    $KERNEL_CODE, $smp_start64
    .code64
smp_start64:
    mov     $KERNEL_DATA, %eax
    mov     %eax, %ds
    mov     %eax, %es
    mov     %eax, %ss
    mov     trampoline_stack, %rsp
    jmp     smp_entry

    .section .note.GNU-stack, "", @progbits
