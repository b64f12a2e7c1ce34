/* Frames of the host on the stream of a process: u8 kind, three zero bytes, u32 length, that many bytes. */
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <termios.h>

#include "agent.h"

#define HEAD 8

static uint8_t inputs[PROCESSES_MOST][WINDOW];		/* standard input that waits; before the start: records */

uint8_t *input_of(struct process *process)
{
	return inputs[process - processes];
}

void forget_spec(struct process *process)
{
	if (process->spec && process->spec != input_of(process))
		CALL(munmap, process->spec, SPEC_MOST, 0);
	process->spec = 0;
}

/* Records of the spec; those of most processes fit where their input will be. */
static int add_records(struct process *process, const uint8_t *data, size_t size)
{
	if (!process->spec)
		process->spec = input_of(process);
	if (process->filled + size > WINDOW && process->spec == input_of(process)) {
		long map = call(SYS_mmap, 0, SPEC_MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
		if (map < 0)
			return 0;
		memcpy((void *)map, process->spec, process->filled);
		process->spec = (uint8_t *)map;
	}
	if (process->filled + size > (process->spec == input_of(process) ? WINDOW : SPEC_MOST))
		return 0;
	memcpy(process->spec + process->filled, data, size);
	process->filled += size;
	return 1;
}

static int add_input(struct process *process, const uint8_t *data, size_t size)
{
	if (process->in < 0) {			/* nobody reads it: it is taken all the same */
		process->taken += size;
		return 1;
	}
	if (process->filled + size > WINDOW)
		return 0;
	memcpy(input_of(process) + process->filled, data, size);
	process->filled += size;
	return 1;
}

/* With a terminal, the end of input is a character, where it counts (termios(3), VEOF). */
static void end_terminal(struct process *process)
{
	struct {			/* struct termios of include/uapi/asm-generic/termbits.h */
		uint32_t iflag, oflag, cflag, lflag;
		uint8_t line, cc[19];
	} about;
	if (CALL(ioctl, process->in, TCGETS, &about) >= 0 && (about.lflag & ICANON))
		add_input(process, &about.cc[VEOF], 1);
}

/* A frame is whole. 0 where it is none that may come. */
static int finish(struct process *process)
{
	uint32_t value;
	memcpy(&value, process->small, sizeof value);
	switch (process->kind) {
	case 'G':
		begin(process);
		break;
	case 'A':
		attach(process, value);
		break;
	case 'I':
		give_input(process);
		break;
	case 'i':
		if (process->terminal)
			end_terminal(process);
		else
			process->input_ends = 1;
		give_input(process);
		break;
	case 'K':
		if (process->pid)
			CALL(kill, process->pid, value, 0);
		break;
	case 'W': {
		uint16_t size[4] = { value, value >> 16 };	/* struct winsize */
		if (process->terminal && process->out[OUT] >= 0)
			CALL(ioctl, process->out[OUT], TIOCSWINSZ, size);
		break;
	}
	case 'o':
		if (!process->terminal && (value == 1 || value == 2))
			close_out(process, value - 1);
		break;
	}
	return process->used;
}

/* The head of a frame is there: whether it is one that may come now. */
static int begins(struct process *process)
{
	uint32_t length;
	memcpy(&length, process->head + 4, sizeof length);
	process->kind = process->head[0];
	process->left = length;
	if (process->head[1] | process->head[2] | process->head[3])
		return 0;
	switch (process->kind) {
	case 'S':
		return !process->number && length <= FRAME_MOST;
	case 'G':
		return !process->number && !length;
	case 'A':
		return !process->number && length == 4;
	case 'I':
		return process->number && length <= FRAME_MOST && !process->input_ends;
	case 'i':
		return process->number && !length;
	case 'K':
	case 'W':
	case 'o':
		return process->number && length == 4;
	}
	return 0;
}

/* What has come. 0 where the stream is to be given up: it is broken, or the process is another's now. */
int consume(struct process *process, const uint8_t *data, size_t size)
{
	for (;;) {
		if (process->head_filled == HEAD && !process->left) {
			process->head_filled = 0;
			if (!finish(process))
				return 0;
		}
		if (!size)
			return 1;
		if (process->head_filled < HEAD) {
			process->head[process->head_filled++] = *data++;
			size--;
			if (process->head_filled == HEAD && !begins(process))
				return 0;
			continue;
		}
		size_t part = size < process->left ? size : process->left;
		if (process->kind == 'S' ? !add_records(process, data, part)
		    : process->kind == 'I' && !add_input(process, data, part))
			return 0;
		if (process->kind != 'S' && process->kind != 'I')
			memcpy(process->small + 4 - process->left, data, part);	/* they have four bytes */
		process->left -= part;
		data += part;
		size -= part;
	}
}
