/* The CMOS clock. */
#ifndef CLOCK_H
#define CLOCK_H

#include <stdint.h>

struct date { unsigned year, month, day, hour, minute, second; };

/* The date and time, UTC by custom. */
struct date clock_read(void);

/* One register of the CMOS RAM. */
uint8_t cmos_read(uint8_t index);

#endif
