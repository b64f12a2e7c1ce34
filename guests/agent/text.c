/* Words, numbers, addresses; the reply. */
#include "agent.h"

/* gcc makes calls to these of its own accord */
void *memcpy(void *to, const void *from, size_t length)
{
	for (size_t at = 0; at < length; at++)
		((char *)to)[at] = ((const char *)from)[at];
	return to;
}

void *memset(void *to, int value, size_t length)
{
	for (size_t at = 0; at < length; at++)
		((char *)to)[at] = value;
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

/* replies ---------------------------------------------------------------------------------------- */

char reply[512];

void put(const char *text)
{
	size_t at = length_of(reply), length = length_of(text);
	if (at + length < sizeof reply - 1)	/* room for the newline */
		memcpy(reply + at, text, length + 1);
}

static void put_number(unsigned long value)
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
