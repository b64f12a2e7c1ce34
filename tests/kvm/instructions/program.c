/* On the processor, in user mode: the state after each test and round, to standard output. */
#include <stdio.h>

#include "state.h"

int main(int argc, char **argv)
{
    static struct state state;
    (void)argv;
    for (const struct test *test = tests; test < tests_end; test++) {
        if (argc > 1) {
            printf("%lx %s\n", test->flags, test->name);
            continue;
        }
        for (unsigned round = 0; round < ROUNDS; round++) {
            prepare(&state, (unsigned)(test - tests), round);
            test->run(&state);
            fwrite(&state, sizeof(state), 1, stdout);
        }
    }
    return 0;
}
