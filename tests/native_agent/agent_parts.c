/* Drives parts of the agent that do I/O, with real terminals, pipes and sockets. Built with ASan and UBSan.

     typed SIZE...   lines of these sizes come from the host, one when the other was taken, and are read when no more is
     end             an end of file comes, and a line behind it
     discard         a clone finds unread input of its parent in a pipe, beside a terminal
     hung            a clone finds a terminal that was hung up
     undeliverable   a client is sent what its socket cannot hold, at once and behind what it has not read */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"

static uint8_t scratch[1 << 16];

static void must(bool right, const char *what)
{
    if (!right) {
        perror(what);
        exit(1);
    }
}

/* A program whose descriptors in `streams` are a terminal. Returns its side of that. */
static int open_program(struct program *program, uint8_t streams)
{
    const uint8_t size[5] = { streams, 37, 0, 101, 0 };
    *program = (struct program){ .keeper = -1, .input = -1, .output = -1, .error = -1, .terminal = { .master = -1, .slave = -1 } };
    must(terminal_set(&program->terminal, size, sizeof size, 0) == 0, "terminal_set");
    int theirs = terminal_open(&program->terminal);
    must(theirs >= 0 && fcntl(theirs, F_SETFL, O_NONBLOCK) == 0, "terminal_open");
    if (streams & 1)
        must((program->input = dup(program->terminal.master)) >= 0, "dup");
    return theirs;
}

/* Waits until the kernel has brought to the terminal what the agent wrote of `sent` bytes, as far as it holds that. */
static void arrive(const struct program *program, int theirs, size_t sent)
{
    const struct chunk *chunk = program->stdin_queue.first; /* one at most: the host waits for TAKEN */
    size_t written = sent - (chunk ? chunk->size - chunk->done : 0);
    for (int unread = 0; (size_t)unread < written && unread < 4095; poll(NULL, 0, 1))
        must(ioctl(theirs, FIONREAD, &unread) == 0, "FIONREAD");
}

static int typed(int count, char **sizes)
{
    static uint8_t lines[1 << 17];
    struct program program;
    int theirs = open_program(&program, 3);
    size_t sent = 0, got = 0;
    bool same = true;
    for (int i = 0; i < count; i++) {
        size_t size = strtoul(sizes[i], NULL, 10);
        must(size > 0 && size <= sizeof lines - sent, "size");
        memset(lines + sent, 'a' + i, size);
        lines[sent + size - 1] = '\n';
        must(program_stdin(&program, lines + sent, size) == 0, "program_stdin");
        sent += size;
        while (program.stdin_queue.first || i == count - 1) { /* it does not fit, or was the last: now the program reads */
            arrive(&program, theirs, sent - got);
            ssize_t n = read(theirs, scratch, sizeof scratch);
            if (n < 0 && !program.stdin_queue.first)
                break;
            must(n >= 0 || errno == EAGAIN, "read");
            same = same && (n <= 0 || ((size_t)n <= sent - got && memcmp(scratch, lines + got, (size_t)n) == 0));
            got += n > 0 ? (size_t)n : 0;
            program_stdin_event(&program);
        }
    }
    printf("%zu of %zu, %s\n", got, sent, same ? "right" : "wrong");
    terminal_close(&program.terminal);
    return 0;
}

static int end(void)
{
    struct program program;
    int theirs = open_program(&program, 1);
    must(program_stdin(&program, NULL, 0) == 0 && program_stdin(&program, (const uint8_t *)"yes\n", 4) == 0, "program_stdin");
    arrive(&program, theirs, 5);
    for (unsigned i = 0; i < 3; i++) {
        ssize_t n = read(theirs, scratch, sizeof scratch);
        printf("%zd%s", n, i < 2 ? " " : "\n");
        program_stdin_event(&program);
    }
    queue_clear(&program.stdin_queue);
    return 0;
}

static int discard(void)
{
    struct program program;
    int pipe_ends[2], waiting = -1;
    open_program(&program, 6);
    must(pipe(pipe_ends) == 0 && write(pipe_ends[1], "secret", 6) == 6, "pipe");
    program.input = pipe_ends[1];
    must(program_discard(&program, scratch, sizeof scratch) == 0, "program_discard");
    must(ioctl(pipe_ends[0], FIONREAD, &waiting) == 0, "FIONREAD");
    printf("%d\n", waiting);
    return 0;
}

static int hung(void)
{
    struct program program;
    int theirs = open_program(&program, 7);
    must(program_stdin(&program, NULL, 0) == 0, "program_stdin"); /* an end of file is under way */
    must(ioctl(theirs, TIOCVHANGUP) == 0, "TIOCVHANGUP"); /* as the kernel does when the leader of its session ends */
    must(program_discard(&program, scratch, sizeof scratch) == 0, "program_discard");
    must(program_stdin(&program, (const uint8_t *)"lost\n", 5) == 0, "program_stdin");
    printf("%s\n", program.stdin_queue.first ? "waits" : "goes on");
    terminal_close(&program.terminal);
    return 0;
}

static int undeliverable(void)
{
    static const uint8_t message[32 << 10];
    static struct clients clients;
    int ends[2], small = 1;
    for (unsigned behind = 0; behind < 2; behind++) {
        must(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends) == 0, "socketpair");
        must(setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof small) == 0, "SO_SNDBUF");
        clients.list[0] = (struct client){ .fd = ends[0], .id = 1 };
        clients.count = 1;
        while (behind && !clients.list[0].replies.first)
            clients_deliver(&clients, 1, message, 100);
        clients_deliver(&clients, 1, message, sizeof message);
        ssize_t n;
        struct port port = { .fd = -1 };
        bool gone;
        do {
            while ((n = recv(ends[1], scratch, sizeof scratch, 0)) > 0)
                ;
            must(clients_event(&clients, 0, POLLOUT, &port, &gone) == 0, "clients_event");
        } while (clients.list[0].replies.first);
        while ((n = recv(ends[1], scratch, sizeof scratch, 0)) > 0)
            ;
        printf("%s\n", n == 0 ? "hung up" : "waits");
    }
    return 0;
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    if (strcmp(mode, "typed") == 0)
        return typed(argc - 2, argv + 2);
    if (strcmp(mode, "end") == 0)
        return end();
    if (strcmp(mode, "discard") == 0)
        return discard();
    if (strcmp(mode, "hung") == 0)
        return hung();
    if (strcmp(mode, "undeliverable") == 0)
        return undeliverable();
    return 2;
}
