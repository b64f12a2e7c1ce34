/* Init of a guest whose power is cut: appends numbered records to a file, and names each once fsync(2) has returned.
 *
 * Every 16th record is also a new file of its own, renamed into place, its folder synced. Driven by
 * tests/kvm/test_virtio_blk.py, which kills the machine and looks for every record named.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define RECORD 64

static void die(const char *what)
{
	perror(what);
	for (;;)
		pause();
}

static void store(int fd, int number)
{
	char record[RECORD];

	memset(record, '.', sizeof record);
	record[snprintf(record, sizeof record, "record %08d", number)] = ' ';
	record[RECORD - 1] = '\n';
	if (write(fd, record, sizeof record) != sizeof record || fsync(fd))
		die("store");
}

int main(void)
{
	char name[32];
	int log = open("/log", O_CREAT | O_WRONLY | O_APPEND, 0644), folder = open("/kept", O_RDONLY | O_DIRECTORY), fd;

	if (log < 0 || folder < 0)
		die("open");
	for (int number = 0;; number++) {
		store(log, number);
		if (number % 16 == 15) {
			snprintf(name, sizeof name, "/kept/%08d", number);
			fd = open("/kept/new", O_CREAT | O_WRONLY | O_TRUNC, 0644);
			if (fd < 0)
				die("open");
			store(fd, number);
			close(fd);
			if (rename("/kept/new", name) || fsync(folder))
				die("rename");
		}
		printf("synced %d\n", number);
		fflush(stdout);
	}
}
