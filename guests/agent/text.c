/* Words, numbers, addresses; the reply. */
#include "agent.h"

/* gcc makes calls to these of its own accord */
void *memcpy(void *to, const void *from, size_t length)
{
	void *at = to;
	__asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(length) : : "memory");
	return to;
}

void *memset(void *to, int value, size_t length)
{
	void *at = to;
	__asm__ volatile("rep stosb" : "+D"(at), "+c"(length) : "a"(value) : "memory");
	return to;
}

size_t length_of(const char *text)
{
	size_t length = 0;
	while (text[length])
		length++;
	return length;
}

int equal(const void *one, const void *other, size_t length)
{
	for (size_t at = 0; at < length; at++)
		if (((const char *)one)[at] != ((const char *)other)[at])
			return 0;
	return 1;
}

int same(const char *one, const char *other)
{
	return equal(one, other, length_of(other) + 1);
}

/* replies ---------------------------------------------------------------------------------------- */

char reply[REPLY_MOST];
static size_t reply_end;

int room(void)
{
	return sizeof reply - 2 - reply_end;	/* for the newline */
}

void put(const char *text)
{
	size_t length = length_of(text);
	if ((long)length <= room()) {
		memcpy(reply + reply_end, text, length + 1);
		reply_end += length;
	}
}

/* Anything as a part of a word: what does not print as %XX, and so what separates words and their parts. */
void put_escaped(const char *bytes, size_t length)
{
	static const char digits[] = "0123456789ABCDEF";
	char escaped[4] = { 0 };
	for (size_t n = 0; n < length; n++) {
		uint8_t byte = bytes[n];
		int plain = byte > ' ' && byte < 0x7F && byte != '%' && byte != ',';
		escaped[0] = plain ? byte : '%';
		escaped[1] = plain ? 0 : digits[byte >> 4];
		escaped[2] = digits[byte & 15];
		put(escaped);
	}
}

void put_number(unsigned long value)
{
	char digits[24] = { 0 }, *at = digits + sizeof digits - 1;
	do
		*--at = '0' + value % 10;
	while (value /= 10);
	put(at);
}

void start(const char *text)
{
	reply[0] = 0;
	reply_end = 0;
	put(text);
}

/* `ok`, or what went wrong with a system call. */
void result(long done, const char *what)
{
	start("ok");
	if (done < 0) {
		start("error ");
		put(what);
		put(": errno ");
		put_number(-done);
	}
}

/* what words mean -------------------------------------------------------------------------------- */

/* A decimal number of at most `most` that `*text` begins with, which moves behind it; -1 where there is none. */
int64_t number(const char **text, int64_t most)
{
	int64_t value = 0;
	const char *at = *text;
	for (; *at >= '0' && *at <= '9'; at++)
		if ((value = value * 10 + *at - '0') > most)
			return -1;
	if (at == *text)
		return -1;
	*text = at;
	return value;
}

/* A word that is such a number, and nothing else. */
int64_t whole(const char *text, int64_t most)
{
	int64_t value = number(&text, most);
	return *text ? -1 : value;
}

static int digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Bytes of hexadecimal digits, `between` them one character or none (0): how many, -1 where it is not so. */
int bytes_of(const char *text, char between, uint8_t *to, int most)
{
	int count = 0;
	for (;; text += 2) {
		if (count && between && *text && *text++ != between)
			return -1;
		if (!*text)
			return count;
		if (count == most || digit(text[0]) < 0 || digit(text[1]) < 0)
			return -1;
		to[count++] = digit(text[0]) << 4 | digit(text[1]);
	}
}

/* The word as it was before it was escaped, in its place; - becomes the empty one. Its length, -1 where it is none. */
int unescape(char *text)
{
	char *to = text;
	if (same(text, "-"))
		*text = 0;
	for (const char *at = text; *at; at++) {
		if (*at != '%') {
			*to++ = *at;
			continue;
		}
		if (digit(at[1]) < 0 || digit(at[2]) < 0 || !(*to++ = digit(at[1]) << 4 | digit(at[2])))
			return -1;
		at += 2;
	}
	*to = 0;
	return to - text;
}

int is_mac(const char *text, uint8_t *mac)
{
	return bytes_of(text, ':', mac, 6) == 6 && length_of(text) == 17;
}

/* An IPv4 address, in the order of the network; 0 where it is none. `*text` moves behind it. */
int ipv4(const char **text, uint32_t *address)
{
	*address = 0;
	for (int part = 0; part < 4; part++) {
		int64_t value = number(text, 255);
		if (value < 0 || (part < 3 && *(*text)++ != '.'))
			return 0;
		*address |= (uint32_t)value << 8 * part;
	}
	return 1;
}
