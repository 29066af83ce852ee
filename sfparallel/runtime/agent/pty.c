/* The program's terminal, where the host's standard streams are one. The host's terminal stays what the user has: it edits lines,
   echoes, makes signals of keys and turns line feeds into what it needs. This one passes bytes: "external processing" (EXTPROC,
   as telnetd and rlogind use it) does nothing to input though the modes say that lines are edited and echoed, so that programs see
   an ordinary terminal; and the kernel tells in packet mode (ioctl_tty(2), TIOCPKT_IOCTL) when they change the modes. The host then
   does the same to its own: input() with readline, getpass and debuggers work.

   It is nobody's controlling terminal: its hang-up would reach the program when its input ends, and the keeper when the program
   does. What the kernel would signal (SIGWINCH) the agent does. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PIECE_SIZE 4096u      /* what one read(2) gives at most: N_TTY_BUF_SIZE */
#define MOST_WAITING (64u << 10) /* more than a terminal holds: 4 KiB, and 8 on their way (drivers/tty/pty.c) */
#define MOST_UNREAD 4000      /* a full buffer of input (4 KiB) loses bytes (drivers/tty/n_tty.c, "overflow") */

int terminal_set(struct terminal *terminal, const uint8_t *payload, size_t size, pid_t program)
{
    if (size != 5)
        return -EPROTO;
    terminal->streams = payload[0];
    terminal->size.ws_row = (uint16_t)(payload[1] | payload[2] << 8);
    terminal->size.ws_col = (uint16_t)(payload[3] | payload[4] << 8);
    if (terminal->master < 0)
        return 0;
    if (ioctl(terminal->master, TIOCSWINSZ, &terminal->size) < 0)
        return -errno;
    if (program > 0)
        kill(-program, SIGWINCH);
    return 0;
}

static int set_modes(int master)
{
    struct termios modes;
    if (tcgetattr(master, &modes) < 0)
        return -errno;
    modes.c_iflag |= IUTF8;
    modes.c_oflag = OPOST; /* and nothing of what it may do: programs that switch it off are noticed */
    modes.c_lflag |= EXTPROC;
    return tcsetattr(master, TCSANOW, &modes) < 0 ? -errno : 0;
}

