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

enum { WRITE_PAGES = 64 }; /* written at once: 256 KiB are still in the cache since the comparison with zero */
enum { KIND_SAME = 0 };    /* beside enum sfpage_kind: dirty, but equal to what the layer beneath holds */
enum { GAP_PAGES = 8 };    /* clean pages of the target that one mmap may lay over again to save another call */
enum { FILL_PAGES = 4 };   /* unchanged pages that are stored all the same, to make one run of two (measured: with 16, the first
                            * fork of a job stores twice what was dirtied, and takes 5 ms longer; with none, 3 ms) */
enum { ASIDE_PAGES = 64 }; /* rows that are freed after the pause: for shorter ones the two system calls take longer */

/* Dirty pages in a row of which the same was made. */
struct piece {
    uint64_t first;
    uint32_t pages;
    uint8_t kind;   /* enum sfpage_kind, or KIND_SAME */
    uint8_t origin; /* enum sf_origin: where the mapping under the private pages comes from */
};

struct commit {
    struct sf_plan plan;
    struct sf_prepared *prepared; /* for this commit, or nothing is prepared; borrowed from the context */
    struct sf_ranges dirty;
    struct piece *pieces;    /* malloc'ed */
    size_t count;
    size_t capacity;
    uint64_t window_first;   /* stored pages that are not written yet */
    uint64_t window_pages;
};

static uint64_t address_of(const struct commit *commit, uint64_t page)
{
    return commit->plan.request->address + page * SFPAGE_PAGE_BYTES;
}

static int flush_window(struct commit *commit)
{
    uint64_t pages = commit->window_pages;
    commit->window_pages = 0;
    if (pages == 0)
        return 0;
    return sf_write_at(commit->plan.target, sf_page(&commit->plan, commit->window_first), pages * SFPAGE_PAGE_BYTES,
                       commit->window_first * SFPAGE_PAGE_BYTES);
}

static int store_page(struct commit *commit, uint64_t page)
{
    int status = 0;
    void *prepared = sf_prepared_page(commit->prepared, page);
    if (prepared != NULL) {
        memcpy(prepared, sf_page(&commit->plan, page), SFPAGE_PAGE_BYTES);
        return 0;
    }
    if (commit->window_pages == WRITE_PAGES || commit->window_first + commit->window_pages != page)
        status = flush_window(commit);
    if (commit->window_pages == 0)
        commit->window_first = page;
    commit->window_pages++;
    return status;
}

static int note_page(struct commit *commit, uint64_t page, int kind, enum sf_origin origin)
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
        if (sf_origin_of(&commit->plan, page) == SF_ORIGIN_ZERO)
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
        enum sf_origin origin = sf_origin_of(&commit->plan, between);
        int status = note_page(commit, between, SFPAGE_STORED, origin);
        if (status == 0 && origin != SF_ORIGIN_TARGET) {
            status = store_page(commit, between);
            filled++;
        }
        if (status != 0)
            return status;
    }
    return filled;
}

/* A program that only counts references up and down again leaves a dirty page that is what it was: half of the pages that a
 * Python program dirties between two forks are such ones (measured). A layer that cannot be read is no obstacle. What had
 * changed while it was prepared will hardly have changed back. */
static bool is_unchanged(const struct commit *commit, const struct sf_range *range, uint64_t page)
{
    char read[SFPAGE_PAGE_BYTES];
    if (range->pages > SF_COMPARED_PAGES || sf_prepared_page(commit->prepared, page) != NULL)
        return false;
    const void *content = sf_kept_page(commit->prepared, page);
    if (content == NULL && sf_read_layer(&commit->plan, page, read))
        content = read;
    return content != NULL && memcmp(content, sf_page(&commit->plan, page), SFPAGE_PAGE_BYTES) == 0;
}

