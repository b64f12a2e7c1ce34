/* What an instruction sees and leaves behind; the same for the program and the guest. */
#ifndef STATE_H
#define STATE_H

#define STATE_RAX       0
#define STATE_RBX       8
#define STATE_RCX       16
#define STATE_RDX       24
#define STATE_RDI       32
#define STATE_FLAGS     40
#define STATE_MXCSR     48
#define STATE_XMM       64
#define STATE_MEMORY    128
#define MEMORY_SIZE     1024
#define ROUNDS          4

#ifndef __ASSEMBLER__
#include <stdint.h>

struct state {
    uint64_t rax, rbx, rcx, rdx, rdi, flags;
    uint32_t mxcsr, unused[3];
    uint8_t xmm[4][16];
    uint8_t memory[MEMORY_SIZE];
} __attribute__((aligned(64)));

struct test {
    void (*run)(struct state *);
    const char *name;
    uint64_t flags;
};

extern const struct test tests[], tests_end[];

static uint64_t seed;

static inline uint64_t number(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

/* The input of round `round` of a test: random, with a few bits set in round 1 and floating-point numbers in round 2. */
static inline void prepare(struct state *state, unsigned test, unsigned round)
{
    seed = 0x9e3779b97f4a7c15ull * (test * ROUNDS + round + 1);
    uint64_t *words = (uint64_t *)state;
    for (unsigned i = 0; i < sizeof(*state) / 8; i++) {
        words[i] = number();
        if (round == 1)
            words[i] &= number() & number() & number() & number();
        if (round == 2 && i >= STATE_XMM / 8 && i < STATE_MEMORY / 8)
            words[i] = (i & 1 ? 0x4008000000000000ull : 0x40a0000040400000ull) | (words[i] & 0xffff0000);
    }
    state->flags = (state->flags & 0x8d5) | 2;
    state->mxcsr = 0x1f80;
    if (round == 3)         /* cmpxchg16b finds what it compares with */
        for (unsigned i = 0; i < 2; i++) {
            ((uint64_t *)state->memory)[2 * i] = state->rax;
            ((uint64_t *)state->memory)[2 * i + 1] = state->rdx;
        }
    for (unsigned i = 512; i < MEMORY_SIZE; i++)    /* where XSAVE has its header: what is not written must be 0 */
        state->memory[i] = 0;
}
#endif
#endif
