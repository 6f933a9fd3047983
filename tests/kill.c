/* Kills a process at its n-th file operation below a folder. Preloaded, so that what SQLite and Rust write counts too;
   see killed_commands.py. Reading, and opening to read, changes nothing and does not count. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BEFORE, HALFWAY, AFTER };

static char root[PATH_MAX];
static long fatal, counted;
static int moment;

void kill_at(const char *folder, long operation, int when) {
    fatal = operation, moment = when, counted = 0;
    snprintf(root, sizeof root, "%s", folder);
}

long operations(void) { return counted; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Whether an operation is the fatal one. The file is that of the descriptor, or of a name, perhaps from its folder. */
static int hit(int descriptor, const char *name) {
    char link[64], place[PATH_MAX] = "";
    if (!*root) return 0;
    if (name && *name == '/')
        snprintf(place, sizeof place, "%s", name);
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        if (readlink(link, place, sizeof place - 1) < 0) return 0;
    }
    if (strncmp(place, root, strlen(root)) || __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST) != fatal) return 0;
    if (moment == BEFORE) die();
    return 1;
}

/* `half` is what a killed call has done by then; the whole, where it cannot be divided. */
#define COUNTED(type, name, parameters, descriptor, path, call, half) \
    type name parameters {                                            \
        static type(*real) parameters;                                \
        if (!real) real = dlsym(RTLD_NEXT, #name);                    \
        int fatal_one = hit(descriptor, path);                        \
        type result = fatal_one && moment == HALFWAY ? half : call;   \
        if (fatal_one) die();                                         \
        return result;                                                \
    }
#define WHOLE(name, parameters, descriptor, path, call) COUNTED(int, name, parameters, descriptor, path, call, call)
#define WRITES(name, parameters, ...)                                           \
    COUNTED(ssize_t, name, parameters, fd, NULL, real(fd, data, size __VA_ARGS__), \
            real(fd, data, size / 2 __VA_ARGS__))
#define OPENS(name, parameters, descriptor, ...)                                       \
    int name parameters {                                                              \
        static int(*real) parameters;                                                  \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                     \
        va_list rest;                                                                  \
        va_start(rest, flags);                                                         \
        int mode = va_arg(rest, int);                                                  \
        va_end(rest);                                                                  \
        int writes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);   \
        int fatal_one = writes && hit(descriptor, path);                               \
        int result = real(__VA_ARGS__);                                                \
        if (fatal_one) die();                                                          \
        return result;                                                                 \
    }

OPENS(open, (const char *path, int flags, ...), -1, path, flags, mode)
OPENS(open64, (const char *path, int flags, ...), -1, path, flags, mode)
OPENS(openat, (int fd, const char *path, int flags, ...), fd, fd, path, flags, mode)
OPENS(openat64, (int fd, const char *path, int flags, ...), fd, fd, path, flags, mode)
WRITES(write, (int fd, const void *data, size_t size))
WRITES(pwrite, (int fd, const void *data, size_t size, off_t offset), , offset)
WRITES(pwrite64, (int fd, const void *data, size_t size, off64_t offset), , offset)
WHOLE(fsync, (int fd), fd, NULL, real(fd))
WHOLE(fdatasync, (int fd), fd, NULL, real(fd))
WHOLE(ftruncate, (int fd, off_t size), fd, NULL, real(fd, size))
WHOLE(ftruncate64, (int fd, off64_t size), fd, NULL, real(fd, size))
WHOLE(rename, (const char *path, const char *to), -1, path, real(path, to))
WHOLE(unlink, (const char *path), -1, path, real(path))
WHOLE(unlinkat, (int fd, const char *path, int flags), fd, path, real(fd, path, flags))
WHOLE(rmdir, (const char *path), -1, path, real(path))
WHOLE(mkdir, (const char *path, mode_t mode), -1, path, real(path, mode))
WHOLE(chmod, (const char *path, mode_t mode), -1, path, real(path, mode))
