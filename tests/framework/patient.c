/* A program of 1 KiB for guests: copies its input to its output until that ends, then ends with the code argv[1]. Starting
 * it costs an emulated kernel a quarter of what busybox does. gcc -nostdlib -static. */
static long call(long number, long a, long b, long c)
{
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

__attribute__((used)) void run(long *stack)
{
	static char bytes[512];
	const char *text = stack[0] > 1 ? (const char *)stack[2] : "0";
	long size, code = 0;
	while ((size = call(0, 0, (long)bytes, sizeof bytes)) > 0)
		call(1, 1, (long)bytes, size);
	for (; *text; text++)
		code = code * 10 + *text - '0';
	call(60, code, 0, 0);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n\tand $-16, %rsp\n\tcall run\n");
