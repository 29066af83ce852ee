#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PORT_NAME "sf.agent"
#define PORTS "/sys/class/virtio-ports"

static bool has_our_name(const char *device)
{
    char path[sizeof PORTS + 280], name[sizeof PORT_NAME + 1];
    snprintf(path, sizeof path, PORTS "/%s/name", device);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, name, sizeof name);
    close(fd);
    return n == (ssize_t)sizeof PORT_NAME && memcmp(name, PORT_NAME "\n", (size_t)n) == 0;
}

static int find_port(char *path, size_t room)
{
    DIR *folder = opendir(PORTS);
    if (!folder)
        return -errno;
    int result = -ENOENT;
    for (const struct dirent *entry; result < 0 && (entry = readdir(folder));) {
        if (entry->d_name[0] != '.' && has_our_name(entry->d_name)) {
            snprintf(path, room, "/dev/%s", entry->d_name);
            result = 0;
        }
    }
    closedir(folder);
    return result;
}

int port_open(struct port *port)
{
    char path[300];
    int result = find_port(path, sizeof path);
    /* The host names the port in a control message that may come after the driver's probe has returned. */
    for (unsigned attempt = 0; result == -ENOENT && attempt < 2000; attempt++) {
        nanosleep(&(struct timespec){ .tv_nsec = 5 * 1000 * 1000 }, NULL);
        result = find_port(path, sizeof path);
    }
    if (result < 0)
        return result;
    port->fd = open(path, O_RDWR | O_CLOEXEC);
    if (port->fd < 0)
        return -errno;
    port->in.capacity = 2 * (FRAME_HEADER_SIZE + FRAME_MAX_PAYLOAD);
    port->in.data = malloc(port->in.capacity);
    port->out = malloc(FRAME_HEADER_SIZE + FRAME_MAX_PAYLOAD);
    return port->in.data && port->out ? 0 : -ENOMEM;
}

int port_fill(struct port *port)
{
    for (;;) {
        size_t space;
        uint8_t *at = frame_space(&port->in, &space);
        ssize_t n = read(port->fd, at, space);
        if (n > 0) {
            frame_filled(&port->in, (size_t)n);
            return 0;
        }
        if (n < 0 && errno != EINTR && errno != EAGAIN)
            return -errno;
        /* 0: no host is connected, and the driver then neither blocks in read(2) nor in poll(2). A guest that has lost
           its host has nothing to do but to wait for the next one; this is not a path that a working host takes. */
        if (n == 0)
            nanosleep(&(struct timespec){ .tv_nsec = 10 * 1000 * 1000 }, NULL);
    }
}

uint8_t *port_payload(struct port *port)
{
    return port->out + FRAME_HEADER_SIZE;
}

int port_send_prepared(struct port *port, enum frame_type type, uint16_t channel, size_t size)
{
    frame_header(port->out, type, channel, size);
    const uint8_t *at = port->out;
    size_t left = FRAME_HEADER_SIZE + size;
    while (left > 0) {
        /* The driver takes at most 32 KiB at once (drivers/char/virtio_console.c, port_fops_write). */
        ssize_t n = write(port->fd, at, left);
        if (n < 0 && errno != EINTR)
            return -errno;
        if (n > 0) {
            at += n;
            left -= (size_t)n;
        }
    }
    return 0;
}

int port_send(struct port *port, enum frame_type type, uint16_t channel, const void *payload, size_t size)
{
    if (size > FRAME_MAX_PAYLOAD)
        return -EMSGSIZE;
    if (size > 0)
        memcpy(port_payload(port), payload, size);
    return port_send_prepared(port, type, channel, size);
}
