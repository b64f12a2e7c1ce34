/* What the agent's files share: the kernel without a library, words and what they mean, the reply. */
#ifndef AGENT_H
#define AGENT_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

static inline long call(long number, long a, long b, long c, long d, long e)
{
	long result;
	register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = 0;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;		/* -errno where it failed */
}

#define CALL(name, a, b, c) call(SYS_##name, (long)(a), (long)(b), (long)(c), 0, 0)

/* text.c */
void *memcpy(void *to, const void *from, size_t length);
void *memset(void *to, int value, size_t length);
size_t length_of(const char *text);
int equal(const void *one, const void *other, size_t length);
int64_t number(const char **text, int64_t most);
int bytes_of(const char *text, char between, uint8_t *to, int most);
int is_mac(const char *text, uint8_t *mac);
int ipv4(const char **text, uint32_t *address);

extern char reply[512];		/* of the request that is served */
void put(const char *text);
void start(const char *text);
void result(long done, const char *what);

/* network.c */
void mac(char **words);
void address(char **words);

#endif
