/* The command line: words divided by spaces, some of them NAME=NUMBER. */
#include "pvh.h"

#include "console.h"

const char *command_line(const struct pvh_info *info)
{
    return info->command_line ? (const char *)info->command_line : "";
}

static const char *find(const char *line, const char *word)
{
    while (*line) {
        while (*line == ' ')
            line++;
        if (starts_with(line, word)) {
            const char *end = line + strlen(word);
            if (!*end || *end == ' ' || *end == '=')
                return end;
        }
        while (*line && *line != ' ')
            line++;
    }
    return 0;
}

bool option(const char *line, const char *word)
{
    return find(line, word) != 0;
}

uint64_t option_number(const char *line, const char *word, uint64_t otherwise)
{
    const char *at = find(line, word);
    uint64_t value;
    if (!at || *at++ != '=' || !parse_number(&at, &value))
        return otherwise;
    return value;
}

bool parse_number(const char **text, uint64_t *value)
{
    const char *at = *text;
    unsigned base = 10;
    if (at[0] == '0' && at[1] == 'x') {
        base = 16;
        at += 2;
    }
    const char *first = at;
    *value = 0;
    for (;; at++) {
        unsigned digit = *at >= '0' && *at <= '9' ? (unsigned)(*at - '0')
                       : *at >= 'a' && *at <= 'f' ? (unsigned)(*at - 'a' + 10) : 99;
        if (digit >= base)
            break;
        *value = *value * base + digit;
    }
    if (at == first)
        return false;
    *text = at;
    return true;
}
