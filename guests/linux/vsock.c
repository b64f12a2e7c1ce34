/* AF_VSOCK from the command line, for tests of the socket device: small, static, no dependencies.
 *
 *     vsock serve PORT N           take N streams at a time and in all: each gets back what it sends, until it ends its half
 *     vsock sink PORT              take one stream, read it to its end, answer "BYTES CRC", close
 *     vsock source PORT BYTES      take one stream, send BYTES and end; then read to its end; print "sent CRC"
 *     vsock send CID PORT BYTES    connect, send BYTES, end our half, print the answer
 *     vsock get CID PORT           connect, end our half, read to the end, print "got BYTES CRC"
 *     vsock many CID PORT N        open N streams, then send a line through each and read it back; print "many N"
 *     vsock try CID PORT           connect; print "connected" or why not
 *     vsock drop CID PORT          connect, send a byte, close with bytes unread
 *     vsock cid                    print our CID
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BLOCK (256 << 10)
static uint8_t block[BLOCK];
static uint32_t table[256];

static void die(const char *what)
{
	printf("%s: %s\n", what, strerror(errno));
	exit(1);
}

static uint32_t crc(uint32_t sum, const uint8_t *data, size_t length)
{
	if (!table[1])
		for (uint32_t n = 0; n < 256; n++) {
			uint32_t value = n;
			for (int bit = 0; bit < 8; bit++)
				value = value & 1 ? 0xEDB88320 ^ value >> 1 : value >> 1;
			table[n] = value;
		}
	sum = ~sum;
	while (length--)
		sum = table[(sum ^ *data++) & 0xFF] ^ sum >> 8;
	return ~sum;
}

static struct sockaddr_vm address(unsigned cid, unsigned port)
{
	struct sockaddr_vm to = { .svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port };
	return to;
}

static int stream_socket(void)
{
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (fd < 0)
		die("socket");
	return fd;
}

static int dial(unsigned cid, unsigned port)
{
	struct sockaddr_vm to = address(cid, port);
	struct timeval patience = { .tv_sec = 20 };
	int fd = stream_socket();
	setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, sizeof patience);
	if (connect(fd, (struct sockaddr *)&to, sizeof to))
		die("connect");
	return fd;
}

static int listen_at(unsigned port)
{
	struct sockaddr_vm at = address(VMADDR_CID_ANY, port);
	int fd = stream_socket();
	if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 1024))
		die("listen");
	printf("listening\n");
	fflush(stdout);
	return fd;
}

static int take(unsigned port)
{
	int fd = accept(listen_at(port), NULL, NULL);
	if (fd < 0)
		die("accept");
	return fd;
}

static void put(int fd, const void *data, size_t length)
{
	for (ssize_t done; length; length -= done, data = (const char *)data + done)
		if ((done = send(fd, data, length, MSG_NOSIGNAL)) < 0)
			die("send");
}

/* Send `bytes` of a pattern that has no short period; its checksum. */
static uint32_t pour(int fd, uint64_t bytes)
{
	uint64_t state = 0x9E3779B97F4A7C15;
	uint32_t sum = 0;
	while (bytes) {
		size_t size = bytes < BLOCK ? bytes : BLOCK;
		for (size_t at = 0; at < size; at += 8) {
			state ^= state << 13, state ^= state >> 7, state ^= state << 17;
			memcpy(block + at, &state, 8);
		}
		put(fd, block, size);
		sum = crc(sum, block, size);
		bytes -= size;
	}
	return sum;
}

/* Read to the end; how much, and its checksum. */
static uint64_t drain(int fd, uint32_t *sum)
{
	uint64_t bytes = 0;
	ssize_t size;
	*sum = 0;
	while ((size = recv(fd, block, BLOCK, 0)) > 0) {
		*sum = crc(*sum, block, size);
		bytes += size;
	}
	if (size < 0)
		die("recv");
	return bytes;
}

