/* Processes for the host, vsock port 2: one stream each, between which and the process's pipes or terminal all is moved.
 *
 * What the host sends is taken at once: it sends no more input than WINDOW ahead of what the process took, so signals
 * are never behind input that nobody reads. Output is read only while nothing of it waits for the stream: a host that
 * does not read stops the process that writes, and no other. Events are edge-triggered, so that nothing is watched
 * anew; `ready` and `hung` remember what they said. docs/agent.md is the protocol.
 */
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "agent.h"

#define HEAD 8
#define OUTPUT_MOST (32 << 10)
#define READ_LEAST 4096			/* room for output without which it waits for the next packet */
#define DRAIN_MOST (1 << 20)		/* what a pipe holds at most (/proc/sys/fs/pipe-max-size) */
#define TURNS 4				/* packets of one process before others have theirs */

struct process processes[PROCESSES_MOST];
static uint8_t outputs[PROCESSES_MOST][OUTPUT_MOST + 1024];
static uint8_t arrived[FRAME_MOST];
unsigned used;

uint8_t *output_of(struct process *process)
{
	return outputs[process - processes];
}

/* Have the pages that the first process needs: each takes an emulated kernel milliseconds. */
void warm_up(void)
{
	volatile uint8_t *first[] = { input_of(processes), input_of(processes) + 4096, outputs[0], outputs[0] + 4096, arrived,
				      arrived + 4096 };
	for (unsigned n = 0; n < sizeof first / sizeof *first; n++)
		*first[n] = 0;
}

void release(struct process *process)
{
	forget_spec(process);
	process->used = 0;
}

void lose(struct process *process)
{
	CALL(close, process->stream, 0, 0);
	process->stream = -1;
	process->ready[STREAM] = process->head_filled = process->left = 0;
	process->sent = 0;			/* a frame that was cut off is sent again to whoever comes */
	if (!process->number)
		release(process);
}

/* Frames --------------------------------------------------------------------------------------- */

void tell(struct process *process, char kind, const void *data, size_t length)
{
	uint8_t *at = output_of(process) + process->end;
	memset(at, 0, HEAD);
	*at = kind;
	memcpy(at + 4, &(uint32_t){ length }, 4);
	if (data)
		memcpy(at + HEAD, data, length);
	process->end += HEAD + length;
}

/* Send what waits. 0 where something still does. */
int flush(struct process *process)
{
	while (process->sent < process->end) {
		if (process->stream < 0)
			return 0;
		long sent = CALL5(sendto, process->stream, output_of(process) + process->sent,
				  process->end - process->sent, MSG_DONTWAIT | MSG_NOSIGNAL, 0);
		if (sent == -EINTR)
			continue;
		if (sent == -EAGAIN) {
			if (!process->stream_waits)
				watch(process->stream, STREAM, process - processes, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
				      EPOLL_CTL_MOD);
			process->stream_waits = 1;
			return 0;
		}
		if (sent < 0) {
			lose(process);
			return 0;
		}
		process->sent += sent;
	}
	process->sent = process->end = 0;
	return 1;
}

/* Moving ----------------------------------------------------------------------------------------- */

static void close_in(struct process *process)
{
	if (process->in >= 0 && !process->terminal)
		CALL(close, process->in, 0, 0);
	process->in = -1;
	process->taken += process->filled;
	process->filled = 0;
}

void close_out(struct process *process, int which)
{
	if (process->out[which] < 0)
		return;
	if (process->terminal)
		close_in(process);
	CALL(close, process->out[which], 0, 0);
	process->out[which] = -1;
	process->ready[which] = 0;
}

/* Input that waits goes to the process, as far as it takes it. */
void give_input(struct process *process)
{
	uint8_t *input = input_of(process);
	uint32_t given = 0;
	while (process->in >= 0 && given < process->filled) {
		long done = CALL(write, process->in, input + given, process->filled - given);
		if (done == -EINTR)
			continue;
		if (done == -EAGAIN) {
			if (!process->terminal && !process->in_waits)
				watch(process->in, IN, process - processes, EPOLLOUT | EPOLLET, EPOLL_CTL_ADD);
			process->in_waits = 1;
			break;
		}
		if (done <= 0) {
			close_in(process);		/* it reads no more: what else comes is taken and dropped */
			return;
		}
		given += done;
	}
	process->filled -= given;
	process->taken += given;
	if (given)
		memcpy(input, input + given, process->filled);
	if (process->input_ends && !process->filled)
		close_in(process);
}