static int copy_range(struct commit *commit, const struct sf_range *range, struct sfpage_reply *reply, uint32_t *step)
{
    for (uint64_t page = range->first; page < range->first + range->pages; page++) {
        enum sf_origin origin = sf_origin_of(&commit->plan, page);
        if (range->zero_frame && origin == SF_ORIGIN_ZERO)
            continue; /* only ever read: the kernel's zero page, not memory of this process */
        bool zero = range->zero_frame || sf_is_zero(sf_page(&commit->plan, page));
        bool same = !zero && is_unchanged(commit, range, page);
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
        if (fallocate(commit->plan.target, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(piece->first * SFPAGE_PAGE_BYTES),
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
    int status = sf_write_at(commit->plan.runs, runs, count * sizeof *runs, 0);
    free(runs);
    return status;
}

enum content { FROM_TARGET, FROM_NOWHERE, WHAT_IS_BENEATH };

static int lay(const struct commit *commit, uint64_t first, uint64_t pages, enum content content)
{
    uint64_t address = address_of(commit, first), length = pages * SFPAGE_PAGE_BYTES;
    switch (content) {
    case FROM_TARGET:
        return sf_map_file(address, length, commit->plan.target, first * SFPAGE_PAGE_BYTES);
    case FROM_NOWHERE:
        return sf_map_anonymous(address, length);
    default:
        return sf_drop_pages(address, length);
    }
}

/* Let pages of guest memory show something else. To free the private pages takes 0.3 to 0.5 us each, to move the page tables
 * of a large row aside next to nothing; where they cannot be moved (two mappings, an older kernel) they are freed now. */
static int replace(const struct commit *commit, uint64_t first, uint64_t pages, enum content content)
{
    uint64_t address = address_of(commit, first), length = pages * SFPAGE_PAGE_BYTES;
    bool moved = pages >= ASIDE_PAGES && sf_move_aside(commit->prepared, address, length) == 0;
    int status = moved && content == WHAT_IS_BENEATH ? 0 : lay(commit, first, pages, content);
    if (status != 0 && moved && sf_move_back(commit->prepared, address, length) != 0)
        return -ENOTRECOVERABLE;
    return status;
}

static bool all_from_target(const struct commit *commit, uint64_t first, uint64_t end)
{
    for (uint64_t page = first; page < end; page++)
        if (sf_origin_of(&commit->plan, page) != SF_ORIGIN_TARGET)
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
    int status = replace(commit, first, end - first, FROM_TARGET);
    return status != 0 ? status : (ssize_t)(next - i);
}

static bool needs_mapping(const struct piece *piece)
{
    if (piece->kind == KIND_SAME)
        return false;
    return piece->kind == SFPAGE_STORED ? piece->origin != SF_ORIGIN_TARGET : piece->origin != SF_ORIGIN_ZERO;
}

static int remap(const struct commit *commit, uint32_t *step)
{
    for (size_t i = 0; i < commit->count;) {
        const struct piece *piece = &commit->pieces[i];
        ssize_t done = 1;
        *step = SFPAGE_STEP_MMAP;
        if (needs_mapping(piece) && piece->kind == SFPAGE_STORED) {
            done = share_stored(commit, i);
        } else if (needs_mapping(piece)) {
            done = replace(commit, piece->first, piece->pages, FROM_NOWHERE);
        } else {
            /* What lies beneath is right already, a layer or nothing: no new mapping, only the private pages go. */
            *step = SFPAGE_STEP_MADVISE;
            done = replace(commit, piece->first, piece->pages, WHAT_IS_BENEATH);
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
    for (size_t i = 0; i < commit->count; i++) {
        extra += needs_mapping(&commit->pieces[i]) ? 2 : 0;
        extra += commit->pieces[i].pages >= ASIDE_PAGES ? 2 : 0;
    }
    reply->step = SFPAGE_STEP_BUDGET;
    int status = sf_budget(context, extra);
    if (status == 0)
        status = remap(commit, &reply->step);
    if (status == 0) {
        reply->step = SFPAGE_STEP_NONE;
        reply->flags |= SFPAGE_REMAPPED;
    } else if (status == -ENOTRECOVERABLE) {
        reply->flags &= ~(uint32_t)SFPAGE_INTACT;
    }
}

static int scan_and_copy(struct sf_context *context, struct commit *commit, struct sfpage_reply *reply, uint32_t *step)
{
    uint64_t start = sf_now_ns();
    *step = SFPAGE_STEP_SCAN;
    int status = sf_scan_around(context, commit->plan.request->address, commit->plan.pages,
                                (commit->plan.request->flags & SFPAGE_PLAIN_PAGEMAP) != 0, &commit->prepared->dirty,
                                &commit->dirty);
    uint64_t scanned = sf_now_ns();
    reply->value[SFPAGE_V_SCAN_NS] = scanned - start;
    if (status == 0)
        status = copy_pages(commit, reply, step);
    if (status == 0 && (commit->plan.request->flags & SFPAGE_IN_PLACE) != 0) {
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

/* For SETTLE: what of the prepared pages is in use now. Without knowing that for certain nothing may be taken out. */
static void note_stored(struct commit *commit)
{
    for (size_t i = 0; i < commit->count; i++)
        if (commit->pieces[i].kind == SFPAGE_STORED &&
            sf_append(&commit->prepared->stored, commit->pieces[i].first, commit->pieces[i].pages, false) != 0)
            commit->prepared->rows.count = 0;
}

void sf_commit(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply)
{
    uint64_t start = sf_now_ns();
    struct commit commit = {.prepared = &context->prepared};
    uint32_t step;
    reply->flags = SFPAGE_INTACT;
    if (!sf_is_prepared(&context->prepared, message))
        sf_settle(&context->prepared);
    int status = sf_open_plan(message, &context->prepared, &commit.plan, &step);
    if (status != 0) {
        sf_fail(reply, status, step);
        return;
    }
    context->prepared.used = true;
    status = scan_and_copy(context, &commit, reply, &step);
    uint64_t copied = sf_now_ns();
    if (status == 0 && context->prepared.window != NULL)
        note_stored(&commit);
    if (status != 0)
        sf_fail(reply, status, step);
    else if ((message->request.flags & SFPAGE_NO_REMAP) == 0)
        try_remap(context, &commit, reply);
    sf_close_plan(&commit.plan);
    free(commit.dirty.items);
    free(commit.pieces);
    reply->value[SFPAGE_V_REMAP_NS] = sf_now_ns() - copied;
    reply->value[SFPAGE_V_TOTAL_NS] = sf_now_ns() - start;
}
