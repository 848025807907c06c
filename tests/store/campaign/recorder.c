// Writes down every call that changes files below one folder, with its data and in its order, and kills the process at
// one of them if asked. What it can't write down ends the process. Build: cc -shared -fPIC -o recorder.so recorder.c -ldl

#include "calls.h"
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;  // a call and its record are one step
static int written_to = -1;
static long count, at;

struct __attribute__((packed)) record {  // disk.py reads it
    char kind;
    uint64_t inode, place, size;
    uint32_t path_size, to_size, data_size;
};

static void put(const void *data, size_t size) {
    if (syscall(SYS_write, written_to, data, size) != (long)size) abort();
}

static void put_record(char kind, uint64_t inode, uint64_t place, uint64_t size, const char *path, const char *to, uint32_t data) {
    struct record head = {kind, inode, place, size, strlen(path), strlen(to), data};
    put(&head, sizeof head), put(path, head.path_size), put(to, head.to_size);
}

// From now on write down what is below a folder, behind what the file at `log` has; and kill at the n-th call, 0: never.
void recorder_begin(const char *below, const char *log, long n) {
    if (written_to >= 0) close(written_to);
    written_to = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (written_to < 0) abort();
    count = 0, at = n;
    strncpy(folder, below, sizeof folder - 1);
}

// Write down what the process has just acknowledged, or begins.
void recorder_say(const char *text) {
    pthread_mutex_lock(&turn);
    put_record('n', 0, 0, 0, text, "", 0);
    pthread_mutex_unlock(&turn);
}

static void begin(void) {
    pthread_mutex_lock(&turn);
    if (++count == at) kill(getpid(), SIGKILL);
}

static long end(long result) {
    int kept = errno;
    pthread_mutex_unlock(&turn);
    errno = kept;
    return result;
}

static uint64_t inode_of(int descriptor) {
    struct stat status;
    if (fstat(descriptor, &status)) abort();
    return status.st_ino;
}

static void put_write(int descriptor, off_t place, const struct iovec *parts, int n, ssize_t size) {
    if (size <= 0) return;
    put_record('w', inode_of(descriptor), place, size, "", "", size);
    for (int i = 0; i < n && size > 0; i++) {
        size_t part = parts[i].iov_len < (size_t)size ? parts[i].iov_len : (size_t)size;
        put(parts[i].iov_base, part);
        size -= part;
    }
}

#define WRITE(name, arguments, given, place, parts, n) \
    ssize_t name arguments { \
        REAL(name); \
        if (!is_file_below(descriptor)) return real given; \
        begin(); \
        ssize_t size = real given; \
        put_write(descriptor, place, parts, n, size); \
        return end(size); \
    }

WRITE(pwrite64, (int descriptor, const void *data, size_t size_, off64_t at_), (descriptor, data, size_, at_), at_, (&(struct iovec){(void *)data, size_}), 1)
WRITE(pwritev, (int descriptor, const struct iovec *parts, int n, off_t at_), (descriptor, parts, n, at_), at_, parts, n)
WRITE(pwritev2, (int descriptor, const struct iovec *parts, int n, off_t at_, int flags), (descriptor, parts, n, at_, flags), at_, parts, n)
WRITE(pwritev64v2, (int descriptor, const struct iovec *parts, int n, off64_t at_, int flags), (descriptor, parts, n, at_, flags), at_, parts, n)
WRITE(write, (int descriptor, const void *data, size_t size_), (descriptor, data, size_), lseek(descriptor, 0, SEEK_CUR) - size, (&(struct iovec){(void *)data, size_}), 1)

#define OF_FILE(kind, name, arguments, given, size) \
    int name arguments { \
        REAL(name); \
        if (!is_file_below(descriptor)) return real given; \
        begin(); \
        int result = real given; \
        if (!result) put_record(kind, inode_of(descriptor), 0, size, "", "", 0); \
        return end(result); \
    }
#define OF_PATH(kind, name, arguments, given, to) \
    int name arguments { \
        REAL(name); \
        if (!is_below(path)) return real given; \
        begin(); \
        int result = real given; \
        if (!result) put_record(kind, 0, 0, 0, path, to, 0); \
        return end(result); \
    }

OF_FILE('s', fsync, (int descriptor), (descriptor), 0)
OF_FILE('s', fdatasync, (int descriptor), (descriptor), 0)
OF_FILE('t', ftruncate64, (int descriptor, off64_t size), (descriptor, size), size)
/* It makes the reserve, from its start. Python calls it by one of its two names. */
OF_FILE('t', posix_fallocate64, (int descriptor, off64_t from, off64_t size), (descriptor, from, size), size)
OF_FILE('t', posix_fallocate, (int descriptor, off_t from, off_t size), (descriptor, from, size), size)
OF_PATH('r', rename, (const char *path, const char *to), (path, to), to)
OF_PATH('l', link, (const char *path, const char *to), (path, to), to)
OF_PATH('u', unlink, (const char *path), (path), "")

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (!is_below(path)) return real(path, mode);
    begin();
    int result = real(path, mode);
    struct stat status;
    if (!result && stat(path, &status)) abort();
    if (!result) put_record('d', status.st_ino, 0, 0, path, "", 0);
    return end(result);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    REAL(open64);
    if (!(flags & (O_CREAT | O_TRUNC)) || !is_below(path)) return real(path, flags, mode);
    if (flags & (O_TRUNC | O_APPEND)) abort();
    begin();
    int descriptor = real(path, flags, mode);
    if (descriptor >= 0) put_record('c', inode_of(descriptor), 0, 0, path, "", 0);
    return end(descriptor);
}

// Ways to change files that no store takes.
#define REFUSED(type, name, arguments, given) \
    type name arguments { REAL(name); if (is_below(path)) abort(); return real given; }
REFUSED(int, rmdir, (const char *path), (path))
REFUSED(int, symlink, (const char *to, const char *path), (to, path))
REFUSED(int, truncate64, (const char *path, off64_t size), (path, size))
REFUSED(int, unlinkat, (int in, const char *path, int flags), (in, path, flags))
REFUSED(int, renameat, (int in, const char *path, int out, const char *to), (in, path, out, to))
REFUSED(int, linkat, (int in, const char *path, int out, const char *to, int flags), (in, path, out, to, flags))
REFUSED(int, mkdirat, (int in, const char *path, mode_t mode), (in, path, mode))
