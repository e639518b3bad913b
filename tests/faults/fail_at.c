/* Fails or kills at the n-th operation on files below a folder: preloaded by harness.py, which arms it in a child.
   Processes that the child forks count with it; a kill is of the one process, or of its group. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL_BEFORE, KILL_IN_THE_MIDDLE, DISK_FULL, ERROR_ONCE };
static char folder[PATH_MAX];
static long number = -1, *count = 0;
static int mode = 0, whole_group = 0;

void fail_at(const char *below, long at, int how, int kills_group) {
    count = mmap(0, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    number = at, mode = how, whole_group = kills_group;
    strncpy(folder, below, sizeof folder - 1);
}
void disarm(void) { number = -1; }
long operations(void) { return *count; }
static void die(void) { kill(whole_group ? 0 : getpid(), SIGKILL); }

static int is_below(const char *path) { return folder[0] && !strncmp(path, folder, strlen(folder)); }

static int names_below(int at, const char *path) {
    char link[64], base[PATH_MAX];
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') return is_below(path);
    if (at == AT_FDCWD) return getcwd(base, sizeof base) && is_below(base);
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, base, sizeof base - 1);
    return length > 0 && (base[length] = 0, is_below(base));
}

static int opens_below(int file) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    return length > 0 && (path[length] = 0, is_below(path));
}

/* 0: go on as usual; 1: fail; 2: do half of it, then die. */
static int next_operation(int makes_room) {
    long now = __atomic_fetch_add(count, 1, __ATOMIC_SEQ_CST);
    if (number < 0 || now < number) return 0;
    if (mode == DISK_FULL && !makes_room) return errno = ENOSPC, 1;
    if (now > number) return 0;
    if (mode == KILL_BEFORE) die();
    if (mode == ERROR_ONCE) return errno = EIO, 1;
    return mode == KILL_IN_THE_MIDDLE ? 2 : 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) {
    int what = opens_below(file) ? next_operation(0) : 0;
    if (what == 1) return -1;
    if (what == 2) { REAL(write)(file, data, size / 2); die(); }
    return REAL(write)(file, data, size);
}
ssize_t writev(int file, const struct iovec *parts, int num) {
    int what = opens_below(file) ? next_operation(0) : 0;
    if (what == 1) return -1;
    if (what == 2) { REAL(writev)(file, parts, num / 2); die(); }
    return REAL(writev)(file, parts, num);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    int what = opens_below(file) ? next_operation(0) : 0;
    if (what == 1) return -1;
    if (what == 2) { REAL(pwrite64)(file, data, size / 2, at); die(); }
    return REAL(pwrite64)(file, data, size, at);
}

#define WHOLE(is_ours, makes_room, call)                  \
    int what = (is_ours) ? next_operation(makes_room) : 0; \
    if (what == 1) return -1;                              \
    int result = call;                                     \
    if (what == 2) die();                                    \
    return result;

int fsync(int file) { WHOLE(opens_below(file), 0, REAL(fsync)(file)) }
int fdatasync(int file) { WHOLE(opens_below(file), 0, REAL(fdatasync)(file)) }
int rename(const char *old, const char *new) { WHOLE(names_below(AT_FDCWD, new), 0, REAL(rename)(old, new)) }
int renameat(int a, const char *old, int b, const char *new) { WHOLE(names_below(b, new), 0, REAL(renameat)(a, old, b, new)) }
int unlink(const char *path) { WHOLE(names_below(AT_FDCWD, path), 1, REAL(unlink)(path)) }
int unlinkat(int at, const char *path, int flags) { WHOLE(names_below(at, path), 1, REAL(unlinkat)(at, path, flags)) }
int rmdir(const char *path) { WHOLE(names_below(AT_FDCWD, path), 1, REAL(rmdir)(path)) }
int mkdir(const char *path, mode_t how) { WHOLE(names_below(AT_FDCWD, path), 0, REAL(mkdir)(path, how)) }
