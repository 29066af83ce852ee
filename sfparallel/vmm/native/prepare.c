/* PREPARE and SETTLE: what a COMMIT needs is made ready while the VM still runs, and what it leaves is cleared when it runs again.
 *
 * A page of a memfd that nobody has written to has to be allocated, cleared and entered into the file, which takes longer than
 * to copy it. PREPARE does so for each page that it finds private and worth storing, through a shared mapping of the target
 * (the window) that only this file and COMMIT know. COMMIT copies into the window, and moves the private pages that it has
 * copied out of guest memory by their page tables, to free them later. SETTLE frees them, and takes out of the target what was
 * prepared for nothing. Nothing of this decides whether a commit succeeds: a page that is not prepared is written with pwrite.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4 /* Linux 5.7; of private mappings of files 5.13 */
#endif

/* Page tables move whole where old and new place are alike modulo what one of them covers. */
enum { TABLE_BYTES = 2 << 20 };

static bool same_file(int fd, dev_t device, ino_t inode)
{
    struct stat status;
    return fstat(fd, &status) == 0 && status.st_dev == device && status.st_ino == inode;
}

bool sf_is_prepared(const struct sf_prepared *prepared, const struct sf_message *message)
{
    return prepared->window != NULL && !prepared->used && prepared->address == message->request.address &&
           prepared->length == message->request.length && prepared->number == message->request.target &&
           prepared->flags == (message->request.flags & SFPAGE_IN_PLACE) &&
           same_file(message->fds[0], prepared->device, prepared->target_inode) &&
           same_file(message->fds[2], prepared->device, prepared->sources_inode);
}

void *sf_prepared_page(struct sf_prepared *prepared, uint64_t page)
{
    const struct sf_ranges *rows = &prepared->rows;
    if (prepared->window == NULL)
        return NULL;
    while (prepared->at < rows->count && rows->items[prepared->at].first + rows->items[prepared->at].pages <= page)
        prepared->at++;
    if (prepared->at == rows->count || page < rows->items[prepared->at].first)
        return NULL;
    return prepared->window + page * SFPAGE_PAGE_BYTES;
}

const void *sf_kept_page(struct sf_prepared *prepared, uint64_t page)
{
    while (prepared->kept_at < prepared->kept_count && prepared->kept[prepared->kept_at] < page)
        prepared->kept_at++;
    if (prepared->kept_at == prepared->kept_count || prepared->kept[prepared->kept_at] != page)
        return NULL;
    return prepared->kept_bytes + prepared->kept_at * SFPAGE_PAGE_BYTES;
}

/* Where the page tables of an address of guest memory go; never two addresses to one place. */
static char *aside(const struct sf_prepared *prepared, uint64_t address)
{
    uint64_t base = (uint64_t)(uintptr_t)prepared->scratch;
    base += (prepared->address - base) & (TABLE_BYTES - 1);
    return (char *)(uintptr_t)(base + (address - prepared->address));
}

int sf_move_aside(struct sf_prepared *prepared, uint64_t address, uint64_t length)
{
    if (prepared->scratch == NULL)
        return -ENOENT;
    void *moved = mremap((void *)(uintptr_t)address, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
                         aside(prepared, address));
    return moved == MAP_FAILED ? -errno : 0;
}

int sf_move_back(struct sf_prepared *prepared, uint64_t address, uint64_t length)
{
    void *moved = mremap(aside(prepared, address), length, length, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)(uintptr_t)address);
    return moved == MAP_FAILED ? -errno : 0;
}

/* Whether the page is what its layer holds. If so its content is kept, which is faster to compare with in the pause. */
static bool keep_unchanged(struct sf_prepared *prepared, const struct sf_plan *plan, uint64_t page)
{
    if (prepared->kept == NULL || prepared->kept_count == SF_KEPT_PAGES)
        return false;
    char *content = prepared->kept_bytes + prepared->kept_count * SFPAGE_PAGE_BYTES;
    if (!sf_read_layer(plan, page, content) || memcmp(content, sf_page(plan, page), SFPAGE_PAGE_BYTES) != 0)
        return false;
    prepared->kept[prepared->kept_count++] = page;
    return true;
}

static bool worth_storing(struct sf_prepared *prepared, const struct sf_plan *plan, const struct sf_range *range, uint64_t page)
{
    if (range->zero_frame || sf_is_zero(sf_page(plan, page)))
        return false;
    return range->pages > SF_COMPARED_PAGES || !keep_unchanged(prepared, plan, page);
}

static void punch(const struct sf_prepared *prepared, uint64_t first, uint64_t end)
{
    if (end > first)
        (void)!fallocate(prepared->target, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(first * SFPAGE_PAGE_BYTES),
                         (off_t)((end - first) * SFPAGE_PAGE_BYTES));
}

/* Pages of [first, end) that the image does not take from the target. */
static void punch_unused(const struct sf_prepared *prepared, uint64_t first, uint64_t end)
{
    uint64_t from = first;
    for (uint64_t page = first; page < end; page++) {
        if (prepared->sources[page] == prepared->number) {
            punch(prepared, from, page);
            from = page + 1;
        }
    }
    punch(prepared, from, end);
}

