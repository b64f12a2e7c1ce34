/* The CMOS clock (MC146818): BCD unless register B says binary; not read while it updates itself. */
#include "clock.h"

#include "cpu.h"

#define CMOS_INDEX      0x70
#define CMOS_DATA       0x71
#define UPDATING        0x80        /* register A */
#define BINARY          0x04        /* register B */

uint8_t cmos_read(uint8_t index)
{
    out8(CMOS_INDEX, index);
    return in8(CMOS_DATA);
}

static unsigned number(uint8_t value, int binary)
{
    return binary ? value : (value >> 4) * 10u + (value & 15);
}

struct date clock_read(void)
{
    int binary = cmos_read(11) & BINARY;
    for (unsigned tries = 0; cmos_read(10) & UPDATING && tries < 10000; tries++)
        relax();
    struct date date = {
        .second = number(cmos_read(0), binary), .minute = number(cmos_read(2), binary),
        .hour = number(cmos_read(4) & 0x7f, binary), .day = number(cmos_read(7), binary),
        .month = number(cmos_read(8), binary), .year = 2000 + number(cmos_read(9), binary),
    };
    return date;
}
