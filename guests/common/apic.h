/* Interrupt controllers: the local APIC of each processor, the IOAPIC, the old PIC; and the PIT. */
#ifndef APIC_H
#define APIC_H

#include "cpu.h"

/* Local APIC registers (Intel SDM 3A, 11.4.1), at the address of their reset state. */
#define LOCAL_APIC          0xfee00000ul
#define APIC_ID             0x020       /* bits 31:24 */
#define APIC_VERSION        0x030
#define APIC_EOI            0x0b0
#define APIC_SPURIOUS       0x0f0       /* bit 8 switches the APIC on */
#define APIC_COMMAND        0x300       /* writing the low half sends */
#define APIC_COMMAND_HIGH   0x310       /* bits 31:24: destination */
#define APIC_TIMER          0x320
#define APIC_LINT0          0x350
#define APIC_INITIAL_COUNT  0x380
#define APIC_CURRENT_COUNT  0x390
#define APIC_DIVIDE         0x3e0

#define APIC_MASKED         (1u << 16)
#define APIC_EXTINT         0x700u
#define APIC_INIT           0x4500u     /* delivery mode INIT, level assert */
#define APIC_STARTUP        0x4600u     /* delivery mode start-up; bits 7:0: page to start at */
#define APIC_SENDING        (1u << 12)

#define IOAPIC              0xfec00000ul

/* Switch this processor's APIC on, all its sources masked but LINT0 as the PIC's input on the boot processor. */
void apic_enable(bool pic_input);

static inline uint32_t apic_read(uint32_t reg)              { return mmio_read32(LOCAL_APIC + reg); }
static inline void apic_write(uint32_t reg, uint32_t value) { mmio_write32(LOCAL_APIC + reg, value); }
static inline uint8_t apic_id(void)                         { return (uint8_t)(apic_read(APIC_ID) >> 24); }
static inline void apic_end(void)                           { apic_write(APIC_EOI, 0); }

/* Send an interrupt command to one processor and wait until it is on its way. */
void apic_send(uint8_t destination, uint32_t command);

/* IOAPIC registers: 0 id, 1 version and number of pins, 0x10 and up two per pin. */
uint32_t ioapic_read(uint8_t reg);
void ioapic_write(uint8_t reg, uint32_t value);

/* Send a pin's interrupts, edge triggered, to a vector of the processor with that APIC id. */
void ioapic_route(uint8_t pin, uint8_t vector, uint8_t destination);

/* The PIC pair: interrupt lines at VECTOR_IRQ and up, all masked but those in `lines`. */
void pic_setup(uint16_t lines);
void pic_end(uint8_t line);

/* Channel 0 of the PIT interrupts `hz` times a second (19 at least: its counter has 16 bits). */
#define PIT_HZ  1193182u
void pit_start(uint32_t hz);
void pit_stop(void);

#endif
