/* Mounts, the root, and what a container's /dev and /etc need: folders, nodes, links, a line in a file. */
#define _GNU_SOURCE		/* O_PATH */
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "agent.h"

#define PATH_MOST 4096
#define MOUNTS_MOST 256

/* Make the folders that `path` names, whichever are missing; its last part as well. */
long make_dirs(char *path, unsigned mode)
{
	long done = -ENOENT;
	for (char *at = path + (*path == '/'); *at || at[-1] != '/'; at++) {
		char was = *at;
		if (was && was != '/')
			continue;
		*at = 0;
		done = CALL(mkdir, path, mode, 0);
		*at = was;
		if (!was || (done < 0 && done != -EEXIST))
			break;
	}
	return done == -EEXIST ? 0 : done;
}

/* What a file or a folder is to be mounted onto. */
static long make_target(const char *source, char *target, int bind)
{
	long fd = bind ? CALL(open, source, O_PATH | O_DIRECTORY | O_CLOEXEC, 0) : -EISDIR;
	if (fd != -ENOTDIR) {
		if (fd >= 0)
			CALL(close, fd, 0, 0);
		return make_dirs(target, 0755);
	}
	for (char *slash = target + length_of(target); slash > target; slash--)
		if (*slash == '/') {
			*slash = 0;
			make_dirs(target, 0755);
			*slash = '/';
			break;
		}
	fd = CALL(open, target, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (fd >= 0)
		CALL(close, fd, 0, 0);
	return fd;
}

static int unescape_all(char **words)
{
	for (; *words; words++)
		if (unescape(*words) < 0) {
			start("error a word is no %XX text");
			return 0;
		}
	return 1;
}

/* mount TYPE SOURCE TARGET FLAGS DATA */
void mount(char **words)
{
	int64_t flags = whole(words[4], UINT32_MAX);
	long done;
	if (flags < 0) {
		start("error flags are a number");
		return;
	}
	if (!unescape_all(words))
		return;
	for (int again = 1;; again = 0) {
		done = CALL5(mount, words[2], words[3], words[1], flags, words[5]);
		if (done != -ENOENT || !again || (flags & MS_REMOUNT))
			break;
		make_target(words[2], words[3], !!(flags & (MS_BIND | MS_MOVE)));
	}
	result(done, "mount");
}

void unmount(char **words)
{
	int64_t flags = words[2] ? whole(words[2], 15) : 0;
	if (flags < 0)
		start("error flags are a number");
	else if (unescape_all(words))
		result(CALL(umount2, words[1], flags, 0), "umount");
}

/* root TARGET [NAME...]: TARGET becomes / for us and all who come after, what is mounted at /NAME goes along. */
void root(char **words)
{
	static char to[PATH_MOST];
	long done;
	if (!unescape_all(words))
		return;
	size_t length = length_of(words[1]);
	for (char **name = words + 2; *name; name++) {
		char from[256] = "/";
		size_t more = length_of(*name);
		if (length + more + 2 > sizeof to || more + 2 > sizeof from || !more) {
			start("error too long a path");
			return;
		}
		memcpy(from + 1, *name, more + 1);
		memcpy(to, words[1], length);
		memcpy(to + length, from, more + 2);
		/* another init keeps its own */
		unsigned flags = init ? MS_MOVE : MS_BIND | MS_REC;
		done = CALL5(mount, from, to, "", flags, 0);
		if (done == -ENOENT && make_dirs(to, 0755) >= 0)
			done = CALL5(mount, from, to, "", flags, 0);
		if (done < 0) {
			result(done, *name);
			return;
		}
	}
	done = CALL(chdir, words[1], 0, 0);
	if (done >= 0 && init)
		done = CALL5(mount, ".", "/", "", MS_MOVE, 0);
	if (done >= 0)
		done = CALL(chroot, ".", 0, 0);
	if (done >= 0)
		done = CALL(chdir, "/", 0, 0);
	result(done, "root");
}

static long mode_of(const char *text)
{
	long mode = 0;
	for (; *text >= '0' && *text <= '7' && mode < 07777; text++)
		mode = mode * 8 + *text - '0';
	return *text || mode > 07777 ? -1 : mode;
}

/* dir PATH MODE */
void make_dir(char **words)
{
	long mode = mode_of(words[2]);
	if (mode < 0)
		start("error a mode is octal");
	else if (unescape_all(words)) {
		long done = make_dirs(words[1], 0755);
		result(done < 0 ? done : CALL(chmod, words[1], mode, 0), "mkdir");
	}
}

/* node PATH c|b|p MODE MAJOR MINOR */
void make_node(char **words)
{
	int64_t major_number = whole(words[4], 4095), minor_number = whole(words[5], 1048575);
	long mode = mode_of(words[3]), done;
	unsigned kind = same(words[2], "c") ? S_IFCHR : same(words[2], "b") ? S_IFBLK : same(words[2], "p") ? S_IFIFO : 0;
	if (mode < 0 || major_number < 0 || minor_number < 0 || !kind) {
		start("error a node is PATH c|b|p MODE MAJOR MINOR");
		return;
	}
	if (!unescape_all(words))
		return;
	done = CALL(mknod, words[1], kind | mode, minor_number % 256 | major_number << 8 | minor_number / 256 << 20);
	if (done >= 0)
		done = CALL(chmod, words[1], mode, 0);		/* whatever the umask is */
	result(done == -EEXIST ? 0 : done, "mknod");
}

/* symlink TEXT PATH */
void make_symlink(char **words)
{
	if (unescape_all(words)) {
		long done = CALL(symlink, words[1], words[2], 0);
		result(done == -EEXIST ? 0 : done, "symlink");
	}
}

/* write PATH TEXT: one write(2), as sysctls want it */
void write_text(char **words)
{
	int length = unescape(words[2]);
	if (length < 0 || unescape(words[1]) < 0) {
		start("error a word is no %XX text");
		return;
	}
	long fd = CALL(open, words[1], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NONBLOCK, 0644), done = fd;
	if (fd >= 0) {
		done = CALL(write, fd, words[2], length);
		CALL(close, fd, 0, 0);
	}
	result(done, "write");
}

/* All file systems, the last one first; the root stays, read-only. */
void unmount_all(void)
{
	static char table[32 << 10];
	static char *targets[MOUNTS_MOST];
	int count = 0;
	long size = read_proc("self/mounts", table, sizeof table - 1, 1);
	for (char *at = table, *end = table + (size > 0 ? size : 0); at < end && count < MOUNTS_MOST; at++) {
		while (at < end && *at != ' ')
			at++;
		char *to = ++at;
		targets[count++] = to;
		for (; at < end && *at != ' '; at++) {
			if (*at == '\\' && at + 3 < end) {		/* \040, as proc(5) has it */
				*to++ = (at[1] - '0') << 6 | (at[2] - '0') << 3 | (at[3] - '0');
				at += 3;
			} else {
				*to++ = *at;
			}
		}
		char *rest = at;
		*to = 0;
		for (at = rest + 1; at < end && *at != '\n'; at++)
			;
	}
	while (count--)
		if (!same(targets[count], "/"))
			CALL(umount2, targets[count], 0, 0);
	CALL5(mount, 0, "/", 0, MS_REMOUNT | MS_RDONLY, 0);
}