static int open_pair(struct terminal *terminal)
{
    char name[64];
    int on = 1, locked = 0;
    terminal->master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (terminal->master < 0 || ioctl(terminal->master, TIOCSPTLCK, &locked) < 0 ||
        ptsname_r(terminal->master, name, sizeof name) != 0)
        return -errno;
    terminal->slave = open(name, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (terminal->slave < 0)
        return -errno;
    int result = set_modes(terminal->master);
    if (result < 0)
        return result;
    if (ioctl(terminal->master, TIOCSWINSZ, &terminal->size) < 0 || ioctl(terminal->master, TIOCPKT, &on) < 0)
        return -errno;
    terminal->channel = terminal->streams & 2 ? 1 : 2;
    terminal->deaf = false;
    terminal->unread = 0;
    return 0;
}

int terminal_open(struct terminal *terminal)
{
    char name[64];
    int result = terminal->master < 0 ? open_pair(terminal) : 0;
    if (result < 0)
        return result;
    if (ptsname_r(terminal->master, name, sizeof name) != 0)
        return -errno;
    int theirs = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    return theirs < 0 ? -errno : theirs;
}

void terminal_close(struct terminal *terminal)
{
    if (terminal->master >= 0) {
        close(terminal->master);
        close(terminal->slave);
    }
    terminal->master = terminal->slave = -1;
}

int terminal_send_modes(const struct terminal *terminal, struct port *port)
{
    struct termios modes;
    uint8_t payload[14], *at = payload;
    if (terminal->master < 0 || tcgetattr(terminal->master, &modes) < 0) /* of a master: those of the other side */
        return 0;
    const tcflag_t flags[3] = { modes.c_iflag, modes.c_oflag, modes.c_lflag };
    for (unsigned i = 0; i < 3; i++)
        for (unsigned shift = 0; shift < 32; shift += 8)
            *at++ = (uint8_t)(flags[i] >> shift);
    *at++ = modes.c_cc[VMIN];
    *at++ = modes.c_cc[VTIME];
    return port_send(port, FRAME_MODES, 0, payload, sizeof payload);
}

/* Send what one read(2) gives. Returns how many bytes it read, 0 if there is nothing, or -errno of the port. */
static int relay_piece(const struct terminal *terminal, struct port *port)
{
    /* The first byte says what the rest is. It lies where the frame's header will be. */
    uint8_t *packet = port_payload(port) - 1;
    ssize_t n = read(terminal->master, packet, 1 + PIECE_SIZE);
    if (n <= 0) /* EAGAIN; and nothing ends here: a side of it is open as long as we are */
        return 0;
    if (packet[0] != TIOCPKT_DATA) {
        int sent = packet[0] & TIOCPKT_IOCTL ? terminal_send_modes(terminal, port) : 0;
        return sent < 0 ? sent : 1;
    }
    if (n == 1 || terminal->deaf)
        return (int)n;
    int result = port_send_prepared(port, FRAME_OUTPUT, terminal->channel, (size_t)n - 1);
    return result < 0 ? result : (int)n;
}

int terminal_event(const struct terminal *terminal, struct port *port)
{
    int result = relay_piece(terminal, port);
    return result < 0 ? result : 0;
}

/* read(2) of a terminal waits for what is on its way inside of the kernel (n_tty_read(), tty_buffer_flush_work()). */
int terminal_drain(const struct terminal *terminal, struct port *port)
{
    for (size_t sent = 0; terminal->master >= 0 && sent < MOST_WAITING;) {
        int n = relay_piece(terminal, port);
        if (n <= 0)
            return n;
        sent += (size_t)n;
    }
    return 0;
}

int terminal_discard(const struct terminal *terminal, uint8_t *scratch, size_t size)
{
    const int ends[2] = { terminal->master, terminal->slave };
    for (unsigned i = 0; i < 2 && terminal->master >= 0; i++) {
        ssize_t n;
        int waiting;
        /* 0: an end of file that nobody has read; or always, if the program has hung the terminal up: then the ioctl fails. */
        while ((n = read(ends[i], scratch, size)) > 0 || (n == 0 && ioctl(ends[i], FIONREAD, &waiting) == 0) ||
               (n < 0 && errno == EINTR))
            ;
        if (n < 0 && errno != EAGAIN && errno != EIO)
            return -errno;
    }
    return 0;
}

static bool is_empty(const struct terminal *terminal)
{
    struct pollfd polled = { .fd = terminal->slave, .events = POLLIN };
    return poll(&polled, 1, 0) == 0;
}

/* How much input fits for certain. FIONREAD does not count what is on its way inside of the kernel. Nothing is, if all is there
   that was written; or if there is nothing, because poll(2) of an empty terminal waits for it (n_tty_poll()). */
static size_t room(struct terminal *terminal)
{
    int unread = 0;
    if (ioctl(terminal->slave, FIONREAD, &unread) < 0) {
        terminal->unread = 0; /* hung up: there is nobody who could miss any */
        return MOST_UNREAD;
    }
    if (unread < terminal->unread && (!is_empty(terminal) || ioctl(terminal->slave, FIONREAD, &unread) < 0))
        return 0;
    terminal->unread = unread;
    return unread < MOST_UNREAD ? (size_t)(MOST_UNREAD - unread) : 0;
}

ssize_t terminal_write(struct terminal *terminal, const uint8_t *data, size_t size)
{
    size_t most = room(terminal);
    if (most == 0) {
        errno = EAGAIN;
        return -1;
    }
    ssize_t n = write(terminal->master, data, size < most ? size : most);
    if (n > 0)
        terminal->unread += (int)n;
    return n;
}

/* A reader takes this character for an end of file only if it finds no other beside it (n_tty_read() with EXTPROC): neither what
   was typed before nor what is typed after it. */
bool terminal_end_input(struct terminal *terminal)
{
    struct termios modes;
    if (!is_empty(terminal))
        return false;
    if (tcgetattr(terminal->master, &modes) < 0 || !(modes.c_lflag & ICANON))
        return true; /* there is no such thing as an end in this mode */
    if (write(terminal->master, &modes.c_cc[VEOF], 1) != 1)
        return false;
    terminal->unread = INT_MAX; /* more only when it was read */
    return true;
}
