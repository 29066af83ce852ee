/* COMMIT: move the pages that guest memory does not share with its layers into the target layer, then share that layer.
 *
 * The VM is stopped meanwhile. Order is what makes a failure harmless: nothing is remapped before every page is in the
 * target and the runs are written. All mappings are private ones: were the target mapped shared, clones would see what the
 * parent writes later in each page that they have not touched.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

enum origin { ORIGIN_ZERO, ORIGIN_TARGET, ORIGIN_OTHER };
enum { OWN_FDS = 3 };      /* target, runs, sources; the layers follow */
enum { WRITE_PAGES = 64 }; /* written at once: 256 KiB are still in the cache since the comparison with zero */
enum { COMPARED_PAGES = 32 }; /* longest row of dirty pages that is compared with what the layers hold; longer ones are data */
enum { KIND_SAME = 0 };    /* beside enum sfpage_kind: dirty, but equal to what the layer beneath holds */
enum { GAP_PAGES = 8 };    /* clean pages of the target that one mmap may lay over again to save another call */
enum { FILL_PAGES = 16 };  /* unchanged pages that are stored all the same, to make one run of two */

/* Dirty pages in a row of which the same was made. */
struct piece {
    uint64_t first;
    uint32_t pages;
    uint8_t kind;   /* enum sfpage_kind, or KIND_SAME */
    uint8_t origin; /* enum origin: where the mapping under the private pages comes from */
};

struct commit {
    const struct sfpage_request *request;
    uint64_t pages;          /* of guest memory */
    int target;              /* descriptors, borrowed from the message */
    int runs;
    const uint16_t *sources; /* one per page, mapped from the third descriptor; unmapped at the end */
    const uint16_t *numbers; /* behind the sources: of the layers among the descriptors, in their order */
    const int *layers;       /* their descriptors, borrowed from the message */
    size_t layer_count;
    struct sf_ranges dirty;
    struct piece *pieces;    /* malloc'ed */
    size_t count;
    size_t capacity;
    uint64_t window_first;   /* stored pages that are not written yet */
    uint64_t window_pages;
};

static uint64_t address_of(const struct commit *commit, uint64_t page)
{
    return commit->request->address + page * SFPAGE_PAGE_BYTES;
}

/* A page is zero if its first word is and each byte equals the one a word further on. */
static bool is_zero(const char *page)
{
    uint64_t word;
    memcpy(&word, page, sizeof word);
    return word == 0 && memcmp(page, page + sizeof word, SFPAGE_PAGE_BYTES - sizeof word) == 0;
}

static enum origin origin_of(const struct commit *commit, uint64_t page)
{
    uint16_t source = commit->sources[page];
    if (source == 0)
        return ORIGIN_ZERO;
    return source == commit->request->target ? ORIGIN_TARGET : ORIGIN_OTHER;
}

static int flush_window(struct commit *commit)
{
    uint64_t pages = commit->window_pages;
    commit->window_pages = 0;
    if (pages == 0)
        return 0;
    return sf_write_at(commit->target, (const void *)(uintptr_t)address_of(commit, commit->window_first),
                       pages * SFPAGE_PAGE_BYTES, commit->window_first * SFPAGE_PAGE_BYTES);
}

static int store_page(struct commit *commit, uint64_t page)
{
    int status = 0;
    if (commit->window_pages == WRITE_PAGES || commit->window_first + commit->window_pages != page)
        status = flush_window(commit);
    if (commit->window_pages == 0)
        commit->window_first = page;
    commit->window_pages++;
    return status;
}

static int layer_of(const struct commit *commit, uint64_t page)
{
    uint16_t source = commit->sources[page];
    if (source != 0 && source == commit->request->target)
        return commit->target;
    for (size_t i = 0; source != 0 && i < commit->layer_count; i++)
        if (commit->numbers[i] == source)
            return commit->layers[i];
    return -1;
}

/* A program that only counts references up and down again leaves a dirty page that is what it was: half of the pages that a
 * Python program dirties between two forks are such ones (measured). A layer that cannot be read is no obstacle. */
static bool is_unchanged(const struct commit *commit, uint64_t page)
{
    char stored[SFPAGE_PAGE_BYTES];
    int layer = layer_of(commit, page);
    return layer >= 0 && sf_read_at(layer, stored, sizeof stored, page * SFPAGE_PAGE_BYTES) == 0 &&
           memcmp(stored, (const char *)(uintptr_t)address_of(commit, page), sizeof stored) == 0;
}

