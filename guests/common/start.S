/*
 * The way from the PVH entry point to C in 64-bit mode.
 *
 * PVH (xen/docs/misc/pvh.pandoc) enters a kernel in 32-bit protected mode with paging off, flat segments and
 * EBX pointing to struct hvm_start_info. Long mode needs, in this order (Intel SDM 3A, 9.8.5): page tables,
 * CR4.PAE, EFER.LME, CR0.PG, and then a jump to a 64-bit code segment.
 */
#include "segments.h"

    .section .note.pvh, "a", @note
    .long   4, 8, 18                    /* name and descriptor size; XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz  "Xen"
    .quad   start32

    .section .text.start, "ax"
    .code32
    .globl  start32
start32:
    cld
    mov     $boot_stack_top, %esp
    mov     %ebx, %edi                  /* the first argument of main */
    call    enter_paging
    ljmp    $KERNEL_CODE, $start64

/* Page tables, PAE, long mode, paging, the GDT. Application processors come here too (trampoline.S). */
    .globl  enter_paging
enter_paging:
    mov     $level4, %eax
    mov     %eax, %cr3
    mov     %cr4, %eax
    or      $0x20, %eax                 /* CR4.PAE */
    mov     %eax, %cr4
    mov     $0xc0000080, %ecx           /* IA32_EFER */
    rdmsr
    or      $0x101, %eax                /* LME: long mode; SCE: syscall and sysret */
    wrmsr
    mov     %cr0, %eax
    or      $0x80010001, %eax           /* PG, WP, PE */
    mov     %eax, %cr0
    lgdt    gdt_pointer
    ret

    .code64
start64:
    mov     $KERNEL_DATA, %eax
    mov     %eax, %ds
    mov     %eax, %es
    mov     %eax, %ss
    mov     %edi, %edi                  /* the upper half was undefined until here */
    call    main
    call    power_off

    .section .data.gdt, "aw"
    .globl  gdt, gdt_pointer
    .balign 8
gdt:                                    /* Intel SDM 3A, 3.4.5; the order of user segments suits SYSRET */
    .quad   0
    .quad   0x00af9b000000ffff          /* KERNEL_CODE: 64-bit, ring 0 */
    .quad   0x00cf93000000ffff          /* KERNEL_DATA */
    .quad   0x00cffb000000ffff          /* USER_CODE32: 32-bit, ring 3, unused */
    .quad   0x00cff3000000ffff          /* USER_DATA */
    .quad   0x00affb000000ffff          /* USER_CODE: 64-bit, ring 3 */
    .quad   0, 0                        /* TSS_SELECTOR: filled by user_setup */
gdt_end:
gdt_pointer:
    .word   gdt_end - gdt - 1
    .quad   gdt

/*
 * Identity map of the first 4 GiB in pages of 2 MiB, written out by the assembler: a loop at run time would
 * be slow where ring 0 is emulated. Level 4, entry 511 leads to a level-2 table of the topmost GiB that maps
 * nothing, as Linux has one: pyhv puts its help for system calls there on a software KVM.
 * Flags: 1 present, 2 writable, 4 user (in all levels above, as the lowest one decides), 0x80 large page.
 */
    .section .page_tables, "aw"
    .globl  level4, level3, level2
    .balign 4096
level4:
    .quad   level3 + 7
    .fill   510, 8, 0
    .quad   level3_top + 7
level3:
    .quad   level2 + 7, level2 + 0x1000 + 7, level2 + 0x2000 + 7, level2 + 0x3000 + 7
    .fill   508, 8, 0
level3_top:
    .fill   511, 8, 0
    .quad   level2_top + 7
level2:
    .set    page, 0
    .rept   2048
    .quad   page + 0x83
    .set    page, page + 0x200000
    .endr

    .section .bss.boot, "aw", @nobits
    .balign 4096
level2_top:
    .skip   4096
    .skip   16384
    .globl  boot_stack_top
boot_stack_top:

    .section .note.GNU-stack, "", @progbits
