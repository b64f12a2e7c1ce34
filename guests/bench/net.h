/* Packets as they lie in memory: virtio-net's header (virtio 1.2, 5.1.6), Ethernet, ARP, IPv4, TCP, UDP. */
#ifndef NET_H
#define NET_H

#include <stdint.h>

#define TYPE_IP         0x0800
#define TYPE_ARP        0x0806
#define PROTOCOL_TCP    6
#define PROTOCOL_UDP    17
#define VIRTIO_HEADER   12
#define ETHER_HEADER    14
#define FIN             0x01
#define SYN             0x02
#define RST             0x04
#define PSH             0x08
#define ACK             0x10

struct virtio_header { uint8_t flags, gso_type; uint16_t header_length, gso_size, csum_start, csum_offset, buffers; };
struct ether { uint8_t to[6], from[6]; uint16_t type; } __attribute__((packed));
struct arp {
    uint16_t hardware, protocol;
    uint8_t sizes[2];
    uint16_t operation;
    uint8_t from_mac[6];
    uint32_t from;
    uint8_t to_mac[6];
    uint32_t to;
} __attribute__((packed));
struct ip {
    uint8_t version, service;
    uint16_t length, id, fragment;
    uint8_t ttl, protocol;
    uint16_t checksum;
    uint32_t from, to;
} __attribute__((packed));
struct tcp {
    uint16_t from, to;
    uint32_t sequence, acknowledgement;
    uint8_t offset, flags;
    uint16_t window, checksum, urgent;
} __attribute__((packed));
struct udp { uint16_t from, to, length, checksum; } __attribute__((packed));

struct packet {
    struct virtio_header virtio;
    struct ether ether;
    union {
        struct arp arp;
        struct {
            struct ip ip;
            union {
                struct { struct tcp tcp; uint8_t options[8]; } __attribute__((packed));
                struct { struct udp udp; uint64_t number; } __attribute__((packed));
            };
        } __attribute__((packed));
    };
} __attribute__((packed));

static inline uint16_t swap16(uint16_t value) { return __builtin_bswap16(value); }
static inline uint32_t swap32(uint32_t value) { return __builtin_bswap32(value); }

static inline void copy(void *to, const void *from, unsigned length)
{
    for (unsigned i = 0; i < length; i++)
        ((uint8_t *)to)[i] = ((const uint8_t *)from)[i];
}

/* The Internet checksum of an even number of bytes (RFC 1071), not inverted, as it lies in memory. */
static inline uint16_t sum(const void *data, unsigned length, uint32_t total)
{
    for (unsigned i = 0; i < length; i += 2) {
        uint16_t word;
        copy(&word, (const uint8_t *)data + i, 2);
        total += word;
    }
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return (uint16_t)total;
}

#endif
