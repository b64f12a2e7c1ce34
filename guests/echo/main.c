/*
 * echo: counts the bytes typed at the serial port until an end-of-transmission (Ctrl-D), taking them by
 * interrupt as they come, then says how many there were and their sum. Nothing may be lost, however fast
 * they are pasted. With `echo` on the command line every byte is sent back, too.
 */
#include "apic.h"
#include "console.h"
#include "power.h"
#include "pvh.h"
#include "traps.h"

#define UART_LINE       4
#define END             4

static volatile bool done;
static bool answers;
static volatile uint64_t count, sum;

static void receive(struct trap *trap)
{
    (void)trap;
    while (in8(COM1 + 5) & 1) {         /* LSR: data ready */
        char byte = (char)in8(COM1);
        if (byte == END) {
            done = true;
            break;
        }
        count++;
        sum += (uint8_t)byte;
        if (answers)
            put(&byte, 1);
    }
    pic_end(UART_LINE);
}

void main(const struct pvh_info *info);
void main(const struct pvh_info *info)
{
    answers = option(command_line(info), "echo");
    traps_setup();
    apic_enable(true);
    trap_set(VECTOR_IRQ + UART_LINE, receive);
    pic_setup(1 << UART_LINE);
    out8(COM1 + 2, 0x01);               /* FCR: FIFOs on */
    out8(COM1 + 4, 0x0b);               /* MCR: DTR, RTS, OUT2 */
    out8(COM1 + 1, 0x01);               /* IER: on receive */
    puts("echo: ready\n");
    while (!done)
        wait_for_interrupt();
    print("\necho: %lu bytes, sum %lu\n", count, sum);
    power_off();
}
