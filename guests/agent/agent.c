/* pyhv's agent in a Linux guest: does what the host can't do from outside, and is the guest's init where it is /init.
 *
 * It listens at two vsock ports (below 1024, so no program without CAP_NET_BIND_SERVICE can take their places) and
 * serves the host only: requests in lines at port 1 (requests.c), a stream for each process at port 2 (process.c).
 * docs/agent.md is the protocol, hv/snapshot/agent.py and hv/sandbox are the other end.
 *
 * x86-64, no library: some 20 KiB, not 800, which matters where an initramfs is unpacked by an emulated kernel; and few
 * system calls, which cost a thousand times what they do elsewhere. It sleeps in one epoll_wait without a time limit.
 * Left out on purpose: IPv6, namespaces and cgroups (the guest is the container), seccomp. Driven by
 * tests/unit/test_agent.py, tests/kvm/test_guest_agent.py and tests/kvm/test_clones.py.
 */
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>

#include "agent.h"

#define REQUESTS_PORT 1
#define PROCESSES_PORT 2
#define BACKLOG 128
#define WAITS_MOST 60		/* seconds until AF_VSOCK must be there: its module may be loaded behind us */
#define EVENTS_MOST 64

/* Who an event is for: what it is, and a number of its own. */
#define FOR(which, index) ((uint64_t)(which) << 32 | (index))

int epoll;
static int children;		/* signalfd(2) for SIGCHLD */

void watch(int fd, unsigned which, unsigned index, unsigned events, int operation)
{
	struct epoll_event event = { .events = events, .data.u64 = FOR(which, index) };
	CALL5(epoll_ctl, epoll, operation, fd, &event, 0);
}

/* All children that have ended, orphans too. 0 where there are no more. */
int reap(void)
{
	int status;
	long pid;
	while ((pid = CALL5(wait4, -1, &status, WNOHANG, 0, 0)) > 0)
		reaped(pid, status);
	return pid != -ECHILD;
}

/* A stream that somebody opens: the host's is taken, another is closed. */
static void take(long listener, void (*taker)(long fd))
{
	struct sockaddr_vm peer = { 0 };
	unsigned size = sizeof peer;
	long fd = CALL5(accept4, listener, &peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return;
	if (peer.svm_cid == VMADDR_CID_HOST)
		taker(fd);
	else
		CALL(close, fd, 0, 0);
}

static long listen_at(unsigned port)
{
	struct sockaddr_vm at = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port };
	struct timespec second = { .tv_sec = 1 };
	int kind = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
	long fd = CALL(socket, AF_VSOCK, kind, 0);
	for (int n = 0; fd == -EAFNOSUPPORT && n < WAITS_MOST; n++) {
		CALL(nanosleep, &second, 0, 0);
		fd = CALL(socket, AF_VSOCK, kind, 0);
	}
	if (fd >= 0 && (CALL(bind, fd, &at, sizeof at) < 0 || CALL(listen, fd, BACKLOG, 0) < 0))
		return -1;
	return fd;
}

/* Standard descriptors, so that none of ours gets their numbers; nothing else that we inherited. */
static void own_descriptors(void)
{
	long fd;
	CALL(close_range, 3, ~0u, 0);
	do
		fd = CALL(epoll_create1, 0, 0, 0);
	while (fd >= 0 && fd < 3);
	CALL(close, fd, 0, 0);
}

static void get_ready(void)
{
	static const char no_port[] = "pyhv-agent: no vsock, or port 1 or 2 is taken\n";
	uint64_t all = ~0ul, child = 1ul << (SIGCHLD - 1);
	own_descriptors();
	CALL5(rt_sigprocmask, SIG_SETMASK, &all, 0, 8, 0);	/* SIGPIPE too */
	CALL(setsid, 0, 0, 0);
	CALL(umask, 022, 0, 0);
	CALL(prctl, PR_SET_DUMPABLE, 0, 0);		/* a process shares our memory until it runs its program */
	CALL(prctl, PR_SET_CHILD_SUBREAPER, 1, 0);
	set_up();
	open_proc();
	warm_up();
	epoll = CALL(epoll_create1, EPOLL_CLOEXEC, 0, 0);
	children = CALL5(signalfd4, -1, &child, 8, SFD_CLOEXEC | SFD_NONBLOCK, 0);
	long requests = listen_at(REQUESTS_PORT), streams = listen_at(PROCESSES_PORT);
	if (requests < 0 || streams < 0) {
		CALL(write, 2, no_port, sizeof no_port - 1);
		if (!init)
			CALL(exit_group, 1, 0, 0);
	}
	watch(children, CHILDREN, children, EPOLLIN, EPOLL_CTL_ADD);
	watch(requests, REQUESTS, requests, EPOLLIN, EPOLL_CTL_ADD);
	watch(streams, STREAMS, streams, EPOLLIN, EPOLL_CTL_ADD);
}

static void agent(void)
{
	static struct epoll_event events[EVENTS_MOST];
	static struct signalfd_siginfo signal;
	int again = 0;
	get_ready();
	for (;;) {
		long count = CALL5(epoll_wait, epoll, events, EVENTS_MOST, again ? 0 : ending_wait(), 0);
		int requests = -1, streams = -1;
		for (long n = 0; n < count; n++) {
			unsigned which = events[n].data.u64 >> 32, index = events[n].data.u64;
			if (which < CLIENT) {
				mark(index, which, events[n].events);
			} else if (which == CLIENT) {
				serve_client(index);
			} else if (which == CHILDREN) {
				CALL(read, children, &signal, sizeof signal);
				reap();
			} else if (which == REQUESTS) {
				requests = index;
			} else {
				streams = index;
			}
		}
		/* last, for a new stream may get the place of one that has events here */
		if (requests >= 0)
			take(requests, take_client);
		if (streams >= 0)
			take(streams, take_stream);
		again = serve_processes();
		ending_step();
	}
}

__attribute__((force_align_arg_pointer, noreturn, used)) void _start(void)
{
	agent();
	__builtin_unreachable();
}
