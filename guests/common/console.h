/* Output on the first serial port, and what a guest needs of string.h. */
#ifndef CONSOLE_H
#define CONSOLE_H

#include <stdbool.h>
#include <stddef.h>

#define COM1 0x3f8

void put(const char *text, size_t length);
void puts(const char *text);

/* A small printf: %d %u %x %s %c %%, `l` for 64 bits, a width, `0` or `-` before it. */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));

size_t strlen(const char *text);
bool equal(const char *a, const char *b);
bool starts_with(const char *text, const char *prefix);

#endif
