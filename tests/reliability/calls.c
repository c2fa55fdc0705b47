// File system calls under one folder, recorded or made to fail: a library to preload (LD_PRELOAD), driven by tests/reliability/calls.py.
//
// calls_record(fd): from now on write what changes names, and what is synced with its content, to a log: lines
// "OP\tINODE\tPATH\tSECOND PATH\tBYTES\n", each followed by so many bytes. calls_fail(n, error, kinds): the n-th call of these
// kinds from now on fails with errno `error`; -1 = a write of half; -2 = the process ends there. calls_count(): how many there were.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, OPEN = 4, RENAME = 8, LINK = 16, MKDIR = 32, ALLOCATE = 64, MMAP = 128, READ = 256, UNLINK = 512 };

static char root[PATH_MAX];
static size_t root_length;
static int log_fd = -1, fail_error, fail_kinds;
static long fail_at, count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))real(#name))
static void* real(const char* name) {
  void* found = dlsym(RTLD_NEXT, name);
  if (!found) abort();
  return found;
}

void calls_root(const char* path) {
  snprintf(root, sizeof root, "%s", path);
  root_length = strlen(root);
}
void calls_record(int fd) { log_fd = fd; }
void calls_fail(long nth, int error, int kinds) {
  count = 0;
  fail_error = error;
  fail_kinds = kinds;
  fail_at = nth;
}
long calls_count(void) { return __atomic_load_n(&count, __ATOMIC_SEQ_CST); }

static int under(const char* path) {
  return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

// The absolute path of a name beside a descriptor; 0 = not under the root.
static int resolve(int dir, const char* name, char* out) {
  if (!root_length || !name) return 0;
  if (name[0] == '/') {
    snprintf(out, PATH_MAX, "%s", name);
  } else {
    char base[PATH_MAX], link[64];
    ssize_t n;
    if (dir == AT_FDCWD) {
      if (!getcwd(base, sizeof base)) return 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
      if ((n = readlink(link, base, sizeof base - 1)) < 0) return 0;
      base[n] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) return 0;
  }
  return under(out);
}

static int path_of(int fd, char* out) {
  if (!root_length || fd < 0) return 0;
  const int saved = errno;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, out, PATH_MAX - 1);
  errno = saved;
  if (n < 0) return 0;
  out[n] = 0;
  return under(out);
}

// Whether this call is the one to fail; errno is set then. 2 = a short write.
static int fails(int kind) {
  if (!(fail_kinds & kind)) return 0;
  if (__atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) != fail_at) return 0;
  if (fail_error == -1) return 2;
  if (fail_error == -2) _exit(137);
  errno = fail_error;
  return 1;
}

static void put(const void* data, size_t size) {
  while (size) {
    const ssize_t n = REAL(write)(log_fd, data, size);
    if (n <= 0) abort();
    data = (const char*)data + n;
    size -= n;
  }
}

static void say(const char* op, unsigned long inode, const char* path, const char* second, const void* data, size_t size) {
  char line[3 * PATH_MAX];
  put(line, snprintf(line, sizeof line, "%s\t%lu\t%s\t%s\t%zu\n", op, inode, path, second, size));
  put(data, size);
}

void calls_mark(const char* text) {
  pthread_mutex_lock(&lock);
  if (log_fd >= 0) say("mark", 0, text, "", "", 0);
  pthread_mutex_unlock(&lock);
}

static unsigned long inode_at(const char* path) {
  struct stat info;
  const int saved = errno, found = fstatat(AT_FDCWD, path, &info, AT_SYMLINK_NOFOLLOW);
  errno = saved;
  return found == 0 ? info.st_ino : 0;
}

// What a descriptor holds now: a file's bytes, or a folder's names.
static void say_synced(int fd, const char* path) {
  struct stat info;
  if (fstat(fd, &info)) return;
  if (S_ISDIR(info.st_mode)) {
    say("syncdir", info.st_ino, path, "", "", 0);
    return;
  }
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const int again = REAL(open)(link, O_RDONLY | O_CLOEXEC);
  char* content = malloc(info.st_size + 1);
  size_t size = 0;
  ssize_t n;
  while (size < (size_t)info.st_size && (n = REAL(pread)(again, content + size, info.st_size - size, size)) > 0) size += n;
  REAL(close)(again);
  say("sync", info.st_ino, path, "", content, size);
  free(content);
}

