/*
 * bench: what ring 0 tells ring 3, at the start of the arena: RAM that both see at its physical address, so that
 * rings and buffers need no translation.
 */
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ARENA           0x2000000ul     /* 32 MiB, above the kernel */
#define ARENA_END       0x3c00000ul     /* a guest of 64 MiB has it */
#define DEVICES_MAX     16

struct bench {
    uint64_t tsc_khz;
    unsigned count;
    uint64_t devices[DEVICES_MAX];      /* where each device's registers are */
    /* how much of each; 0 leaves it out */
    uint64_t sequential, random, single, write;     /* MiB, requests at depth 32 and 1, MiB */
    uint64_t segments, round_trips;                 /* 64 KiB TCP segments, UDP packets */
    uint64_t console, entropy;                      /* bytes */
    uint64_t depth;                                 /* sequential requests in flight */
    bool check;                                     /* look at the data too */
    uint32_t address, peer;                         /* IPv4 addresses: ours, the host's */
    uint16_t tcp_port, udp_port;
};

#endif
