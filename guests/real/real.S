/*
 * real: a boot sector. Loaded at 0000:7C00 as a PC's firmware would, in 16-bit real mode without any firmware
 * to call. Checks that arithmetic, segments, the stack, the vector table and A20 are what an 8086 program
 * (and a 286's) expects, reports each on the serial port, and powers off. The first check that fails ends the
 * machine by the debug exit with the check's letter as value.
 */
    .code16
    .section .text.start, "ax"
    .globl  start
start:
    cli
    xor     %ax, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %ax, %ss
    mov     $0x7c00, %sp
    cld
    mov     $hello, %si
    call    puts

    /* arithmetic: 16 bits wrap, MUL and DIV use DX:AX, AAM is the 8086's own */
    mov     $'a', %bl
    mov     $0xffff, %ax
    add     $1, %ax
    jnz     failed
    jnc     failed
    mov     $1234, %ax
    mov     $567, %cx
    mul     %cx                         /* 699678 = 0x000aad1e */
    cmp     $0x000a, %dx
    jne     failed
    cmp     $0xad1e, %ax
    jne     failed
    div     %cx
    cmp     $1234, %ax
    jne     failed
    mov     $73, %al
    aam
    cmp     $0x0703, %ax
    jne     failed
    mov     $arithmetic, %si
    call    puts

    /* segments: 1234:5678 and 179B:0008 are the same byte, 16 * segment + offset = 0x179b8 */
    mov     $'s', %bl
    mov     $0x1234, %ax
    mov     %ax, %es
    movw    $0xbeef, %es:0x5678
    mov     $0x179b, %ax
    mov     %ax, %fs
    cmpw    $0xbeef, %fs:0x0008
    jne     failed
    mov     $segments, %si
    call    puts

    /* A20: FFFF:0010 is 0x100000, not address 0 */
    mov     $'g', %bl
    mov     $0xffff, %ax
    mov     %ax, %es
    movw    $0x1111, %ds:0x0500
    movw    $0x2222, %es:0x0510
    cmpw    $0x1111, %ds:0x0500
    jne     failed
    cmpw    $0x2222, %es:0x0510
    jne     failed
    mov     $gate, %si
    call    puts

    /* interrupts: a vector at 4 * number, INT pushes FLAGS, CS, IP */
    mov     $'i', %bl
    movw    $handler, 4 * 0x42
    movw    $0, 4 * 0x42 + 2
    mov     $7, %ax
    int     $0x42
    cmp     $8, %ax
    jne     failed
    cmp     $0x7c00, %sp
    jne     failed
    mov     $vectors, %si
    call    puts

    mov     $bye, %si
    call    puts
    mov     $0x604, %dx                 /* ACPI PM1 control: SLP_TYP 5, SLP_EN */
    mov     $0x3400, %ax
    out     %ax, %dx
    mov     $'p', %bl
failed:
    mov     $failure, %si
    call    puts
    mov     %bl, %al
    out     %al, $0xf4
halted:
    hlt
    jmp     halted

handler:
    inc     %ax
    iret

puts:                                   /* SI: zero-terminated text */
    mov     $0x3f8, %dx
0:  lodsb
    test    %al, %al
    jz      1f
    out     %al, %dx
    jmp     0b
1:  ret

hello:      .asciz "real mode at 0000:7c00\n"
arithmetic: .asciz "arithmetic ok\n"
segments:   .asciz "segments ok\n"
gate:       .asciz "A20 ok\n"
vectors:    .asciz "interrupt vectors ok\n"
bye:        .asciz "powering off\n"
failure:    .asciz "FAILED\n"

    .org    510                         /* what makes it a boot sector */
    .byte   0x55, 0xaa
