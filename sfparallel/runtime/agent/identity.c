/* Taking on an identity: everything in process, on descriptors opened at boot. Whatever fails, the caller must not let
   user code run. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <linux/sock_diag.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "netlink.h"

#define BATCH_SIZE (64u << 10)
#define BATCH_MESSAGES 128u /* an answer to each of them must fit into the socket's receive buffer */
#define HOSTS_LINE 128      /* fixed width of the first line of /etc/hosts, which alone changes */

static int open_netlink(int protocol)
{
    int one = 1;
    struct sockaddr_nl any = { .nl_family = AF_NETLINK };
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (fd < 0)
        return -errno;
    /* Errors come without a copy of the request. Bound now, because else the first request binds it: in a clone. */
    if (setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &one, sizeof one) < 0 ||
        bind(fd, (const struct sockaddr *)&any, sizeof any) < 0) {
        int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

static int open_kept(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    return fd < 0 ? -errno : fd;
}

static struct text_file open_text(const char *path)
{
    struct text_file file = { .fd = open_kept(path) };
    off_t end = file.fd < 0 ? 0 : lseek(file.fd, 0, SEEK_END);
    file.size = end > 0 ? (size_t)end : 0;
    return file;
}

static int replace_text(struct text_file *file, const char *text)
{
    size_t size = strlen(text);
    if (pwrite(file->fd, text, size, 0) != (ssize_t)size)
        return -errno;
    /* Names of clones are longer than their parent's, mostly: to cut a file is the dearest part of writing it. */
    if (size < file->size && ftruncate(file->fd, (off_t)size) < 0)
        return -errno;
    file->size = size;
    return 0;
}

static int write_hosts(int fd, const char *address, const char *hostname)
{
    char line[HOSTS_LINE + 1];
    snprintf(line, sizeof line, "%s %s", address, hostname);
    size_t length = strlen(line);
    memset(line + length, ' ', HOSTS_LINE - length);
    line[HOSTS_LINE - 1] = '\n';
    return pwrite(fd, line, HOSTS_LINE, 0) == HOSTS_LINE ? 0 : -errno;
}

static int prepare_hosts(int fd)
{
    static const char rest[] = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";
    int result = write_hosts(fd, "127.0.1.1", "sf");
    if (result < 0)
        return result;
    if (pwrite(fd, rest, sizeof rest - 1, HOSTS_LINE) < 0 || ftruncate(fd, (off_t)(HOSTS_LINE + sizeof rest - 1)) < 0)
        return -errno;
    return 0;
}

int host_open(struct host *host)
{
    *host = (struct host){
        .random = open_kept("/dev/urandom"),
        .hostname = open_text("/etc/hostname"),
        .machine_id = open_text("/etc/machine-id"),
        .hosts = open_kept("/etc/hosts"),
        .role = open_text(AGENT_FOLDER "/role"),
        .route = open_netlink(NETLINK_ROUTE),
        .diag = open_netlink(NETLINK_SOCK_DIAG),
        .control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0),
        .interface = (int)if_nametoindex("eth0"),
        .batch = malloc(BATCH_SIZE),
        .answer = malloc(BATCH_SIZE),
    };
    const int fds[] = { host->random, host->hostname.fd, host->machine_id.fd, host->hosts, host->role.fd, host->route,
                        host->diag, host->control };
    for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
        if (fds[i] < 0)
            return fds[i];
    if (!host->batch || !host->answer)
        return -ENOMEM;
    return prepare_hosts(host->hosts);
}

static int reseed(int random, const uint8_t *entropy)
{
    struct {
        struct rand_pool_info info;
        uint8_t bytes[ENTROPY_SIZE];
    } pool = { .info = { .entropy_count = 8 * (int)ENTROPY_SIZE, .buf_size = (int)ENTROPY_SIZE } };
    memcpy(pool.bytes, entropy, ENTROPY_SIZE);
    /* The first mixes it into the pool; only the second makes the generator in use take a new key from there now
       (drivers/char/random.c): until then clones would draw equal numbers. */
    if (ioctl(random, RNDADDENTROPY, &pool) < 0 || ioctl(random, RNDRESEEDCRNG) < 0)
        return -errno;
    return 0;
}

int set_clock(int64_t time_ns)
{
    struct timespec now = { .tv_sec = time_ns / 1000000000, .tv_nsec = time_ns % 1000000000 };
    return clock_settime(CLOCK_REALTIME, &now) < 0 ? -errno : 0;
}

void clock_catch_up(int64_t time_ns)
{
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now) == 0 && (int64_t)now.tv_sec * 1000000000 + now.tv_nsec < time_ns)
        (void)set_clock(time_ns); /* it fails for nobody with CAP_SYS_TIME */
}