static int note_page(struct commit *commit, uint64_t page, int kind, enum origin origin)
{
    if (commit->count > 0) {
        struct piece *last = &commit->pieces[commit->count - 1];
        if (last->first + last->pages == page && last->kind == kind && last->origin == origin) {
            last->pages++;
            return 0;
        }
    }
    if (commit->count == commit->capacity) {
        size_t capacity = commit->capacity == 0 ? 1024 : commit->capacity * 2;
        struct piece *pieces = realloc(commit->pieces, capacity * sizeof *pieces);
        if (pieces == NULL)
            return -ENOMEM;
        commit->pieces = pieces;
        commit->capacity = capacity;
    }
    commit->pieces[commit->count++] =
        (struct piece){.first = page, .pages = 1, .kind = (uint8_t)kind, .origin = (uint8_t)origin};
    return 0;
}

static bool any_zero(const struct commit *commit, uint64_t first, uint64_t end)
{
    for (uint64_t page = first; page < end; page++)
        if (origin_of(commit, page) == ORIGIN_ZERO)
            return true;
    return false;
}

/* Store the pages between the last stored one and `page` too, which their layers hold as they are, if they are few: each run
 * costs the parent a mapping now (about 10 us) and every clone two, a page about 1 us, once. Returns their number, or -errno. */
static ssize_t fill_gap(struct commit *commit, uint64_t page)
{
    size_t last = commit->count;
    while (last > 0 && commit->pieces[last - 1].kind == KIND_SAME)
        last--;
    if (last == 0 || commit->pieces[last - 1].kind != SFPAGE_STORED)
        return 0;
    uint64_t first = commit->pieces[last - 1].first + commit->pieces[last - 1].pages;
    if (page - first > FILL_PAGES || any_zero(commit, first, page))
        return 0;
    commit->count = last;
    ssize_t filled = 0;
    for (uint64_t between = first; between < page; between++) {
        enum origin origin = origin_of(commit, between);
        int status = note_page(commit, between, SFPAGE_STORED, origin);
        if (status == 0 && origin != ORIGIN_TARGET) {
            status = store_page(commit, between);
            filled++;
        }
        if (status != 0)
            return status;
    }
    return filled;
}

static int copy_range(struct commit *commit, const struct sf_range *range, struct sfpage_reply *reply, uint32_t *step)
{
    for (uint64_t page = range->first; page < range->first + range->pages; page++) {
        enum origin origin = origin_of(commit, page);
        if (range->zero_frame && origin == ORIGIN_ZERO)
            continue; /* only ever read: the kernel's zero page, not memory of this process */
        bool zero = range->zero_frame || is_zero((const char *)(uintptr_t)address_of(commit, page));
        bool same = !zero && range->pages <= COMPARED_PAGES && is_unchanged(commit, page);
        reply->value[SFPAGE_V_DIRTY_PAGES]++;
        if (!same)
            reply->value[zero ? SFPAGE_V_ZERO_PAGES : SFPAGE_V_STORED_PAGES]++;
        *step = SFPAGE_STEP_WRITE;
        ssize_t filled = zero || same ? 0 : fill_gap(commit, page);
        if (filled < 0)
            return (int)filled;
        reply->value[SFPAGE_V_STORED_PAGES] += (uint64_t)filled;
        int status = note_page(commit, page, zero ? SFPAGE_ZERO : same ? KIND_SAME : SFPAGE_STORED, origin);
        if (status == 0 && !zero && !same)
            status = store_page(commit, page);
        if (status != 0)
            return status;
    }
    return 0;
}

static int copy_pages(struct commit *commit, struct sfpage_reply *reply, uint32_t *step)
{
    int status = 0;
    for (size_t i = 0; status == 0 && i < commit->dirty.count; i++)
        status = copy_range(commit, &commit->dirty.items[i], reply, step);
    if (status == 0) {
        *step = SFPAGE_STEP_WRITE;
        status = flush_window(commit);
    }
    return status;
}

/* All zero pieces, not only those that come from the target: an earlier commit that failed may have left data there. */
static int punch_zeros(const struct commit *commit)
{
    for (size_t i = 0; i < commit->count; i++) {
        const struct piece *piece = &commit->pieces[i];
        if (piece->kind != SFPAGE_ZERO)
            continue;
        if (fallocate(commit->target, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(piece->first * SFPAGE_PAGE_BYTES),
                      (off_t)piece->pages * SFPAGE_PAGE_BYTES) != 0)
            return -errno;
    }
    return 0;
}

