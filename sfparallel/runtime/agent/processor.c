/* The test of the processor (../cpu_check), which runs once in each boot: a template whose processor computes wrong is none. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* All that the descriptor has, but no more of it in `text` than there is room for, and a final 0. */
static int read_text(int fd, char *text, size_t room)
{
    char more[512];
    size_t size = 0;
    for (;;) {
        bool full = size == room - 1;
        ssize_t n = full ? read(fd, more, sizeof more) : read(fd, text + size, room - 1 - size);
        if (n < 0 && errno != EINTR)
            return -errno;
        if (n > 0 && !full)
            size += (size_t)n;
        text[size] = 0;
        if (n == 0)
            return 0;
    }
}

int processor_check(const char *path, char *text, size_t room)
{
    int ends[2], status;
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -errno;
    pid_t pid = fork();
    if (pid < 0)
        return -errno;
    if (pid == 0) {
        dup2(ends[1], STDOUT_FILENO);
        execl(path, path, "--quick", (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    int result = read_text(ends[0], text, room);
    close(ends[0]);
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -errno;
    /* Text without a status would be as strange as a status without text. */
    if (result == 0 && status != 0 && text[0] == 0)
        snprintf(text, room, "the test of the processor ended with wait status %#x", (unsigned)status);
    return result;
}
