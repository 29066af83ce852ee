/* Feeds the agent's parts that do no I/O from standard input, and prints what they make of it. Built with ASan and UBSan.

     frames PIECE   parse frames that come in pieces of PIECE bytes
     thaw           decode a THAW payload
     report         decode a report of the keeper
     answers        walk a netlink datagram as if it were a dump of addresses of interface 2
     batch          print the messages of an identity, hexadecimal */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "frame.h"
#include "message.h"
#include "netlink.h"

static uint8_t *read_all(size_t *size)
{
    size_t room = 1 << 16, have = 0;
    uint8_t *data = malloc(room);
    for (;;) {
        ssize_t n = read(0, data + have, room - have);
        if (n <= 0)
            break;
        have += (size_t)n;
        if (have == room)
            data = realloc(data, room *= 2);
    }
    /* Of exactly this size, so that the sanitizer sees every byte read beyond it. */
    uint8_t *exact = malloc(have ? have : 1);
    memcpy(exact, data, have);
    free(data);
    *size = have;
    return exact;
}

static int frames(const uint8_t *data, size_t size, size_t piece)
{
    struct frame_buffer buffer = { .capacity = 2 * (FRAME_HEADER_SIZE + FRAME_MAX_PAYLOAD) };
    struct frame frame;
    int result = 0;
    buffer.data = malloc(buffer.capacity);
    while (size > 0 && result == 0) {
        size_t space, n = piece < size ? piece : size;
        uint8_t *at = frame_space(&buffer, &space);
        if (space == 0)
            abort();
        if (n > space)
            n = space;
        memcpy(at, data, n);
        frame_filled(&buffer, n);
        data += n;
        size -= n;
        while ((result = frame_next(&buffer, &frame)) > 0) {
            uint32_t sum = 0;
            for (uint32_t i = 0; i < frame.size; i++)
                sum = sum * 31 + frame.payload[i];
            printf("%u %u %u %u\n", frame.type, frame.channel, frame.size, sum);
        }
    }
    printf("end %d\n", result);
    free(buffer.data);
    return 0;
}

static void print_identity(const struct identity *identity)
{
    char address[INET_ADDRSTRLEN];
    inet_ntop(AF_INET, &identity->address, address, sizeof address);
    printf("identity %d %lld %s %s %s %u %u %u\n", (int)identity->role, (long long)identity->time_ns, identity->hostname,
           identity->machine_id, address, identity->prefix, identity->mtu, identity->entropy[63]);
    for (size_t i = 0; i < identity->neighbours->size; i++) {
        struct neighbour neighbour;
        if (thaw_neighbour(identity, i, &neighbour) < 0) {
            printf("bad neighbour\n");
            continue;
        }
        inet_ntop(AF_INET, &neighbour.address, address, sizeof address);
        printf("neighbour %s %02x\n", address, neighbour.mac[5]);
    }
}

static int thaw(const uint8_t *data, size_t size)
{
    struct thaw thaw;
    const char *what;
    if (thaw_decode(data, size, &thaw, &what) < 0) {
        printf("bad %s\n", what);
        return 0;
    }
    if (thaw.has_identity)
        print_identity(&thaw.identity);
    printf("reply %u %zu\n", thaw.channel, thaw.reply ? thaw.reply_size : 0);
    for (size_t i = 0; i < thaw.mounts->size; i++) {
        struct export export;
        if (thaw_export(&thaw, i, &export) < 0)
            printf("bad mount\n");
        else
            printf("mount %u %s\n", export.tag, export.mountpoint);
    }
    thaw_free(&thaw);
    return 0;
}

static int report(const uint8_t *data, size_t size)
{
    struct report decoded;
    if (report_decode(data, size, &decoded) < 0)
        printf("bad\n");
    else if (decoded.kind == REPORT_PID)
        printf("pid %lld\n", (long long)decoded.pid);
    else
        printf("exited %lld %lld\n", (long long)decoded.pid, (long long)decoded.status);
    return 0;
}

static int answers(const uint8_t *data, size_t size)
{
    for (const struct nlmsghdr *m = NULL; (m = netlink_next(data, size, m));) {
        struct in_addr address;
        uint8_t prefix;
        char text[INET_ADDRSTRLEN];
        if (netlink_address(m, 2, &address, &prefix))
            printf("address %s/%u\n", inet_ntop(AF_INET, &address, text, sizeof text), prefix);
        else
            printf("message %u\n", m->nlmsg_type);
    }
    return 0;
}

static int print_batch(void)
{
    static uint8_t space[256] __attribute__((aligned(4)));
    struct batch batch = { .data = space, .capacity = sizeof space, .sequence = 41 };
    struct neighbour neighbour = { .mac = { 10, 83, 70, 0, 0, 2 } };
    const uint8_t mac[MAC_SIZE] = { 10, 83, 70, 0, 0, 1 };
    struct in_addr address;
    inet_pton(AF_INET, "10.83.0.9", &address);
    inet_pton(AF_INET, "10.83.0.2", &neighbour.address);
    int result = batch_delete_address(&batch, 2, address, 16);
    result |= batch_set_link(&batch, 2, mac, 9000);
    result |= batch_add_address(&batch, 2, address, 16);
    result |= batch_add_neighbour(&batch, 2, &neighbour);
    batch_acknowledge_last(&batch);
    printf("%d %u ", result, batch.count);
    for (size_t i = 0; i < batch.size; i++)
        printf("%02x", space[i]);
    printf("\n");
    size_t before = batch.size;
    while (result == 0)
        result = batch_add_neighbour(&batch, 2, &neighbour);
    printf("%d %d\n", result, batch.size > before && batch.size <= sizeof space);
    return 0;
}

int main(int argc, char **argv)
{
    size_t size;
    uint8_t *data = read_all(&size);
    const char *mode = argc > 1 ? argv[1] : "";
    int result = 2;
    if (strcmp(mode, "frames") == 0 && argc > 2)
        result = frames(data, size, (size_t)strtoul(argv[2], NULL, 10));
    else if (strcmp(mode, "thaw") == 0)
        result = thaw(data, size);
    else if (strcmp(mode, "report") == 0)
        result = report(data, size);
    else if (strcmp(mode, "answers") == 0)
        result = answers(data, size);
    else if (strcmp(mode, "batch") == 0)
        result = print_batch();
    free(data);
    return result;
}
