/*
 * tiny: the least a guest can do. Entered by PVH in flat 32-bit protected mode; prints a line on the serial
 * port and powers off, in about 30 instructions. Boot-time benchmarks run it, so it also ends under
 * virtual machine monitors that have no ACPI power-off: by keyboard-controller reset, then triple fault.
 */
    .section .note.pvh, "a", @note
    .long   4, 8, 18            /* name and descriptor size; XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz  "Xen"
    .quad   start

    .section .text.start, "ax"
    .code32
    .globl  start
start:
    mov     $message, %esi
    mov     $length, %ecx
    mov     $0x3f8, %edx        /* COM1, transmit register */
    rep outsb
    mov     $0x604, %edx        /* ACPI PM1 control */
    mov     $0x3400, %eax       /* SLP_TYP 5, SLP_EN: soft off */
    out     %ax, %dx
    mov     $0xfe, %al          /* not there? pulse the reset line by the keyboard controller */
    out     %al, $0x64
    lidt    no_vectors          /* nor that? an exception without vectors shuts the processor down */
    ud2

message:
    .ascii  "hello from the guest\n"
    .equ    length, . - message
no_vectors:
    .word   0
    .long   0
