/* What would be on the disk if the power went now? A preload shim for tests; power.py builds it and reads what it keeps.
 *
 * POWER names folders, with ":" between them. For each, FOLDER.power holds what has been synced: one file for each inode,
 * with the bytes that its last fsync or fdatasync saw, and `log`, which tells of every change of a name:
 *
 *   C inode path        a file was made          D path              a folder was made
 *   U aside path        a name was removed       R aside old<tab>new a name was changed
 *   S path              the folder was synced: changes of names in it are on the disk from here on
 *
 * While FOLDER.power/full is there, its disk is full: no write there succeeds (ENOSPC).
 *
 * `aside` is where the synced bytes of the removed file are kept from then on, "-" if there are none. The real syncs are
 * left out, since nothing here needs the real disk. power_arm(n, torn) kills the process before its n-th operation from
 * then on; if that is a write and `torn` is set, half of it is done. Pages that are mapped are not seen: SQLite's -shm is
 * the only such file, and no power cut has to keep it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define DESCRIPTORS 65536
#define INODES 8192
#define ROOTS 16
#define ALL INT64_MAX
#define REAL(name) ((__typeof__(&name))real(#name))

static char roots[ROOTS][PATH_MAX];
static int root_count;
static long steps, kill_at;
static int is_torn;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct { char root; ino_t inode; } open_files[DESCRIPTORS]; /* root: its number from 1 on; 0 is none of ours */
static struct { ino_t inode; int64_t from, to; } unsynced[INODES]; /* of an inode that is not here: everything */

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

__attribute__((constructor)) static void begin(void) {
    char *names = getenv("POWER"), *rest = NULL;
    if (names == NULL) return;
    names = strdup(names);
    for (char *name = strtok_r(names, ":", &rest); name && root_count < ROOTS; name = strtok_r(NULL, ":", &rest))
        snprintf(roots[root_count++], PATH_MAX, "%s", name);
    free(names);
}

/* -- which files are ours -- */

static int root_of(const char *path) {
    for (int n = 0; n < root_count; n++) {
        size_t length = strlen(roots[n]);
        if (strncmp(path, roots[n], length) == 0 && (path[length] == '/' || path[length] == 0)) return n + 1;
    }
    return 0;
}

