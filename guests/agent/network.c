/* Network cards, by the ioctls that every kernel has (man 7 netdevice). */
#include <arpa/inet.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "agent.h"

#define CARDS_MOST 256		/* interface indices that are looked at */
#define ROUTES_MOST 16		/* default routes that are removed */

/* The interface that `card` names into `request`; 0 where there is none. */
static int find_card(long fd, const char *card, struct ifreq *request)
{
	uint8_t mac[6];
	memset(request, 0, sizeof *request);
	if (!is_mac(card, mac)) {
		size_t length = length_of(card);
		memcpy(request->ifr_name, card, length < IFNAMSIZ ? length : IFNAMSIZ - 1);
		return length < IFNAMSIZ && CALL(ioctl, fd, SIOCGIFINDEX, request) >= 0;
	}
	for (int index = 1; index < CARDS_MOST; index++) {
		request->ifr_ifindex = index;
		if (CALL(ioctl, fd, SIOCGIFNAME, request) >= 0 && CALL(ioctl, fd, SIOCGIFHWADDR, request) >= 0
		    && request->ifr_hwaddr.sa_family == ARPHRD_ETHER && equal(request->ifr_hwaddr.sa_data, mac, 6))
			return 1;
	}
	return 0;
}

static long set_up_card(long fd, struct ifreq *request, int up)
{
	long done = CALL(ioctl, fd, SIOCGIFFLAGS, request);
	if (done < 0)
		return done;
	request->ifr_flags = up ? request->ifr_flags | IFF_UP : request->ifr_flags & ~IFF_UP;
	return CALL(ioctl, fd, SIOCSIFFLAGS, request);
}

static void set_mac(char **words, long fd)
{
	struct ifreq request, other;
	uint8_t mac[6];
	long done;
	if (!is_mac(words[2], mac) || mac[0] & 1) {
		start("error a MAC address is six bytes, the first one even");
		return;
	}
	if (!find_card(fd, words[1], &request)) {
		if (is_mac(words[1], (uint8_t *)&other) && find_card(fd, words[2], &other))
			start("ok");		/* done before */
		else
			start("error no such network card");
		return;
	}
	memset(&request.ifr_hwaddr, 0, sizeof request.ifr_hwaddr);
	request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
	memcpy(request.ifr_hwaddr.sa_data, mac, 6);
	other = request;
	done = CALL(ioctl, fd, SIOCSIFHWADDR, &request);
	if (done == -EBUSY) {			/* a driver that can't while it is up */
		set_up_card(fd, &request, 0);
		done = CALL(ioctl, fd, SIOCSIFHWADDR, &other);
		set_up_card(fd, &request, 1);
	}
	result(done, "SIOCSIFHWADDR");
}

static struct sockaddr inet(uint32_t address)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = address };
	struct sockaddr to;
	memcpy(&to, &in, sizeof to);
	return to;
}

static long set_route(long fd, struct ifreq *card, uint32_t gateway)
{
	struct rtentry route = { .rt_dst = inet(0), .rt_genmask = inet(0), .rt_flags = RTF_UP };
	for (int count = 0; count < ROUTES_MOST && CALL(ioctl, fd, SIOCDELRT, &route) >= 0; count++)
		;
	route.rt_flags = RTF_UP | RTF_GATEWAY;
	route.rt_gateway = inet(gateway);
	route.rt_dev = card->ifr_name;
	return CALL(ioctl, fd, SIOCADDRT, &route);
}

static void set_address(char **words, long fd)
{
	const char *text = words[2];
	struct ifreq request;
	uint32_t address, gateway = 0;
	int64_t prefix = -1;
	long done;
	if (ipv4(&text, &address) && *text++ == '/')
		prefix = number(&text, 32);
	if (prefix < 1 || *text || (words[3] && (text = words[3], !ipv4(&text, &gateway) || *text))) {
		start("error an address is A.B.C.D/P, a gateway A.B.C.D");
		return;
	}
	if (!find_card(fd, words[1], &request)) {
		start("error no such network card");
		return;
	}
	request.ifr_addr = inet(address);
	if ((done = CALL(ioctl, fd, SIOCSIFADDR, &request)) < 0) {
		result(done, "SIOCSIFADDR");
		return;
	}
	request.ifr_addr = inet(htonl(0xFFFFFFFF << (32 - prefix)));
	if ((done = CALL(ioctl, fd, SIOCSIFNETMASK, &request)) < 0) {
		result(done, "SIOCSIFNETMASK");
		return;
	}
	if ((done = set_up_card(fd, &request, 1)) >= 0 && words[3])
		done = set_route(fd, &request, gateway);
	result(done, "the card's state or route");
}

static void set_mtu(char **words, long fd)
{
	struct ifreq request;
	int64_t size = whole(words[2], 65535);
	if (size < 68)				/* RFC 791 */
		start("error a card's MTU is 68 to 65535");
	else if (!find_card(fd, words[1], &request))
		start("error no such network card");
	else
		request.ifr_mtu = size, result(CALL(ioctl, fd, SIOCSIFMTU, &request), "SIOCSIFMTU");
}

static void set_link(char **words, long fd)
{
	struct ifreq request;
	int up = same(words[2], "up");
	if (!up && !same(words[2], "down"))
		start("error a card is up or down");
	else if (!find_card(fd, words[1], &request))
		start("error no such network card");
	else
		result(set_up_card(fd, &request, up), "SIOCSIFFLAGS");
}

/* A route by `card` to A.B.C.D/P, beside those that are there. */
static void add_route(char **words, long fd)
{
	struct rtentry entry = { .rt_flags = RTF_UP };
	const char *text = words[2];
	struct ifreq request;
	uint32_t to, gateway = 0;
	int64_t prefix = -1;
	long done;
	if (ipv4(&text, &to) && *text++ == '/')
		prefix = number(&text, 32);
	if (prefix < 0 || *text || (words[3] && (text = words[3], !ipv4(&text, &gateway) || *text))) {
		start("error a route is A.B.C.D/P, a gateway A.B.C.D");
		return;
	}
	if (!find_card(fd, words[1], &request)) {
		start("error no such network card");
		return;
	}
	entry.rt_dst = inet(to);
	entry.rt_genmask = inet(prefix ? htonl(0xFFFFFFFF << (32 - prefix)) : 0);
	entry.rt_dev = request.ifr_name;
	if (words[3]) {
		entry.rt_flags |= RTF_GATEWAY;
		entry.rt_gateway = inet(gateway);
	}
	done = CALL(ioctl, fd, SIOCADDRT, &entry);
	result(done == -EEXIST ? 0 : done, "SIOCADDRT");
}

/* With a socket, by which the kernel is asked about network cards. */
static void with_socket(char **words, void (*command)(char **, long))
{
	long fd = CALL(socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0) {
		result(fd, "socket");
		return;
	}
	command(words, fd);
	CALL(close, fd, 0, 0);
}

void mac(char **words)
{
	with_socket(words, set_mac);
}

void address(char **words)
{
	with_socket(words, set_address);
}

void mtu(char **words)
{
	with_socket(words, set_mtu);
}

void link_state(char **words)
{
	with_socket(words, set_link);
}

void route(char **words)
{
	with_socket(words, add_route);
}
