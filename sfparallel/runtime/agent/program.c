/* The keeper, a Python process, and the program's interpreter, which it starts (runtime/keeper.py). */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* A piece of output and its frame header fill exactly one buffer of the port's driver. */
#define PIECE_SIZE ((32u << 10) - FRAME_HEADER_SIZE)
enum { CHANNEL_STDOUT = 1, CHANNEL_STDERR = 2 };

/* A halted guest (RB_HALT_SYSTEM) looks to the host like one that computes: its processors stand still, QEMU runs on and says
   nothing, and its region waits for ever. So nobody but the agent may, and `halt` fails with EPERM. The same goes for
   kexec_load(2). Other ends (power-off and reset by sysrq, a panic) QEMU reports. */
static int forbid_halting(void)
{
    return prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT, 0, 0, 0) < 0 ? -errno : 0;
}

static void become_keeper(int socket)
{
    char number[16], path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    char variable[32], home[] = "HOME=/root", locale[] = "LANG=C.UTF-8";
    char *environment[] = { path, home, locale, variable, NULL };
    char *arguments[] = { (char[]){ "python3" }, (char[]){ "-m" }, (char[]){ "sfparallel.runtime.keeper" }, NULL };
    sigset_t none;
    int input = open("/dev/null", O_RDONLY);
    if (input < 0 || dup2(input, 0) < 0 || fcntl(socket, F_SETFD, 0) < 0)
        _exit(126);
    close(input);
    if (cgroup_enter() < 0 || forbid_halting() < 0)
        _exit(126);
    snprintf(number, sizeof number, "%d", socket);
    snprintf(variable, sizeof variable, "SF_KEEPER_FD=%s", number);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    execve("/usr/bin/python3", arguments, environment);
    _exit(127);
}

int program_start_keeper(struct program *program)
{
    int ends[2], room = 2 << 20;
    char answer[16];
    *program = (struct program){ .keeper = -1, .input = -1, .output = -1, .error = -1, .terminal = { .master = -1, .slave = -1 } };
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
        return -errno;
    /* RUN's payload, arguments and environment, must fit into one packet. */
    if (setsockopt(ends[0], SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room) < 0)
        return -errno;
    program->keeper = ends[0];
    program->keeper_pid = fork();
    if (program->keeper_pid < 0)
        return -errno;
    if (program->keeper_pid == 0)
        become_keeper(ends[1]);
    close(ends[1]);
    ssize_t n = recv(program->keeper, answer, sizeof answer, 0);
    return n == 5 && memcmp(answer, "ready", 5) == 0 ? 0 : -ECHILD;
}

