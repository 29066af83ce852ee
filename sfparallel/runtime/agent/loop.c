/* The agent's states and its loop. poll(2) rather than epoll: what we listen to depends on the state, and it is a
   handful of descriptors. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Errors of the port and of our own descriptors: there is nobody left to tell but the console. */
static void must(int result, const char *what)
{
    if (result < 0)
        die(what, result);
}

static void send_map(struct agent *agent, enum frame_type type, const char *first, int64_t value, const char *second,
                     int64_t other)
{
    msgpack_sbuffer buffer;
    msgpack_packer packer;
    msgpack_sbuffer_init(&buffer);
    msgpack_packer_init(&packer, &buffer, msgpack_sbuffer_write);
    msgpack_pack_map(&packer, 2);
    msgpack_pack_str_with_body(&packer, first, strlen(first));
    msgpack_pack_int64(&packer, value);
    msgpack_pack_str_with_body(&packer, second, strlen(second));
    if (type == FRAME_FROZEN)
        msgpack_pack_str_with_body(&packer, "1", 1);
    else
        msgpack_pack_int64(&packer, other);
    must(port_send(&agent->port, type, 0, buffer.data, buffer.size), "port");
    msgpack_sbuffer_destroy(&buffer);
}

static void become_frozen(struct agent *agent)
{
    agent->state = AGENT_FROZEN;
    send_map(agent, FRAME_FROZEN, "oom_kills", oom_kills(agent->vmstat), "agent", 1);
}

/* The only way out of a failed identity: no user code may run. */
static void fail(struct agent *agent, const char *text)
{
    port_send(&agent->port, FRAME_FAILED, 0, text, strlen(text));
    dprintf(STDERR_FILENO, "sfagent: %s\n", text);
    power_off();
}

static void fail_step(struct agent *agent, const char *step, int error)
{
    char text[256];
    snprintf(text, sizeof text, "cannot %s: %s", step, strerror(-error));
    fail(agent, text);
}

static void become_running(struct agent *agent, uint16_t channel, const uint8_t *reply, size_t size)
{
    agent->state = AGENT_RUNNING;
    send_map(agent, FRAME_WOKEN, "cpu_ns", clock_ns(CLOCK_PROCESS_CPUTIME_ID) - agent->thaw_cpu_ns, "wall_ns",
             clock_ns(CLOCK_MONOTONIC) - agent->thaw_wall_ns);
    must(cgroup_set(&agent->cgroup, false), "cgroup.freeze");
    if (reply)
        clients_deliver(&agent->clients, channel, reply, size);
}

static void take_identity(struct agent *agent, const struct thaw *thaw)
{
    const struct identity *identity = &thaw->identity;
    const char *step = "discard the parent's output";
    uint8_t *scratch = port_payload(&agent->port);
    int result = 0;
    bool clone = identity->role != ROLE_PARENT;
    /* Whoever asked for this clone may have died since, or while it was frozen. Nobody would take its answer here, and the
       other programs of the parent would run a second time. */
    if (clone && thaw->reply && !clients_waits(&agent->clients, thaw->channel))
        fail(agent, "the program that asked for this clone has ended");
    if (clone)
        result = program_discard(&agent->program, scratch, FRAME_MAX_PAYLOAD);
    if (result == 0)
        result = identity_take(&agent->host, identity, &step);
    if (result == 0 && clone)
        result = ghosts_destroy(&agent->host, &step);
    if (result < 0)
        fail_step(agent, step, result);
    if (clone) {
        clients_cancel(&agent->clients, thaw->channel, thaw->reply, thaw->reply_size, scratch);
        if (identity->role == ROLE_CLONE)
            program_close_stdin(&agent->program);
        agent->program.stdin_owed = false;
    }
}

/* Host folders need answers from the host before they are mounted: the loop goes on, in THAWING. */
static void begin_mounts(struct agent *agent, const struct thaw *thaw)
{
    const char *step;
    int result = exports_mount(&agent->exports, thaw, &step);
    if (result < 0)
        fail_step(agent, step, result);
    agent->state = AGENT_THAWING;
    agent->thaw_channel = thaw->channel;
    agent->thaw_reply = NULL;
    agent->thaw_reply_size = thaw->reply_size;
    if (!thaw->reply)
        return;
    agent->thaw_reply = malloc(thaw->reply_size + 1);
    if (!agent->thaw_reply)
        fail_step(agent, "keep the reply", -ENOMEM);
    memcpy(agent->thaw_reply, thaw->reply, thaw->reply_size);
}

static void end_mounts(struct agent *agent, int status)
{
    char text[4096];
    if (exports_child_done(&agent->exports, status, text, sizeof text) < 0)
        fail(agent, text);
    uint8_t *reply = agent->thaw_reply;
    agent->thaw_reply = NULL;
    become_running(agent, agent->thaw_channel, reply, agent->thaw_reply_size);
    free(reply);
}

