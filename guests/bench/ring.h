/* Ring 3's side of a virtio-mmio device: registers, split queues, polling (virtio 1.2, 2.7 and 4.2). */
#ifndef RING_H
#define RING_H

#include "bench.h"
#include "cpu.h"

#define ID_NET          1
#define ID_BLOCK        2
#define ID_CONSOLE      3
#define ID_ENTROPY      4

#define F_EVENT_IDX     (1ul << 29)
#define F_VERSION_1     (1ul << 32)

#define NEXT            1
#define WRITE           2

#define REG_DEVICE_ID   0x008
#define REG_CONFIG      0x100

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct avail { uint16_t flags, index, ring[]; };
struct used_entry { uint32_t id, length; };
struct used { uint16_t flags, index; struct used_entry ring[]; };

struct queue {
    volatile struct descriptor *table;
    volatile struct avail *avail;
    volatile struct used *used;
    uint64_t notify;            /* address of QueueNotify */
    unsigned index, size;
    uint16_t added, published, seen;
    uint64_t notifications;
};

/* Memory of the arena, zeroed, aligned to 4096; never given back within one test. */
void *take(uint64_t bytes);
void arena_reset(void);

/* Reset and negotiate: what of `wanted` the device offers is taken. Ends the program where it refuses. */
uint64_t device_start(uint64_t base, uint64_t wanted);
void queue_setup(struct queue *queue, uint64_t base, unsigned index, unsigned most);
void device_go(uint64_t base);
void device_stop(uint64_t base);

void describe(struct queue *queue, unsigned at, const volatile void *address, uint32_t length, unsigned flags,
              unsigned next);

/* Put the chain at `head` into the available ring; `publish` lets the device see it, and tells it where it asks. */
void add(struct queue *queue, unsigned head);
void publish(struct queue *queue);

/* The next used entry; false where there is none yet. `wait_used` polls until there is one, 20 s at most. */
bool next_used(struct queue *queue, struct used_entry *entry);
struct used_entry wait_used(struct queue *queue);

uint64_t elapsed_ns(uint64_t since);            /* since an rdtsc() */
void report(const char *format, ...);           /* %s and %u (64 bits); one line on the serial port */
_Noreturn void fail(const char *why);

void bench_block(const struct bench *bench, uint64_t base);
void bench_net(const struct bench *bench, uint64_t base);
void bench_console(const struct bench *bench, uint64_t base);
void bench_entropy(const struct bench *bench, uint64_t base);

#endif
