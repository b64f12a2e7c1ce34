/* Local APIC (Intel SDM 3A, 11), IOAPIC (82093AA data sheet), PIC (8259A), PIT (8254). */
#include "apic.h"

#include "traps.h"

#define PIC1            0x20
#define PIC2            0xa0
#define PIC_INIT        0x11        /* ICW1: edge triggered, cascade, ICW4 follows */
#define PIC_CASCADE     2           /* the second PIC hangs on line 2 of the first */
#define PIC_8086        0x01        /* ICW4 */
#define PIC_END         0x20        /* OCW2: end of interrupt */

#define PIT_CHANNEL0    0x40
#define PIT_CONTROL     0x43
#define PIT_RATE        0x34        /* channel 0, low byte then high byte, mode 2: rate generator */
#define PIT_ONCE        0x30        /* mode 0: counts down once */

void apic_enable(bool pic_input)
{
    apic_write(APIC_SPURIOUS, 0x100 | VECTOR_SPURIOUS);     /* first: until then the mask bits below stay set */
    apic_write(APIC_TIMER, APIC_MASKED);
    apic_write(APIC_LINT0, pic_input ? APIC_EXTINT : APIC_MASKED);
}

void apic_send(uint8_t destination, uint32_t command)
{
    apic_write(APIC_COMMAND_HIGH, (uint32_t)destination << 24);
    apic_write(APIC_COMMAND, command);
    while (apic_read(APIC_COMMAND) & APIC_SENDING)
        relax();
}

uint32_t ioapic_read(uint8_t reg)
{
    mmio_write32(IOAPIC, reg);
    return mmio_read32(IOAPIC + 0x10);
}

void ioapic_write(uint8_t reg, uint32_t value)
{
    mmio_write32(IOAPIC, reg);
    mmio_write32(IOAPIC + 0x10, value);
}

void ioapic_route(uint8_t pin, uint8_t vector, uint8_t destination)
{
    ioapic_write(0x11 + 2 * pin, (uint32_t)destination << 24);
    ioapic_write(0x10 + 2 * pin, vector);       /* unmasked, edge, active high, physical, fixed: all zero bits */
}

void pic_setup(uint16_t lines)
{
    out8(PIC1, PIC_INIT);
    out8(PIC2, PIC_INIT);
    out8(PIC1 + 1, VECTOR_IRQ);
    out8(PIC2 + 1, VECTOR_IRQ + 8);
    out8(PIC1 + 1, 1 << PIC_CASCADE);
    out8(PIC2 + 1, PIC_CASCADE);
    out8(PIC1 + 1, PIC_8086);
    out8(PIC2 + 1, PIC_8086);
    if (lines >> 8)
        lines |= 1 << PIC_CASCADE;
    out8(PIC1 + 1, (uint8_t)~lines);
    out8(PIC2 + 1, (uint8_t)(~lines >> 8));
}

void pic_end(uint8_t line)
{
    if (line >= 8)
        out8(PIC2, PIC_END);
    out8(PIC1, PIC_END);
}

void pit_start(uint32_t hz)
{
    uint32_t divisor = PIT_HZ / hz;
    out8(PIT_CONTROL, PIT_RATE);
    out8(PIT_CHANNEL0, (uint8_t)divisor);
    out8(PIT_CHANNEL0, (uint8_t)(divisor >> 8));
}

void pit_stop(void)
{
    out8(PIT_CONTROL, PIT_ONCE);    /* stops a real one; KVM's goes on until there is a count, which it counts once */
    out8(PIT_CHANNEL0, 0);
    out8(PIT_CHANNEL0, 0);
}
