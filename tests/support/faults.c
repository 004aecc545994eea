/* Faults of the machine below one process: its disk returns EIO in one folder, its wall clock is wrong.
 *
 * Loaded before the C library (LD_PRELOAD) and without effect until `faults_follow` names a file with a
 * `struct control`, which the test changes while the process runs. Monotonic clocks are left alone.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { READS = 1, WRITES = 2 };

struct control {
  int64_t ahead_ns;    /* added to the wall clock */
  uint32_t broken;     /* READS, WRITES */
  uint32_t num_failed; /* calls that failed by it */
  char folder[PATH_MAX];
};

static struct control idle;
static struct control *volatile control = &idle;

int faults_follow(const char *path) {
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return -1;
  void *shared = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (shared == MAP_FAILED) return -1;
  control = shared;
  return 0;
}

static int is_inside(const char *path) {
  size_t length = strlen(control->folder);
  return length && !strncmp(path, control->folder, length) && (!path[length] || path[length] == '/');
}

static int fails(uint32_t how) {
  __atomic_add_fetch(&control->num_failed, 1, __ATOMIC_RELAXED);
  errno = EIO;
  return how != 0;
}

static int fails_at(uint32_t how, const char *path) {
  return (control->broken & how) && path && is_inside(path) && fails(how);
}

static int fails_on(uint32_t how, int fd) {
  char link[64], path[PATH_MAX];
  if (!(control->broken & how) || fd < 0) return 0;
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return 0;
  path[length] = 0;
  return is_inside(path) && fails(how);
}

#define REAL(result, name, ...)                          \
  static result (*real)(__VA_ARGS__);                    \
  if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define MODE                       \
  mode_t mode = 0;                 \
  if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) { \
    va_list rest;                  \
    va_start(rest, flags);         \
    mode = va_arg(rest, mode_t);   \
    va_end(rest);                  \
  }

static uint32_t kind(int flags) { return (flags & O_ACCMODE) == O_RDONLY ? READS : WRITES; }

#define OPEN(name)                                      \
  int name(const char *path, int flags, ...) {          \
    MODE                                                \
    REAL(int, #name, const char *, int, mode_t);        \
    return fails_at(kind(flags), path) ? -1 : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                    \
  int name(int at, const char *path, int flags, ...) {  \
    MODE                                                \
    REAL(int, #name, int, const char *, int, mode_t);   \
    return fails_at(kind(flags), path) ? -1 : real(at, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

DIR *opendir(const char *path) {
  REAL(DIR *, "opendir", const char *);
  return fails_at(READS, path) ? NULL : real(path);
}

ssize_t read(int fd, void *into, size_t size) {
  REAL(ssize_t, "read", int, void *, size_t);
  return fails_on(READS, fd) ? -1 : real(fd, into, size);
}

#define PREAD(name)                                          \
  ssize_t name(int fd, void *into, size_t size, off_t at) {  \
    REAL(ssize_t, #name, int, void *, size_t, off_t);        \
    return fails_on(READS, fd) ? -1 : real(fd, into, size, at); \
  }
PREAD(pread)
PREAD(pread64)

#define MMAP(name)                                                                     \
  void *name(void *place, size_t size, int protection, int flags, int fd, off_t at) {  \
    REAL(void *, #name, void *, size_t, int, int, int, off_t);                         \
    return fails_on(READS, fd) ? MAP_FAILED : real(place, size, protection, flags, fd, at); \
  }
MMAP(mmap)
MMAP(mmap64)

ssize_t write(int fd, const void *from, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t);
  return fails_on(WRITES, fd) ? -1 : real(fd, from, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int);
  return fails_on(WRITES, fd) ? -1 : real(fd, parts, count);
}

#define SYNC(name)                              \
  int name(int fd) {                            \
    REAL(int, #name, int);                      \
    return fails_on(WRITES, fd) ? -1 : real(fd); \
  }
SYNC(fsync)
SYNC(fdatasync)
SYNC(syncfs)

int link(const char *from, const char *to) {
  REAL(int, "link", const char *, const char *);
  return fails_at(WRITES, to) ? -1 : real(from, to);
}

int linkat(int at, const char *from, int at_too, const char *to, int flags) {
  REAL(int, "linkat", int, const char *, int, const char *, int);
  return fails_at(WRITES, to) ? -1 : real(at, from, at_too, to, flags);
}

#define SECOND 1000000000LL

int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(int, "clock_gettime", clockid_t, struct timespec *);
  int result = real(clock, now);
  if (!result && control->ahead_ns && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    int64_t moved = now->tv_sec * SECOND + now->tv_nsec + control->ahead_ns;
    now->tv_sec = moved / SECOND;
    now->tv_nsec = moved % SECOND;
  }
  return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  (void)zone;
  struct timespec exact;
  int result = clock_gettime(CLOCK_REALTIME, &exact);
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return result;
}

time_t time(time_t *into) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (into) *into = exact.tv_sec;
  return exact.tv_sec;
}
