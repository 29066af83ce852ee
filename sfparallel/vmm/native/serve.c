/* The service thread: one control connection, one request at a time, and the end of the process with the connection.
 *
 * Loaded into QEMU with LD_PRELOAD; found through one of
 *   SFPAGE_FD=<n>       an inherited descriptor, already connected (raw shells)
 *   SFPAGE_PATH=<path>  a socket to bind; exactly one peer is accepted, of our user or root, within SFPAGE_WAIT_MS (60 s) (libvirt domains)
 *   SFPAGE_LAUNCHER=<n> an inherited descriptor, by which shells are ordered; see launcher.c
 * The thread is made before QEMU's sandbox starts and needs nothing that spawn=deny or resourcecontrol=deny forbid.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "internal.h"

enum { EXIT_PEER_GONE = 0, EXIT_SETUP = 119, DEFAULT_WAIT_MS = 60000, STACK_BYTES = 512 << 10 };

_Static_assert(sizeof(struct sfpage_request) == 40, "part of the protocol");
_Static_assert(sizeof(struct sfpage_reply) == 88, "part of the protocol");
_Static_assert(sizeof(struct sfpage_extent) == 24, "part of the protocol");
_Static_assert(sizeof(struct sfpage_run) == 16, "part of the protocol");

/* _exit is exit_group(2) in glibc: all threads end at once, no handler of QEMU runs. */
static void end_process(int status) __attribute__((noreturn));
static void end_process(int status)
{
    _exit(status);
}

static void take_fds(struct msghdr *header, struct sf_message *message)
{
    message->fd_count = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c != NULL; c = CMSG_NXTHDR(header, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        unsigned count = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(message->fds + message->fd_count, CMSG_DATA(c), count * sizeof(int));
        message->fd_count += count; /* the kernel merges the descriptors of a packet into one message of <= 253 */
    }
}

/* Returns 0, or -errno if the packet is of no use; ends the process when the peer is gone. */
static int receive(const struct sf_context *context, struct sf_message *message)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof message->fds)];
    } ancillary;
    struct iovec vector = {.iov_base = &message->request, .iov_len = sizeof message->request};
    struct msghdr header = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof ancillary};
    ssize_t n;
    memset(&message->request, 0, sizeof message->request);
    do
        n = recvmsg(context->control, &header, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n <= 0)
        end_process(EXIT_PEER_GONE);
    take_fds(&header, message);
    /* There is room for as many descriptors as the kernel passes: a cut means that QEMU's RLIMIT_NOFILE is too low. */
    if ((header.msg_flags & MSG_CTRUNC) != 0)
        return -EMFILE;
    if (n != sizeof message->request || (header.msg_flags & MSG_TRUNC) != 0 || message->request.magic != SFPAGE_MAGIC)
        return -EPROTO;
    return message->request.version == SFPAGE_VERSION ? 0 : -EPROTONOSUPPORT;
}

static void hello(const struct sf_context *context, struct sfpage_reply *reply)
{
    reply->flags = SFPAGE_INTACT;
    reply->value[SFPAGE_V_PAGE_BYTES] = (uint64_t)sysconf(_SC_PAGESIZE);
    reply->value[SFPAGE_V_CAPABILITIES] = context->has_scan ? SFPAGE_HAS_PAGEMAP_SCAN : 0;
    reply->value[SFPAGE_V_MAX_MAPPINGS] = context->max_maps;
    reply->value[SFPAGE_V_PID] = (uint64_t)getpid();
}

static void dispatch(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply)
{
    switch (message->request.operation) {
    case SFPAGE_HELLO:
        hello(context, reply);
        break;
    case SFPAGE_MAP:
        sf_map(context, message, reply);
        break;
    case SFPAGE_COMMIT:
        sf_commit(context, message, reply);
        break;
    case SFPAGE_PREPARE:
        sf_prepare(context, message, reply);
        break;
    case SFPAGE_SETTLE:
        reply->flags = SFPAGE_INTACT;
        sf_settle(&context->prepared);
        break;
    case SFPAGE_STATS:
        sf_stats(context, message, reply);
        break;
    case SFPAGE_WARM:
        sf_warm(message, reply);
        break;
    default:
        reply->flags = SFPAGE_INTACT;
        sf_fail(reply, -ENOSYS, SFPAGE_STEP_RECEIVE);
    }
}

static void answer(struct sf_context *context, struct sf_message *message)
{
    int status = receive(context, message);
    struct sfpage_reply reply = {
        .magic = SFPAGE_MAGIC,
        .version = SFPAGE_VERSION,
        .operation = message->request.operation,
        .serial = message->request.serial,
        .flags = SFPAGE_INTACT,
    };
    if (status == 0)
        dispatch(context, message, &reply);
    else
        sf_fail(&reply, status, SFPAGE_STEP_RECEIVE);
    for (unsigned i = 0; i < message->fd_count; i++)
        close(message->fds[i]);
    if (send(context->control, &reply, sizeof reply, MSG_NOSIGNAL) != sizeof reply)
        end_process(EXIT_PEER_GONE);
}

/* Whether the peer of a socket is of our own user, or root: whoever talks to us owns guest memory. */
static bool is_ours(int fd)
{
    struct ucred peer;
    socklen_t size = sizeof peer;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && (peer.uid == geteuid() || peer.uid == 0);
}

