/* A disk and a clock that fail on command, for benchmarks/faults.py; compiled there, preloaded.

   Every call that changes a file or folder below $FAULTS_UNDER is counted, in all processes
   together, in the shared file $FAULTS_STATE. The call whose number is asked for

     KILL     is not carried out: the process gets SIGKILL (of a write, the first half is written)
     GROUP    the same, for its whole process group
     FULL     fails with ENOSPC, and so do all that make or write something from there on
     CLOCK    is carried out, and from there on all clocks of the day are wrong by so many seconds

   With $FAULTS_NOLOCK set, flock() does nothing: the kernel's locks do not reach another machine. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, KILL, GROUP, FULL, CLOCK };
typedef struct { long count, at, what, seconds, reached; } State;

static State *state(void) {
    static State *found;
    const char *name = getenv("FAULTS_STATE");
    static char known[PATH_MAX];
    if (!name) return NULL;
    if (found && !strcmp(name, known)) return found;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, name, O_RDWR);
    if (fd < 0) return NULL;
    found = mmap(NULL, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    strncpy(known, name, PATH_MAX - 1);
    return found;
}

static int below(const char *path) {
    const char *top = getenv("FAULTS_UNDER");
    char whole[2 * PATH_MAX], here[PATH_MAX];
    if (!top || !path) return 0;
    if (path[0] != '/' && getcwd(here, sizeof here)) {
        snprintf(whole, sizeof whole, "%s/%s", here, path);
        path = whole;
    }
    return !strncmp(path, top, strlen(top));
}

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static void die(State *s) {
    kill(s->what == GROUP ? 0 : getpid(), SIGKILL);
    for (;;) pause();
}

static void told(const char *call, const char *path, long number) {
    const char *name = getenv("FAULTS_LOG");
    if (!name) return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (fd >= 0) dprintf(fd, "%ld %s %s\n", number, call, path), close(fd);
}

/* 0: carry it out; 1: it fails, errno is set; 2: write half, then die */
static int fault(const char *call, const char *path, int makes) {
    State *s = state();
    if (!s) return 0;
    long number = __atomic_add_fetch(&s->count, 1, __ATOMIC_SEQ_CST);
    told(call, path, number);
    if (number == s->at) s->reached = 1;
    if (number == s->at && (s->what == KILL || s->what == GROUP)) {
        if (makes == 2) return 2;
        die(s);
    }
    if (s->what == FULL && s->at && number >= s->at && makes) return errno = ENOSPC, 1;
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGE(name, type, makes, shown, test, declared, ...)                                      \
    type name declared {                                                                           \
        static __typeof__(&name) real;                                                             \
        if (!real) real = REAL(name);                                                              \
        if ((test) && fault(#name, shown, makes)) return (type)-1;                                 \
        return real(__VA_ARGS__);                                                                  \
    }

CHANGE(rename, int, 0, b, below(a) || below(b), (const char *a, const char *b), a, b)
CHANGE(renameat, int, 0, b, below(a) || below(b), (int x, const char *a, int y, const char *b), x, a, y, b)
CHANGE(unlink, int, 0, a, below(a), (const char *a), a)
CHANGE(unlinkat, int, 0, a, below(a) || below_fd(x), (int x, const char *a, int f), x, a, f)
CHANGE(rmdir, int, 0, a, below(a), (const char *a), a)
CHANGE(mkdir, int, 1, a, below(a), (const char *a, mode_t m), a, m)
CHANGE(mkdirat, int, 1, a, below(a), (int x, const char *a, mode_t m), x, a, m)
CHANGE(symlink, int, 1, b, below(b), (const char *a, const char *b), a, b)
CHANGE(link, int, 1, b, below(b), (const char *a, const char *b), a, b)
CHANGE(ftruncate, int, 0, "(fd)", below_fd(f), (int f, off_t n), f, n)
CHANGE(ftruncate64, int, 0, "(fd)", below_fd(f), (int f, off_t n), f, n)
CHANGE(truncate, int, 0, a, below(a), (const char *a, off_t n), a, n)
CHANGE(fsync, int, 0, "(fd)", below_fd(f), (int f), f)

static int opens(const char *call, const char *path, int flags) {
    if (!(flags & (O_CREAT | O_TRUNC)) || !below(path)) return 0;
    return fault(call, path, 1);
}

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        static __typeof__(&name) real;                                                             \
        if (!real) real = REAL(name);                                                              \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                    \
        va_end(more);                                                                              \
        return opens(#name, path, flags) ? -1 : real(path, flags, mode);                           \
    }
#define OPENAT(name)                                                                               \
    int name(int at, const char *path, int flags, ...) {                                           \
        static __typeof__(&name) real;                                                             \
        if (!real) real = REAL(name);                                                              \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                    \
        va_end(more);                                                                              \
        return opens(#name, path, flags) ? -1 : real(at, path, flags, mode);                       \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                                \
    FILE *name(const char *path, const char *mode) {                                               \
        static __typeof__(&name) real;                                                             \
        if (!real) real = REAL(name);                                                              \
        if (strpbrk(mode, "wa") && below(path) && fault(#name, path, 1)) return NULL;              \
        return real(path, mode);                                                                   \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *bytes, size_t size) {
    static __typeof__(&write) real;
    if (!real) real = REAL(write);
    int what = below_fd(fd) ? fault("write", "(fd)", 2) : 0;
    if (what == 2) real(fd, bytes, size / 2), die(state());
    return what ? -1 : real(fd, bytes, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    static __typeof__(&writev) real;
    if (!real) real = REAL(writev);
    int what = below_fd(fd) ? fault("writev", "(fd)", 2) : 0;
    if (what == 2) real(fd, parts, count / 2), die(state());
    return what ? -1 : real(fd, parts, count);
}

int flock(int fd, int operation) {
    static __typeof__(&flock) real;
    if (!real) real = REAL(flock);
    return getenv("FAULTS_NOLOCK") && below_fd(fd) ? 0 : real(fd, operation);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static __typeof__(&clock_gettime) real;
    if (!real) real = REAL(clock_gettime);
    int result = real(clock, now);
    State *s = clock == CLOCK_REALTIME ? state() : NULL;
    if (s && s->what == CLOCK && s->at && s->count >= s->at) now->tv_sec += s->seconds;
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec t;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &t);
    now->tv_sec = t.tv_sec, now->tv_usec = t.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