static void on_thaw(struct agent *agent, const struct frame *frame)
{
    struct thaw thaw;
    const char *what;
    agent->thaw_cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    agent->thaw_wall_ns = clock_ns(CLOCK_MONOTONIC);
    if (agent->state != AGENT_FROZEN && agent->state != AGENT_FREEZING)
        fail(agent, "THAW for a guest that is not frozen");
    if (thaw_decode(frame->payload, frame->size, &thaw, &what) < 0) {
        char text[128];
        snprintf(text, sizeof text, "cannot read the field %s of THAW", what);
        fail(agent, text);
    }
    /* The host gives a freeze up that takes too long. Its VM goes on as it was. */
    if (agent->state == AGENT_FREEZING && (thaw.has_identity || thaw.mounts->size > 0))
        fail(agent, "an identity for a guest that is not frozen");
    if (thaw.has_identity)
        take_identity(agent, &thaw);
    else
        clock_catch_up(thaw.time_ns); /* it stood still while this VM was saved */
    if (thaw.mounts->size > 0)
        begin_mounts(agent, &thaw);
    else
        become_running(agent, thaw.channel, thaw.reply, thaw.reply_size);
    thaw_free(&thaw);
}

static void on_freeze(struct agent *agent)
{
    if (agent->state != AGENT_RUNNING)
        die("FREEZE for a guest that is not running", EPROTO);
    must(program_drain(&agent->program, &agent->port), "port");
    must(cgroup_set(&agent->cgroup, true), "cgroup.freeze");
    agent->state = AGENT_FREEZING;
}

static bool fuse_is_quiet(struct agent *agent)
{
    struct pollfd polled[MAX_EXPORTS];
    if (agent->exports.unanswered > 0)
        return false;
    for (size_t i = 0; i < agent->exports.count; i++)
        polled[i] = (struct pollfd){ .fd = agent->exports.list[i].fd, .events = POLLIN };
    return agent->exports.count == 0 || poll(polled, agent->exports.count, 0) == 0;
}

/* Processes that wait for a host folder freeze only when they have their answer (fs/fuse/dev.c waits killably), and
   read-ahead may be on its way for nobody: both must come to rest before the cut. */
static void try_to_freeze(struct agent *agent)
{
    if (!cgroup_is_frozen(&agent->cgroup) || !fuse_is_quiet(agent))
        return;
    must(program_drain(&agent->program, &agent->port), "port");
    become_frozen(agent);
}

static void on_signal(struct agent *agent, const struct frame *frame)
{
    if (frame->size != 4)
        die("SIGNAL", EPROTO);
    uint32_t number = (uint32_t)frame->payload[0] | (uint32_t)frame->payload[1] << 8 | (uint32_t)frame->payload[2] << 16 |
                      (uint32_t)frame->payload[3] << 24;
    if (number > 0 && number < 65)
        program_signal(&agent->program, (int)number);
}

/* The VM stood still with all its clocks (Ctrl-Z). */
static void on_clock(const struct frame *frame)
{
    uint64_t time_ns = 0;
    if (frame->size != sizeof time_ns)
        die("CLOCK", EPROTO);
    for (unsigned i = 0; i < sizeof time_ns; i++)
        time_ns |= (uint64_t)frame->payload[i] << 8 * i;
    must(set_clock((int64_t)time_ns), "clock");
}

static void on_frame(struct agent *agent, const struct frame *frame)
{
    switch ((enum frame_type)frame->type) {
    case FRAME_FREEZE:
        on_freeze(agent);
        break;
    case FRAME_THAW:
        on_thaw(agent, frame);
        break;
    case FRAME_REPLY:
        clients_deliver(&agent->clients, frame->channel, frame->payload, frame->size);
        break;
    case FRAME_STDIN:
        must(program_stdin(&agent->program, frame->payload, frame->size), "input of the program");
        break;
    case FRAME_FUSE_REPLY:
        exports_reply(&agent->exports, frame->channel, frame->payload, frame->size);
        break;
    case FRAME_SIGNAL:
        on_signal(agent, frame);
        break;
    case FRAME_RUN:
        must(program_run(&agent->program, frame->payload, frame->size), "RUN");
        must(terminal_send_modes(&agent->program.terminal, &agent->port), "port"); /* the first ones: before any change */
        break;
    case FRAME_TERMINAL:
        must(terminal_set(&agent->program.terminal, frame->payload, frame->size, agent->program.pid), "TERMINAL");
        break;
    case FRAME_CLOCK:
        on_clock(frame);
        break;
    case FRAME_CLOSE:
        program_close_output(&agent->program, frame->channel);
        break;
    default:
        die("unknown frame", EPROTO);
    }
}

