/* What PREPARE and COMMIT are given: guest memory, the target layer, and which layer holds which page. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

enum { OWN_FDS = 3 }; /* target, runs, sources; the layers follow */

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
static int check_sources(const struct sf_plan *plan)
{
    if ((plan->request->flags & SFPAGE_IN_PLACE) != 0)
        return 0;
    for (uint64_t page = 0; page < plan->pages; page++)
        if (plan->sources[page] == plan->request->target)
            return -EINVAL;
    return 0;
}

int sf_open_plan(const struct sf_message *message, const struct sf_prepared *prepared, struct sf_plan *plan, uint32_t *step)
{
    int status = check_arguments(message, step);
    if (status != 0)
        return status;
    *plan = (struct sf_plan){
        .request = &message->request,
        .pages = message->request.length / SFPAGE_PAGE_BYTES,
        .target = message->fds[0],
        .runs = message->fds[1],
        .layers = message->fds + OWN_FDS,
        .layer_count = message->fd_count - OWN_FDS,
        .source_bytes = source_bytes(message),
    };
    *step = SFPAGE_STEP_SOURCES;
    if (sf_is_prepared(prepared, message)) {
        plan->sources = prepared->sources;
    } else {
        void *sources = mmap(NULL, plan->source_bytes, PROT_READ, MAP_PRIVATE, message->fds[2], 0);
        if (sources == MAP_FAILED)
            return -errno;
        plan->sources = plan->mapped = sources;
        status = check_sources(plan);
    }
    plan->numbers = plan->sources + plan->pages;
    if (status != 0)
        sf_close_plan(plan);
    return status;
}

void sf_close_plan(struct sf_plan *plan)
{
    if (plan->mapped != NULL)
        munmap(plan->mapped, plan->source_bytes);
    plan->mapped = NULL;
}

/* A page is zero if its first word is and each byte equals the one a word further on. */
bool sf_is_zero(const char *page)
{
    uint64_t word;
    memcpy(&word, page, sizeof word);
    return word == 0 && memcmp(page, page + sizeof word, SFPAGE_PAGE_BYTES - sizeof word) == 0;
}

enum sf_origin sf_origin_of(const struct sf_plan *plan, uint64_t page)
{
    uint16_t source = plan->sources[page];
    if (source == 0)
        return SF_ORIGIN_ZERO;
    return source == plan->request->target ? SF_ORIGIN_TARGET : SF_ORIGIN_OTHER;
}

static int layer_of(const struct sf_plan *plan, uint64_t page)
{
    uint16_t source = plan->sources[page];
    if (source != 0 && source == plan->request->target)
        return plan->target;
    for (size_t i = 0; source != 0 && i < plan->layer_count; i++)
        if (plan->numbers[i] == source)
            return plan->layers[i];
    return -1;
}

bool sf_read_layer(const struct sf_plan *plan, uint64_t page, void *content)
{
    int layer = layer_of(plan, page);
    return layer >= 0 && sf_read_at(layer, content, SFPAGE_PAGE_BYTES, page * SFPAGE_PAGE_BYTES) == 0;
}