/* Accepts the one peer and removes every way for another to come. */
static void accept_peer(struct sf_context *context)
{
    struct pollfd waiting = {.fd = context->listener, .events = POLLIN};
    int n;
    do {
        n = poll(&waiting, 1, context->wait_ms);
        if (n > 0)
            context->control = accept4(context->listener, NULL, NULL, SOCK_CLOEXEC);
        if (context->control >= 0 && !is_ours(context->control)) {
            close(context->control);
            context->control = -1;
        }
    } while (n > 0 ? context->control < 0 : n < 0 && errno == EINTR);
    unlink(context->path);
    close(context->listener);
    if (context->control < 0)
        end_process(EXIT_SETUP);
}

static void *serve(void *argument)
{
    struct sf_context *context = argument;
    struct sf_message *message = calloc(1, sizeof *message);
    if (message == NULL || sf_read_max_maps(&context->max_maps) != 0 || sf_count_maps(&context->maps) != 0)
        end_process(EXIT_SETUP);
    if (context->listener >= 0)
        accept_peer(context);
    for (;;)
        answer(context, message);
    return NULL;
}

static int listen_at(const char *path)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof name.sun_path)
        return -ENAMETOOLONG;
    memcpy(name.sun_path, path, strlen(path));
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (bind(fd, (struct sockaddr *)&name, sizeof name) != 0 || listen(fd, 1) != 0) {
        int status = -errno;
        close(fd);
        return status;
    }
    return fd;
}

static int adopt(const char *number)
{
    char *end;
    long fd = strtol(number, &end, 10);
    int type;
    socklen_t size = sizeof type;
    if (*number == 0 || *end != 0 || fd < 0 || fd > INT32_MAX)
        return -EINVAL;
    if (getsockopt((int)fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_SEQPACKET)
        return -ENOTSOCK;
    if (fcntl((int)fd, F_SETFD, FD_CLOEXEC) != 0)
        return -errno;
    return (int)fd;
}

/* QEMU handles its own signals: this thread must not be picked for any of them. */
static int start_thread(struct sf_context *context)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    sigfillset(&all);
    if (pthread_attr_init(&attributes) != 0)
        return -ENOMEM;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = -pthread_create(&thread, &attributes, serve, context);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return status;
}

/* Serve on a connected socket or, if that is -1, on one that is bound at path. */
static int start(int control, const char *path, const char *wait_ms)
{
    struct sf_context *context = calloc(1, sizeof *context);
    if (context == NULL)
        return -ENOMEM;
    context->control = control;
    context->listener = control < 0 ? listen_at(path) : -1;
    context->wait_ms = wait_ms != NULL ? atoi(wait_ms) : DEFAULT_WAIT_MS;
    context->path = control < 0 ? strdup(path) : NULL; /* a copy: the variable goes away */
    if (context->control < 0 && context->listener < 0)
        return -EINVAL;
    context->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (context->pagemap < 0)
        context->pagemap = -errno;
    context->has_scan = sf_probe_scan(context->pagemap);
    return start_thread(context);
}

/* Become a launcher; returns in the shells that it makes, as `adopt` does. Whoever lists processes sees which one it is. */
static int launch(const char *number, char *name)
{
    static const char title[] = "sf-launcher";
    char own[sizeof title];
    int control = adopt(number);
    bool fits = strlen(name) >= sizeof title - 1;
    if (control < 0)
        return control;
    if (fits) {
        memcpy(own, name, sizeof title);
        memcpy(name, title, sizeof title);
    }
    control = sf_launch_shells(control);
    if (fits)
        memcpy(name, own, sizeof title);
    if (control < 0 || fcntl(control, F_SETFD, FD_CLOEXEC) != 0)
        return control < 0 ? control : -errno;
    return control;
}

/* Without its paging layer a VM could neither be forked nor be trusted to end with its supervisor: better no VM at all. */
__attribute__((constructor)) static void load(int argc, char **argv, char **environment)
{
    const char *fd = getenv("SFPAGE_FD"), *path = getenv("SFPAGE_PATH"), *launcher = getenv("SFPAGE_LAUNCHER");
    int status = 0;
    (void)argc;
    (void)environment;
    /* QEMU allocates much in steps of 2 MiB and uses little of it: a huge page there is memory lost in every clone. */
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    /* The C library gives each thread a heap of its own, and adds to it page by page, with a system call for each. QEMU has one
     * thread that allocates much, while the guest runs: all share one heap, which grows in larger steps (brk(2)). */
    mallopt(M_ARENA_MAX, 1);
    if (launcher != NULL || fd != NULL) {
        status = launcher != NULL ? launch(launcher, argv[0]) : adopt(fd);
        if (status >= 0)
            status = start(status, NULL, NULL);
    } else if (path != NULL) {
        status = start(-1, path, getenv("SFPAGE_WAIT_MS"));
    }
    unsetenv("LD_PRELOAD");
    unsetenv("SFPAGE_FD");
    unsetenv("SFPAGE_PATH");
    unsetenv("SFPAGE_WAIT_MS");
    unsetenv("SFPAGE_LAUNCHER");
    if (status != 0)
        end_process(EXIT_SETUP);
}
