/* What user_program.c is asked to do, by its argument. */
#ifndef PROGRAM_H
#define PROGRAM_H

#define MODE_EXIT           0
#define MODE_CALLS          1
#define MODE_SSE            2
#define MODE_LEAK           3
#define MODE_PRIVILEGED     4
#define MODE_READ_KERNEL    5
#define MODE_WRITE_KERNEL   6
#define MODE_INVALID        7

#endif