static int send_run(int keeper, const uint8_t *payload, size_t size, const int fds[3])
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(3 * sizeof(int))];
    } control = { .header = { .cmsg_len = CMSG_LEN(3 * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
    memcpy(CMSG_DATA(&control.header), fds, 3 * sizeof(int));
    struct iovec piece = { .iov_base = (void *)(uintptr_t)payload, .iov_len = size };
    struct msghdr message = {
        .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room,
    };
    return sendmsg(keeper, &message, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

static int set_nonblocking(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
}

/* A pipe or the terminal for descriptor `number` of the program: our end, -1 for the terminal's output, and theirs. */
static int open_stream(struct program *program, unsigned number, int *ours, int *theirs)
{
    int ends[2];
    if (program->terminal.streams & 1u << number) {
        *theirs = terminal_open(&program->terminal);
        *ours = number == 0 && *theirs >= 0 ? fcntl(program->terminal.master, F_DUPFD_CLOEXEC, 3) : -1;
        return *theirs < 0 ? *theirs : number == 0 && *ours < 0 ? -errno : 0;
    }
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -errno;
    *ours = ends[number == 0];
    *theirs = ends[number != 0];
    return set_nonblocking(*ours);
}

int program_run(struct program *program, const uint8_t *payload, size_t size)
{
    int theirs[3], *ours[3] = { &program->input, &program->output, &program->error };
    if (program->started)
        return -EBUSY;
    if (program->keeper_outside) {
        int moved = cgroup_put_keeper(program->keeper_pid, true);
        if (moved < 0)
            return moved;
        program->keeper_outside = false;
    }
    for (unsigned i = 0; i < 3; i++) {
        int opened = open_stream(program, i, ours[i], &theirs[i]);
        if (opened < 0)
            return opened;
    }
    program->pid = 0;
    program->signal = 0;
    program->stdin_end = false;
    queue_clear(&program->stdin_queue);
    int result = send_run(program->keeper, payload, size, theirs);
    for (unsigned i = 0; i < 3; i++)
        close(theirs[i]);
    program->started = result == 0;
    return result;
}

static void close_end(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void program_close_stdin(struct program *program)
{
    queue_clear(&program->stdin_queue);
    program->stdin_end = false;
    close_end(&program->input);
}

/* Send what one read(2) gives. Returns how many bytes, 0 if there are none or at the end, or -errno of the port. */
static int relay_piece(int *fd, struct port *port, uint16_t channel)
{
    if (*fd < 0)
        return 0;
    ssize_t n = read(*fd, port_payload(port), PIECE_SIZE);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n <= 0) {
        close_end(fd);
        return 0;
    }
    int result = port_send_prepared(port, FRAME_OUTPUT, channel, (size_t)n);
    return result < 0 ? result : (int)n;
}

void program_close_output(struct program *program, uint16_t channel)
{
    if (channel == CHANNEL_STDOUT)
        close_end(&program->output);
    else if (channel == CHANNEL_STDERR)
        close_end(&program->error);
    else
        program_close_stdin(program);
    if (channel == program->terminal.channel)
        program->terminal.deaf = true;
}

int program_output_event(int *fd, struct port *port, uint16_t channel)
{
    int result = relay_piece(fd, port, channel);
    return result < 0 ? result : 0;
}

/* Send what is in a pipe now, and no more: a process that goes on writing (`yes`) must not keep us here. */
static int relay_waiting(int *fd, struct port *port, uint16_t channel)
{
    int waiting = 0;
    if (*fd < 0 || ioctl(*fd, FIONREAD, &waiting) < 0)
        return 0;
    while (waiting > 0) {
        int n = relay_piece(fd, port, channel);
        if (n <= 0)
            return n;
        waiting -= n;
    }
    return 0;
}

int program_drain(struct program *program, struct port *port)
{
    int result = terminal_drain(&program->terminal, port);
    if (result == 0)
        result = relay_waiting(&program->output, port, CHANNEL_STDOUT);
    return result < 0 ? result : relay_waiting(&program->error, port, CHANNEL_STDERR);
}

static int discard(int fd, uint8_t *scratch, size_t size)
{
    if (fd < 0)
        return 0;
    for (;;) {
        ssize_t n = read(fd, scratch, size);
        if (n == 0 || (n < 0 && errno == EAGAIN))
            return 0;
        if (n < 0 && errno != EINTR)
            return -errno;
    }
}

/* What the parent's user typed and its program has not read must not be read by the clone. We hold the writing end of
   that pipe only; /proc/self/fd reopens the pipe for reading (proc(5)). The program is frozen: nobody reads meanwhile. */
static int discard_input(int fd, uint8_t *scratch, size_t size)
{
    int waiting = 0;
    char path[32];
    if (fd < 0 || ioctl(fd, FIONREAD, &waiting) < 0 || waiting == 0)
        return 0;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int reader = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (reader < 0)
        return -errno;
    int result = discard(reader, scratch, size);
    close(reader);
    return result;
}

static bool reads_terminal(const struct program *program)
{
    return program->input >= 0 && program->terminal.streams & 1;
}

int program_discard(struct program *program, uint8_t *scratch, size_t size)
{
    int result = discard(program->output, scratch, size);
    if (result == 0)
        result = discard(program->error, scratch, size);
    if (result == 0 && !reads_terminal(program))
        result = discard_input(program->input, scratch, size);
    if (result == 0)
        result = terminal_discard(&program->terminal, scratch, size);
    return result;
}

static int send_exited(struct program *program, struct port *port, int64_t status, int64_t kills)
{
    int result = program_drain(program, port);
    if (result < 0)
        return result;
    program_close_stdin(program);
    close_end(&program->output);
    close_end(&program->error);
    terminal_close(&program->terminal);
    program->started = false;
    program->pid = 0;
    msgpack_sbuffer buffer;
    msgpack_packer packer;
    msgpack_sbuffer_init(&buffer);
    msgpack_packer_init(&packer, &buffer, msgpack_sbuffer_write);
    msgpack_pack_map(&packer, 2);
    msgpack_pack_str_with_body(&packer, "status", 6);
    msgpack_pack_int64(&packer, status);
    msgpack_pack_str_with_body(&packer, "oom_kills", 9);
    msgpack_pack_int64(&packer, kills);
    result = port_send(port, FRAME_EXITED, 0, buffer.data, buffer.size);
    msgpack_sbuffer_destroy(&buffer);
    return result;
}

static void send_signal(const struct program *program, int number)
{
    /* The program makes itself a group leader right after it was forked; until then there is only the process. */
    if (kill(-program->pid, number) < 0 && errno == ESRCH)
        kill(program->pid, number);
}

int program_keeper_event(struct program *program, struct port *port, int vmstat)
{
    uint8_t message[512];
    struct report report;
    ssize_t n = recv(program->keeper, message, sizeof message, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n <= 0)
        return -ECHILD;
    int result = report_decode(message, (size_t)n, &report);
    if (result < 0)
        return result;
    if (report.kind == REPORT_EXITED)
        return program->started ? send_exited(program, port, report.status, oom_kills(vmstat)) : 0;
    program->pid = (pid_t)report.pid;
    result = cgroup_put_keeper(program->keeper_pid, false);
    if (result < 0)
        return result;
    program->keeper_outside = true;
    if (program->signal)
        send_signal(program, program->signal);
    program->signal = 0;
    return 0;
}

void program_signal(struct program *program, int number)
{
    if (program->pid > 0)
        send_signal(program, number);
    else if (program->started)
        program->signal = number;
}

void program_stdin_event(struct program *program)
{
    bool terminal = reads_terminal(program);
    for (struct chunk *chunk; program->input >= 0 && (chunk = program->stdin_queue.first);) {
        const uint8_t *data = chunk->data + chunk->done;
        size_t size = chunk->size - chunk->done;
        ssize_t n = terminal ? terminal_write(&program->terminal, data, size) : write(program->input, data, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            break; /* EPIPE: the program does not want it */
        chunk->done += (size_t)n;
        if (chunk->done == chunk->size)
            queue_pop(&program->stdin_queue);
    }
    if (terminal && program->stdin_end && !program->stdin_queue.first)
        program->stdin_end = !terminal_end_input(&program->terminal);
    else if (program->stdin_end || program->stdin_queue.first)
        program_close_stdin(program);
}

/* Nothing tells a terminal's other side that input was read (n_tty wakes it only when it had been throttled). */
int program_patience_ms(const struct program *program)
{
    return reads_terminal(program) && (program->stdin_end || program->stdin_queue.first) ? 50 : -1;
}

int program_stdin_taken(struct program *program, struct port *port)
{
    if (!program->stdin_owed || program->stdin_queue.first || (reads_terminal(program) && program->stdin_end))
        return 0;
    program->stdin_owed = false;
    return port_send(port, FRAME_TAKEN, 0, NULL, 0);
}

int program_stdin(struct program *program, const uint8_t *data, size_t size)
{
    program->stdin_owed = true;
    if (program->input < 0)
        return 0;
    if (size == 0)
        program->stdin_end = true;
    else if (queue_append(&program->stdin_queue, data, size) < 0)
        return -ENOMEM;
    program_stdin_event(program);
    return 0;
}
