#include "netlink.h"

#include <errno.h>
#include <linux/neighbour.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <net/if.h>
#include <string.h>

/* Kernel's socket states, of include/net/tcp_states.h: not in any header for user space with these names. */
enum { STATE_ESTABLISHED = 1, STATE_TIME_WAIT = 6, STATE_CLOSE = 7, STATE_LISTEN = 10, STATE_NEW_SYN_RECV = 12 };
#define ALL_STATES ((1u << (STATE_NEW_SYN_RECV + 1)) - 2u)

/* Begin a message whose fixed part is `body`; returns the new size of the batch, or 0 if it does not fit. */
static size_t begin(struct batch *batch, uint16_t type, uint16_t flags, const void *body, size_t body_size)
{
    size_t need = NLMSG_SPACE(body_size);
    if (batch->capacity - batch->size < need)
        return 0;
    struct nlmsghdr header = {
        .nlmsg_len = (uint32_t)NLMSG_LENGTH(body_size),
        .nlmsg_type = type,
        .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags),
        .nlmsg_seq = batch->sequence + 1,
    };
    uint8_t *at = batch->data + batch->size;
    memset(at, 0, need);
    memcpy(at, &header, sizeof header);
    memcpy(at + NLMSG_HDRLEN, body, body_size);
    return batch->size + need;
}

/* Append an attribute to the message that begin() opened and that ends at `end`; 0 goes through. */
static size_t attribute(struct batch *batch, size_t end, uint16_t type, const void *data, size_t size)
{
    size_t need = RTA_SPACE(size);
    if (end == 0 || batch->capacity - end < need)
        return 0;
    struct rtattr header = { .rta_len = (uint16_t)RTA_LENGTH(size), .rta_type = type };
    memset(batch->data + end, 0, need);
    memcpy(batch->data + end, &header, sizeof header);
    memcpy(batch->data + end + RTA_LENGTH(0), data, size);
    uint32_t length = (uint32_t)(end + need - batch->size);
    memcpy(batch->data + batch->size, &length, sizeof length);
    return end + need;
}

static int finish(struct batch *batch, size_t end)
{
    if (end == 0)
        return -ENOBUFS;
    batch->last = batch->size;
    batch->size = end;
    batch->count++;
    batch->sequence++;
    return 0;
}

int batch_set_link(struct batch *batch, int interface, const uint8_t *mac, uint32_t mtu)
{
    struct ifinfomsg body = { .ifi_family = AF_UNSPEC, .ifi_index = interface, .ifi_flags = IFF_UP, .ifi_change = IFF_UP };
    size_t end = begin(batch, RTM_SETLINK, 0, &body, sizeof body);
    end = attribute(batch, end, IFLA_ADDRESS, mac, MAC_SIZE);
    return finish(batch, attribute(batch, end, IFLA_MTU, &mtu, sizeof mtu));
}

static int address_message(struct batch *batch, uint16_t type, uint16_t flags, int interface, struct in_addr address,
                           uint8_t prefix)
{
    struct ifaddrmsg body = { .ifa_family = AF_INET, .ifa_prefixlen = prefix, .ifa_index = (uint32_t)interface };
    size_t end = begin(batch, type, flags, &body, sizeof body);
    return finish(batch, attribute(batch, end, IFA_LOCAL, &address, sizeof address));
}

int batch_add_address(struct batch *batch, int interface, struct in_addr address, uint8_t prefix)
{
    return address_message(batch, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, interface, address, prefix);
}

int batch_delete_address(struct batch *batch, int interface, struct in_addr address, uint8_t prefix)
{
    return address_message(batch, RTM_DELADDR, 0, interface, address, prefix);
}

int batch_add_neighbour(struct batch *batch, int interface, const struct neighbour *neighbour)
{
    struct ndmsg body = { .ndm_family = AF_INET, .ndm_ifindex = interface, .ndm_state = NUD_PERMANENT };
    size_t end = begin(batch, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &body, sizeof body);
    end = attribute(batch, end, NDA_DST, &neighbour->address, sizeof neighbour->address);
    return finish(batch, attribute(batch, end, NDA_LLADDR, neighbour->mac, MAC_SIZE));
}

int batch_dump_addresses(struct batch *batch)
{
    struct ifaddrmsg body = { .ifa_family = AF_INET };
    return finish(batch, begin(batch, RTM_GETADDR, NLM_F_DUMP, &body, sizeof body));
}

