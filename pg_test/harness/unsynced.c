/*
 * A library to be preloaded into a server: notes what happens to files below one directory, so that afterwards all that
 * was not fsynced can be taken back, as a power cut would (pg_test/harness/unsynced.py, which also compiles this).
 *
 * Each line of the journal is one operation that has succeeded: its letter and, separated by tabs, its parts.
 *   C path inode          a file was made
 *   L path                a name was given by link
 *   R old new [grave]     a rename; what was under the new name lies in the grave
 *   U path grave          a name was removed; its file lies in the grave
 *   M path                a directory was made
 *   F inode size          the file's bytes up to its size were fsynced
 *   S path                the directory was fsynced
 * An operation cut off before its line is written counts as one that reached the disk, which is a possible outcome too.
 *
 * UNSYNCED_ROOT: the directory. UNSYNCED_JOURNAL: the journal. UNSYNCED_GRAVES: a directory of the same file system.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static const char *root(void) { return getenv("UNSYNCED_ROOT"); }

/* Relative paths are those of the server's own files: storages are named by absolute ones. */
static int below(const char *path) {
    const char *dir = root();
    size_t n = dir ? strlen(dir) : 0;
    return n && path && !strncmp(path, dir, n) && (path[n] == '/' || path[n] == 0);
}

static void note(const char *format, ...) {
    char line[3 * PATH_MAX];
    va_list args;
    int saved = errno;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    const char *journal = getenv("UNSYNCED_JOURNAL");
    int fd = journal ? (int)syscall(SYS_openat, AT_FDCWD, journal, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
    if (fd >= 0) {
        if (syscall(SYS_write, fd, line, n) != n) abort();
        syscall(SYS_close, fd);
    }
    errno = saved;
}

/* Keeps a file under another name; an empty text if there is none. */
static void bury(const char *path, char *grave, size_t size) {
    static atomic_ulong count;
    struct timespec now;
    struct stat found;
    grave[0] = 0;
    if (lstat(path, &found) != 0 || !S_ISREG(found.st_mode)) return;
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(grave, size, "%s/%d-%ld-%lu", getenv("UNSYNCED_GRAVES"), (int)getpid(), now.tv_nsec, count++);
    if (syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, grave, 0) != 0) grave[0] = 0;
}

static int opened(int fd, const char *path, int existed) {
    struct stat found;
    if (fd >= 0 && !existed && fstat(fd, &found) == 0) note("C\t%s\t%lu\n", path, (unsigned long)found.st_ino);
    return fd;
}

static int exists(const char *path) {
    struct stat found;
    return lstat(path, &found) == 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); } \
        if (!(flags & O_CREAT) || !below(path)) return real(path, flags, mode); \
        int existed = exists(path); \
        return opened(real(path, flags, mode), path, existed); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); } \
        if (!(flags & O_CREAT) || !below(path)) return real(at, path, flags, mode); \
        int existed = exists(path); \
        return opened(real(at, path, flags, mode), path, existed); \
    }
OPENAT(openat)
OPENAT(openat64)

int link(const char *from, const char *to) {
    REAL(link);
    int done = real(from, to);
    if (done == 0 && below(to)) note("L\t%s\n", to);
    return done;
}

int linkat(int at, const char *from, int to_at, const char *to, int flags) {
    REAL(linkat);
    int done = real(at, from, to_at, to, flags);
    if (done == 0 && below(to)) note("L\t%s\n", to);
    return done;
}

int rename(const char *from, const char *to) {
    REAL(rename);
    if (!below(to)) return real(from, to);
    char grave[PATH_MAX];
    bury(to, grave, sizeof grave);
    int done = real(from, to);
    if (done == 0) note("R\t%s\t%s\t%s\n", from, to, grave);
    return done;
}

static int removed(int done, const char *path, const char *grave) {
    if (done == 0 && grave[0]) note("U\t%s\t%s\n", path, grave);
    return done;
}

int unlink(const char *path) {
    REAL(unlink);
    if (!below(path)) return real(path);
    char grave[PATH_MAX];
    bury(path, grave, sizeof grave);
    return removed(real(path), path, grave);
}

int unlinkat(int at, const char *path, int flags) {
    REAL(unlinkat);
    if (flags || !below(path)) return real(at, path, flags);
    char grave[PATH_MAX];
    bury(path, grave, sizeof grave);
    return removed(real(at, path, flags), path, grave);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    int done = real(path, mode);
    if (done == 0 && below(path)) note("M\t%s\n", path);
    return done;
}

static int synced(int done, int fd) {
    char link[64], path[PATH_MAX];
    struct stat found;
    if (done != 0) return done;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return done;
    path[n] = 0;
    if (!below(path) || fstat(fd, &found) != 0) return done;
    if (S_ISDIR(found.st_mode)) note("S\t%s\n", path);
    else note("F\t%lu\t%lu\n", (unsigned long)found.st_ino, (unsigned long)found.st_size);
    return done;
}

int fsync(int fd) {
    REAL(fsync);
    return synced(real(fd), fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    return synced(real(fd), fd);
}
