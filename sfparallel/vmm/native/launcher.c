/* The launcher: a QEMU that stands still before its main function, and makes shells by forking itself.
 *
 * By the time the constructor of this library runs, the dynamic linker has loaded and relocated QEMU and its hundred
 * libraries: 3.6 MiB of pages that a started QEMU has for itself, and half of what its start costs. Forked shells share
 * them with the launcher. No thread exists yet, so that a fork is all that it takes; QEMU's own life begins in the child.
 *
 * A shell is made with CLONE_PARENT (clone(2)): it is a child of the supervisor, as if that had started it, which waits for
 * it, and whose end is the end of both (PR_SET_PDEATHSIG).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

_Static_assert(sizeof(struct sfpage_launch) == 56, "part of the protocol");
_Static_assert(sizeof(struct sfpage_launched) == 16, "part of the protocol");

/* Where the C library keeps the number of this thread, for the kernel to correct in the child; NULL if it does not say
 * (no CONFIG_CHECKPOINT_RESTORE): then locks of the child carry the launcher's number, which no thread of the child has. */
static int *thread_number(void)
{
    int *address = NULL;
    return prctl(PR_GET_TID_ADDRESS, &address, 0, 0, 0) == 0 ? address : NULL;
}

/* fork(2), but for the parent of the child. fork() of the C library cannot do that. */
static pid_t fork_sibling(void)
{
    int *number = thread_number();
    unsigned long flags = CLONE_PARENT | SIGCHLD;
    if (number != NULL)
        flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
    long pid = syscall(SYS_clone, flags, NULL, NULL, number, 0UL);
    return pid < 0 ? -errno : (pid_t)pid;
}

static bool is_wanted(int fd, const int32_t *targets, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        if (targets[i] == fd)
            return true;
    return false;
}

/* Descriptors move above all numbers that are wanted first: sources and targets may overlap. Closes all others. */
static int place(const int *fds, const int32_t *targets, unsigned count)
{
    int above = 3, moved[SFPAGE_LAUNCH_FDS];
    for (unsigned i = 0; i < count; i++)
        if (targets[i] >= above)
            above = targets[i] + 1;
    for (unsigned i = 0; i < count; i++)
        if ((moved[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, above)) < 0)
            return -errno;
    for (unsigned i = 0; i < count; i++)
        if (dup2(moved[i], targets[i]) < 0)
            return -errno;
    for (int fd = 3; fd < above; fd++)
        if (!is_wanted(fd, targets, count))
            close(fd);
    return syscall(SYS_close_range, (unsigned)above, ~0U, 0) == 0 ? 0 : -errno;
}

/* In the child. Returns the number of its control socket, or -errno. */
static int become_shell(const struct sfpage_launch *order, const int *fds, pid_t supervisor)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0)
        return -errno;
    if (getppid() != supervisor) /* it ended before the line above, and the signal will never come */
        return -ESRCH;
    if (setsid() < 0)
        return -errno;
    int status = place(fds, order->targets, order->count);
    return status != 0 ? status : (int)order->control;
}

static int check(const struct sfpage_launch *order, ssize_t bytes, unsigned fds)
{
    if (bytes != sizeof *order || order->magic != SFPAGE_MAGIC || order->version != SFPAGE_VERSION)
        return -EPROTO;
    if (order->count > SFPAGE_LAUNCH_FDS || order->count != fds)
        return -EINVAL;
    for (unsigned i = 0; i < order->count; i++)
        if (order->targets[i] < 1)
            return -EINVAL;
    return 0;
}

/* The next order with its descriptors; 0, or -errno if it is of no use. The peer's end is the end of the launcher. */
static int receive(int control, struct sfpage_launch *order, int *fds, unsigned *count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(SFPAGE_LAUNCH_FDS * sizeof(int))];
    } ancillary;
    struct iovec vector = {.iov_base = order, .iov_len = sizeof *order};
    struct msghdr header = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof ancillary};
    ssize_t n;
    do
        n = recvmsg(control, &header, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n <= 0)
        _exit(0);
    *count = 0;
    struct cmsghdr *c = CMSG_FIRSTHDR(&header);
    if (c != NULL && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
        *count = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(c), *count * sizeof(int));
    }
    return (header.msg_flags & MSG_CTRUNC) != 0 ? -EMFILE : check(order, n, *count);
}

int sf_launch_shells(int control)
{
    pid_t supervisor = getppid();
    for (;;) {
        struct sfpage_launch order;
        int fds[SFPAGE_LAUNCH_FDS];
        unsigned count = 0;
        int status = receive(control, &order, fds, &count);
        struct sfpage_launched answer = {
            .magic = SFPAGE_MAGIC, .version = SFPAGE_VERSION, .serial = order.serial, .status = status};
        if (status == 0) {
            answer.pid = fork_sibling();
            if (answer.pid == 0)
                return become_shell(&order, fds, supervisor);
            answer.status = answer.pid < 0 ? answer.pid : 0;
        }
        for (unsigned i = 0; i < count; i++)
            close(fds[i]);
        if (send(control, &answer, sizeof answer, MSG_NOSIGNAL) != sizeof answer)
            _exit(0);
    }
}
