/* Netlink messages, built and read without any I/O. */
#ifndef SF_NETLINK_H
#define SF_NETLINK_H

#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "message.h"

/* Messages that go to the kernel in one sendmsg(2). */
struct batch {
    uint8_t *data; /* owned by the caller, aligned to 4 */
    size_t capacity;
    size_t size;
    size_t last;   /* offset of the newest message */
    unsigned count;
    uint32_t sequence; /* of the newest message */
};

/* Each appends one message; returns 0, or -ENOBUFS if the batch is full (it is then unchanged). */
int batch_set_link(struct batch *batch, int interface, const uint8_t *mac, uint32_t mtu); /* and bring it up */
int batch_add_address(struct batch *batch, int interface, struct in_addr address, uint8_t prefix);
int batch_delete_address(struct batch *batch, int interface, struct in_addr address, uint8_t prefix);
int batch_add_neighbour(struct batch *batch, int interface, const struct neighbour *neighbour);
int batch_dump_addresses(struct batch *batch);
int batch_dump_sockets(struct batch *batch, int family, int protocol);
int batch_destroy_socket(struct batch *batch, const struct inet_diag_msg *socket, int protocol);

/* Ask for an acknowledgement of the newest message. Errors of all messages are reported anyway. */
void batch_acknowledge_last(struct batch *batch);

/* Whether a socket of a dump belongs to the parent: its local address is neither loopback nor "any". */
bool socket_is_ghost(const struct inet_diag_msg *socket);

/* Walk the messages of one datagram: NULL to begin with, then the previous one. Returns NULL after the last
   (or before one that is cut off). */
const struct nlmsghdr *netlink_next(const uint8_t *data, size_t size, const struct nlmsghdr *previous);

/* The address of an RTM_NEWADDR message of a dump, if it is IPv4 and of `interface`. */
bool netlink_address(const struct nlmsghdr *message, int interface, struct in_addr *address, uint8_t *prefix);

/* The payload of a message if it has at least `size` bytes, else NULL. */
const void *netlink_payload(const struct nlmsghdr *message, size_t size);

#endif
