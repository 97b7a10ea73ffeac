/* Preloaded into the command: a clock that jumps, a disk that never answers, a stage that ignores SIGTERM.
 *
 * The file named by FAULTS_SWITCHES holds the switches; the process that started the command changes them while it runs. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct switches {
    volatile long long clock_s; /* added to the time of day */
    volatile int hang;          /* a stage's writes never return */
    volatile int deaf;          /* a stage's handler of SIGTERM is not installed */
};

static struct switches none, *active = &none;
static int is_stage;

__attribute__((constructor)) static void read_switches(void) {
    const char *path = getenv("FAULTS_SWITCHES");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED) active = mapped;
    char words[4096] = "", name[] = "draftsmith.stages";
    fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, words, sizeof words);
    if (fd >= 0) close(fd);
    is_stage = length > 0 && memmem(words, (size_t)length, name, sizeof name) != NULL; /* the closing 0 included */
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += active->clock_s;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}

ssize_t write(int fd, const void *bytes, size_t count) {
    if (is_stage && active->hang) { /* like a write to a lost file server: only SIGKILL ends it */
        sigset_t all;
        sigfillset(&all);
        for (;;) {
            sigprocmask(SIG_BLOCK, &all, NULL);
            pause();
        }
    }
    return syscall(SYS_write, fd, bytes, count);
}

extern int __sigaction(int, const struct sigaction *, struct sigaction *); /* glibc's own name of it */

int sigaction(int number, const struct sigaction *wanted, struct sigaction *before) {
    struct sigaction ignored = {.sa_handler = SIG_IGN};
    int refused = wanted && number == SIGTERM && is_stage && active->deaf;
    return __sigaction(number, refused ? &ignored : wanted, before);
}