static void serve(unsigned port, int most)
{
	struct pollfd *watched = calloc(most + 1, sizeof *watched);
	int count = 1, taken = 0;
	watched[0] = (struct pollfd){ .fd = listen_at(port), .events = POLLIN };
	while (taken < most || count > 1) {
		if (poll(watched, count, -1) < 0)
			die("poll");
		for (int n = count - 1; n > 0; n--) {
			if (!watched[n].revents)
				continue;
			ssize_t size = recv(watched[n].fd, block, BLOCK, 0);
			if (size > 0) {
				put(watched[n].fd, block, size);
				continue;
			}
			close(watched[n].fd);
			watched[n] = watched[--count];
		}
		if (watched[0].revents && taken < most) {
			int fd = accept(watched[0].fd, NULL, NULL);
			if (fd < 0)
				die("accept");
			watched[count++] = (struct pollfd){ .fd = fd, .events = POLLIN };
			if (++taken == most)
				watched[0].events = 0;
		}
	}
	printf("served %d\n", taken);
}

static void many(unsigned cid, unsigned port, int count)
{
	int *fds = calloc(count, sizeof *fds);
	char line[32], back[32];
	for (int n = 0; n < count; n++)
		fds[n] = dial(cid, port);
	for (int n = 0; n < count; n++)
		put(fds[n], line, sprintf(line, "stream %d\n", n));
	for (int n = 0; n < count; n++) {
		int length = sprintf(line, "stream %d\n", n);
		if (recv(fds[n], back, length, MSG_WAITALL) != length || memcmp(line, back, length))
			die("recv");
		close(fds[n]);
	}
	printf("many %d\n", count);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	unsigned a = argc > 2 ? strtoul(argv[2], NULL, 0) : 0, b = argc > 3 ? strtoul(argv[3], NULL, 0) : 0;
	unsigned long long c = argc > 4 ? strtoull(argv[4], NULL, 0) : 0;
	struct rlimit files = { 4096, 4096 };
	uint32_t sum;
	setrlimit(RLIMIT_NOFILE, &files);
	if (!strcmp(what, "serve"))
		serve(a, b);
	else if (!strcmp(what, "sink")) {
		int fd = take(a), length;
		unsigned long long bytes = drain(fd, &sum);
		length = sprintf((char *)block, "%llu %08x\n", bytes, sum);
		put(fd, block, length);
		printf("sunk %llu %08x\n", bytes, sum);
	} else if (!strcmp(what, "source")) {
		int fd = take(a);
		printf("sent %08x\n", pour(fd, strtoull(argv[3], NULL, 0)));
		shutdown(fd, SHUT_WR);
		drain(fd, &sum);
	} else if (!strcmp(what, "send")) {
		int fd = dial(a, b);
		sum = pour(fd, c);
		shutdown(fd, SHUT_WR);
		ssize_t size = recv(fd, block, 100, MSG_WAITALL);
		printf("sent %llu %08x answer %.*s\n", c, sum, size > 0 ? (int)size : 0, block);
	} else if (!strcmp(what, "get")) {
		int fd = dial(a, b);
		shutdown(fd, SHUT_WR);
		unsigned long long bytes = drain(fd, &sum);
		printf("got %llu %08x\n", bytes, sum);
	} else if (!strcmp(what, "many"))
		many(a, b, c);
	else if (!strcmp(what, "try")) {
		dial(a, b);
		printf("connected\n");
	} else if (!strcmp(what, "drop")) {
		int fd = dial(a, b);
		put(fd, "x", 1);
		poll(&(struct pollfd){ .fd = fd, .events = POLLIN }, 1, 10000);
		close(fd);
		printf("dropped\n");
	} else if (!strcmp(what, "cid")) {
		int fd = open("/dev/vsock", O_RDONLY);
		if (fd < 0 || ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &a) < 0)
			die("/dev/vsock");
		printf("cid %u\n", a);
	} else {
		printf("see the source for what it takes\n");
		return 2;
	}
	return 0;
}