void mark(unsigned index, unsigned which, unsigned events)
{
	struct process *process = &processes[index];
	if (!process->used)
		return;
	process->again = 1;
	if (which == IN || (which == OUT && process->terminal && (events & EPOLLOUT)))
		give_input(process);
	if (which == OUT || which == ERR) {
		if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
			process->ready[which] = 1;
		if (events & (EPOLLHUP | EPOLLERR))
			process->hung[which] = 1;
	}
	if (which == STREAM && (events & ~EPOLLOUT))
		process->ready[STREAM] = 1;
}

void reaped(int pid, int status)
{
	for (unsigned n = 0; n < used; n++)
		if (processes[n].pid == pid && processes[n].used) {
			processes[n].pid = 0;
			processes[n].status = status;
			processes[n].reaped = processes[n].again = 1;
			processes[n].ready[OUT] = processes[n].out[OUT] >= 0;
			processes[n].ready[ERR] = processes[n].out[ERR] >= 0;
			processes[n].drain = DRAIN_MOST;
		}
}

/* What the host has sent. */
static void take_frames(struct process *process)
{
	while (process->used && process->ready[STREAM]) {
		long size = CALL5(recvfrom, process->stream, arrived, sizeof arrived, MSG_DONTWAIT, 0);
		if (size == -EINTR)
			continue;
		if (size < (long)sizeof arrived)
			process->ready[STREAM] = 0;	/* more makes an event */
		if (size == -EAGAIN)
			return;
		if (size > 0 && consume(process, arrived, size))
			continue;
		if (process->used && process->stream >= 0)
			lose(process);
		if (process->used && process->told && !size) {	/* the host will not come for what those left behind say */
			close_out(process, OUT);
			close_out(process, ERR);
		}
		return;
	}
}

/* Read output behind what waits already; whether there was any. */
static int read_output(struct process *process, int which)
{
	uint8_t *at = output_of(process) + process->end;
	long most = OUTPUT_MOST - process->end - HEAD, size;
	if (!process->ready[which] || most < READ_LEAST)
		return 0;
	do
		size = CALL(read, process->out[which], at + HEAD, most);
	while (size == -EINTR);
	if (size > 0) {
		if (size < most && !process->terminal && !process->hung[which])
			process->ready[which] = 0;	/* a pipe gives all it has */
		tell(process, "OR"[which], 0, size);
		process->drain -= size;
		return 1;
	}
	if (size == -EAGAIN)
		process->ready[which] = 0;
	else
		close_out(process, which);		/* its end; EIO with a terminal */
	return 0;
}

static void tell_end(struct process *process)
{
	uint32_t how[2] = { WIFSIGNALED(process->status),
			    WIFSIGNALED(process->status) ? WTERMSIG(process->status) : WEXITSTATUS(process->status) };
	process->told = 1;
	close_in(process);
	tell(process, 'X', how, sizeof how);
}

static void serve_process(struct process *process)
{
	process->again = 0;
	take_frames(process);
	for (int turn = 0; process->used && process->number; turn++) {
		if (turn == TURNS) {
			process->again = 1;
			return;
		}
		if (!flush(process))
			return;
		if (process->taken >= WINDOW / 2 && !process->told) {
			tell(process, 'I', &process->taken, 4);
			process->taken = 0;
		}
		read_output(process, OUT);
		read_output(process, ERR);
		if (process->reaped && !process->told && process->end < OUTPUT_MOST
		    && (process->drain <= 0 || !(process->ready[OUT] | process->ready[ERR])))
			tell_end(process);
		if (process->end)
			continue;
		if (process->told && process->out[OUT] < 0 && process->out[ERR] < 0) {
			lose(process);
			release(process);
		}
		if (!(process->ready[OUT] | process->ready[ERR]))
			return;
	}
}

/* All that have something to do, once; whether there is more. */
int serve_processes(void)
{
	int again = 0;
	for (unsigned n = 0; n < used; n++)
		if (processes[n].used && processes[n].again)
			serve_process(&processes[n]);
	for (unsigned n = 0; n < used; n++)		/* one may have got its stream by another behind it */
		again |= processes[n].used & processes[n].again;
	return again;
}