static int set_names(struct host *host, const struct identity *identity)
{
    char text[HOSTNAME_SIZE + 2];
    uint8_t octets[4];
    char address[16];
    if (sethostname(identity->hostname, strlen(identity->hostname)) < 0)
        return -errno;
    snprintf(text, sizeof text, "%s\n", identity->hostname);
    int result = replace_text(&host->hostname, text);
    if (result < 0)
        return result;
    snprintf(text, sizeof text, "%s\n", identity->machine_id);
    result = replace_text(&host->machine_id, text);
    if (result < 0)
        return result;
    memcpy(octets, &identity->address, sizeof octets);
    snprintf(address, sizeof address, "%u.%u.%u.%u", octets[0], octets[1], octets[2], octets[3]);
    result = write_hosts(host->hosts, address, identity->hostname);
    if (result < 0)
        return result;
    snprintf(text, sizeof text, "%-6s", role_name(identity->role)); /* of equal length: see replace_text */
    return replace_text(&host->role, text);
}

static struct batch new_batch(const struct host *host)
{
    return (struct batch){ .data = host->batch, .capacity = BATCH_SIZE, .sequence = host->sequence };
}

static int send_batch(struct host *host, int fd, const struct batch *batch)
{
    host->sequence = batch->sequence;
    return send(fd, batch->data, batch->size, 0) < 0 ? -errno : 0;
}

/* Send a batch and wait for the acknowledgement of its last message. Errors equal to `ignored` do not count. */
static int commit(struct host *host, int fd, struct batch *batch, int ignored)
{
    if (batch->count == 0)
        return 0;
    batch_acknowledge_last(batch);
    int result = send_batch(host, fd, batch);
    if (result < 0)
        return result;
    for (;;) {
        ssize_t n = recv(fd, host->answer, BATCH_SIZE, 0);
        if (n < 0)
            return -errno;
        for (const struct nlmsghdr *m = NULL; (m = netlink_next(host->answer, (size_t)n, m));) {
            const struct nlmsgerr *error = netlink_payload(m, sizeof error->error);
            if (m->nlmsg_type != NLMSG_ERROR || !error)
                continue;
            if (error->error != 0 && error->error != -ignored && result == 0)
                result = error->error;
            if (m->nlmsg_seq == batch->sequence)
                return result;
        }
    }
}

/* What a dump calls for every message; a negative result ends the dump. */
typedef int visit_fn(void *context, const struct nlmsghdr *message);

static int dump(struct host *host, int fd, const struct batch *request, visit_fn *visit, void *context)
{
    int result = send_batch(host, fd, request);
    if (result < 0)
        return result;
    for (;;) {
        ssize_t n = recv(fd, host->answer, BATCH_SIZE, 0);
        if (n < 0)
            return -errno;
        for (const struct nlmsghdr *m = NULL; (m = netlink_next(host->answer, (size_t)n, m));) {
            if (m->nlmsg_type == NLMSG_DONE)
                return result;
            if (m->nlmsg_type == NLMSG_ERROR) {
                const struct nlmsgerr *error = netlink_payload(m, sizeof error->error);
                return error ? error->error : -EBADMSG;
            }
            if (result == 0)
                result = visit(context, m);
        }
    }
}

struct address_visit {
    const struct host *host;
    struct batch *batch;
};

static int delete_visited(void *context, const struct nlmsghdr *message)
{
    const struct address_visit *visit = context;
    struct in_addr address;
    uint8_t prefix;
    if (!netlink_address(message, visit->host->interface, &address, &prefix))
        return 0;
    return batch_delete_address(visit->batch, visit->host->interface, address, prefix);
}

/* The deletions go into `batch` behind what is there. The dump itself is sent from a buffer of its own. */
static int collect_addresses(struct host *host, struct batch *batch)
{
    uint8_t space[64] __attribute__((aligned(4)));
    struct batch request = { .data = space, .capacity = sizeof space, .sequence = host->sequence };
    struct address_visit visit = { .host = host, .batch = batch };
    int result = batch_dump_addresses(&request);
    return result < 0 ? result : dump(host, host->route, &request, delete_visited, &visit);
}

/* The first identity, or one of another MTU: whatever the interface has is replaced. */
static int configure(struct host *host, const struct identity *identity, const char **step)
{
    struct batch batch = new_batch(host);
    *step = "read the addresses of eth0";
    int result = collect_addresses(host, &batch);
    if (result < 0)
        return result;
    batch.sequence = host->sequence + batch.count; /* the dump has used numbers, too; only the last one matters */
    *step = "set the addresses of eth0";
    if ((result = batch_set_link(&batch, host->interface, identity->mac, identity->mtu)) < 0 ||
        (result = batch_add_address(&batch, host->interface, identity->address, identity->prefix)) < 0)
        return result;
    return commit(host, host->route, &batch, 0);
}