static void on_port(struct agent *agent)
{
    struct frame frame;
    int result;
    must(port_fill(&agent->port), "port");
    while ((result = frame_next(&agent->port.in, &frame)) > 0)
        on_frame(agent, &frame);
    must(result, "frame");
}

static void on_children(struct agent *agent)
{
    struct signalfd_siginfo info;
    int status;
    ssize_t ignored = read(agent->children, &info, sizeof info); /* one stands for several; waitpid tells */
    (void)ignored;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (pid == agent->program.keeper_pid)
            die("the keeper ended", ECHILD);
        if (pid == agent->exports.child)
            end_mounts(agent, status);
    }
}

/* Fill agent->polled; the order is that of handle_events(). Returns how many. */
static nfds_t prepare_poll(struct agent *agent)
{
    struct pollfd *p = agent->polled;
    const struct program *program = &agent->program;
    bool running = agent->state == AGENT_RUNNING, freezing = agent->state == AGENT_FREEZING;
    *p++ = (struct pollfd){ .fd = agent->port.fd, .events = POLLIN };
    *p++ = (struct pollfd){ .fd = agent->children, .events = POLLIN };
    *p++ = (struct pollfd){ .fd = program->keeper, .events = POLLIN };
    *p++ = (struct pollfd){ .fd = freezing ? agent->cgroup.events : -1, .events = POLLPRI };
    *p++ = (struct pollfd){ .fd = program->output, .events = POLLIN };
    *p++ = (struct pollfd){ .fd = program->error, .events = POLLIN };
    *p++ = (struct pollfd){ .fd = program->stdin_queue.first && program_patience_ms(program) < 0 ? program->input : -1, .events = POLLOUT };
    /* While freezing no new request is passed on: its reply would cross FROZEN on the way. */
    *p++ = (struct pollfd){ .fd = running ? agent->clients.listener : -1, .events = POLLIN };
    *p++ = (struct pollfd){ .fd = program->terminal.master, .events = POLLIN };
    for (size_t i = 0; i < agent->exports.count; i++)
        *p++ = (struct pollfd){ .fd = agent->exports.list[i].fd, .events = POLLIN };
    for (size_t i = 0; running && i < agent->clients.count; i++) {
        const struct client *client = &agent->clients.list[i];
        *p++ = (struct pollfd){ .fd = client->fd, .events = (short)(POLLIN | (client->replies.first ? POLLOUT : 0)) };
    }
    return (nfds_t)(p - agent->polled);
}

static void handle_clients(struct agent *agent, const struct pollfd *polled, size_t count)
{
    bool drained = false;
    /* From the last to the first: one that is gone is replaced by the last, which was handled already. */
    for (size_t i = count; i-- > 0;) {
        bool gone;
        if (!polled[i].revents)
            continue;
        /* What a program printed before a request goes before it: the request may be the end of this VM. */
        if (!drained)
            must(program_drain(&agent->program, &agent->port), "port");
        drained = true;
        must(clients_event(&agent->clients, i, polled[i].revents, &agent->port, &gone), "client");
    }
}

static void handle_events(struct agent *agent, nfds_t count)
{
    const struct pollfd *p = agent->polled;
    size_t exports = agent->exports.count;
    size_t clients = count - 9 - exports;
    /* Output before the keeper's report that the program has ended, and all that comes from the guest before the port:
       FREEZE must find it relayed. */
    if (p[4].revents)
        must(program_output_event(&agent->program.output, &agent->port, 1), "port");
    if (p[5].revents)
        must(program_output_event(&agent->program.error, &agent->port, 2), "port");
    if (p[8].revents)
        must(terminal_event(&agent->program.terminal, &agent->port), "port");
    if (p[6].revents || program_patience_ms(&agent->program) >= 0)
        program_stdin_event(&agent->program);
    for (size_t i = 0; i < exports; i++)
        if (p[9 + i].revents)
            must(exports_event(&agent->exports, i, &agent->port), "port");
    handle_clients(agent, p + 9 + exports, clients);
    if (p[7].revents)
        must(clients_accept(&agent->clients), "client socket");
    if (p[1].revents)
        on_children(agent);
    if (p[2].revents)
        must(program_keeper_event(&agent->program, &agent->port, agent->vmstat), "the keeper ended");
    if (p[0].revents)
        on_port(agent);
}

void agent_run(struct agent *agent)
{
    become_frozen(agent);
    for (;;) {
        if (agent->state == AGENT_FROZEN) {
            on_port(agent); /* blocks in read(2): nothing else may stir */
            continue;
        }
        nfds_t count = prepare_poll(agent);
        if (poll(agent->polled, count, program_patience_ms(&agent->program)) < 0 && errno != EINTR)
            die("poll", errno);
        handle_events(agent, count);
        must(program_stdin_taken(&agent->program, &agent->port), "port");
        if (agent->state == AGENT_FREEZING)
            try_to_freeze(agent);
    }
}
