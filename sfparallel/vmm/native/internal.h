/* What the parts of the paging layer share. Nothing here is visible outside the library. */
#ifndef SFPAGE_INTERNAL_H
#define SFPAGE_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "sfpage.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

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

/* What PREPARE has made ready for the next COMMIT, and what is left for SETTLE; all zero when there is nothing. */
struct sf_prepared {
    uint64_t address;        /* the request that it was made for, which the commit must repeat */
    uint64_t length;
    uint32_t number;
    uint32_t flags;
    dev_t device;            /* of target and sources: both are memfds */
    ino_t target_inode;
    ino_t sources_inode;
    int target;              /* a duplicate, owned */
    char *window;            /* shared mapping of the whole target; NULL: nothing is prepared */
    char *scratch;           /* where private pages are moved to; NULL: there was no room for it */
    size_t scratch_bytes;
    const uint16_t *sources; /* mapped, owned */
    size_t source_bytes;
    struct sf_ranges dirty;  /* pages that were private */
    struct sf_ranges rows;   /* pages that exist in the target, and in the window's page tables */
    size_t at;               /* the row that sf_prepared_page looks at first */
    uint64_t *kept;          /* pages that were dirty and what their layer holds, ascending */
    char *kept_bytes;        /* what it holds, page by page; a mapping of SF_KEPT_PAGES, or NULL */
    size_t kept_count;
    size_t kept_at;          /* the one that sf_kept_page looks at first */
    struct sf_ranges stored; /* what the commit has stored, if it succeeded */
    bool used;               /* a commit has begun */
};

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
    struct sf_prepared prepared;
};

/* A request with its descriptors, which the service loop closes after the reply was made. */
struct sf_message {
    struct sfpage_request request;
    int fds[SFPAGE_MAX_LAYERS + 3];
    unsigned fd_count;
};

enum { SF_COMPARED_PAGES = 32 }; /* longest row of dirty pages that is compared with what the layers hold; longer ones are data */

enum { SF_KEPT_PAGES = 4096 };   /* 16 MiB */

enum sf_origin { SF_ORIGIN_ZERO, SF_ORIGIN_TARGET, SF_ORIGIN_OTHER };

/* A request of PREPARE or COMMIT, checked. */
struct sf_plan {
    const struct sfpage_request *request;
    uint64_t pages;          /* of guest memory */
    int target;              /* descriptors, borrowed from the message */
    int runs;
    const uint16_t *sources; /* one per page */
    const uint16_t *numbers; /* behind the sources: of the layers among the descriptors, in their order */
    const int *layers;       /* their descriptors, borrowed from the message */
    size_t layer_count;
    void *mapped;            /* the sources' mapping, if it is the plan's own; else they are the prepared state's */
    size_t source_bytes;
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

/* scan.c: appends the wanted ones of `pages` pages from page `first` on, in ascending order; page 0 is the one at address. */
int sf_scan(const struct sf_context *context, uint64_t address, uint64_t first, uint64_t pages, enum sf_want want, bool plain,
            struct sf_ranges *ranges);
/* All private pages, without looking at large rows that are known to be; the kernel takes 0.1 to 0.5 us for each page. */
int sf_scan_around(const struct sf_context *context, uint64_t address, uint64_t pages, bool plain, const struct sf_ranges *known,
                   struct sf_ranges *ranges);
bool sf_probe_scan(int pagemap);
int sf_append(struct sf_ranges *ranges, uint64_t first, uint64_t pages, bool zero_frame);

/* plan.c */
int sf_open_plan(const struct sf_message *message, const struct sf_prepared *prepared, struct sf_plan *plan, uint32_t *step);
void sf_close_plan(struct sf_plan *plan);
enum sf_origin sf_origin_of(const struct sf_plan *plan, uint64_t page);
bool sf_is_zero(const char *page);
bool sf_read_layer(const struct sf_plan *plan, uint64_t page, void *content); /* false: no layer holds it, or none that can be read */

static inline const char *sf_page(const struct sf_plan *plan, uint64_t page)
{
    return (const char *)(uintptr_t)(plan->request->address + page * SFPAGE_PAGE_BYTES);
}

/* prepare.c */
bool sf_is_prepared(const struct sf_prepared *prepared, const struct sf_message *message);
/* Both are asked for in ascending order, and NULL if there is none: the page in the target, ready to be written to; what the
 * layer of a page holds. */
void *sf_prepared_page(struct sf_prepared *prepared, uint64_t page);
const void *sf_kept_page(struct sf_prepared *prepared, uint64_t page);
/* Private pages leave guest memory, which shows then what is mapped beneath, and can come back. Both 0 or -errno. */
int sf_move_aside(struct sf_prepared *prepared, uint64_t address, uint64_t length);
int sf_move_back(struct sf_prepared *prepared, uint64_t address, uint64_t length);
void sf_settle(struct sf_prepared *prepared);

/* The operations fill in status, step, flags and values of the reply. */
void sf_map(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply);
void sf_prepare(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply);
void sf_commit(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply);
void sf_stats(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply);
void sf_warm(const struct sf_message *message, struct sfpage_reply *reply);

/* launcher.c: makes shells as long as the peer lives. Returns only in a new shell, with the number of its control socket, or
 * -errno if it cannot become one. */
int sf_launch_shells(int control);

/* Note a failure in the reply. */
static inline void sf_fail(struct sfpage_reply *reply, int status, uint32_t step)
{
    reply->status = status;
    reply->step = step;
}

#endif
