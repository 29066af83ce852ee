/* Local programs reach the host through a SEQPACKET socket: one packet is one message, relayed unread but for its "id". */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define MAX_MESSAGE (128u << 10)

int clients_open(struct clients *clients)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = AGENT_FOLDER "/agent.sock" };
    int result = make_folders(AGENT_FOLDER);
    if (result < 0)
        return result;
    clients->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (clients->listener < 0)
        return -errno;
    if (bind(clients->listener, (const struct sockaddr *)&address, sizeof address) < 0 ||
        chmod(address.sun_path, 0666) < 0 || listen(clients->listener, 64) < 0)
        return -errno;
    return 0;
}

static struct client *find_client(struct clients *clients, uint16_t id)
{
    for (size_t i = 0; i < clients->count; i++)
        if (clients->list[i].id == id)
            return &clients->list[i];
    return NULL;
}

/* The id that was free for longest: a late reply to a client that is gone must not reach its successor. */
static uint16_t unused_id(struct clients *clients)
{
    do {
        clients->newest = clients->newest == UINT16_MAX ? 1 : (uint16_t)(clients->newest + 1);
    } while (find_client(clients, clients->newest));
    return clients->newest;
}

int clients_accept(struct clients *clients)
{
    int fd = accept4(clients->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return errno == EAGAIN || errno == ECONNABORTED ? 0 : -errno;
    if (clients->count == MAX_CLIENTS) {
        close(fd); /* the program sees end of file: too many open connections */
        return 0;
    }
    clients->list[clients->count] = (struct client){ .fd = fd, .id = unused_id(clients) };
    clients->count++;
    return 0;
}

static int remember_request(struct client *client, int64_t number)
{
    if (client->waiting_count == client->waiting_room) {
        size_t room = client->waiting_room ? 2 * client->waiting_room : 8;
        int64_t *grown = realloc(client->waiting, room * sizeof *grown);
        if (!grown)
            return -ENOMEM;
        client->waiting = grown;
        client->waiting_room = room;
    }
    client->waiting[client->waiting_count++] = number;
    return 0;
}

static void forget_request(struct client *client, int64_t number)
{
    for (size_t i = 0; i < client->waiting_count; i++) {
        if (client->waiting[i] == number) {
            client->waiting[i] = client->waiting[--client->waiting_count];
            return;
        }
    }
}

static int drop_client(struct clients *clients, size_t i, struct port *port)
{
    struct client *client = &clients->list[i];
    uint16_t id = client->id;
    close(client->fd);
    free(client->waiting);
    queue_clear(&client->replies);
    *client = clients->list[--clients->count];
    return port_send(port, FRAME_GONE, id, NULL, 0);
}

/* What cannot be delivered, now or ever (no memory, larger than the socket's buffer), ends the connection: the client would wait
   for it for ever. Returns false if there is no room yet. */
static bool deliver(const struct client *client, const uint8_t *data, size_t size)
{
    if (send(client->fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        return true;
    if (errno == EAGAIN)
        return false;
    shutdown(client->fd, SHUT_RDWR); /* its event follows */
    return true;
}

static void flush_replies(struct client *client)
{
    for (struct chunk *chunk; (chunk = client->replies.first) && deliver(client, chunk->data, chunk->size);)
        queue_pop(&client->replies);
}

/* Relay one packet. Returns 0, -EPIPE at the end of the client's stream, -EAGAIN if there is none, or -errno. */
static int relay_request(struct client *client, struct port *port)
{
    uint8_t *payload = port_payload(port);
    ssize_t n = recv(client->fd, payload, MAX_MESSAGE + 1, MSG_DONTWAIT | MSG_TRUNC);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        return -EPIPE;
    if (n < 0)
        return -EAGAIN;
    if (n > (ssize_t)MAX_MESSAGE)
        return -EPIPE; /* against the protocol: hang up */
    int64_t number;
    if (message_integer(payload, (size_t)n, "id", &number) == 0) {
        int result = remember_request(client, number);
        if (result < 0)
            return result;
    }
    return port_send_prepared(port, FRAME_REQUEST, client->id, (size_t)n);
}

int clients_event(struct clients *clients, size_t i, short events, struct port *port, bool *gone)
{
    struct client *client = &clients->list[i];
    *gone = false;
    if (events & POLLOUT)
        flush_replies(client);
    if (!(events & (POLLIN | POLLHUP | POLLERR)))
        return 0;
    int result = relay_request(client, port);
    if (result == -EPIPE) {
        *gone = true;
        return drop_client(clients, i, port);
    }
    return result == -EAGAIN ? 0 : result;
}

static void send_or_queue(struct client *client, const uint8_t *data, size_t size)
{
    if (!client->replies.first && deliver(client, data, size))
        return;
    /* Out of memory: the same as above. */
    if (queue_append(&client->replies, data, size) < 0)
        shutdown(client->fd, SHUT_RDWR);
}

void clients_deliver(struct clients *clients, uint16_t id, const uint8_t *data, size_t size)
{
    struct client *client = find_client(clients, id);
    int64_t number;
    if (!client)
        return; /* it hung up while the reply was on its way */
    if (client->waiting_count > 0 && message_integer(data, size, "id", &number) == 0)
        forget_request(client, number);
    send_or_queue(client, data, size);
}

bool clients_waits(struct clients *clients, uint16_t id)
{
    const struct client *client = find_client(clients, id);
    struct pollfd polled = { .fd = client ? client->fd : -1 };
    return client && poll(&polled, 1, 0) >= 0 && !(polled.revents & (POLLHUP | POLLERR));
}

static void send_cancelled(struct client *client, int64_t number)
{
    static const char message[] = "the request was made before this VM was cloned; its answer went to the parent";
    msgpack_sbuffer buffer;
    msgpack_packer packer;
    msgpack_sbuffer_init(&buffer);
    msgpack_packer_init(&packer, &buffer, msgpack_sbuffer_write);
    msgpack_pack_map(&packer, 3);
    msgpack_pack_str_with_body(&packer, "id", 2);
    msgpack_pack_int64(&packer, number);
    msgpack_pack_str_with_body(&packer, "error", 5);
    msgpack_pack_str_with_body(&packer, "cancelled", 9);
    msgpack_pack_str_with_body(&packer, "message", 7);
    msgpack_pack_str_with_body(&packer, message, sizeof message - 1);
    send_or_queue(client, (const uint8_t *)buffer.data, buffer.size);
    msgpack_sbuffer_destroy(&buffer);
}

void clients_cancel(struct clients *clients, uint16_t channel, const uint8_t *reply, size_t size, uint8_t *scratch)
{
    for (size_t i = 0; i < clients->count; i++) {
        struct client *client = &clients->list[i];
        int64_t answered = 0, number;
        bool has_reply = client->id == channel && reply && message_integer(reply, size, "id", &answered) == 0;
        /* Requests that lay in the socket when the VM was frozen belong to the parent, too. */
        for (ssize_t n; (n = recv(client->fd, scratch, MAX_MESSAGE, MSG_DONTWAIT)) > 0;)
            if (message_integer(scratch, (size_t)n, "id", &number) == 0)
                send_cancelled(client, number);
        size_t kept = 0;
        for (size_t k = 0; k < client->waiting_count; k++) {
            if (has_reply && client->waiting[k] == answered)
                client->waiting[kept++] = answered;
            else
                send_cancelled(client, client->waiting[k]);
        }
        client->waiting_count = kept;
    }
}
