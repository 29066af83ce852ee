/* The packets of the paging layer's control socket (AF_UNIX, SOCK_SEQPACKET): one packet is one request or one reply.
 *
 * The supervisor sends requests, one at a time; the library, which lives inside QEMU, answers each with one reply. All
 * numbers are little endian; the structs have no padding. sfparallel/vmm/paging.py is the other end: change both.
 * Descriptors travel with the request as one SCM_RIGHTS message. They are the library's from then on and it closes them
 * before it replies, whatever the outcome.
 */
#ifndef SFPAGE_H
#define SFPAGE_H

#include <stdint.h>

#define SFPAGE_MAGIC 0x47504653u /* "SFPG" */
#define SFPAGE_VERSION 1u
#define SFPAGE_PAGE_BYTES 4096u
#define SFPAGE_MAX_LAYERS 250u       /* the kernel passes at most 253 descriptors in a message (SCM_MAX_FD) */
#define SFPAGE_MAX_EXTENTS (1u << 20)
#define SFPAGE_ZERO_LAYER 0xffffffffu
#define SFPAGE_KEPT_LAYER 0xfffffffeu

enum sfpage_operation {
    SFPAGE_HELLO = 1,
    SFPAGE_MAP = 2,    /* descriptors: extents, then the layers */
    SFPAGE_COMMIT = 3, /* descriptors: target layer (writable), runs (empty file, writable), sources; then layers with
                          which dirty pages are compared (readable) */
    SFPAGE_STATS = 4,
    SFPAGE_PREPARE = 5, /* while the VM runs: make ready what the COMMIT with the same descriptors and numbers will need.
                           A refusal means that this commit takes longer, no more */
    SFPAGE_SETTLE = 6,  /* when the VM runs again, or will not be committed: free what PREPARE and COMMIT left behind */
    SFPAGE_WARM = 7,    /* of a shell: allocate what QEMU will write to first; a refusal means that it starts slower, no more */
};

/* Bits of sfpage_request.flags. */
enum sfpage_request_flag {
    SFPAGE_IN_PLACE = 1u,      /* PREPARE, COMMIT: no other process maps the target; it may hold older data of this VM */
    SFPAGE_NO_REMAP = 2u,      /* COMMIT: leave the mappings alone (the VM is about to end, or MAP follows) */
    SFPAGE_PLAIN_PAGEMAP = 4u, /* PREPARE, COMMIT, STATS: do not use the PAGEMAP_SCAN ioctl */
};

/* Bits of sfpage_reply.flags. */
enum sfpage_reply_flag {
    SFPAGE_INTACT = 1u,   /* guest memory has the content that the guest expects: the VM may be resumed */
    SFPAGE_REMAPPED = 2u, /* COMMIT: guest memory is mapped as the runs say; without it, MAP is due before the next COMMIT */
};

/* Bits of the capabilities in the reply to HELLO. */
enum sfpage_capability {
    SFPAGE_HAS_PAGEMAP_SCAN = 1u,
};

/* Which step failed; valid in a reply whose status is not 0, or (COMMIT) which is not REMAPPED though it should be. */
enum sfpage_step {
    SFPAGE_STEP_NONE = 0,
    SFPAGE_STEP_RECEIVE = 1,  /* malformed packet, unknown operation, or descriptors lost (RLIMIT_NOFILE of QEMU) */
    SFPAGE_STEP_ARGUMENTS = 2, /* address, length, number of descriptors, numbers in the packet */
    SFPAGE_STEP_RANGE = 3,    /* msync: the range is not mapped throughout */
    SFPAGE_STEP_EXTENTS = 4,  /* reading the extents, or what they say */
    SFPAGE_STEP_FILES = 5,    /* fstat, fcntl: not a regular file, too short (-ENODATA), not writable */
    SFPAGE_STEP_BUDGET = 6,   /* more mappings than vm.max_map_count allows */
    SFPAGE_STEP_MMAP = 7,
    SFPAGE_STEP_SOURCES = 8,  /* mapping the sources, or what they say */
    SFPAGE_STEP_SCAN = 9,     /* /proc/self/pagemap */
    SFPAGE_STEP_MEMORY = 10,  /* malloc */
    SFPAGE_STEP_WRITE = 11,   /* pwrite to the target layer */
    SFPAGE_STEP_PUNCH = 12,   /* fallocate(FALLOC_FL_PUNCH_HOLE) on the target layer */
    SFPAGE_STEP_RUNS = 13,    /* writing the runs */
    SFPAGE_STEP_MADVISE = 14,
    SFPAGE_STEP_STATS = 15,   /* /proc/self/smaps_rollup, /proc/self/maps */
    SFPAGE_STEP_POPULATE = 16, /* PREPARE, WARM: madvise(MADV_POPULATE_WRITE) on a mapping of the target layer, or QEMU's */
};