// Opening, also of streams: created names are recorded, and cut files.
#define OPENED(path, dir, makes, cuts, call, failed)                                       \
  char full[PATH_MAX];                                                                     \
  if (!resolve(dir, path, full)) return call;                                              \
  if (fails(OPEN)) return failed;                                                          \
  pthread_mutex_lock(&lock);                                                               \
  const unsigned long before = log_fd >= 0 ? inode_at(full) : 0;                           \
  __typeof__(call) result = call;                                                          \
  if (log_fd >= 0 && result != failed && (makes) && !before) say("create", inode_at(full), full, "", "", 0); \
  if (log_fd >= 0 && result != failed && (cuts) && before) say("cut", before, full, "", "", 0);              \
  pthread_mutex_unlock(&lock);                                                             \
  return result;

#define MODE(flags)                       \
  mode_t mode = 0;                        \
  if ((flags) & (O_CREAT | O_TMPFILE)) {  \
    va_list list;                         \
    va_start(list, flags);                \
    mode = va_arg(list, mode_t);          \
    va_end(list);                         \
  }

int open(const char* path, int flags, ...) {
  MODE(flags)
  OPENED(path, AT_FDCWD, flags & O_CREAT, flags & O_TRUNC, REAL(open)(path, flags, mode), -1)
}
int open64(const char* path, int flags, ...) {
  MODE(flags)
  OPENED(path, AT_FDCWD, flags & O_CREAT, flags & O_TRUNC, REAL(open64)(path, flags, mode), -1)
}
int openat(int dir, const char* path, int flags, ...) {
  MODE(flags)
  OPENED(path, dir, flags & O_CREAT, flags & O_TRUNC, REAL(openat)(dir, path, flags, mode), -1)
}
int openat64(int dir, const char* path, int flags, ...) {
  MODE(flags)
  OPENED(path, dir, flags & O_CREAT, flags & O_TRUNC, REAL(openat64)(dir, path, flags, mode), -1)
}
FILE* fopen(const char* path, const char* how) {
  OPENED(path, AT_FDCWD, strpbrk(how, "wa"), strchr(how, 'w'), REAL(fopen)(path, how), NULL)
}
FILE* fopen64(const char* path, const char* how) {
  OPENED(path, AT_FDCWD, strpbrk(how, "wa"), strchr(how, 'w'), REAL(fopen64)(path, how), NULL)
}

#define ON_FD(fd, kind, call)                  \
  char full[PATH_MAX];                         \
  if (fail_kinds & (kind) && path_of(fd, full)) { \
    const int how = fails(kind);               \
    if (how == 1) return -1;                   \
    if (how == 2 && size > 1) size /= 2;       \
  }                                            \
  return call;

ssize_t write(int fd, const void* data, size_t size) { ON_FD(fd, WRITE, REAL(write)(fd, data, size)) }
ssize_t pwrite(int fd, const void* data, size_t size, off_t at) { ON_FD(fd, WRITE, REAL(pwrite)(fd, data, size, at)) }
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) { ON_FD(fd, WRITE, REAL(pwrite64)(fd, data, size, at)) }
ssize_t read(int fd, void* data, size_t size) { ON_FD(fd, READ, REAL(read)(fd, data, size)) }
ssize_t pread(int fd, void* data, size_t size, off_t at) { ON_FD(fd, READ, REAL(pread)(fd, data, size, at)) }
ssize_t pread64(int fd, void* data, size_t size, off64_t at) { ON_FD(fd, READ, REAL(pread64)(fd, data, size, at)) }
ssize_t writev(int fd, const struct iovec* parts, int size) { ON_FD(fd, WRITE, REAL(writev)(fd, parts, size)) }
int ftruncate(int fd, off_t size) { ON_FD(fd, ALLOCATE, REAL(ftruncate)(fd, size)) }
int ftruncate64(int fd, off64_t size) { ON_FD(fd, ALLOCATE, REAL(ftruncate64)(fd, size)) }

