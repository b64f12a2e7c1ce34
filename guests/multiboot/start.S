/*
 * multiboot: a 32-bit kernel entered by Multiboot 1 (Multiboot Specification 0.6.96): flat protected mode,
 * paging off, EAX the magic number, EBX the information structure.
 */
    .section .text.start, "ax"
    .globl  start
    .set    flags, 3                    /* modules on page boundaries, and tell me the memory */
    .balign 4
    .long   0x1badb002, flags, -(0x1badb002 + flags)
start:
    cld
    mov     $stack_top, %esp
    push    %ebx
    push    %eax
    call    main
    mov     $0x604, %edx                /* ACPI PM1 control: soft off */
    mov     $0x3400, %eax
    out     %ax, %dx
0:  cli
    hlt
    jmp     0b

    .bss
    .balign 16
    .skip   8192
stack_top:
    .section .note.GNU-stack, "", @progbits
