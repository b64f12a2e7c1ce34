/* What a file system must do, one line each: "ok NAME" or "FAIL NAME ...". Runs in the current directory of a guest.
 *
 *     fs_check                 all of it, in a folder that can be written
 *     fs_check readonly FILE   that nothing can be changed; FILE exists
 *     fs_check count DIR       how many entries DIR has
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static int failures;

#define CHECK(name, condition) do { \
        errno = 0; \
        if (condition) \
            printf("ok %s\n", name); \
        else { \
            failures++; \
            printf("FAIL %s line %d errno %d\n", name, __LINE__, errno); \
        } \
    } while (0)

static int put(const char *name, const char *text)
{
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0644);

    if (fd >= 0 && write(fd, text, strlen(text)) != (ssize_t)strlen(text))
        exit(3);
    return fd;
}

static int holds(int fd, const char *text)
{
    char buffer[64] = "";

    return pread(fd, buffer, sizeof buffer - 1, 0) == (ssize_t)strlen(text) && !strcmp(buffer, text);
}

static void names(void)
{
    struct stat st;
    char text[64] = "";
    int old = put("old", "old"), new = put("new", "new"), fd;

    CHECK("rename over an open file", !rename("old", "new") && holds(new, "new") && holds(old, "old"));
    CHECK("the replaced file has no link", !fstat(new, &st) && st.st_nlink == 0 && !fstat(old, &st) && st.st_nlink == 1);
    CHECK("the old name is gone", access("old", F_OK) < 0 && errno == ENOENT);
    close(new);
    CHECK("unlink while open", !unlink("new") && pwrite(old, "still", 5, 0) == 5 && holds(old, "still"));
    CHECK("an unlinked file has attributes", !fchmod(old, 0600) && !ftruncate(old, 2) && !fstat(old, &st)
          && st.st_size == 2 && st.st_nlink == 0);
    close(old);
    fd = put("one", "1");
    CHECK("hard links", !link("one", "two") && !fstat(fd, &st) && st.st_nlink == 2 && !unlink("one")
          && !stat("two", &st) && st.st_nlink == 1);
    close(fd);
    CHECK("rename without replacing", (close(put("three", "3")), syscall(SYS_renameat2, AT_FDCWD, "two", AT_FDCWD,
          "three", 1) < 0) && errno == EEXIST);
    CHECK("exchange", !syscall(SYS_renameat2, AT_FDCWD, "two", AT_FDCWD, "three", 2)
          && holds(fd = open("two", O_RDONLY), "3") && !close(fd));
    CHECK("symbolic links", !symlink("two", "link") && readlink("link", text, 63) == 3 && !lstat("link", &st)
          && S_ISLNK(st.st_mode) && !stat("link", &st) && S_ISREG(st.st_mode));
    CHECK("a FIFO, no device", !mkfifo("fifo", 0600) && mknod("dev", S_IFBLK | 0600, 0x801) < 0 && errno == EPERM);
    CHECK("a full directory stays", !mkdir("dir", 0755) && !close(put("dir/x", "x")) && rmdir("dir") < 0
          && errno == ENOTEMPTY && !unlink("dir/x") && !rmdir("dir"));
}

static void contents(void)
{
    struct stat st;
    struct timespec times[2] = {{1000000000, 123456789}, {-5, 5}};
    char value[16] = "", *map;
    int fd = put("data", "0123456789"), other = open("data", O_WRONLY | O_APPEND);

    CHECK("append", write(other, "ab", 2) == 2 && ftruncate(fd, 5) == 0 && write(other, "!", 1) == 1
          && holds(fd, "01234!"));
    CHECK("truncate and grow", !truncate("data", 3) && !truncate("data", 1 << 20) && !fstat(fd, &st)
          && st.st_size == 1 << 20 && pread(fd, value, 4, 1) == 4 && !memcmp(value, "12\0\0", 4));
    CHECK("holes", pwrite(fd, "x", 1, 512 << 10) == 1 && lseek(fd, 64 << 10, SEEK_DATA) == 512 << 10
          && lseek(fd, 512 << 10, SEEK_HOLE) == (512 << 10) + 4096);
    CHECK("punch a hole", !fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 512 << 10, 4096)
          && pread(fd, value, 1, 512 << 10) == 1 && !value[0] && lseek(fd, 64 << 10, SEEK_DATA) < 0 && errno == ENXIO);
    CHECK("times", !futimens(fd, times) && !fstat(fd, &st) && st.st_atim.tv_nsec == 123456789 && st.st_mtime == -5);
    CHECK("a write is a change", write(other, "y", 1) == 1 && !fstat(fd, &st) && st.st_mtime > 1000000000);
    umask(027);
    close(open("moded", O_CREAT | O_WRONLY, 0666));
    CHECK("umask and mode", !stat("moded", &st) && (st.st_mode & 07777) == 0640 && !chmod("moded", 04755)
          && !stat("moded", &st) && (st.st_mode & 07777) == 04755);
    umask(022);
    CHECK("extended attributes", !setxattr("data", "user.a", "value", 5, 0) && getxattr("data", "user.a", value, 16) == 5
          && listxattr("data", value, 16) == 7 && !strcmp(value, "user.a") && !removexattr("data", "user.a")
          && getxattr("data", "user.a", value, 16) < 0 && errno == ENODATA);
    map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK("a shared mapping", map != MAP_FAILED && (memcpy(map + 4096, "mapped", 6), !msync(map, 8192, MS_SYNC))
          && pread(fd, value, 6, 4096) == 6 && !memcmp(value, "mapped", 6) && !munmap(map, 8192));
    CHECK("copy a range", copy_file_range(fd, (loff_t[]){4096}, open("copy", O_CREAT | O_RDWR, 0644), NULL, 6, 0) == 6);
    CHECK("fsync", !fsync(fd) && !fdatasync(fd) && !syncfs(fd));
}

static void locks(void)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 5};
    int fd = put("locked", "0123456789"), status = 0;
    pid_t child;

    CHECK("a record lock", !fcntl(fd, F_SETLK, &lock) && !flock(fd, LOCK_EX));
    child = fork();
    if (!child) {
        int own = open("locked", O_RDWR);
        struct flock seen = {.l_type = F_RDLCK, .l_whence = SEEK_SET};

        if (fcntl(own, F_GETLK, &seen) || seen.l_type != F_WRLCK || seen.l_start != 10 || seen.l_len != 5)
            _exit(1);
        if (seen.l_pid != getppid())
            _exit(2);
        if (fcntl(own, F_SETLK, &lock) == 0 || errno != EAGAIN || flock(own, LOCK_EX | LOCK_NB) == 0)
            _exit(3);
        if (fcntl(own, F_SETLKW, &lock) || flock(own, LOCK_EX))
            _exit(4);
        _exit(0);
    }
    usleep(300000);
    lock.l_type = F_UNLCK;
    fcntl(fd, F_SETLK, &lock);
    flock(fd, LOCK_UN);
    CHECK("another process sees the locks, and waits for them", waitpid(child, &status, 0) == child && status == 0);
    if (status)
        printf("child %#x\n", status);
}

static void directory(void)
{
    char name[32];
    int seen = 0, later = 0;
    long at = 0;
    struct dirent *entry;
    DIR *dir;

    mkdir("many", 0755);
    for (int i = 0; i < 300; i++) {
        sprintf(name, "many/entry-%03d", i);
        if (mknod(name, S_IFREG | 0644, 0))
            exit(4);
    }
    dir = opendir("many");
    while ((entry = readdir(dir)))
        if (entry->d_name[0] != '.' && ++seen == 150)
            at = telldir(dir);
    CHECK("all entries once", seen == 300);
    for (int i = 0; i < 300; i += 10) {
        sprintf(name, "many/entry-%03d", i);
        unlink(name);
    }
    seekdir(dir, at);
    while ((entry = readdir(dir)))
        if (entry->d_name[0] != '.')
            later += entry->d_name[8] != '0';
    CHECK("offsets hold while entries go", later <= 150 && later >= 105);
    closedir(dir);
}

static void owner(void)
{
    struct stat st;

    if (chmod(".", 0777) || setegid(1234) || seteuid(1000))
        exit(5);
    close(open("theirs", O_CREAT | O_WRONLY, 0600));
    if (seteuid(0) || setegid(0))
        exit(6);
    CHECK("a user's file is the user's", !stat("theirs", &st) && st.st_uid == 1000 && st.st_gid == 1234);
    CHECK("root gives it away", !chown("theirs", 7, 8) && !stat("theirs", &st) && st.st_uid == 7 && st.st_gid == 8);
}

int main(int argc, char **argv)
{
    setlinebuf(stdout);
    if (argc > 2 && !strcmp(argv[1], "readonly")) {
        CHECK("no write", open(argv[2], O_WRONLY) < 0 && errno == EROFS);
        CHECK("no new file", open("new", O_CREAT | O_WRONLY, 0644) < 0 && errno == EROFS);
        CHECK("no unlink", unlink(argv[2]) < 0 && errno == EROFS);
        CHECK("no directory", mkdir("d", 0755) < 0 && errno == EROFS);
        CHECK("no chmod", chmod(argv[2], 0) < 0 && errno == EROFS);
    } else if (argc > 2 && !strcmp(argv[1], "count")) {
        DIR *dir = opendir(argv[2]);
        int count = 0;

        while (dir && readdir(dir))
            count++;
        printf("%d entries\n", count);
    } else {
        names();
        contents();
        locks();
        directory();
        owner();
    }
    printf("%d failures\n", failures);
    return !!failures;
}
