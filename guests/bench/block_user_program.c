/* Block: sequential reads, random reads at two depths, writes (virtio 1.2, 5.2). */
#include "ring.h"

#define SECTOR          512
#define CHUNK           (1u << 20)
#define SMALL           4096u
#define DEPTH_MAX       32
#define F_FLUSH         (1ul << 9)
#define TYPE_IN         0
#define TYPE_OUT        1
#define TYPE_FLUSH      4

struct header { uint32_t type, reserved; uint64_t sector; };

static struct queue queue;
static struct header *headers;
static volatile uint8_t *statuses;
static uint64_t *data[DEPTH_MAX];
static uint64_t state;

/* Request `slot` has descriptors 3 * slot to 3 * slot + 2, set up once. */
static void prepare(unsigned depth, uint32_t size, bool writable)
{
    for (unsigned slot = 0; slot < depth; slot++) {
        describe(&queue, 3 * slot, headers + slot, sizeof(struct header), NEXT, 3 * slot + 1);
        describe(&queue, 3 * slot + 1, data[slot], size, NEXT | (writable ? WRITE : 0), 3 * slot + 2);
        describe(&queue, 3 * slot + 2, statuses + slot, 1, WRITE, 0);
    }
}

static void submit(unsigned slot, uint32_t type, uint64_t sector)
{
    headers[slot] = (struct header){ .type = type, .sector = sector };
    statuses[slot] = 0xff;
    add(&queue, 3 * slot);
}

/* The slot that came back; its status was good. */
static unsigned finish(struct used_entry entry)
{
    unsigned slot = entry.id / 3;
    if (slot >= DEPTH_MAX || statuses[slot])
        fail("a request failed");
    return slot;
}

static uint64_t count_bad(const uint64_t *words, uint64_t offset, uint32_t length)
{
    uint64_t bad = 0;
    for (uint32_t i = 0; i < length / 8; i++)
        bad += words[i] != offset + 8 * i;
    return bad;
}

static uint64_t draw(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* One run: `count` requests of `size` bytes, one after the other in the file or anywhere in it. */
struct run { uint64_t blocks, count, sent; uint32_t size, type; };

static void send_next(struct run *run, unsigned slot)
{
    uint64_t block = (run->size == CHUNK ? run->sent : draw()) % run->blocks;
    if (run->type == TYPE_OUT)
        for (uint32_t i = 0; i < run->size / 8; i++)
            data[slot][i] = ~(block * run->size + 8 * i);
    submit(slot, run->type, block * run->size / SECTOR);
    run->sent++;
}

static void measure(const struct bench *bench, const char *what, struct run run, unsigned depth)
{
    uint64_t done = 0, bad = 0, notified = queue.notifications;
    prepare(depth, run.size, run.type == TYPE_IN);
    uint64_t start = rdtsc();
    for (unsigned slot = 0; slot < depth && run.sent < run.count; slot++)
        send_next(&run, slot);
    publish(&queue);
    while (done < run.count) {
        struct used_entry entry = wait_used(&queue);
        do {        /* all that came back meanwhile, so that a batch costs one notification at most */
            unsigned slot = finish(entry);
            done++;
            if (bench->check && run.type == TYPE_IN)
                bad += count_bad(data[slot], headers[slot].sector * SECTOR, run.size);
            if (run.sent < run.count)
                send_next(&run, slot);
        } while (next_used(&queue, &entry));
        publish(&queue);
    }
    report("bench: %s bytes=%u requests=%u ns=%u notifications=%u bad=%u", what, run.count * run.size, run.count,
           elapsed_ns(start), queue.notifications - notified, bad);
}

void bench_block(const struct bench *bench, uint64_t base)
{
    uint64_t taken = device_start(base, F_FLUSH);
    queue_setup(&queue, base, 0, 128);
    device_go(base);
    uint64_t sectors = mmio_read32(base + REG_CONFIG) | (uint64_t)mmio_read32(base + REG_CONFIG + 4) << 32;
    uint64_t size = sectors * SECTOR;
    unsigned depth = queue.size / 3 < DEPTH_MAX ? queue.size / 3 : DEPTH_MAX;
    unsigned deep = bench->depth < 1 ? 1 : bench->depth > 8 ? 8 : (unsigned)bench->depth;
    headers = take(DEPTH_MAX * sizeof(struct header));
    statuses = take(DEPTH_MAX);
    for (unsigned slot = 0; slot < DEPTH_MAX; slot++)
        data[slot] = take(slot < deep ? CHUNK : SMALL);
    state = 88172645463325252ul;
    if (bench->sequential && size >= CHUNK)
        measure(bench, "sequential", (struct run){ size / CHUNK, bench->sequential, 0, CHUNK, TYPE_IN }, deep);
    if (bench->random && size >= SMALL)
        measure(bench, "random", (struct run){ size / SMALL, bench->random, 0, SMALL, TYPE_IN }, depth);
    if (bench->single && size >= SMALL)
        measure(bench, "single", (struct run){ size / SMALL, bench->single, 0, SMALL, TYPE_IN }, 1);
    if (bench->write && size >= CHUNK) {
        measure(bench, "write", (struct run){ size / CHUNK, bench->write, 0, CHUNK, TYPE_OUT }, deep);
        if (taken & F_FLUSH) {
            describe(&queue, 0, headers, sizeof(struct header), NEXT, 2);
            submit(0, TYPE_FLUSH, 0);
            publish(&queue);
            finish(wait_used(&queue));
        }
    }
}
