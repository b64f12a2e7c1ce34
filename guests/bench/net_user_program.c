/*
 * Network: a TCP stream of 64 KiB segments to the host, and round trips of small UDP packets (virtio 1.2, 5.1).
 *
 * As little TCP as the measurement needs: one connection, no congestion control (a tap has no bottleneck but its
 * ends), and going back to what was acknowledged where something got lost. Segments go out whole; the device's side
 * cuts them (VIRTIO_NET_F_HOST_TSO4), and their checksums are left to it too (VIRTIO_NET_F_CSUM).
 */
#include "net.h"
#include "ring.h"

#define F_CSUM          (1ul << 0)
#define F_MAC           (1ul << 5)
#define F_HOST_TSO4     (1ul << 11)
#define BUFFERS         64
#define BUFFER_SIZE     2048
#define SLOTS           32
#define MSS             1460
#define PAYLOAD         (44 * MSS)      /* with its headers below 64 KiB */
#define TRIPS_MAX       4096
#define PATIENCE_NS     20000000000ul
#define RESEND_NS       20000000ul      /* without an acknowledgement */
#define ASK_NS          200000000ul     /* without an answer to a UDP packet */
#define REPEATED        3               /* acknowledgements of the same that mean a loss (RFC 5681, 3.2) */
#define FIRST_SEQUENCE  1000u

static const struct bench *bench;
static struct queue receive, transmit;
static uint8_t *buffers;
static struct packet *slots;
static unsigned slot_next, slots_busy;
static uint8_t our_mac[6], peer_mac[6];
static bool peer_known;
static uint16_t our_port;       /* another one each time: the host may remember a connection that was cut */

/* sending */

static struct packet *slot(void)
{
    struct used_entry entry;
    while (next_used(&transmit, &entry))
        slots_busy--;
    while (slots_busy == SLOTS) {
        publish(&transmit);
        wait_used(&transmit);
        slots_busy--;
    }
    slots_busy++;
    struct packet *packet = slots + slot_next;
    *packet = (struct packet){ 0 };
    copy(packet->ether.to, peer_mac, 6);
    copy(packet->ether.from, our_mac, 6);
    return packet;
}

/* The packet's first `length` bytes, then `payload`. Packets use the slots in turn, and come back in that order. */
static void queue_packet(struct packet *packet, unsigned length, const void *payload, unsigned payload_length)
{
    unsigned head = 2 * slot_next;
    slot_next = (slot_next + 1) % SLOTS;
    describe(&transmit, head, packet, length, payload_length ? NEXT : 0, head + 1);
    if (payload_length)
        describe(&transmit, head + 1, payload, payload_length, 0, 0);
    add(&transmit, head);
}

static void ip_header(struct packet *packet, uint8_t protocol, unsigned length)
{
    packet->ether.type = swap16(TYPE_IP);
    packet->ip = (struct ip){ .version = 0x45, .length = swap16((uint16_t)length), .ttl = 64, .protocol = protocol,
                              .from = swap32(bench->address), .to = swap32(bench->peer) };
    packet->ip.checksum = (uint16_t)~sum(&packet->ip, sizeof(packet->ip), 0);
}

static void send_arp(uint16_t operation, const uint8_t *to, uint32_t to_address)
{
    struct packet *packet = slot();
    for (unsigned i = 0; i < 6; i++)
        packet->ether.to[i] = to ? to[i] : 0xff;
    packet->ether.type = swap16(TYPE_ARP);
    packet->arp = (struct arp){ .hardware = swap16(1), .protocol = swap16(TYPE_IP), .sizes = { 6, 4 },
                                .operation = swap16(operation), .from = swap32(bench->address), .to = to_address };
    copy(packet->arp.from_mac, our_mac, 6);
    if (to)
        copy(packet->arp.to_mac, to, 6);
    queue_packet(packet, VIRTIO_HEADER + ETHER_HEADER + sizeof(struct arp), 0, 0);
    publish(&transmit);
}

static struct {
    uint32_t next, acknowledged, received;      /* sequence numbers: ours to send, ours acknowledged, the host's */
    uint64_t window, total;                     /* what the host takes; how much it acknowledged */
    unsigned scale, repeated;
    bool open, ended;
} tcp;