/* Every later identity: only what differs is changed. Asking for all addresses, or setting the link by netlink (which asks the
 * device for more than its new MAC), would cost a clone a tenth of its way to user code. */
static int reconfigure(struct host *host, const struct identity *identity, const char **step)
{
    struct ifreq request = { .ifr_hwaddr.sa_family = ARPHRD_ETHER };
    struct batch batch = new_batch(host);
    memcpy(request.ifr_name, "eth0", sizeof "eth0");
    memcpy(request.ifr_hwaddr.sa_data, identity->mac, MAC_SIZE);
    *step = "set the MAC address of eth0";
    if (ioctl(host->control, SIOCSIFHWADDR, &request) < 0)
        return -errno;
    *step = "set the addresses of eth0";
    int result;
    if ((result = batch_delete_address(&batch, host->interface, host->address, host->prefix)) < 0 ||
        (result = batch_add_address(&batch, host->interface, identity->address, identity->prefix)) < 0)
        return result;
    /* EADDRNOTAVAIL: the user's program has taken the former address away */
    return commit(host, host->route, &batch, EADDRNOTAVAIL);
}

static int set_network(struct host *host, const struct identity *identity, const char **step)
{
    *step = "find eth0";
    if (host->interface == 0)
        return -ENODEV;
    int result = host->configured && host->mtu == identity->mtu ? reconfigure(host, identity, step)
                                                                : configure(host, identity, step);
    host->configured = result == 0;
    host->address = identity->address;
    host->prefix = identity->prefix;
    host->mtu = identity->mtu;
    return result;
}

static int set_neighbours(struct host *host, const struct identity *identity)
{
    size_t i = 0;
    while (i < identity->neighbours->size) {
        struct batch batch = new_batch(host);
        for (; i < identity->neighbours->size && batch.count < BATCH_MESSAGES; i++) {
            struct neighbour neighbour;
            int result = thaw_neighbour(identity, i, &neighbour);
            if (result < 0 || (result = batch_add_neighbour(&batch, host->interface, &neighbour)) < 0)
                return result;
        }
        int result = commit(host, host->route, &batch, 0);
        if (result < 0)
            return result;
    }
    return 0;
}

struct socket_visit {
    struct batch *batch;
    int protocol;
    bool more; /* the batch was full */
};

static int destroy_visited(void *context, const struct nlmsghdr *message)
{
    struct socket_visit *visit = context;
    const struct inet_diag_msg *found = netlink_payload(message, sizeof *found);
    if (message->nlmsg_type != SOCK_DIAG_BY_FAMILY || !found || !socket_is_ghost(found))
        return 0;
    if (visit->batch->count == BATCH_MESSAGES) {
        visit->more = true;
        return 0;
    }
    return batch_destroy_socket(visit->batch, found, visit->protocol);
}

static int destroy_kind(struct host *host, int family, int protocol)
{
    struct socket_visit visit = { .protocol = protocol };
    do {
        uint8_t space[128] __attribute__((aligned(4)));
        struct batch request = { .data = space, .capacity = sizeof space, .sequence = host->sequence };
        struct batch batch = { .data = host->batch, .capacity = BATCH_SIZE, .sequence = host->sequence + 1 };
        visit.batch = &batch;
        visit.more = false;
        int result = batch_dump_sockets(&request, family, protocol);
        if (result < 0 || (result = dump(host, host->diag, &request, destroy_visited, &visit)) < 0)
            return result;
        /* ENOENT: it went away with the one before it */
        if ((result = commit(host, host->diag, &batch, ENOENT)) < 0)
            return result;
    } while (visit.more);
    return 0;
}

int ghosts_destroy(struct host *host, const char **step)
{
    static const int families[] = { AF_INET, AF_INET6 }, protocols[] = { IPPROTO_TCP, IPPROTO_UDP };
    *step = "destroy the parent's sockets";
    for (size_t f = 0; f < 2; f++) {
        for (size_t p = 0; p < 2; p++) {
            int result = destroy_kind(host, families[f], protocols[p]);
            if (result < 0)
                return result;
        }
    }
    return 0;
}

int identity_take(struct host *host, const struct identity *identity, const char **step)
{
    *step = "reseed the random number generator";
    int result = reseed(host->random, identity->entropy);
    if (result < 0)
        return result;
    *step = "set the clock";
    if ((result = set_clock(identity->time_ns)) < 0)
        return result;
    *step = "set the names";
    if ((result = set_names(host, identity)) < 0)
        return result;
    if ((result = set_network(host, identity, step)) < 0)
        return result;
    *step = "set the neighbours";
    return set_neighbours(host, identity);
}
