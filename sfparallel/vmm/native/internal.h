/* What the parts of the paging layer share. Nothing here is visible outside the library. */
#ifndef SFPAGE_INTERNAL_H
#define SFPAGE_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "sfpage.h"

/* State of the one service thread, which owns it; allocated by the constructor, lives as long as the process. */
struct sf_context {
    int control;          /* connected control socket; -1 until a peer was accepted */
    int listener;         /* listening socket under SFPAGE_PATH until a peer was accepted, else -1 */
    int wait_ms;          /* how long a listener waits for its peer */
    char *path;           /* name of the listener's socket; NULL without one */
    int pagemap;          /* /proc/self/pagemap, or -errno of opening it */
    bool has_scan;        /* the kernel has PAGEMAP_SCAN (Linux 6.7) */
    uint64_t max_maps;    /* vm.max_map_count */
    uint64_t maps;        /* no fewer mappings than this process has; see sf_budget */
};

/* A request with its descriptors, which the service loop closes after the reply was made. */
struct sf_message {
    struct sfpage_request request;
    int fds[SFPAGE_MAX_LAYERS + 3];
    unsigned fd_count;
};

/* A run of pages as the page tables have it. */
struct sf_range {
    uint64_t first;
    uint64_t pages;
    bool zero_frame; /* the kernel's shared zero page is mapped here; only PAGEMAP_SCAN can tell */
};

struct sf_ranges {
    struct sf_range *items; /* malloc'ed; freed by the owner of the struct */
    size_t count;
    size_t capacity;
};

enum sf_want { SF_PRIVATE, SF_FILE };

/* io.c: one wrapper per system call or kernel file; all return 0 (or what is said) or -errno. */
uint64_t sf_now_ns(void);
int sf_read_at(int fd, void *buffer, size_t bytes, uint64_t offset);  /* -ENODATA when the file ends before */
int sf_write_at(int fd, const void *buffer, size_t bytes, uint64_t offset);
int sf_regular_file(int fd, uint64_t *bytes);                         /* -EINVAL: not a regular file */
int sf_map_file(uint64_t address, uint64_t length, int fd, uint64_t offset);
int sf_map_anonymous(uint64_t address, uint64_t length);
int sf_drop_pages(uint64_t address, uint64_t length);
int sf_check_range(const struct sfpage_request *request, uint32_t *step);
int sf_count_maps(uint64_t *count);
int sf_read_max_maps(uint64_t *count);
int sf_read_rollup(uint64_t *private_bytes, uint64_t *anonymous_bytes);
int sf_budget(struct sf_context *context, uint64_t extra);            /* -ENOMEM: vm.max_map_count would be passed */

/* scan.c: appends the wanted pages of [address, address + pages) in ascending order; page 0 is the one at address. */
int sf_scan(const struct sf_context *context, uint64_t address, uint64_t pages, enum sf_want want, bool plain,
            struct sf_ranges *ranges);
bool sf_probe_scan(int pagemap);

/* The operations fill in status, step, flags and values of the reply. */
void sf_map(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply);
void sf_commit(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply);
void sf_stats(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply);

/* Note a failure in the reply. */
static inline void sf_fail(struct sfpage_reply *reply, int status, uint32_t step)
{
    reply->status = status;
    reply->step = step;
}

#endif