static void send_tcp(uint8_t flags, const void *payload, unsigned length)
{
    struct packet *packet = slot();
    unsigned header = sizeof(struct tcp) + (flags & SYN ? sizeof(packet->options) : 0);
    ip_header(packet, PROTOCOL_TCP, sizeof(struct ip) + header + length);
    packet->tcp = (struct tcp){ .from = swap16(our_port), .to = swap16(bench->tcp_port), .sequence = swap32(tcp.next),
                                .acknowledgement = swap32(tcp.received), .offset = (uint8_t)(header / 4 << 4),
                                .flags = flags, .window = swap16(0xffff) };
    if (flags & SYN) {          /* maximum segment size; window scale, so that the peer gives us its own; padding */
        static const uint8_t options[8] = { 2, 4, MSS >> 8, MSS & 0xff, 3, 3, 0, 0 };
        copy(packet->options, options, sizeof(options));
    }
    /* Checksum left to the device: the field holds the pseudo header's sum (5.1.6.2). */
    const struct { uint32_t from, to; uint8_t zero, protocol; uint16_t length; } pseudo = {
        packet->ip.from, packet->ip.to, 0, PROTOCOL_TCP, swap16((uint16_t)(header + length)) };
    packet->tcp.checksum = sum(&pseudo, sizeof(pseudo), 0);
    packet->virtio = (struct virtio_header){ .flags = 1, .csum_start = ETHER_HEADER + sizeof(struct ip), .csum_offset = 16 };
    if (length > MSS) {
        packet->virtio.gso_type = 1;
        packet->virtio.gso_size = MSS;
        packet->virtio.header_length = (uint16_t)(ETHER_HEADER + sizeof(struct ip) + header);
    }
    tcp.next += length + (flags & (SYN | FIN) ? 1 : 0);
    queue_packet(packet, (unsigned)(VIRTIO_HEADER + ETHER_HEADER + sizeof(struct ip) + header), payload, length);
}

/* receiving */

static void take_tcp(const struct packet *packet)
{
    const struct tcp *got = &packet->tcp;
    unsigned header = got->offset >> 4 << 2, ip_length = swap16(packet->ip.length);
    if (swap16(got->to) != our_port || header < sizeof(*got) || ip_length < sizeof(struct ip) + header)
        return;
    if (got->flags & RST)
        fail("the host refused the TCP connection");
    if (got->flags & SYN) {
        const uint8_t *option = packet->options, *end = (const uint8_t *)got + header;
        while (option < end && *option) {
            if (*option == 3)
                tcp.scale = option[2];
            option += *option == 1 || !option[1] ? 1 : option[1];
        }
        tcp.received = swap32(got->sequence) + 1;
        tcp.open = true;
    }
    if (got->flags & ACK) {
        int32_t more = (int32_t)(swap32(got->acknowledgement) - tcp.acknowledged);
        if (more > 0) {
            tcp.acknowledged += (uint32_t)more;
            tcp.total += (uint32_t)more;
        }
        tcp.repeated = more == 0 ? tcp.repeated + 1 : 0;
        tcp.window = (uint64_t)swap16(got->window) << (got->flags & SYN ? 0 : tcp.scale);
    }
    if (got->flags & FIN) {
        tcp.received = swap32(got->sequence) + 1;
        tcp.ended = true;
    }
}

/* One packet, if there is one: its UDP payload, else 0. ARP and TCP are dealt with here. */
static const struct packet *receive_one(bool *any)
{
    struct used_entry entry;
    *any = next_used(&receive, &entry);
    if (!*any)
        return 0;
    struct packet *packet = (struct packet *)(buffers + entry.id * BUFFER_SIZE);
    const struct packet *udp = 0;
    if (packet->ether.type == swap16(TYPE_ARP) && packet->arp.to == swap32(bench->address)) {
        copy(peer_mac, packet->arp.from_mac, 6);
        peer_known = true;
        if (packet->arp.operation == swap16(1))
            send_arp(2, packet->arp.from_mac, packet->arp.from);
    } else if (packet->ether.type == swap16(TYPE_IP) && packet->ip.protocol == PROTOCOL_TCP) {
        take_tcp(packet);
    } else if (packet->ether.type == swap16(TYPE_IP) && packet->ip.protocol == PROTOCOL_UDP) {
        udp = packet;
    }
    add(&receive, entry.id);        /* nobody overwrites it before `publish` */
    return udp;
}

static void receive_all(void)
{
    bool any;
    do
        receive_one(&any);
    while (any);
    publish(&receive);
}

static void wait_for(const bool *flag, const char *what)
{
    for (uint64_t start = rdtsc(); !*flag;) {
        receive_all();
        if (elapsed_ns(start) > PATIENCE_NS)
            fail(what);
    }
}

/* From `at` on, as much as the window has room for: a whole segment, or what is left of one. 0 where there is none. */
static unsigned send_data(const char *payload, uint64_t at, uint64_t all)
{
    unsigned offset = (unsigned)(at % PAYLOAD), length = PAYLOAD - offset;
    if (at >= all || at - tcp.total >= tcp.window)
        return 0;
    uint64_t room = tcp.window - (at - tcp.total);
    if (length > room) {
        if (at != tcp.total)        /* better wait for a whole one */
            return 0;
        length = (unsigned)room;
    }
    send_tcp(ACK | PSH, payload + offset, length);
    return length;
}

