#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

static void step(int result, const char *what)
{
    if (result < 0)
        die(what, result);
}

static int open_children(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    if (sigprocmask(SIG_BLOCK, &set, NULL) < 0)
        return -errno;
    int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

/* No template may be taken of a guest whose processor computes wrong. */
static void refuse(struct port *port, const char *wrong)
{
    port_send(port, FRAME_FAILED, 0, wrong, strlen(wrong));
    dprintf(STDERR_FILENO, "sfagent: %s", wrong);
    power_off();
}

int main(int argc, char **argv)
{
    static char wrong[16384];
    (void)argc;
    /* Elsewhere it would set up mounts, and power the machine off. */
    if (getpid() != 1) {
        dprintf(STDERR_FILENO, "usage: sfagent as the init of a guest, not %s\n", argv[0]);
        return 2;
    }
    /* Zeroed and never freed: it lives as long as the guest. */
    struct agent *agent = calloc(1, sizeof *agent);
    if (!agent)
        die("agent", ENOMEM);
    boot(wrong, sizeof wrong);
    signal(SIGPIPE, SIG_IGN);
    agent->children = open_children();
    step(agent->children, "signalfd");
    agent->vmstat = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
    step(agent->vmstat < 0 ? -errno : 0, "/proc/vmstat");
    step(cgroup_open(&agent->cgroup), "cgroup");
    step(clients_open(&agent->clients), "agent.sock");
    step(host_open(&agent->host), "identity");
    step(port_open(&agent->port), "port sf.agent");
    if (wrong[0])
        refuse(&agent->port, wrong);
    step(program_start_keeper(&agent->program), "keeper");
    agent_run(agent);
}
