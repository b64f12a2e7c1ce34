/* Streams of the host at vsock port 2 until each has its process: a new one, by a spec, or one whose stream broke. */
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <termios.h>

#include "agent.h"

#define STEP_MOST 200			/* bytes of what failed that are told */

static void tell_failure(struct process *process, const struct failure *failure)
{
	struct {
		uint32_t error;
		char text[STEP_MOST + 60];
	} said = { failure->error, { 0 } };
	size_t step = length_of(failure->step), about = length_of(failure->about);
	memcpy(said.text, failure->step, step);
	if (about) {
		said.text[step++] = ' ';
		if (about > STEP_MOST)
			about = STEP_MOST;
		memcpy(said.text + step, failure->about, about);
	}
	tell(process, 'E', &said, 4 + step + about);
	if (!flush(process) && process->stream < 0)
		return;
	if (process->stream >= 0)
		lose(process);
}

static void close_all(const int *fds, int count)
{
	for (int n = 0; n < count; n++)
		if (fds[n] >= 0)
			CALL(close, fds[n], 0, 0);
}

/* A terminal: the one of its root's /dev/pts, so that it has a name there. */
static long open_terminal(struct process *process, struct spec *spec)
{
	int flags = O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK, zero = 0;
	uint16_t size[4] = { spec->rows, spec->columns };	/* struct winsize */
	long master = CALL(open, "/dev/pts/ptmx", flags, 0), slave;
	if (master < 0 || CALL(ioctl, master, TIOCSPTLCK, &zero) < 0) {
		CALL(close, master, 0, 0);
		master = CALL5(openat, dev, "pts/ptmx", flags, 0, 0);
		if (master < 0)
			return master;
		CALL(ioctl, master, TIOCSPTLCK, &zero);
	}
	slave = CALL(ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (slave < 0) {
		CALL(close, master, 0, 0);
		return slave;
	}
	CALL(ioctl, master, TIOCSWINSZ, size);
	process->terminal = 1;
	process->in = process->out[OUT] = master;
	spec->in = spec->out = spec->err = slave;
	return 0;
}

static long open_pipes(struct process *process, struct spec *spec)
{
	int fds[6] = { -1, -1, -1, -1, -1, -1 };
	for (int n = 0; n < 6; n += 2) {
		long done = CALL(pipe2, fds + n, O_CLOEXEC, 0);
		if (done < 0) {
			close_all(fds, 6);
			return done;
		}
	}
	process->in = fds[1];
	process->out[OUT] = fds[2];
	process->out[ERR] = fds[4];
	spec->in = fds[0];
	spec->out = fds[3];
	spec->err = fds[5];
	for (int n = 1; n < 5; n += n == 1 ? 1 : 2)		/* ours; the other ends are its own */
		CALL(fcntl, fds[n], F_SETFL, O_NONBLOCK | (n == 1 ? O_WRONLY : 0));
	return 0;
}

/* The records are there: run it. */
void begin(struct process *process)
{
	static struct spec spec;
	static struct failure failure;
	unsigned index = process - processes;
	long done = parse(process->spec, process->filled, &spec) ? 0 : -EINVAL;
	failure.error = 0;
	if (done >= 0)
		done = spec.has_terminal ? open_terminal(process, &spec) : open_pipes(process, &spec);
	if (done < 0) {
		failure = (struct failure){ -done, "records, pipes or terminal", "" };
	} else {
		int its[3] = { spec.in, spec.out, spec.err };
		int count = spec.has_terminal ? 1 : 3;
		for (int n = 0; n < count && spec.uid; n++)	/* so that it may open /dev/stdout */
			CALL(fchown, its[n], spec.uid, -1);
		process->pid = start_process(&spec, &failure);
		close_all(its, count);
	}
	if (failure.error) {
		int ours[3] = { process->out[OUT], process->out[ERR], process->terminal ? -1 : process->in };
		close_all(ours, 3);
		process->pid = 0;
		forget_spec(process);
		tell_failure(process, &failure);	/* and it is gone */
		return;
	}
	forget_spec(process);
	process->filled = 0;
	process->number = process->pid;
	watch(process->out[OUT], OUT, index, EPOLLIN | EPOLLET | (process->terminal ? EPOLLOUT : 0), EPOLL_CTL_ADD);
	if (!process->terminal)
		watch(process->out[ERR], ERR, index, EPOLLIN | EPOLLET, EPOLL_CTL_ADD);
	tell(process, 'P', &process->number, 4);
	flush(process);
}

/* The stream of `process` becomes that of the one with this number, whose own broke. */
void attach(struct process *process, int number)
{
	struct failure failure = { ESRCH, "attach", "" };
	for (unsigned n = 0; n < used; n++) {
		struct process *other = &processes[n];
		if (!other->used || other->stream >= 0 || other->number != number)
			continue;
		uint32_t window = WINDOW - (other->filled < WINDOW ? other->filled : WINDOW);
		uint32_t kept = other->end;
		uint8_t *output = output_of(other), first[24];
		other->stream = process->stream;
		other->ready[STREAM] = 1;
		other->stream_waits = 0;
		other->taken = 0;
		other->again = 1;
		/* what waits comes behind the answer */
		memset(first, 0, sizeof first);
		first[0] = 'P';
		first[4] = first[16] = 4;
		memcpy(first + 8, &number, 4);
		first[12] = 'I';
		memcpy(first + 20, &window, 4);
		for (uint32_t at = kept; at--;)
			output[at + sizeof first] = output[at];
		memcpy(output, first, sizeof first);
		other->end = kept + sizeof first;
		watch(other->stream, STREAM, n, EPOLLIN | EPOLLRDHUP | EPOLLET, EPOLL_CTL_MOD);
		process->stream = -1;
		release(process);
		return;
	}
	tell_failure(process, &failure);
}

void take_stream(long fd)
{
	struct process *free = 0;
	for (unsigned n = 0; n < PROCESSES_MOST && !free; n++)
		if (!processes[n].used)
			free = &processes[n];
	for (unsigned n = 0; n < PROCESSES_MOST && !free; n++)		/* ended, and nobody came to hear of it */
		if (processes[n].stream < 0 && !processes[n].pid) {
			close_out(&processes[n], OUT);
			close_out(&processes[n], ERR);
			free = &processes[n];
		}
	if (!free) {
		CALL(close, fd, 0, 0);
		return;
	}
	memset(free, 0, sizeof *free);
	free->stream = fd;
	free->in = free->out[OUT] = free->out[ERR] = -1;
	free->used = free->again = free->ready[STREAM] = 1;
	if (free - processes >= used)
		used = free - processes + 1;
	watch(fd, STREAM, free - processes, EPOLLIN | EPOLLRDHUP | EPOLLET, EPOLL_CTL_ADD);
}