static void stream(void)
{
    uint32_t *payload = take(PAYLOAD);
    for (unsigned i = 0; i < PAYLOAD / 4; i++)
        payload[i] = i;
    tcp.next = tcp.acknowledged = FIRST_SEQUENCE;
    tcp.open = tcp.ended = false;
    send_tcp(SYN, 0, 0);
    publish(&transmit);
    wait_for(&tcp.open, "no answer from the host's TCP port");
    uint64_t all = bench->segments * PAYLOAD, at = 0, done = 0, notified = transmit.notifications, lost = 0;
    uint64_t start = rdtsc(), progress = start, heard = start;
    unsigned unpublished = 0;
    tcp.total = 0;
    while (tcp.total < all) {
        unsigned length = send_data((const char *)payload, at, all);
        at += length;
        if (length && ++unpublished < 4)    /* several segments to a notification */
            continue;
        unpublished = 0;
        publish(&transmit);
        receive_all();
        if (tcp.total != done) {
            done = tcp.total;
            progress = heard = rdtsc();
        } else if ((tcp.repeated >= REPEATED && at != done) || elapsed_ns(progress) > RESEND_NS) {
            if (elapsed_ns(heard) > PATIENCE_NS)
                fail("the host does not acknowledge");
            if (at == done)         /* its window is closed, and the news that it opened got lost: ask */
                send_tcp(ACK, 0, 0);
            else
                lost++;
            at = done;
            tcp.next = tcp.acknowledged;
            tcp.repeated = 0;
            progress = rdtsc();
        }
        if (at < done) {            /* what was sent again had arrived */
            at = done;
            tcp.next = tcp.acknowledged;
        }
    }
    send_tcp(ACK | FIN, 0, 0);
    publish(&transmit);
    wait_for(&tcp.ended, "the host does not close its TCP connection");
    uint64_t ns = elapsed_ns(start);
    send_tcp(ACK, 0, 0);
    publish(&transmit);
    report("bench: stream bytes=%u segments=%u ns=%u notifications=%u lost=%u", all, bench->segments, ns,
           transmit.notifications - notified, lost);
}

static void send_number(uint64_t number)
{
    struct packet *packet = slot();
    unsigned length = sizeof(struct udp) + sizeof(packet->number);
    ip_header(packet, PROTOCOL_UDP, sizeof(struct ip) + length);
    packet->udp = (struct udp){ swap16(our_port), swap16(bench->udp_port), swap16((uint16_t)length), 0 };
    packet->number = number;
    queue_packet(packet, VIRTIO_HEADER + ETHER_HEADER + sizeof(struct ip) + length, 0, 0);
    publish(&transmit);
}

static void round_trips(void)
{
    uint64_t count = bench->round_trips < TRIPS_MAX ? bench->round_trips : TRIPS_MAX, bad = 0;
    uint64_t *times = take(TRIPS_MAX * sizeof(*times));
    for (uint64_t n = 0, first = rdtsc(); n < count; n++, first = rdtsc()) {
        uint64_t start = 0;
        for (bool answered = false; !answered;) {
            bool any;
            if (!start || elapsed_ns(start) > ASK_NS) {
                if (elapsed_ns(first) > PATIENCE_NS)
                    fail("no answer from the host's UDP port");
                start = rdtsc();
                send_number(n);
            }
            const struct packet *got = receive_one(&any);
            if (got && got->udp.to == swap16(our_port)) {
                answered = got->number == n;
                bad += !answered;
            } else if (any) {
                publish(&receive);
            }
        }
        times[n] = elapsed_ns(start);
        publish(&receive);
        for (uint64_t i = n; i && times[i - 1] > times[i]; i--) {       /* sorted, for the median */
            uint64_t smaller = times[i];
            times[i] = times[i - 1];
            times[i - 1] = smaller;
        }
    }
    report("bench: round-trips count=%u median-ns=%u min-ns=%u max-ns=%u bad=%u", count, times[count / 2], times[0],
           times[count - 1], bad);
}

void bench_net(const struct bench *asked, uint64_t base)
{
    bench = asked;
    uint64_t taken = device_start(base, F_CSUM | F_MAC | F_HOST_TSO4);
    queue_setup(&receive, base, 0, BUFFERS);
    queue_setup(&transmit, base, 1, 2 * SLOTS);
    device_go(base);
    if (receive.size < BUFFERS || transmit.size < 2 * SLOTS)
        fail("a network queue is too short");
    for (unsigned i = 0; i < 6; i++)
        our_mac[i] = *(volatile uint8_t *)(base + REG_CONFIG + i);
    buffers = take(BUFFERS * BUFFER_SIZE);
    slots = take(SLOTS * sizeof(*slots));
    slot_next = slots_busy = 0;
    our_port = (uint16_t)(0x8000 | rdtsc() >> 8);
    for (unsigned i = 0; i < BUFFERS; i++) {
        describe(&receive, i, buffers + i * BUFFER_SIZE, BUFFER_SIZE, WRITE, 0);
        add(&receive, i);
    }
    publish(&receive);
    peer_known = false;
    send_arp(1, 0, swap32(bench->peer));
    wait_for(&peer_known, "no ARP answer from the host");
    if (bench->round_trips)
        round_trips();
    if (bench->segments && taken & F_HOST_TSO4)
        stream();
}
