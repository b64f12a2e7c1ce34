/* Queues in ring 3, and printing from there. */
#include <stdarg.h>

#include "ring.h"
#include "user.h"

#define REG_FEATURES        0x010
#define REG_FEATURES_SEL    0x014
#define REG_TAKEN           0x020
#define REG_TAKEN_SEL       0x024
#define REG_QUEUE_SEL       0x030
#define REG_QUEUE_MAX       0x034
#define REG_QUEUE_NUM       0x038
#define REG_QUEUE_READY     0x044
#define REG_QUEUE_NOTIFY    0x050
#define REG_STATUS          0x070
#define REG_QUEUE_DESC      0x080
#define REG_QUEUE_DRIVER    0x090
#define REG_QUEUE_DEVICE    0x0a0

#define ACKNOWLEDGE         1
#define DRIVER              2
#define DRIVER_OK           4
#define FEATURES_OK         8
#define NO_NOTIFY           1

#define PATIENCE_NS         20000000000ul
#define FIRST               (ARENA + 4096)      /* behind struct bench */

static uint64_t arena_at = FIRST;
static bool event_idx;

static const struct bench *bench(void)
{
    return (const struct bench *)ARENA;
}

void arena_reset(void)
{
    arena_at = FIRST;
}

void *take(uint64_t bytes)
{
    uint64_t size = (bytes + 4095) & ~4095ul, at = arena_at;
    if (size > ARENA_END - at)
        fail("the arena is used up");
    arena_at += size;
    for (uint64_t i = 0; i < size; i += 8)
        *(uint64_t *)(at + i) = 0;
    return (void *)at;
}

uint64_t device_start(uint64_t base, uint64_t wanted)
{
    uint64_t taken = 0;
    device_stop(base);
    mmio_write32(base + REG_STATUS, ACKNOWLEDGE);
    mmio_write32(base + REG_STATUS, ACKNOWLEDGE | DRIVER);
    wanted |= F_VERSION_1 | F_EVENT_IDX;
    for (unsigned half = 0; half < 2; half++) {
        mmio_write32(base + REG_FEATURES_SEL, half);
        uint32_t part = mmio_read32(base + REG_FEATURES) & (uint32_t)(wanted >> 32 * half);
        mmio_write32(base + REG_TAKEN_SEL, half);
        mmio_write32(base + REG_TAKEN, part);
        taken |= (uint64_t)part << 32 * half;
    }
    mmio_write32(base + REG_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(mmio_read32(base + REG_STATUS) & FEATURES_OK))
        fail("features refused");
    event_idx = taken & F_EVENT_IDX;
    return taken;
}

void queue_setup(struct queue *queue, uint64_t base, unsigned index, unsigned most)
{
    mmio_write32(base + REG_QUEUE_SEL, index);
    unsigned size = mmio_read32(base + REG_QUEUE_MAX);
    if (!size)
        fail("a queue is missing");
    *queue = (struct queue){ .notify = base + REG_QUEUE_NOTIFY, .index = index, .size = size < most ? size : most };
    size = queue->size;
    queue->table = take(size * sizeof(struct descriptor));
    queue->avail = take(6 + size * 2);
    queue->used = take(6 + size * 8);
    /* We poll: no interrupt, please. With EVENT_IDX that is an event far away, moved on in next_used. */
    queue->avail->flags = 1;
    queue->avail->ring[size] = 0x8000;
    mmio_write32(base + REG_QUEUE_NUM, size);
    const uint64_t parts[] = { (uint64_t)queue->table, (uint64_t)queue->avail, (uint64_t)queue->used };
    for (unsigned i = 0; i < 3; i++) {
        mmio_write32(base + REG_QUEUE_DESC + 0x10 * i, (uint32_t)parts[i]);
        mmio_write32(base + REG_QUEUE_DESC + 0x10 * i + 4, (uint32_t)(parts[i] >> 32));
    }
    mmio_write32(base + REG_QUEUE_READY, 1);
}

void device_go(uint64_t base)
{
    mmio_write32(base + REG_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

void device_stop(uint64_t base)
{
    mmio_write32(base + REG_STATUS, 0);
    while (mmio_read32(base + REG_STATUS))
        relax();
}

void describe(struct queue *queue, unsigned at, const volatile void *address, uint32_t length, unsigned flags,
              unsigned next)
{
    volatile struct descriptor *row = queue->table + at;
    row->address = (uint64_t)address;
    row->length = length;
    row->flags = (uint16_t)flags;
    row->next = (uint16_t)next;
}

void add(struct queue *queue, unsigned head)
{
    queue->avail->ring[queue->added++ & (queue->size - 1)] = (uint16_t)head;
}

void publish(struct queue *queue)
{
    uint16_t old = queue->published, new = queue->added;
    queue->avail->index = new;          /* x86 keeps stores in order */
    queue->published = new;
    asm volatile("mfence" ::: "memory");
    /* 2.7.10: notify where the device asks for it, which with EVENT_IDX it does behind its used ring */
    bool wanted = !(queue->used->flags & NO_NOTIFY);
    if (event_idx) {
        uint16_t event = *(volatile uint16_t *)&queue->used->ring[queue->size];
        wanted = (uint16_t)(new - event - 1) < (uint16_t)(new - old);
    }
    if (wanted) {
        queue->notifications++;
        mmio_write32(queue->notify, queue->index);
    }
}

bool next_used(struct queue *queue, struct used_entry *entry)
{
    if (queue->seen == queue->used->index)
        return false;
    const volatile struct used_entry *from = &queue->used->ring[queue->seen++ & (queue->size - 1)];
    entry->id = from->id;
    entry->length = from->length;
    queue->avail->ring[queue->size] = (uint16_t)(queue->seen + 0x8000);
    return true;
}

struct used_entry wait_used(struct queue *queue)
{
    struct used_entry entry;
    uint64_t start = rdtsc();
    while (!next_used(queue, &entry)) {
        relax();
        if (elapsed_ns(start) > PATIENCE_NS)
            fail("the device does not answer");
    }
    return entry;
}

uint64_t elapsed_ns(uint64_t since)
{
    return (rdtsc() - since) * 1000 / (bench()->tsc_khz / 1000);
}

void report(const char *format, ...)
{
    static char line[256];
    unsigned at = 0;
    va_list arguments;
    va_start(arguments, format);
    for (; *format && at < sizeof(line) - 24; format++) {
        if (*format != '%') {
            line[at++] = *format;
            continue;
        }
        if (*++format == 's') {
            for (const char *text = va_arg(arguments, const char *); *text && at < sizeof(line) - 24; text++)
                line[at++] = *text;
        } else {
            char digits[20];
            unsigned n = 0;
            uint64_t value = va_arg(arguments, uint64_t);
            do
                digits[n++] = (char)('0' + value % 10);
            while (value /= 10);
            while (n)
                line[at++] = digits[--n];
        }
    }
    va_end(arguments);
    line[at++] = '\n';
    /* By interrupt: a software KVM needs no help for that, and QEMU has none for SYSCALL there. */
    call_by_interrupt(CALL_WRITE, (long)line, at);
}

_Noreturn void fail(const char *why)
{
    report("bench: FAILED: %s", why);
    call_by_interrupt(CALL_EXIT, 1, 0);
    for (;;)
        ;
}
