/* System calls: call3(number, a, b, c), call(number, a, b, c, d, e). The result is -errno where one failed. */
	.globl call3, call
	.text
call3:
	xor %r8d, %r8d
	xor %r9d, %r9d
call:
	mov %rdi, %rax
	mov %rsi, %rdi
	mov %rdx, %rsi
	mov %rcx, %rdx
	mov %r8, %r10
	mov %r9, %r8
	xor %r9d, %r9d
	syscall
	ret

	.section .note.GNU-stack, "", @progbits