/* Whatever fails here (no memory, no room, an older kernel), the commit meets it again, and decides. */
static int populate(struct sf_prepared *prepared, uint64_t first, uint64_t pages)
{
    int status = 0;
    if (madvise(prepared->window + first * SFPAGE_PAGE_BYTES, pages * SFPAGE_PAGE_BYTES, MADV_POPULATE_WRITE) != 0)
        status = -errno;
    if (status == 0)
        status = sf_append(&prepared->rows, first, pages, false);
    if (status != 0)
        punch_unused(prepared, first, first + pages); /* some of them may be there */
    return status;
}

static int populate_range(struct sf_prepared *prepared, const struct sf_plan *plan, const struct sf_range *range)
{
    uint64_t end = range->first + range->pages;
    for (uint64_t page = range->first; page < end;) {
        uint64_t first = page;
        while (page < end && worth_storing(prepared, plan, range, page))
            page++;
        int status = page > first ? populate(prepared, first, page - first) : 0;
        if (status != 0)
            return status;
        page += page < end ? 1 : 0;
    }
    return 0;
}

static int begin(struct sf_prepared *prepared, const struct sf_message *message, struct sf_plan *plan)
{
    struct stat target, sources;
    if (fstat(message->fds[0], &target) != 0 || fstat(message->fds[2], &sources) != 0)
        return -errno;
    int copy = fcntl(message->fds[0], F_DUPFD_CLOEXEC, 0);
    if (copy < 0)
        return -errno;
    void *window = mmap(NULL, message->request.length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, copy, 0);
    if (window == MAP_FAILED) {
        int status = -errno;
        close(copy);
        return status;
    }
    void *kept = mmap(NULL, SF_KEPT_PAGES * SFPAGE_PAGE_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint64_t scratch_bytes = message->request.length + TABLE_BYTES;
    void *scratch = mmap(NULL, scratch_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *prepared = (struct sf_prepared){
        .address = message->request.address,
        .length = message->request.length,
        .number = message->request.target,
        .flags = message->request.flags & SFPAGE_IN_PLACE,
        .device = target.st_dev,
        .target_inode = target.st_ino,
        .sources_inode = sources.st_dev == target.st_dev ? sources.st_ino : 0,
        .target = copy,
        .window = window,
        .scratch = scratch == MAP_FAILED ? NULL : scratch,
        .scratch_bytes = scratch_bytes,
        .kept = kept == MAP_FAILED ? NULL : calloc(SF_KEPT_PAGES, sizeof(uint64_t)),
        .kept_bytes = kept == MAP_FAILED ? NULL : kept,
        .sources = plan->sources,
        .source_bytes = plan->source_bytes,
    };
    plan->mapped = NULL; /* the sources are the prepared state's from here on */
    return 0;
}

void sf_prepare(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply)
{
    uint64_t start = sf_now_ns();
    struct sf_prepared *prepared = &context->prepared;
    struct sf_plan plan;
    uint32_t step;
    reply->flags = SFPAGE_INTACT;
    sf_settle(prepared);
    int status = sf_open_plan(message, prepared, &plan, &step);
    if (status != 0) {
        sf_fail(reply, status, step);
        return;
    }
    step = SFPAGE_STEP_MMAP;
    status = begin(prepared, message, &plan);
    if (status == 0) {
        step = SFPAGE_STEP_SCAN;
        status = sf_scan(context, message->request.address, 0, plan.pages, SF_PRIVATE,
                         (message->request.flags & SFPAGE_PLAIN_PAGEMAP) != 0, &prepared->dirty);
    }
    for (size_t i = 0; status == 0 && i < prepared->dirty.count; i++) {
        step = SFPAGE_STEP_POPULATE;
        status = populate_range(prepared, &plan, &prepared->dirty.items[i]);
    }
    sf_close_plan(&plan);
    for (size_t i = 0; i < prepared->rows.count; i++)
        reply->value[SFPAGE_V_PREPARED_PAGES] += prepared->rows.items[i].pages;
    reply->value[SFPAGE_V_PREPARE_NS] = sf_now_ns() - start;
    if (status != 0)
        sf_fail(reply, status, step);
}

/* What was prepared, was not stored and is held by the target neither way: its pages are zero, or half a commit that failed. */
static void punch_rows(const struct sf_prepared *prepared)
{
    const struct sf_ranges *stored = &prepared->stored;
    size_t at = 0;
    for (size_t i = 0; i < prepared->rows.count; i++) {
        uint64_t first = prepared->rows.items[i].first, end = first + prepared->rows.items[i].pages;
        while (at < stored->count && stored->items[at].first + stored->items[at].pages <= first)
            at++;
        for (size_t next = at; next < stored->count && stored->items[next].first < end; next++) {
            punch_unused(prepared, first, stored->items[next].first);
            first = stored->items[next].first + stored->items[next].pages;
        }
        if (first < end)
            punch_unused(prepared, first, end);
    }
}

void sf_settle(struct sf_prepared *prepared)
{
    if (prepared->window == NULL)
        return;
    munmap(prepared->window, prepared->length);
    if (prepared->scratch != NULL)
        munmap(prepared->scratch, prepared->scratch_bytes);
    if (prepared->kept_bytes != NULL)
        munmap(prepared->kept_bytes, SF_KEPT_PAGES * SFPAGE_PAGE_BYTES);
    punch_rows(prepared);
    munmap((void *)(uintptr_t)prepared->sources, prepared->source_bytes);
    close(prepared->target);
    free(prepared->kept);
    free(prepared->dirty.items);
    free(prepared->rows.items);
    free(prepared->stored.items);
    *prepared = (struct sf_prepared){0};
}
