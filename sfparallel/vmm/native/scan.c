/* Which pages of guest memory are private to this process, and which come from layer files. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "internal.h"

/* From <linux/fs.h> of Linux 6.7 (Documentation/admin-guide/mm/pagemap.rst): older headers lack it. */
struct scan_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};
struct scan_argument {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};
#define SCAN_IOCTL _IOWR('f', 16, struct scan_argument)
enum { SCAN_FILE = 1 << 2, SCAN_PRESENT = 1 << 3, SCAN_SWAPPED = 1 << 4, SCAN_ZERO_FRAME = 1 << 5 };

/* Bits of an entry of /proc/self/pagemap; readable without privilege, unlike the frame number. */
#define MAP_PRESENT (UINT64_C(1) << 63)
#define MAP_SWAPPED (UINT64_C(1) << 62)
#define MAP_FILE (UINT64_C(1) << 61)

enum { REGIONS = 2048, ENTRIES = 8192 };
enum { KNOWN_PAGES = 64 }; /* shorter rows are looked at again sooner than left out */

int sf_append(struct sf_ranges *ranges, uint64_t first, uint64_t pages, bool zero_frame)
{
    if (ranges->count > 0) {
        struct sf_range *last = &ranges->items[ranges->count - 1];
        if (last->first + last->pages == first && last->zero_frame == zero_frame) {
            last->pages += pages;
            return 0;
        }
    }
    if (ranges->count == ranges->capacity) {
        size_t capacity = ranges->capacity == 0 ? 1024 : ranges->capacity * 2;
        struct sf_range *items = realloc(ranges->items, capacity * sizeof *items);
        if (items == NULL)
            return -ENOMEM;
        ranges->items = items;
        ranges->capacity = capacity;
    }
    ranges->items[ranges->count++] = (struct sf_range){.first = first, .pages = pages, .zero_frame = zero_frame};
    return 0;
}

static struct scan_argument scan_argument(enum sf_want want)
{
    /* A page is reported when (its categories ^ inverted) has all of mask and any of anyof. */
    return (struct scan_argument){
        .size = sizeof(struct scan_argument),
        .category_inverted = want == SF_PRIVATE ? SCAN_FILE : 0,
        .category_mask = SCAN_FILE,
        .category_anyof_mask = SCAN_PRESENT | SCAN_SWAPPED,
        .return_mask = SCAN_ZERO_FRAME,
    };
}

static int scan_ioctl(const struct sf_context *context, uint64_t address, uint64_t first, uint64_t pages, enum sf_want want,
                      struct sf_ranges *ranges)
{
    struct scan_argument argument = scan_argument(want);
    struct scan_region *regions = calloc(REGIONS, sizeof *regions);
    int status = regions == NULL ? -ENOMEM : 0;
    argument.start = address + first * SFPAGE_PAGE_BYTES;
    argument.end = argument.start + pages * SFPAGE_PAGE_BYTES;
    argument.vec = (uintptr_t)regions;
    while (status == 0 && argument.start < argument.end) {
        argument.vec_len = REGIONS;
        argument.walk_end = 0;
        int n = ioctl(context->pagemap, SCAN_IOCTL, &argument);
        if (n == 0)
            break;
        if (n < 0) {
            status = errno == EINTR ? 0 : -errno;
            continue;
        }
        for (int i = 0; status == 0 && i < n; i++)
            status = sf_append(ranges, (regions[i].start - address) / SFPAGE_PAGE_BYTES,
                            (regions[i].end - regions[i].start) / SFPAGE_PAGE_BYTES,
                            (regions[i].categories & SCAN_ZERO_FRAME) != 0);
        /* Not walk_end: Linux (seen in 6.18) leaves an older value there when a walk that had to refill the kernel's buffer
         * of 512 regions reaches its end, and the last of them would be reported twice. */
        argument.start = regions[n - 1].end;
    }
    free(regions);
    return status;
}

static bool wanted(uint64_t entry, enum sf_want want)
{
    return (entry & (MAP_PRESENT | MAP_SWAPPED)) != 0 && ((entry & MAP_FILE) != 0) == (want == SF_FILE);
}

static int scan_entries(const uint64_t *entries, size_t count, uint64_t base, enum sf_want want, struct sf_ranges *ranges)
{
    for (size_t i = 0; i < count;) {
        size_t end = i;
        while (end < count && wanted(entries[end], want))
            end++;
        int status = end > i ? sf_append(ranges, base + i, end - i, false) : 0;
        if (status != 0)
            return status;
        i = end + 1;
    }
    return 0;
}

static int scan_plain(const struct sf_context *context, uint64_t address, uint64_t first, uint64_t pages, enum sf_want want,
                      struct sf_ranges *ranges)
{
    uint64_t *entries = calloc(ENTRIES, sizeof *entries);
    int status = entries == NULL ? -ENOMEM : 0;
    for (uint64_t at = first, end = first + pages; status == 0 && at < end; at += ENTRIES) {
        size_t count = end - at < ENTRIES ? (size_t)(end - at) : ENTRIES;
        status = sf_read_at(context->pagemap, entries, count * sizeof *entries,
                            (address / SFPAGE_PAGE_BYTES + at) * sizeof *entries);
        if (status == 0)
            status = scan_entries(entries, count, at, want, ranges);
    }
    free(entries);
    return status;
}

int sf_scan(const struct sf_context *context, uint64_t address, uint64_t first, uint64_t pages, enum sf_want want, bool plain,
            struct sf_ranges *ranges)
{
    if (context->pagemap < 0)
        return context->pagemap;
    if (context->has_scan && !plain)
        return scan_ioctl(context, address, first, pages, want, ranges);
    return scan_plain(context, address, first, pages, want, ranges);
}

/* A page that is private stays so while the VM runs. Were it not, it would be stored needlessly, no more. */
int sf_scan_around(const struct sf_context *context, uint64_t address, uint64_t pages, bool plain, const struct sf_ranges *known,
                   struct sf_ranges *ranges)
{
    uint64_t at = 0;
    int status = 0;
    for (size_t i = 0; status == 0 && i < known->count; i++) {
        const struct sf_range *range = &known->items[i];
        if (range->zero_frame || range->pages < KNOWN_PAGES)
            continue;
        if (range->first > at)
            status = sf_scan(context, address, at, range->first - at, SF_PRIVATE, plain, ranges);
        if (status == 0)
            status = sf_append(ranges, range->first, range->pages, false);
        at = range->first + range->pages;
    }
    return status != 0 || at == pages ? status : sf_scan(context, address, at, pages - at, SF_PRIVATE, plain, ranges);
}

bool sf_probe_scan(int pagemap)
{
    struct scan_argument argument = scan_argument(SF_PRIVATE);
    struct scan_region region;
    static const char here; /* any address of this process will do */
    argument.start = (uintptr_t)&here & ~(uint64_t)(SFPAGE_PAGE_BYTES - 1);
    argument.end = argument.start + SFPAGE_PAGE_BYTES;
    argument.vec = (uintptr_t)&region;
    argument.vec_len = 1;
    return pagemap >= 0 && ioctl(pagemap, SCAN_IOCTL, &argument) >= 0;
}
