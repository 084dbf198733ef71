/*
 * A library to be preloaded into a server: while the file FULL_DISK_FLAG is there, nothing can be written to files below
 * the directory FULL_DISK_ROOT, as on a disk that is full (pg_test/harness/full_disk.py, which also compiles this).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* Whether a write to the descriptor finds no room; errno says so. */
static int is_full(int fd) {
    char link[64], path[PATH_MAX];
    const char *root = getenv("FULL_DISK_ROOT"), *flag = getenv("FULL_DISK_FLAG");
    int saved = errno;
    if (!root || !flag || access(flag, F_OK) != 0) {
        errno = saved;
        return 0;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    size_t length = strlen(root);
    int full = !strncmp(path, root, length) && path[length] == '/';
    errno = full ? ENOSPC : saved;
    return full;
}

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(write);
    return is_full(fd) ? -1 : real(fd, bytes, count);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return is_full(fd) ? -1 : real(fd, parts, count);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t at) {
    REAL(pwrite);
    return is_full(fd) ? -1 : real(fd, bytes, count, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) {
    REAL(pwrite64);
    return is_full(fd) ? -1 : real(fd, bytes, count, at);
}
