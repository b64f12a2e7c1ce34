/*
 * Output on the first serial port. A real UART takes a while per byte and one waits for LSR.THRE before each;
 * a virtual one is always ready, and asking would double the exits. `rep outsb` is one instruction for a whole
 * string where ring 0 is emulated.
 */
#include "console.h"

#include <stdarg.h>
#include <stdint.h>

void put(const char *text, size_t length)
{
    asm volatile("rep outsb" : "+S"(text), "+c"(length) : "d"(COM1) : "memory");
}

void puts(const char *text)
{
    put(text, strlen(text));
}

size_t strlen(const char *text)
{
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}

bool equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

bool starts_with(const char *text, const char *prefix)
{
    while (*prefix)
        if (*text++ != *prefix++)
            return false;
    return true;
}

static void put_padded(const char *text, size_t length, size_t width, char fill, bool left)
{
    const char pad = left ? ' ' : fill;
    if (left)
        put(text, length);
    while (width > length) {
        put(&pad, 1);
        width--;
    }
    if (!left)
        put(text, length);
}

static void put_number(unsigned long value, unsigned base, bool negative, size_t width, char fill, bool left)
{
    char digits[24];
    size_t at = sizeof(digits);
    do {
        digits[--at] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    if (negative)
        digits[--at] = '-';
    put_padded(digits + at, sizeof(digits) - at, width, fill, left);
}

void print(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    while (*format) {
        size_t literal = 0;
        while (format[literal] && format[literal] != '%')
            literal++;
        if (literal) {
            put(format, literal);
            format += literal;
            continue;
        }
        format++;
        bool left = *format == '-';
        if (left)
            format++;
        char fill = *format == '0' ? '0' : ' ';
        size_t width = 0;
        while (*format >= '0' && *format <= '9')
            width = width * 10 + (size_t)(*format++ - '0');
        bool is_long = *format == 'l';
        if (is_long)
            format++;
        switch (*format++) {
        case 'd': {
            long value = is_long ? va_arg(arguments, long) : va_arg(arguments, int);
            put_number(value < 0 ? -(unsigned long)value : (unsigned long)value, 10, value < 0, width, fill, left);
            break;
        }
        case 'u':
            put_number(is_long ? va_arg(arguments, unsigned long) : va_arg(arguments, unsigned), 10, false, width,
                       fill, left);
            break;
        case 'x':
            put_number(is_long ? va_arg(arguments, unsigned long) : va_arg(arguments, unsigned), 16, false, width,
                       fill, left);
            break;
        case 's': {
            const char *text = va_arg(arguments, const char *);
            put_padded(text, strlen(text), width, ' ', left);
            break;
        }
        case 'c': {
            char c = (char)va_arg(arguments, int);
            put(&c, 1);
            break;
        }
        case '%':
            put("%", 1);
            break;
        default:            /* a format that ends early, or one we don't know: stop rather than guess */
            va_end(arguments);
            return;
        }
    }
    va_end(arguments);
}