static int write_runs(const struct commit *commit, uint64_t *run_count)
{
    struct sfpage_run *runs = calloc(commit->count + 1, sizeof *runs);
    size_t count = 0;
    if (runs == NULL)
        return -ENOMEM;
    for (size_t i = 0; i < commit->count; i++) {
        const struct piece *piece = &commit->pieces[i];
        struct sfpage_run *last = count > 0 ? &runs[count - 1] : NULL;
        if (piece->kind == KIND_SAME)
            continue;
        if (last != NULL && last->kind == piece->kind && last->first_page + last->pages == piece->first)
            last->pages += piece->pages;
        else
            runs[count++] = (struct sfpage_run){.first_page = piece->first, .pages = piece->pages, .kind = piece->kind};
    }
    *run_count = count;
    int status = sf_write_at(commit->runs, runs, count * sizeof *runs, 0);
    free(runs);
    return status;
}

static bool all_from_target(const struct commit *commit, uint64_t first, uint64_t end)
{
    for (uint64_t page = first; page < end; page++)
        if (origin_of(commit, page) != ORIGIN_TARGET)
            return false;
    return true;
}

/* Map the target over stored pieces from number i on, as long as they touch or only clean pages of the target, which hold
 * the same in the file, lie between them. Returns the number of pieces done, or -errno. */
static ssize_t share_stored(const struct commit *commit, size_t i)
{
    uint64_t first = commit->pieces[i].first, end = first + commit->pieces[i].pages;
    size_t next = i + 1;
    for (; next < commit->count; next++) {
        const struct piece *piece = &commit->pieces[next];
        if (piece->kind != SFPAGE_STORED || piece->first - end > GAP_PAGES || !all_from_target(commit, end, piece->first))
            break;
        end = piece->first + piece->pages;
    }
    int status = sf_map_file(address_of(commit, first), (end - first) * SFPAGE_PAGE_BYTES, commit->target,
                             first * SFPAGE_PAGE_BYTES);
    return status != 0 ? status : (ssize_t)(next - i);
}

static bool needs_mapping(const struct piece *piece)
{
    if (piece->kind == KIND_SAME)
        return false;
    return piece->kind == SFPAGE_STORED ? piece->origin != ORIGIN_TARGET : piece->origin != ORIGIN_ZERO;
}

static int remap(const struct commit *commit, uint32_t *step)
{
    for (size_t i = 0; i < commit->count;) {
        const struct piece *piece = &commit->pieces[i];
        uint64_t address = address_of(commit, piece->first), length = (uint64_t)piece->pages * SFPAGE_PAGE_BYTES;
        ssize_t done = 1;
        *step = SFPAGE_STEP_MMAP;
        if (needs_mapping(piece) && piece->kind == SFPAGE_STORED) {
            done = share_stored(commit, i);
        } else if (needs_mapping(piece)) {
            done = sf_map_anonymous(address, length);
        } else {
            /* What lies beneath is right already, a layer or nothing: no new mapping, only the private pages go. */
            *step = SFPAGE_STEP_MADVISE;
            done = sf_drop_pages(address, length);
        }
        if (done < 0)
            return (int)done;
        i += done > 0 ? (size_t)done : 1;
    }
    return 0;
}

/* Too many mappings is no failure of the commit: the image is complete, and MAP with a flattened image is the way on. */
static void try_remap(struct sf_context *context, const struct commit *commit, struct sfpage_reply *reply)
{
    uint64_t extra = 0;
    for (size_t i = 0; i < commit->count; i++)
        extra += needs_mapping(&commit->pieces[i]) ? 2 : 0;
    reply->step = SFPAGE_STEP_BUDGET;
    if (sf_budget(context, extra) == 0 && remap(commit, &reply->step) == 0) {
        reply->step = SFPAGE_STEP_NONE;
        reply->flags |= SFPAGE_REMAPPED;
    }
}

/* A number for each page, and one for each descriptor of a layer. */
static uint64_t source_bytes(const struct sf_message *message)
{
    return (message->request.length / SFPAGE_PAGE_BYTES + message->fd_count - OWN_FDS) * sizeof(uint16_t);
}