/* The whole name of a path, and the number of its root. */
static int find(int folder, const char *path, char *whole) {
    char base[PATH_MAX], link[64];
    ssize_t length;
    if (root_count == 0 || path == NULL) return 0;
    if (path[0] == '/') {
        snprintf(whole, PATH_MAX, "%s", path);
        return root_of(whole);
    }
    if (folder == AT_FDCWD) {
        if (getcwd(base, sizeof base) == NULL) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
    }
    if (snprintf(whole, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    return root_of(whole);
}

static int root_of_file(int fd, struct stat *found) {
    if (fd < 0 || fd >= DESCRIPTORS || open_files[fd].root == 0) return 0;
    if (fstat(fd, found) != 0 || found->st_ino != open_files[fd].inode) return 0; /* closed meanwhile: another's now */
    return open_files[fd].root;
}

/* -- what is kept -- */

static void kept_name(int root, const char *name, char *path) {
    if (snprintf(path, PATH_MAX, "%s.power/%s", roots[root - 1], name) >= PATH_MAX) abort();
}

static void tell(int root, const char *format, ...) {
    char path[PATH_MAX], line[3 * PATH_MAX];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    kept_name(root, "log", path);
    int fd = REAL(open64)(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || REAL(write)(fd, line, length) != length) abort();
    close(fd);
}

static void mark(ino_t inode, int64_t from, int64_t to) {
    size_t n = inode % INODES;
    if (unsynced[n].inode != inode) {
        unsynced[n].inode = inode;
        unsynced[n].from = 0;
        unsynced[n].to = ALL;
    } else {
        if (from < unsynced[n].from) unsynced[n].from = from;
        if (to > unsynced[n].to) unsynced[n].to = to;
    }
}

static void keep(int root, int fd, const struct stat *found) {
    char name[32], path[PATH_MAX], link[64], block[65536];
    struct stat kept;
    snprintf(name, sizeof name, "%llu", (unsigned long long)found->st_ino);
    kept_name(root, name, path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd); /* it may be open for writing alone */
    int from = REAL(open64)(link, O_RDONLY | O_CLOEXEC), to = REAL(open64)(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (from < 0 || to < 0 || fstat(to, &kept) != 0) abort();
    size_t n = found->st_ino % INODES;
    int is_known = unsynced[n].inode == found->st_ino;
    int64_t at = is_known ? unsynced[n].from : 0, end = is_known ? unsynced[n].to : ALL;
    if (kept.st_size < at) at = kept.st_size;
    if (kept.st_size < found->st_size || end > found->st_size) end = found->st_size;
    while (at < end) {
        ssize_t length = pread64(from, block, end - at < (int64_t)sizeof block ? end - at : (int64_t)sizeof block, at);
        if (length <= 0) break;
        if (REAL(pwrite64)(to, block, length, at) != length) abort();
        at += length;
    }
    if (REAL(ftruncate64)(to, found->st_size) != 0) abort();
    close(from);
    close(to);
    unsynced[n].inode = found->st_ino;
    unsynced[n].from = ALL;
    unsynced[n].to = 0;
}

/* A name goes: the synced bytes of its file make room for another file that gets the same inode. */
static void put_aside(int root, const char *path, char *aside) {
    static int count;
    struct stat found;
    char name[32], kept[PATH_MAX], target[PATH_MAX];
    strcpy(aside, "-");
    if (lstat(path, &found) != 0 || !S_ISREG(found.st_mode)) return;
    snprintf(name, sizeof name, "%llu", (unsigned long long)found.st_ino);
    kept_name(root, name, kept);
    snprintf(aside, 64, "gone-%d-%d", (int)getpid(), ++count);
    kept_name(root, aside, target);
    if (REAL(rename)(kept, target) != 0) strcpy(aside, "-");
    if (unsynced[found.st_ino % INODES].inode == found.st_ino) unsynced[found.st_ino % INODES].inode = 0;
}

static int is_full(int root) {
    char path[PATH_MAX];
    kept_name(root, "full", path);
    if (access(path, F_OK) != 0) return 0;
    errno = ENOSPC;
    return 1;
}

/* -- the end at a chosen moment -- */

void power_arm(long n, int torn) {
    steps = 0;
    kill_at = n;
    is_torn = torn;
}

long power_steps(void) { return steps; }

static void step(void) {
    if (++steps == kill_at) {
        kill(getpid(), SIGKILL);
        pause();
    }
}

static int tears(void) { return is_torn && steps + 1 == kill_at; }

/* -- the calls -- */

static int opened(int fd, int root, int flags, int existed, const char *path) {
    struct stat found;
    if (fd < 0 || fd >= DESCRIPTORS) return fd;
    open_files[fd].root = 0;
    if (root == 0 || fstat(fd, &found) != 0) return fd;
    open_files[fd].root = root;
    open_files[fd].inode = found.st_ino;
    if ((flags & O_CREAT) && !existed) {
        char name[32], kept[PATH_MAX];
        snprintf(name, sizeof name, "%llu", (unsigned long long)found.st_ino);
        kept_name(root, name, kept);
        REAL(unlink)(kept);
        tell(root, "C %s %s\n", name, path);
    }
    if ((flags & O_TRUNC) && S_ISREG(found.st_mode)) mark(found.st_ino, 0, ALL);
    return fd;
}

static int open_any(int folder, const char *path, int flags, mode_t mode) {
    char whole[PATH_MAX];
    int root = find(folder, path, whole);
    if (root == 0) return opened(REAL(openat64)(folder, path, flags, mode), 0, flags, 1, path);
    pthread_mutex_lock(&lock);
    int existed = access(whole, F_OK) == 0;
    if ((flags & (O_CREAT | O_TRUNC)) && (!existed || (flags & O_TRUNC))) step();
    int fd = opened(REAL(openat64)(folder, path, flags, mode), root, flags, existed, whole);
    pthread_mutex_unlock(&lock);
    return fd;
}

#define MODE(flags, mode)                                   \
    mode_t mode = 0;                                        \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                \
        va_list more;                                       \
        va_start(more, flags);                              \
        mode = va_arg(more, mode_t);                        \
        va_end(more);                                       \
    }

int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags, mode) return open_any(folder, path, flags, mode); }
int open(const char *path, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags, mode) return open_any(folder, path, flags, mode); }

