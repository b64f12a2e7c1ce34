/* Segment selectors of the GDT in start.S. SYSCALL wants KERNEL_DATA after KERNEL_CODE, SYSRET the user ones so. */
#ifndef SEGMENTS_H
#define SEGMENTS_H

#define KERNEL_CODE     0x08
#define KERNEL_DATA     0x10
#define USER_CODE32     0x1b
#define USER_DATA       0x23
#define USER_CODE       0x2b
#define TSS_SELECTOR    0x30

#endif
