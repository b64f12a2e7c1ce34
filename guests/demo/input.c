/*
 * Typed input. The UART raises interrupt line 4 when a byte has come; the handler moves it to a ring buffer,
 * and who wants it sleeps (HLT) until there is one. An idle guest costs its host nothing but the timer ticks.
 */
#include "demo.h"

#include "apic.h"
#include "console.h"
#include "traps.h"

#define UART_LINE       4
#define DATA            (COM1 + 0)
#define INTERRUPTS      (COM1 + 1)
#define MODEM           (COM1 + 4)
#define STATUS          (COM1 + 5)
#define DATA_READY      1
#define ON_RECEIVE      1
#define DTR_RTS_OUT2    0x0b        /* OUT2 connects the interrupt on a PC */

static volatile char ring[256];
static volatile uint8_t head, tail; /* as wide as the ring is long, so they wrap by themselves */

static void receive(struct trap *trap)
{
    (void)trap;
    while (in8(STATUS) & DATA_READY) {
        char byte = (char)in8(DATA);
        if ((uint8_t)(head + 1) != tail)    /* full: the byte is lost, as on real hardware */
            ring[head++] = byte;
    }
    pic_end(UART_LINE);
}

void input_start(void)
{
    trap_set(VECTOR_IRQ + UART_LINE, receive);
    out8(MODEM, DTR_RTS_OUT2);
    out8(INTERRUPTS, ON_RECEIVE);
}

int input_wait(unsigned seconds)
{
    uint64_t end = ticks + seconds * TICKS_PER_SECOND;
    while (head == tail) {
        if (seconds && ticks >= end)
            return -1;
        wait_for_interrupt();
    }
    return (unsigned char)ring[tail++];
}
