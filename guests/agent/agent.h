/* What the agent's files share: the kernel without a library, words and what they mean, the reply, the processes. */
#ifndef AGENT_H
#define AGENT_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

/* call.S: -errno where it failed */
long call3(long number, long a, long b, long c);
long call(long number, long a, long b, long c, long d, long e);

#define CALL(name, a, b, c) call3(SYS_##name, (long)(a), (long)(b), (long)(c))
#define CALL5(name, a, b, c, d, e) call(SYS_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))

/* text.c */
void *memcpy(void *to, const void *from, size_t length);
void *memset(void *to, int value, size_t length);
size_t length_of(const char *text);
int equal(const void *one, const void *other, size_t length);
int same(const char *one, const char *other);
int64_t number(const char **text, int64_t most);
int64_t whole(const char *text, int64_t most);
int bytes_of(const char *text, char between, uint8_t *to, int most);
int unescape(char *text);
int is_mac(const char *text, uint8_t *mac);
int ipv4(const char **text, uint32_t *address);

#define REPLY_MOST 4000		/* the host takes lines of 4096 */
extern char reply[REPLY_MOST];	/* of the request that is served */
int room(void);
void put(const char *text);
void put_number(unsigned long value);
void put_escaped(const char *bytes, size_t length);
void start(const char *text);
void result(long done, const char *what);

/* network.c */
void mac(char **words);
void address(char **words);
void mtu(char **words);
void link_state(char **words);
void route(char **words);

/* requests.c: port 1 */
void take_client(long fd);
void serve_client(unsigned index);

/* mounts.c */
void mount(char **words);
void unmount(char **words);
void root(char **words);
void make_dir(char **words);
void make_node(char **words);
void make_symlink(char **words);
void write_text(char **words);
long make_dirs(char *path, unsigned mode);
void unmount_all(void);

/* proc.c */
extern int proc, sys, dev;	/* these file systems, wherever they are mounted by now; -1: they are not there */
void open_proc(void);
long read_proc(const char *name, char *to, size_t most, int whole_file);
void stats(char **words);
void ps(char **words);

/* init.c */
extern int init;		/* whether we are process 1 */
void set_up(void);
void shut_down(char **words);
int ending_wait(void);
void ending_step(void);

/* spec.c: how a process is to be started */
struct spec {
	char **argv, **env;
	const char *cwd, *program;
	uint32_t uid, gid;
	uint32_t groups[256];
	unsigned group_count;
	uint8_t *limits[16];		/* records: resource, soft, hard */
	unsigned limit_count;
	uint16_t rows, columns;
	uint64_t capabilities[5];	/* bounding, effective, inheritable, permitted, ambient */
	uint32_t umask;
	int32_t oom_score_adj;
	uint8_t has_terminal, has_capabilities, no_new_privs, has_umask, has_oom_score_adj;
	int in, out, err;		/* descriptors of the process's side */
};
int parse(uint8_t *at, size_t size, struct spec *spec);

/* start.c */
struct failure {
	long error;			/* 0: it runs */
	const char *step, *about;
};
long start_process(const struct spec *spec, struct failure *failure);

/* process.c: port 2 */
#define PROCESSES_MOST 128
#define FRAME_MOST 65536
#define WINDOW 65536			/* standard input that is taken ahead of the process */
#define SPEC_MOST (2 << 20)

/* What an event is for: the ends of processes, then others. */
enum { OUT, ERR, STREAM, IN, CLIENT, REQUESTS, STREAMS, CHILDREN };

struct process {
	int stream, in, out[2];		/* descriptors, -1: closed. With a terminal in == out[OUT], its master */
	int pid;			/* until it is reaped */
	int number;			/* its pid for good; 0: not started */
	int status;			/* wait(2)'s, once reaped */
	int32_t drain;			/* bytes of output until its end is told */
	uint8_t used, reaped, told, terminal, input_ends, again, stream_waits, in_waits;
	uint8_t ready[3], hung[2];	/* what may have something to read; whose writers are gone */
	uint8_t kind, head_filled;	/* the frame that comes */
	uint8_t head[8], small[4];
	uint32_t left;
	uint8_t *spec;			/* until it is started */
	uint32_t filled;		/* bytes of input that wait, before the start: of the records */
	uint32_t taken;			/* bytes of input that the host has not been told of */
	uint32_t sent, end;		/* of the output buffer */
};
extern struct process processes[PROCESSES_MOST];

void warm_up(void);
void mark(unsigned index, unsigned which, unsigned events);
int serve_processes(void);
void reaped(int pid, int status);

void tell(struct process *process, char kind, const void *data, size_t length);
int flush(struct process *process);
void lose(struct process *process);
void release(struct process *process);
void close_out(struct process *process, int which);
void give_input(struct process *process);
extern unsigned used;			/* places at the beginning of `processes` that were ever used */
uint8_t *output_of(struct process *process);

/* begin.c: streams that come, and what they are for */
void take_stream(long fd);
void begin(struct process *process);
void attach(struct process *process, int number);

/* frames.c */
int consume(struct process *process, const uint8_t *data, size_t size);
void forget_spec(struct process *process);
uint8_t *input_of(struct process *process);

/* agent.c */
extern int epoll;
void watch(int fd, unsigned which, unsigned index, unsigned events, int operation);
int reap(void);

#endif
