// Counts the calls of this process that touch files below one folder, and lets one of them fail or kill the process.
// Build: cc -shared -fPIC -o faults.so faults.c -ldl

#include "calls.h"

enum { WRITES = 1, LOCKS = 2, ANY = 4 };  // kinds of calls

static volatile long count, at;
static volatile int error, kinds;
static char last[64];

// Fail the n-th call of these kinds from now on with an error of errno; 0: none. A negative error kills.
void faults_arm(const char *below, long n, int with, int of) {
    strncpy(folder, below, sizeof folder - 1);
    count = 0, at = n, error = with, kinds = of;
}
long faults_count(void) { return count; }
const char *faults_last(void) { return last; }

static int hit_one(const char *name, int kind) {
    if (!(kinds & (kind | ANY)) || __sync_add_and_fetch(&count, 1) != at) return 0;
    strncpy(last, name, sizeof last - 1);
    if (error < 0) kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}

static int hit(const char *name, int kind, const char *path) { return is_below(path) && hit_one(name, kind); }
static int hit_file(const char *name, int kind, int descriptor) { return is_file_below(descriptor) && hit_one(name, kind); }

#define OF_FILE(type, name, kind, arguments, given) \
    type name arguments { REAL(name); if (hit_file(#name, kind, descriptor)) return -1; return real given; }
#define OF_PATH(type, name, kind, arguments, given) \
    type name arguments { REAL(name); if (hit(#name, kind, path)) return -1; return real given; }

OF_FILE(ssize_t, read, ANY, (int descriptor, void *data, size_t size), (descriptor, data, size))
OF_FILE(ssize_t, pread64, ANY, (int descriptor, void *data, size_t size, off64_t place), (descriptor, data, size, place))
OF_FILE(ssize_t, preadv, ANY, (int descriptor, const struct iovec *parts, int n, off_t place), (descriptor, parts, n, place))
OF_FILE(ssize_t, preadv2, ANY, (int descriptor, const struct iovec *parts, int n, off_t place, int flags), (descriptor, parts, n, place, flags))
OF_FILE(ssize_t, preadv64v2, ANY, (int descriptor, const struct iovec *parts, int n, off64_t place, int flags), (descriptor, parts, n, place, flags))
OF_FILE(ssize_t, write, WRITES, (int descriptor, const void *data, size_t size), (descriptor, data, size))
OF_FILE(ssize_t, pwrite64, WRITES, (int descriptor, const void *data, size_t size, off64_t place), (descriptor, data, size, place))
OF_FILE(ssize_t, pwritev, WRITES, (int descriptor, const struct iovec *parts, int n, off_t place), (descriptor, parts, n, place))
OF_FILE(ssize_t, pwritev2, WRITES, (int descriptor, const struct iovec *parts, int n, off_t place, int flags), (descriptor, parts, n, place, flags))
OF_FILE(ssize_t, pwritev64v2, WRITES, (int descriptor, const struct iovec *parts, int n, off64_t place, int flags), (descriptor, parts, n, place, flags))
OF_FILE(int, fsync, WRITES, (int descriptor), (descriptor))
OF_FILE(int, fdatasync, WRITES, (int descriptor), (descriptor))
OF_FILE(int, ftruncate64, WRITES, (int descriptor, off64_t size), (descriptor, size))
OF_FILE(int, fchmod, ANY, (int descriptor, mode_t mode), (descriptor, mode))
OF_FILE(int, flock, LOCKS, (int descriptor, int operation), (descriptor, operation))
OF_PATH(int, unlink, ANY, (const char *path), (path))
OF_PATH(int, mkdir, WRITES, (const char *path, mode_t mode), (path, mode))
OF_PATH(int, rename, WRITES, (const char *path, const char *to), (path, to))
OF_PATH(int, link, WRITES, (const char *path, const char *to), (path, to))

int unlinkat(int in, const char *path, int flags) { REAL(unlinkat); return hit("unlinkat", ANY, path) ? -1 : real(in, path, flags); }
int renameat(int in, const char *path, int out, const char *to) { REAL(renameat); return hit("renameat", WRITES, path) ? -1 : real(in, path, out, to); }
int linkat(int in, const char *path, int out, const char *to, int flags) { REAL(linkat); return hit("linkat", WRITES, path) ? -1 : real(in, path, out, to, flags); }

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    REAL(open64);
    return hit("open64", flags & O_CREAT ? WRITES : ANY, path) ? -1 : real(path, flags, mode);
}

int fcntl64(int descriptor, int command, ...) {
    va_list more;
    va_start(more, command);
    void *given = va_arg(more, void *);
    va_end(more);
    REAL(fcntl64);
    int locks = command == F_SETLK || command == F_OFD_SETLK;
    return locks && hit_file("fcntl64", LOCKS, descriptor) ? -1 : real(descriptor, command, given);
}