size_t fwrite(const void* data, size_t size, size_t items, FILE* stream) {
  char full[PATH_MAX];
  if (fail_kinds & WRITE && path_of(fileno(stream), full)) {
    const int how = fails(WRITE);
    if (how == 1) return 0;
    if (how == 2) return REAL(fwrite)(data, size, items / 2, stream);
  }
  return REAL(fwrite)(data, size, items, stream);
}
int posix_fallocate(int fd, off_t at, off_t size) {
  char full[PATH_MAX];
  if (fail_kinds & ALLOCATE && path_of(fd, full) && fails(ALLOCATE) == 1) return errno;
  return REAL(posix_fallocate)(fd, at, size);
}
int posix_fallocate64(int fd, off64_t at, off64_t size) {
  char full[PATH_MAX];
  if (fail_kinds & ALLOCATE && path_of(fd, full) && fails(ALLOCATE) == 1) return errno;
  return REAL(posix_fallocate64)(fd, at, size);
}
void* mmap(void* where, size_t size, int protection, int flags, int fd, off_t at) {
  char full[PATH_MAX];
  if (fail_kinds & MMAP && path_of(fd, full) && fails(MMAP) == 1) return MAP_FAILED;
  return REAL(mmap)(where, size, protection, flags, fd, at);
}
void* mmap64(void* where, size_t size, int protection, int flags, int fd, off64_t at) {
  char full[PATH_MAX];
  if (fail_kinds & MMAP && path_of(fd, full) && fails(MMAP) == 1) return MAP_FAILED;
  return REAL(mmap64)(where, size, protection, flags, fd, at);
}

static int synced(int fd, int (*call)(int)) {
  char full[PATH_MAX];
  if (!path_of(fd, full)) return call(fd);
  if (fails(SYNC)) return -1;
  pthread_mutex_lock(&lock);
  const int result = call(fd);
  if (log_fd >= 0 && result == 0) say_synced(fd, full);
  pthread_mutex_unlock(&lock);
  return result;
}
int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

// Names: one path, or two.
static int one(int kind, const char* op, int dir, const char* path, int (*call)(int, const char*, int), int value) {
  char full[PATH_MAX];
  if (!resolve(dir, path, full)) return call(dir, path, value);
  if (fails(kind)) return -1;
  pthread_mutex_lock(&lock);
  const int result = call(dir, path, value);
  if (log_fd >= 0 && result == 0) say(op, kind == MKDIR ? inode_at(full) : 0, full, "", "", 0);
  pthread_mutex_unlock(&lock);
  return result;
}
static int call_mkdirat(int dir, const char* path, int mode) { return REAL(mkdirat)(dir, path, mode); }
static int call_unlinkat(int dir, const char* path, int flags) { return REAL(unlinkat)(dir, path, flags); }
int mkdir(const char* path, mode_t mode) { return one(MKDIR, "mkdir", AT_FDCWD, path, call_mkdirat, mode); }
int mkdirat(int dir, const char* path, mode_t mode) { return one(MKDIR, "mkdir", dir, path, call_mkdirat, mode); }
int unlink(const char* path) { return one(UNLINK, "unlink", AT_FDCWD, path, call_unlinkat, 0); }
int rmdir(const char* path) { return one(UNLINK, "unlink", AT_FDCWD, path, call_unlinkat, AT_REMOVEDIR); }
int unlinkat(int dir, const char* path, int flags) { return one(UNLINK, "unlink", dir, path, call_unlinkat, flags); }
int remove(const char* path) {
  struct stat info;
  const int is_folder = !fstatat(AT_FDCWD, path, &info, AT_SYMLINK_NOFOLLOW) && S_ISDIR(info.st_mode);
  return is_folder ? rmdir(path) : unlink(path);
}

static int two(int kind, const char* op, int from_dir, const char* from, int to_dir, const char* to) {
  char source[PATH_MAX], target[PATH_MAX];
  const int is_ours = resolve(from_dir, from, source) & resolve(to_dir, to, target);
  if (is_ours && fails(kind)) return -1;
  pthread_mutex_lock(&lock);
  const int result = kind == RENAME ? REAL(renameat)(from_dir, from, to_dir, to) : REAL(linkat)(from_dir, from, to_dir, to, 0);
  if (is_ours && log_fd >= 0 && result == 0) say(op, 0, source, target, "", 0);
  pthread_mutex_unlock(&lock);
  return result;
}
int rename(const char* from, const char* to) { return two(RENAME, "rename", AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int a, const char* from, int b, const char* to) { return two(RENAME, "rename", a, from, b, to); }
int link(const char* from, const char* to) { return two(LINK, "link", AT_FDCWD, from, AT_FDCWD, to); }
int linkat(int a, const char* from, int b, const char* to, int flags) {
  (void)flags;
  return two(LINK, "link", a, from, b, to);
}