static int check_files(const struct sf_message *message, uint32_t *step)
{
    uint64_t target, runs, sources;
    *step = SFPAGE_STEP_FILES;
    int status = sf_regular_file(message->fds[0], &target);
    if (status == 0)
        status = sf_regular_file(message->fds[1], &runs);
    if (status == 0)
        status = sf_regular_file(message->fds[2], &sources);
    if (status != 0)
        return status;
    if (target < message->request.length || sources < source_bytes(message))
        return -ENODATA;
    if (runs != 0)
        return -EINVAL;
    /* Both are written with pwrite, and the target is mapped privately, for which it must be readable. */
    if ((fcntl(message->fds[0], F_GETFL) & O_ACCMODE) != O_RDWR || (fcntl(message->fds[1], F_GETFL) & O_ACCMODE) == O_RDONLY)
        return -EBADF;
    return 0;
}

static int check_arguments(const struct sf_message *message, uint32_t *step)
{
    const struct sfpage_request *request = &message->request;
    *step = SFPAGE_STEP_ARGUMENTS;
    if (message->fd_count < OWN_FDS || request->target == 0 || request->target > UINT16_MAX)
        return -EINVAL;
    int status = sf_check_range(request, step);
    return status != 0 ? status : check_files(message, step);
}

/* A target that is not exclusive must be a fresh one: writing pages that clones map would change them under the clones. */
static int check_sources(const struct commit *commit)
{
    if ((commit->request->flags & SFPAGE_IN_PLACE) != 0)
        return 0;
    for (uint64_t page = 0; page < commit->pages; page++)
        if (commit->sources[page] == commit->request->target)
            return -EINVAL;
    return 0;
}

static int scan_and_copy(struct sf_context *context, struct commit *commit, struct sfpage_reply *reply, uint32_t *step)
{
    uint64_t start = sf_now_ns();
    *step = SFPAGE_STEP_SOURCES;
    int status = check_sources(commit);
    if (status != 0)
        return status;
    *step = SFPAGE_STEP_SCAN;
    status = sf_scan(context, commit->request->address, commit->pages, SF_PRIVATE,
                     (commit->request->flags & SFPAGE_PLAIN_PAGEMAP) != 0, &commit->dirty);
    uint64_t scanned = sf_now_ns();
    reply->value[SFPAGE_V_SCAN_NS] = scanned - start;
    if (status == 0)
        status = copy_pages(commit, reply, step);
    if (status == 0 && (commit->request->flags & SFPAGE_IN_PLACE) != 0) {
        *step = SFPAGE_STEP_PUNCH;
        status = punch_zeros(commit);
    }
    if (status == 0) {
        *step = SFPAGE_STEP_RUNS;
        status = write_runs(commit, &reply->value[SFPAGE_V_RUNS]);
    }
    reply->value[SFPAGE_V_COPY_NS] = sf_now_ns() - scanned;
    return status;
}

void sf_commit(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply)
{
    uint64_t start = sf_now_ns();
    uint32_t step;
    reply->flags = SFPAGE_INTACT;
    int status = check_arguments(message, &step);
    if (status != 0) {
        sf_fail(reply, status, step);
        return;
    }
    struct commit commit = {
        .request = &message->request,
        .pages = message->request.length / SFPAGE_PAGE_BYTES,
        .target = message->fds[0],
        .runs = message->fds[1],
        .layers = message->fds + OWN_FDS,
        .layer_count = message->fd_count - OWN_FDS,
    };
    size_t bytes = source_bytes(message);
    void *sources = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, message->fds[2], 0);
    if (sources == MAP_FAILED) {
        sf_fail(reply, -errno, SFPAGE_STEP_SOURCES);
        return;
    }
    commit.sources = sources;
    commit.numbers = commit.sources + commit.pages;
    status = scan_and_copy(context, &commit, reply, &step);
    uint64_t copied = sf_now_ns();
    if (status != 0)
        sf_fail(reply, status, step);
    else if ((message->request.flags & SFPAGE_NO_REMAP) == 0)
        try_remap(context, &commit, reply);
    munmap(sources, bytes);
    free(commit.dirty.items);
    free(commit.pieces);
    reply->value[SFPAGE_V_REMAP_NS] = sf_now_ns() - copied;
    reply->value[SFPAGE_V_TOTAL_NS] = sf_now_ns() - start;
}