ssize_t pwrite64(int fd, const void *content, size_t length, off64_t at) {
    struct stat found;
    int root = root_of_file(fd, &found);
    if (root == 0) return REAL(pwrite64)(fd, content, length, at);
    if (is_full(root)) return -1;
    pthread_mutex_lock(&lock);
    mark(found.st_ino, at, at + length);
    if (tears()) REAL(pwrite64)(fd, content, length / 2, at);
    step();
    ssize_t written = REAL(pwrite64)(fd, content, length, at);
    pthread_mutex_unlock(&lock);
    return written;
}

ssize_t write(int fd, const void *content, size_t length) {
    struct stat found;
    int root = root_of_file(fd, &found);
    if (root == 0) return REAL(write)(fd, content, length);
    if (is_full(root)) return -1;
    pthread_mutex_lock(&lock);
    if (tears()) REAL(write)(fd, content, length / 2);
    step();
    ssize_t written = REAL(write)(fd, content, length);
    int64_t end = lseek64(fd, 0, SEEK_CUR);
    if (written > 0) mark(found.st_ino, end - written, end);
    pthread_mutex_unlock(&lock);
    return written;
}

int ftruncate64(int fd, off64_t length) {
    struct stat found;
    if (root_of_file(fd, &found) == 0) return REAL(ftruncate64)(fd, length);
    pthread_mutex_lock(&lock);
    mark(found.st_ino, 0, ALL);
    step();
    int done = REAL(ftruncate64)(fd, length);
    pthread_mutex_unlock(&lock);
    return done;
}

static int sync_any(int fd, const char *name) {
    struct stat found;
    char link[64], path[PATH_MAX];
    int root = root_of_file(fd, &found);
    if (root == 0) return ((int (*)(int))real(name))(fd);
    pthread_mutex_lock(&lock);
    step();
    if (S_ISDIR(found.st_mode)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, path, sizeof path - 1);
        if (length < 0) abort();
        path[length] = 0;
        tell(root, "S %s\n", path);
    } else {
        keep(root, fd, &found);
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

int fsync(int fd) { return sync_any(fd, "fsync"); }
int fdatasync(int fd) { return sync_any(fd, "fdatasync"); }

int unlinkat(int folder, const char *path, int flags) {
    char whole[PATH_MAX], aside[64];
    int root = find(folder, path, whole);
    if (root == 0) return REAL(unlinkat)(folder, path, flags);
    pthread_mutex_lock(&lock);
    step();
    put_aside(root, whole, aside);
    int done = REAL(unlinkat)(folder, path, flags);
    if (done == 0) tell(root, "U %s %s\n", aside, whole);
    pthread_mutex_unlock(&lock);
    return done;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    char from[PATH_MAX], to[PATH_MAX], aside[64];
    int root = find(new_folder, new, to);
    if (root == 0 || find(old_folder, old, from) != root) return REAL(renameat)(old_folder, old, new_folder, new);
    pthread_mutex_lock(&lock);
    step();
    put_aside(root, to, aside);
    int done = REAL(renameat)(old_folder, old, new_folder, new);
    if (done == 0) tell(root, "R %s %s\t%s\n", aside, from, to);
    pthread_mutex_unlock(&lock);
    return done;
}

int rename(const char *old, const char *new) { return renameat(AT_FDCWD, old, AT_FDCWD, new); }

int mkdir(const char *path, mode_t mode) {
    char whole[PATH_MAX];
    int root = find(AT_FDCWD, path, whole);
    if (root == 0) return REAL(mkdir)(path, mode);
    pthread_mutex_lock(&lock);
    step();
    int done = REAL(mkdir)(path, mode);
    if (done == 0) tell(root, "D %s\n", whole);
    pthread_mutex_unlock(&lock);
    return done;
}
