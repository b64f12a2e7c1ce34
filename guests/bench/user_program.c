/* The program in ring 3: each device its test, and the small ones. */
#include "ring.h"
#include "user.h"

#define CONSOLE_CHUNK   4096
#define CONSOLE_DEPTH   16
#define ENTROPY_CHUNK   4096

void bench_console(const struct bench *bench, uint64_t base)
{
    struct queue receive, transmit;
    device_start(base, 0);
    queue_setup(&receive, base, 0, 16);         /* port 0 (5.3.2) */
    queue_setup(&transmit, base, 1, CONSOLE_DEPTH);
    device_go(base);
    char *text = take(CONSOLE_CHUNK);
    for (unsigned i = 0; i < CONSOLE_CHUNK; i++)
        text[i] = i % 64 == 63 ? '\n' : (char)('0' + i % 64);
    uint64_t left = bench->console, start = rdtsc();
    unsigned waiting = 0;
    for (unsigned head = 0; left || waiting;) {
        while (left && waiting < transmit.size) {
            uint32_t length = left < CONSOLE_CHUNK ? (uint32_t)left : CONSOLE_CHUNK;
            describe(&transmit, head, text, length, 0, 0);
            add(&transmit, head++ % transmit.size);
            head %= transmit.size;
            left -= length;
            waiting++;
        }
        publish(&transmit);
        wait_used(&transmit);
        waiting--;
    }
    report("bench: console bytes=%u ns=%u notifications=%u", bench->console, elapsed_ns(start), transmit.notifications);
}

void bench_entropy(const struct bench *bench, uint64_t base)
{
    struct queue queue;
    device_start(base, 0);
    queue_setup(&queue, base, 0, 1);
    device_go(base);
    uint64_t *words = take(ENTROPY_CHUNK), got = 0, zeros = 0, start = rdtsc();
    describe(&queue, 0, words, ENTROPY_CHUNK, WRITE, 0);
    while (got < bench->entropy) {
        add(&queue, 0);
        publish(&queue);
        unsigned length = wait_used(&queue).length;
        if (!length || length > ENTROPY_CHUNK)
            fail("the entropy device gave nothing, or too much");
        got += length;
        for (unsigned i = 0; bench->check && i < length / 8; i++)
            zeros += !words[i];
    }
    report("bench: entropy bytes=%u ns=%u zeros=%u", got, elapsed_ns(start), zeros);
}

_Noreturn void user_main(const struct bench *bench);
_Noreturn void user_main(const struct bench *bench)
{
    report("bench: devices=%u tsc-khz=%u", (uint64_t)bench->count, bench->tsc_khz);
    for (unsigned i = 0; i < bench->count; i++) {
        uint64_t base = bench->devices[i];
        uint32_t id = mmio_read32(base + REG_DEVICE_ID);
        arena_reset();
        if (id == ID_BLOCK)
            bench_block(bench, base);
        else if (id == ID_NET && (bench->segments || bench->round_trips))
            bench_net(bench, base);
        else if (id == ID_CONSOLE && bench->console)
            bench_console(bench, base);
        else if (id == ID_ENTROPY && bench->entropy)
            bench_entropy(bench, base);
        else
            continue;
    }
    call_by_interrupt(CALL_EXIT, 0, 0);
    for (;;)
        ;
}
