/* The guest agent: PID 1 of every guest. One process, one thread, one poll(2) loop.

   The life of an agent is a cycle of states; transitions are in loop.c and nowhere else:

       FROZEN --THAW--> (THAWING while mounts are made) --> RUNNING --FREEZE--> FREEZING --all still--> FROZEN
                                                               ^--------THAW--------|

   In FROZEN nothing is in flight in either direction of the port: a VM is saved there, and clones wake up there.
   The path from the end of FROZEN to the first instruction of the user's program is what a clone costs: it
   allocates little, opens nothing and executes nothing that was not prepared at boot. */
#ifndef SF_AGENT_H
#define SF_AGENT_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/types.h>
#include <termios.h>

#include "frame.h"
#include "message.h"

#define AGENT_FOLDER "/run/sfparallel"
#define MAX_CLIENTS 256u
#define MAX_EXPORTS 64u
#define MAX_POLLED (16u + MAX_CLIENTS + MAX_EXPORTS)

/* ---- port.c: the virtio-serial port ---- */

struct port {
    int fd;                  /* blocking */
    struct frame_buffer in;
    uint8_t *out;            /* FRAME_HEADER_SIZE + FRAME_MAX_PAYLOAD bytes: header, then payload */
};

/* Find and open the port named sf.agent. Returns 0 or -errno. */
int port_open(struct port *port);

/* One read(2); blocks while there is nothing. Returns 0 or -errno. */
int port_fill(struct port *port);

/* Send a frame; blocks until the host has taken it. Returns 0 or -errno. */
int port_send(struct port *port, enum frame_type type, uint16_t channel, const void *payload, size_t size);

/* Where to put a payload (FRAME_MAX_PAYLOAD bytes) that port_send_prepared() then sends without another copy. */
uint8_t *port_payload(struct port *port);
int port_send_prepared(struct port *port, enum frame_type type, uint16_t channel, size_t size);

/* ---- queue.c: bytes that wait until somebody reads them ---- */

struct chunk {
    struct chunk *next;
    size_t size, done; /* data[done .. size) still waits */
    uint8_t data[];
};

struct queue {
    struct chunk *first, *last;
};

int queue_append(struct queue *queue, const void *data, size_t size); /* 0 or -ENOMEM */
void queue_pop(struct queue *queue);                                  /* drop the first chunk */
void queue_clear(struct queue *queue);

/* ---- clients.c: local programs on the unix socket ---- */

struct client {
    int fd;
    uint16_t id;             /* channel of its frames, never 0 */
    int64_t *waiting;        /* "id"s of its requests that have no reply yet */
    size_t waiting_count, waiting_room;
    struct queue replies;    /* what its socket had no room for */
};

struct clients {
    int listener;
    uint16_t newest;
    size_t count;
    struct client list[MAX_CLIENTS];
};

int clients_open(struct clients *clients);
int clients_accept(struct clients *clients);
/* Handle poll(2) events of client i. Returns true if the client is gone (its slot then holds another one). */
int clients_event(struct clients *clients, size_t i, short events, struct port *port, bool *gone);
void clients_deliver(struct clients *clients, uint16_t id, const uint8_t *data, size_t size);
/* Whether a client is there and has not hung up. */
bool clients_waits(struct clients *clients, uint16_t id);
/* In a clone: answer every request but the one that `reply` answers with {"error": "cancelled"}: they were the parent's. */
void clients_cancel(struct clients *clients, uint16_t channel, const uint8_t *reply, size_t size, uint8_t *scratch);

/* ---- pty.c: the program's terminal ---- */

struct terminal {
    uint8_t streams;         /* bit n: descriptor n of the program is to be the terminal, as on the host (frame TERMINAL) */
    struct winsize size;
    int master, slave;       /* -1: the program has none; the slave is held to look at its unread input */
    int unread;              /* what would be unread of its input if nobody had read since we wrote last; see terminal_write */
    uint16_t channel;        /* of its output */
    bool deaf;               /* nobody reads its output any more */
};

int terminal_set(struct terminal *terminal, const uint8_t *payload, size_t size, pid_t program); /* 0 or -errno */
int terminal_open(struct terminal *terminal);  /* one more descriptor for the program, or -errno */
void terminal_close(struct terminal *terminal);
int terminal_send_modes(const struct terminal *terminal, struct port *port);
int terminal_event(const struct terminal *terminal, struct port *port); /* one piece */
int terminal_drain(const struct terminal *terminal, struct port *port); /* all that is in it now */
int terminal_discard(const struct terminal *terminal, uint8_t *scratch, size_t size);
ssize_t terminal_write(struct terminal *terminal, const uint8_t *data, size_t size); /* as write(2): input, what fits of it */
bool terminal_end_input(struct terminal *terminal);                     /* false: not yet, ask again */

/* ---- program.c: keeper and user program ---- */

struct program {
    int keeper;              /* SEQPACKET socket to it */
    pid_t keeper_pid;
    bool keeper_outside;     /* of the control group that is frozen */
    pid_t pid;               /* the user program's, leader of its process group; 0: none (yet) */
    bool started;            /* RUN was forwarded and EXITED not yet sent */
    int signal;              /* to be sent as soon as pid is known; 0: none */
    int input, output, error; /* our pipe ends; -1: closed; of what is a terminal, `input` is a duplicate of its master */
    struct terminal terminal;
    struct queue stdin_queue;
    bool stdin_end;          /* close `input` when the queue is empty */
    bool stdin_owed;         /* the host waits for TAKEN before it sends more input */
};