/* One piece of guest memory and where it comes from (MAP). Extents are sorted and cover the range without gap. */
struct sfpage_extent {
    uint64_t offset_bytes; /* from the start of the range; the same offset in the layer's file */
    uint64_t length_bytes; /* multiple of the page size, not 0 */
    uint32_t layer;        /* index among the layer descriptors; or SFPAGE_ZERO_LAYER: fresh anonymous memory; or
                              SFPAGE_KEPT_LAYER: from where an earlier MAP took it. What was written there is dropped */
    uint32_t reserved;     /* 0 */
};

enum sfpage_kind {
    SFPAGE_STORED = 1, /* the target layer holds these pages */
    SFPAGE_ZERO = 2,   /* the pages are zero and are held nowhere */
};

/* What a commit made of a run of pages. Runs are sorted and do not touch each other when of the same kind. */
struct sfpage_run {
    uint64_t first_page;
    uint32_t pages;
    uint32_t kind; /* enum sfpage_kind */
};

struct sfpage_request {
    uint32_t magic;
    uint16_t version;
    uint16_t operation; /* enum sfpage_operation */
    uint32_t serial;    /* chosen by the sender, repeated in the reply */
    uint32_t flags;     /* enum sfpage_request_flag */
    uint64_t address;   /* all but HELLO, SETTLE, WARM: where guest memory begins in QEMU's address space; page aligned */
    uint64_t length;    /* likewise: its bytes; multiple of the page size. WARM: how many bytes to allocate */
    uint32_t extents;   /* MAP: number of extents in the file */
    uint32_t target;    /* PREPARE, COMMIT: the number that stands for the target layer in the sources (u16 per page; 0 = zero),
                           behind which stand the numbers of the layers to compare with (u16 per descriptor) */
};

struct sfpage_reply {
    uint32_t magic;
    uint16_t version;
    uint16_t operation;
    uint32_t serial;
    int32_t status; /* 0 or -errno */
    uint32_t step;  /* enum sfpage_step */
    uint32_t flags; /* enum sfpage_reply_flag */
    uint64_t value[8]; /* valid when status is 0; meaning by operation, below */
};

enum sfpage_hello_value { SFPAGE_V_PAGE_BYTES, SFPAGE_V_CAPABILITIES, SFPAGE_V_MAX_MAPPINGS, SFPAGE_V_PID };
enum sfpage_map_value { SFPAGE_V_MAP_CHECK_NS, SFPAGE_V_MAP_NS };
enum sfpage_commit_value {
    SFPAGE_V_DIRTY_PAGES,
    SFPAGE_V_STORED_PAGES, /* not the dirty ones that are what their layer holds already; but unchanged ones in short gaps */
    SFPAGE_V_ZERO_PAGES,
    SFPAGE_V_SCAN_NS,
    SFPAGE_V_COPY_NS,
    SFPAGE_V_REMAP_NS,
    SFPAGE_V_TOTAL_NS,
    SFPAGE_V_RUNS,
};
enum sfpage_prepare_value { SFPAGE_V_PREPARED_PAGES, SFPAGE_V_PREPARE_NS };
enum sfpage_warm_value { SFPAGE_V_WARMED_BYTES }; /* 0 where QEMU translates nothing (KVM) */
enum sfpage_stats_value {
    SFPAGE_V_PRIVATE_PAGES,    /* pages of the range that only this process has (dirty since the last commit) */
    SFPAGE_V_FILE_PAGES,       /* pages of the range that are mapped from layers just now */
    SFPAGE_V_PROCESS_PRIVATE,  /* bytes: Private_Clean + Private_Dirty of the whole process; counts layer pages that
                                  nobody else happens to map */
    SFPAGE_V_PROCESS_ANON,     /* bytes: Anonymous of the whole process */
    SFPAGE_V_PROCESS_MAPPINGS, /* lines of /proc/self/maps */
    SFPAGE_V_STATS_MAX_MAPPINGS,
};

/* The launcher's socket (SFPAGE_LAUNCHER, a descriptor; AF_UNIX, SOCK_SEQPACKET): one order makes one shell. The new
 * shell's descriptors travel with the order, as many as `count`; it has no others, but for standard input. */
#define SFPAGE_LAUNCH_FDS 10u

struct sfpage_launch {
    uint32_t magic;
    uint16_t version;
    uint16_t serial;   /* chosen by the sender, repeated in the answer */
    uint32_t control;  /* which number the paging layer's control socket of the shell gets */
    uint32_t count;
    int32_t targets[SFPAGE_LAUNCH_FDS]; /* the numbers that the descriptors get in the shell, each once and not 0 */
};

struct sfpage_launched {
    uint32_t magic;
    uint16_t version;
    uint16_t serial;
    int32_t status; /* 0 or -errno; then there is no shell */
    int32_t pid;    /* of the shell, which is a child of the launcher's parent */
};

#endif
