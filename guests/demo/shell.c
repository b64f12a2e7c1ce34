/* The prompt: read a line, find the command, run it. Without anybody typing it ends by itself. */
#include "demo.h"

#include "console.h"
#include "power.h"

#define FIRST_WAIT      10          /* s for the first key: `make demo` must end where nobody sits */
#define NEXT_WAIT       60
#define END_OF_INPUT    4           /* Ctrl-D */

static char line[128];
static unsigned patience;

/* One line, with erasing; false where none comes. */
static bool read_line(void)
{
    unsigned length = 0;
    for (;;) {
        int byte = input_wait(patience);
        if (byte < 0 || (byte == END_OF_INPUT && !length)) {
            puts(byte < 0 ? "(nobody types)\n" : "\n");
            return false;
        }
        if (patience == FIRST_WAIT)
            patience = NEXT_WAIT;
        if (byte == '\r' || byte == '\n') {
            puts("\n");
            line[length] = 0;
            return true;
        }
        if ((byte == '\b' || byte == 0x7f) && length) {
            length--;
            puts("\b \b");
        } else if (byte == 3 || byte == 21) {           /* Ctrl-C, Ctrl-U: start again */
            length = 0;
            puts("\ndemo> ");
        } else if (byte >= ' ' && byte < 0x7f && length < sizeof(line) - 1) {
            char c = line[length++] = (char)byte;
            put(&c, 1);
        }
    }
}

static void peek(const char *arguments)
{
    uint64_t address;
    if (!parse_number(&arguments, &address) || address > 0xfffffff0) {
        puts("peek ADDRESS: decimal or 0x..., below 4 GiB\n");
        return;
    }
    const volatile uint8_t *at = (const volatile uint8_t *)address;
    print("%08lx ", address);
    for (unsigned i = 0; i < 16; i++)
        print(" %02x", at[i]);
    puts("\n");
}

static void echo(const char *arguments)     { print("%s\n", arguments); }
static void memory(const char *arguments)   { (void)arguments; memory_report(); }
static void cpus(const char *arguments)     { (void)arguments; cpus_report(); }
static void time(const char *arguments)     { (void)arguments; timer_report(); }
static void devices(const char *arguments)  { (void)arguments; devices_report(); }
static void registers(const char *arguments) { (void)arguments; registers_report(); }
static void user(const char *arguments)     { (void)arguments; user_report(); }
static void crash(const char *arguments)    { (void)arguments; triple_fault(); }
static void reboot(const char *arguments)   { (void)arguments; reset(); }
static void off(const char *arguments)      { (void)arguments; power_off(); }
static void help(const char *arguments);

static const struct { const char *name; void (*run)(const char *); const char *what; } commands[] = {
    { "help", help, "this list" },
    { "mem", memory, "the memory map" },
    { "cpus", cpus, "the processors" },
    { "regs", registers, "control registers of this processor" },
    { "time", time, "clock and timer" },
    { "devices", devices, "what is on the board" },
    { "peek", peek, "ADDRESS: 16 bytes of memory" },
    { "echo", echo, "TEXT: say it" },
    { "user", user, "run the ring-3 program again" },
    { "crash", crash, "triple fault" },
    { "reboot", reboot, "reset the machine" },
    { "off", off, "power off" },
};

static void help(const char *arguments)
{
    (void)arguments;
    for (unsigned i = 0; i < sizeof(commands) / sizeof(*commands); i++)
        print("  %-8s %s\n", commands[i].name, commands[i].what);
}

static void run(char *text)
{
    while (*text == ' ')
        text++;
    char *arguments = text;
    while (*arguments && *arguments != ' ')
        arguments++;
    if (*arguments)
        *arguments++ = 0;
    while (*arguments == ' ')
        arguments++;
    if (!*text)
        return;
    for (unsigned i = 0; i < sizeof(commands) / sizeof(*commands); i++)
        if (equal(text, commands[i].name)) {
            commands[i].run(arguments);
            return;
        }
    print("%s: no such command; try help\n", text);
}

void shell(void)
{
    patience = (unsigned)option_number(command_line(boot_info), "idle", FIRST_WAIT);
    puts("type help, or nothing at all\n");
    for (;;) {
        puts("demo> ");
        if (!read_line())
            return;
        run(line);
    }
}