int program_start_keeper(struct program *program);   /* returns when it says "ready"; 0 or -errno */
int program_run(struct program *program, const uint8_t *payload, size_t size);
int program_keeper_event(struct program *program, struct port *port, int vmstat);
void program_signal(struct program *program, int number);
int program_stdin(struct program *program, const uint8_t *data, size_t size);
void program_stdin_event(struct program *program);
int program_patience_ms(const struct program *program); /* how long poll(2) may wait: -1, unless input waits for its reader */
void program_close_stdin(struct program *program);
int program_stdin_taken(struct program *program, struct port *port); /* tells the host when it may send more input */
void program_close_output(struct program *program, uint16_t channel); /* nobody reads it any more: EPIPE for who prints */
int program_output_event(int *fd, struct port *port, uint16_t channel); /* one piece */
int program_drain(struct program *program, struct port *port);          /* all that is in the pipes now */
int program_discard(struct program *program, uint8_t *scratch, size_t size);

/* ---- cgroup.c: the control group of all that a user's program can be ---- */

struct cgroup {
    int freeze, events;      /* cgroup.freeze and cgroup.events, kept open */
    bool frozen;             /* what was last written */
};

int cgroup_open(struct cgroup *cgroup);
/* The calling process enters the group, for good: neither it nor what it starts can leave. 0 or -errno. */
int cgroup_enter(void);
/* The keeper starts programs from inside, and waits outside: a clone need not wake it up. 0 or -errno. */
int cgroup_put_keeper(pid_t keeper, bool inside);
int cgroup_set(struct cgroup *cgroup, bool frozen);
bool cgroup_is_frozen(const struct cgroup *cgroup);      /* all of its processes have stopped */
int64_t oom_kills(int vmstat);                           /* since boot; -errno */

/* ---- identity.c ---- */

/* A small file that is kept open and written anew. */
struct text_file {
    int fd;
    size_t size;
};

struct host {
    int random, hosts; /* files kept open */
    struct text_file hostname, machine_id, role;
    int route, diag;       /* netlink sockets */
    int control;           /* a socket for ioctls of interfaces */
    int interface;         /* index of eth0; 0: there is none */
    bool configured;       /* eth0 is up, with the address, prefix and MTU that follow */
    struct in_addr address;
    uint8_t prefix;
    uint32_t mtu;
    uint32_t sequence;     /* of netlink messages */
    uint8_t *batch;        /* BATCH_SIZE bytes each: what goes to and comes from the kernel */
    uint8_t *answer;
};

int host_open(struct host *host);
int set_clock(int64_t time_ns); /* CLOCK_REALTIME; 0 or -errno */
/* Take the identity. Returns 0, or -errno and in *step what could not be done. */
/* Set the clock to the host's, which told it a moment ago, but never back: programs go on by it. */
void clock_catch_up(int64_t time_ns);
int identity_take(struct host *host, const struct identity *identity, const char **step);
/* Destroy TCP and connected UDP sockets of a former address. */
int ghosts_destroy(struct host *host, const char **step);

/* ---- fuse.c: host folders ---- */

struct exports {
    size_t count;
    struct { int fd; uint16_t tag; } list[MAX_EXPORTS];
    unsigned unanswered;     /* requests that were relayed and not answered yet */
    pid_t child;             /* makes the overlay mounts; 0: none */
    int child_errors;        /* read end of a pipe on which it says what went wrong */
};

/* Mount the FUSE file systems and start the child that makes the overlays. Returns 0, or -errno and *step. */
int exports_mount(struct exports *exports, const struct thaw *thaw, const char **step);
/* The child has exited with `status`: 0, or -EIO and its message in `text` (`room` bytes). */
int exports_child_done(struct exports *exports, int status, char *text, size_t room);
int exports_event(struct exports *exports, size_t i, struct port *port);
void exports_reply(struct exports *exports, uint16_t tag, const uint8_t *data, size_t size);

/* ---- boot.c ---- */

/* From the kernel's hand-over to a root with everything mounted. Dies on failure. `wrong` gets what the processor computes
   wrong, as text of lines; it is empty if there is nothing. */
void boot(char *wrong, size_t room);
void die(const char *what, int error) __attribute__((noreturn)); /* says so on the console, then powers off */
void power_off(void) __attribute__((noreturn));
int write_file(const char *path, const char *text);              /* 0 or -errno */
int make_folders(const char *path);                              /* mkdir -p; 0 or -errno */

/* ---- processor.c ---- */

/* Run the test of the processor. `text` (room > 0) gets what it found wrong. Returns 0, or -errno if it could not be run. */
int processor_check(const char *path, char *text, size_t room);

/* ---- loop.c ---- */

enum agent_state { AGENT_FROZEN, AGENT_THAWING, AGENT_RUNNING, AGENT_FREEZING };

struct agent {
    enum agent_state state;
    struct port port;
    struct clients clients;
    struct program program;
    struct cgroup cgroup;
    struct host host;
    struct exports exports;
    int children;            /* signalfd for SIGCHLD */
    int vmstat;              /* /proc/vmstat, kept open */
    struct pollfd polled[MAX_POLLED];
    /* while a THAW is being carried out: */
    int64_t thaw_wall_ns, thaw_cpu_ns;
    uint16_t thaw_channel;
    uint8_t *thaw_reply;     /* copy, only in THAWING */
    size_t thaw_reply_size;
};

void agent_run(struct agent *agent) __attribute__((noreturn));

#endif
