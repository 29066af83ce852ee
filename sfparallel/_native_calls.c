/*
 * System calls that Python 3.11 has no wrapper for, and the start of child processes that die with this one.
 * Every function returns -errno on failure, prints nothing and keeps no state.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* unshare(2). */
static int sf_unshare(int flags)
{
    return unshare(flags) == 0 ? 0 : -errno;
}

/* setns(2): moves the calling thread alone. */
static int sf_setns(int fd, int type)
{
    return setns(fd, type) == 0 ? 0 : -errno;
}

/* mount(2); every string may be NULL where the system call allows it. */
static int sf_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
    return mount(source, target, type, flags, data) == 0 ? 0 : -errno;
}

/* umount2(2). */
static int sf_umount(const char *target, int flags)
{
    return umount2(target, flags) == 0 ? 0 : -errno;
}

/* prctl(PR_SET_CHILD_SUBREAPER): orphaned descendants become children of this process. */
static int sf_subreaper(int on)
{
    return prctl(PR_SET_CHILD_SUBREAPER, on, 0, 0, 0) == 0 ? 0 : -errno;
}

/* prctl(PR_SET_PDEATHSIG); 0 clears it. */
static int sf_death_signal(int signal_number)
{
    return prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) == 0 ? 0 : -errno;
}

/* What a child of sf_spawn is to become. The caller owns all of it, and it stays valid until sf_spawn returns. */
struct sf_child {
    const char *program;   /* absolute path */
    char *const *argv;     /* NULL-terminated */
    char *const *envp;     /* NULL-terminated */
    const int *sources;    /* descriptors of this process ... */
    const int *targets;    /* ... and the numbers that they get in the child; each number once; all others are closed */
    int *spare;            /* room for n_fds numbers, overwritten */
    int n_fds;
    int death_signal;      /* sent to the child when the *thread* that called sf_spawn ends; 0 for none */
    int failed_step;       /* written on failure: one of SF_STEP_* */
};

enum { SF_STEP_NONE, SF_STEP_SIGNALS, SF_STEP_PDEATHSIG, SF_STEP_PARENT, SF_STEP_SETSID, SF_STEP_DUP, SF_STEP_EXEC, SF_STEP_VFORK };

/*
 * Signal handlers of this process must not run in the child, which shares its memory until it calls execve: back to the default
 * before signals are let in again. Python ignores SIGPIPE and SIGXFSZ, and an ignored signal stays ignored across execve.
 */
static void reset_signals(void)
{
    for (int number = 1; number < NSIG; number++) {
        struct sigaction action;

        if (sigaction(number, NULL, &action) != 0)
            continue;
        int handled = action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN;
        if (!handled && number != SIGPIPE && number != SIGXFSZ)
            continue;
        memset(&action, 0, sizeof action);
        action.sa_handler = SIG_DFL;
        (void)sigaction(number, &action, NULL);
    }
}

/*
 * Sources and targets may overlap in any way, so every source first moves above the highest target. Descriptors that some
 * library opened without FD_CLOEXEC would live on in the child (and keep a tap alive after its owner): close_range marks
 * them all (Linux 5.11), dup2 then clears the mark on the targets.
 */
static int place_descriptors(struct sf_child *child)
{
    int above = 3;

    for (int i = 0; i < child->n_fds; i++)
        if (child->targets[i] >= above)
            above = child->targets[i] + 1;
    for (int i = 0; i < child->n_fds; i++) {
        child->spare[i] = fcntl(child->sources[i], F_DUPFD_CLOEXEC, above);
        if (child->spare[i] < 0)
            return -errno;
    }
    if (syscall(SYS_close_range, 0U, ~0U, CLOSE_RANGE_CLOEXEC) != 0)
        return -errno;
    for (int i = 0; i < child->n_fds; i++)
        if (dup2(child->spare[i], child->targets[i]) < 0)
            return -errno;
    return 0;
}

/* Runs in the child, on the memory and the stack of the caller. Returns only on failure, with -errno. */
static int become(struct sf_child *child, pid_t parent)
{
    int status;
    sigset_t none;

    reset_signals();
    child->failed_step = SF_STEP_SIGNALS;
    sigemptyset(&none);
    if (sigprocmask(SIG_SETMASK, &none, NULL) != 0)
        return -errno;
    child->failed_step = SF_STEP_PDEATHSIG;
    if (prctl(PR_SET_PDEATHSIG, child->death_signal, 0, 0, 0) != 0)
        return -errno;
    /* The parent may have been killed before prctl: then the signal will never come. */
    child->failed_step = SF_STEP_PARENT;
    if (child->death_signal != 0 && getppid() != parent)
        return -ESRCH;
    /* A session of its own: Ctrl-C on the terminal is for the supervisor, not for its VMs. */
    child->failed_step = SF_STEP_SETSID;
    if (setsid() < 0)
        return -errno;
    child->failed_step = SF_STEP_DUP;
    status = place_descriptors(child);
    if (status < 0)
        return status;
    child->failed_step = SF_STEP_EXEC;
    execve(child->program, child->argv, child->envp);
    return -errno;
}

/*
 * Starts a program; returns its pid, or -errno with child->failed_step set (then there is no child to wait for).
 * vfork, because a fork would copy the page tables of a large Python process for each of 64 VMs. The calling thread is
 * suspended until the child has called execve; other threads run on (cffi has released the interpreter lock).
 */
static int sf_spawn(struct sf_child *child)
{
    /* Volatile: written by the child, read by the parent, on one stack. */
    volatile int status = 0;
    sigset_t all, before;
    pid_t parent = getpid();
    pid_t pid;

    sigfillset(&all);
    if (pthread_sigmask(SIG_BLOCK, &all, &before) != 0)
        return -EINVAL;
    child->failed_step = SF_STEP_VFORK;
    pid = vfork();
    if (pid == 0) {
        status = become(child, parent);
        _exit(127);
    }
    int error = errno;
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pid < 0)
        return -error;
    if (status < 0) {
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
        return status;
    }
    child->failed_step = SF_STEP_NONE;
    return pid;
}
