/* The msgpack messages that the agent itself understands, without any I/O. */
#ifndef SF_MESSAGE_H
#define SF_MESSAGE_H

#include <msgpack.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum role {
    ROLE_PARENT,
    ROLE_CLONE,
    ROLE_RANK, /* a clone that goes on as a whole program, with an input of its own */
};

#define ENTROPY_SIZE 64u
#define MAC_SIZE 6u
#define HOSTNAME_SIZE 64u   /* __NEW_UTS_LEN */
#define MACHINE_ID_SIZE 32u

struct neighbour {
    struct in_addr address;
    uint8_t mac[MAC_SIZE];
};

/* What makes a VM unique. Pointers refer to the decoded message. */
struct identity {
    enum role role;
    int64_t time_ns;                       /* CLOCK_REALTIME */
    const uint8_t *entropy;                /* ENTROPY_SIZE bytes */
    char hostname[HOSTNAME_SIZE + 1];
    char machine_id[MACHINE_ID_SIZE + 1];
    uint8_t mac[MAC_SIZE];
    struct in_addr address;
    uint8_t prefix;
    uint32_t mtu;
    const msgpack_object_array *neighbours; /* each one checked; see thaw_neighbour() */
};

struct export {
    uint16_t tag;
    char mountpoint[4096];
};

struct thaw {
    msgpack_unpacked unpacked;             /* owns what the pointers refer to, with the payload */
    bool has_identity;
    struct identity identity;              /* valid if has_identity */
    int64_t time_ns;                       /* the host's clock when it sent this; 0 if it does not say */
    uint16_t channel;                      /* client that gets `reply` */
    const uint8_t *reply;                  /* NULL if there is none */
    size_t reply_size;
    const msgpack_object_array *mounts;    /* each one checked; see thaw_export() */
};

/* What a role is called on the wire and in the role file. */
const char *role_name(enum role role);

/* Decode a THAW payload. Returns 0, or -EPROTO and in *what the field that is wrong. `payload` must outlive `thaw`;
   call thaw_free() after success. */
int thaw_decode(const uint8_t *payload, size_t size, struct thaw *thaw, const char **what);
void thaw_free(struct thaw *thaw);

/* Entry i of the neighbours or mounts. Returns 0 or -EPROTO. */
int thaw_neighbour(const struct identity *identity, size_t i, struct neighbour *neighbour);
int thaw_export(const struct thaw *thaw, size_t i, struct export *export);

/* The integer under `key` of a message that is a map. Returns 0, or -ENOENT if there is no such integer. */
int message_integer(const uint8_t *data, size_t size, const char *key, int64_t *value);

/* The keeper's report on the program. */
struct report {
    enum { REPORT_PID, REPORT_EXITED } kind;
    int64_t pid;
    int64_t status; /* raw wait status; valid for REPORT_EXITED */
};

/* Returns 0 or -EPROTO. */
int report_decode(const uint8_t *data, size_t size, struct report *report);

#endif
