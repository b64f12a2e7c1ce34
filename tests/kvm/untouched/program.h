/* What user_program.c is asked to do. */
#ifndef PROGRAM_H
#define PROGRAM_H

#define MEMORY  0x08000000ul        /* nobody has touched it when the guest is saved */
#define CODE    0x0c000000ul        /* code of ring 3's, written before; what is below it was never touched */

#endif