int batch_dump_sockets(struct batch *batch, int family, int protocol)
{
    struct inet_diag_req_v2 body = {
        .sdiag_family = (uint8_t)family,
        .sdiag_protocol = (uint8_t)protocol,
        /* A connected UDP socket is "established"; an unconnected one has no peer that could take it for the parent's.
           Listening sockets stay: on an address that is no longer ours they hear nothing, while programs do not reckon
           with their destruction (libzmq aborts on the EINVAL that accept(2) then gives, src/tcp_listener.cpp). */
        .idiag_states = protocol == IPPROTO_UDP
                            ? 1u << STATE_ESTABLISHED
                            : ALL_STATES & ~(1u << STATE_TIME_WAIT | 1u << STATE_CLOSE | 1u << STATE_LISTEN),
    };
    return finish(batch, begin(batch, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &body, sizeof body));
}

int batch_destroy_socket(struct batch *batch, const struct inet_diag_msg *socket, int protocol)
{
    struct inet_diag_req_v2 body = {
        .sdiag_family = socket->idiag_family,
        .sdiag_protocol = (uint8_t)protocol,
        .idiag_states = UINT32_MAX,
        .id = socket->id,
    };
    return finish(batch, begin(batch, SOCK_DESTROY, 0, &body, sizeof body));
}

void batch_acknowledge_last(struct batch *batch)
{
    struct nlmsghdr header;
    memcpy(&header, batch->data + batch->last, sizeof header);
    header.nlmsg_flags |= NLM_F_ACK;
    memcpy(batch->data + batch->last, &header, sizeof header);
}

bool socket_is_ghost(const struct inet_diag_msg *socket)
{
    const uint8_t *address = (const uint8_t *)socket->id.idiag_src;
    static const uint8_t zero[16], mapped[12] = { [10] = 0xff, [11] = 0xff };
    if (socket->idiag_family == AF_INET6) {
        if (memcmp(address, mapped, sizeof mapped) == 0) {
            address += sizeof mapped;
        } else {
            bool loopback = memcmp(address, zero, 15) == 0 && address[15] == 1;
            return !loopback && memcmp(address, zero, 16) != 0;
        }
    }
    return address[0] != 127 && memcmp(address, zero, 4) != 0;
}

const struct nlmsghdr *netlink_next(const uint8_t *data, size_t size, const struct nlmsghdr *previous)
{
    size_t offset = 0;
    if (previous)
        offset = (size_t)((const uint8_t *)previous - data) + NLMSG_ALIGN((size_t)previous->nlmsg_len);
    if (offset > size || size - offset < NLMSG_HDRLEN)
        return NULL;
    const struct nlmsghdr *message = (const void *)(data + offset);
    if (message->nlmsg_len < NLMSG_HDRLEN || message->nlmsg_len > size - offset)
        return NULL;
    return message;
}

const void *netlink_payload(const struct nlmsghdr *message, size_t size)
{
    return message->nlmsg_len >= NLMSG_LENGTH(size) ? (const uint8_t *)message + NLMSG_HDRLEN : NULL;
}

bool netlink_address(const struct nlmsghdr *message, int interface, struct in_addr *address, uint8_t *prefix)
{
    const struct ifaddrmsg *body = netlink_payload(message, sizeof *body);
    if (message->nlmsg_type != RTM_NEWADDR || !body || body->ifa_family != AF_INET || (int)body->ifa_index != interface)
        return false;
    const uint8_t *at = (const uint8_t *)message + NLMSG_SPACE(sizeof *body);
    const uint8_t *end = (const uint8_t *)message + message->nlmsg_len;
    while (end - at >= (ptrdiff_t)sizeof(struct rtattr)) {
        const struct rtattr *header = (const void *)at;
        if (header->rta_len < sizeof *header || header->rta_len > end - at)
            return false;
        if (header->rta_type == IFA_LOCAL && header->rta_len >= RTA_LENGTH(sizeof *address)) {
            memcpy(address, at + RTA_LENGTH(0), sizeof *address);
            *prefix = body->ifa_prefixlen;
            return true;
        }
        at += RTA_ALIGN((size_t)header->rta_len);
        if (at > end)
            return false;
    }
    return false;
}
