/* MAP: lay an image, given as extents of layer files, over guest memory. */
#include <errno.h>
#include <stdlib.h>

#include "internal.h"

static bool is_file(const struct sfpage_extent *extent)
{
    return extent->layer != SFPAGE_ZERO_LAYER && extent->layer != SFPAGE_KEPT_LAYER;
}

/* Contract: nothing in guest memory is touched before all of the extents and files are known to be good. */
static int check_extents(const struct sf_message *message, const struct sfpage_extent *extents)
{
    const struct sfpage_request *request = &message->request;
    const uint64_t mask = SFPAGE_PAGE_BYTES - 1;
    uint64_t at = 0;
    for (uint32_t i = 0; i < request->extents; i++) {
        const struct sfpage_extent *extent = &extents[i];
        if (extent->offset_bytes != at || extent->length_bytes == 0 || (extent->length_bytes & mask) != 0)
            return -EINVAL;
        if (extent->length_bytes > request->length - at || extent->reserved != 0)
            return -EINVAL;
        if (is_file(extent) && extent->layer >= message->fd_count - 1)
            return -EINVAL;
        at += extent->length_bytes;
    }
    return at == request->length ? 0 : -EINVAL;
}

/* A mapping that reaches beyond the end of its file means SIGBUS in the guest later. */
static int check_layers(const struct sf_message *message, const struct sfpage_extent *extents)
{
    uint64_t bytes[SFPAGE_MAX_LAYERS];
    for (unsigned i = 0; i + 1 < message->fd_count; i++) {
        int status = sf_regular_file(message->fds[i + 1], &bytes[i]);
        if (status != 0)
            return status;
    }
    for (uint32_t i = 0; i < message->request.extents; i++) {
        const struct sfpage_extent *extent = &extents[i];
        if (is_file(extent) && extent->offset_bytes + extent->length_bytes > bytes[extent->layer])
            return -ENODATA;
    }
    return 0;
}

static int map_extents(const struct sf_message *message, const struct sfpage_extent *extents)
{
    for (uint32_t i = 0; i < message->request.extents; i++) {
        const struct sfpage_extent *extent = &extents[i];
        uint64_t address = message->request.address + extent->offset_bytes;
        int status;
        if (extent->layer == SFPAGE_ZERO_LAYER)
            status = sf_map_anonymous(address, extent->length_bytes);
        else if (extent->layer == SFPAGE_KEPT_LAYER)
            status = sf_drop_pages(address, extent->length_bytes);
        else
            status = sf_map_file(address, extent->length_bytes, message->fds[extent->layer + 1], extent->offset_bytes);
        if (status != 0)
            return status;
    }
    return 0;
}

static int check(struct sf_context *context, const struct sf_message *message, struct sfpage_extent *extents, uint32_t *step)
{
    *step = SFPAGE_STEP_EXTENTS;
    int status = sf_read_at(message->fds[0], extents, message->request.extents * sizeof *extents, 0);
    if (status == 0)
        status = check_extents(message, extents);
    if (status != 0)
        return status;
    *step = SFPAGE_STEP_FILES;
    status = check_layers(message, extents);
    if (status != 0)
        return status;
    *step = SFPAGE_STEP_BUDGET;
    return sf_budget(context, message->request.extents + 2u);
}

static int check_arguments(const struct sf_message *message, uint32_t *step)
{
    *step = SFPAGE_STEP_ARGUMENTS;
    if (message->fd_count < 1 || message->request.extents == 0)
        return -EINVAL;
    if (message->fd_count > SFPAGE_MAX_LAYERS + 1 || message->request.extents > SFPAGE_MAX_EXTENTS)
        return -E2BIG;
    return sf_check_range(&message->request, step);
}

void sf_map(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply)
{
    uint64_t start = sf_now_ns();
    struct sfpage_extent *extents = NULL;
    uint32_t step;
    reply->flags = SFPAGE_INTACT;
    int status = check_arguments(message, &step);
    if (status == 0) {
        extents = calloc(message->request.extents, sizeof *extents);
        step = SFPAGE_STEP_MEMORY;
        status = extents == NULL ? -ENOMEM : check(context, message, extents, &step);
    }
    uint64_t checked = sf_now_ns();
    if (status == 0) {
        step = SFPAGE_STEP_MMAP;
        status = map_extents(message, extents);
        if (status != 0)
            reply->flags = 0;
    }
    free(extents);
    if (status != 0) {
        sf_fail(reply, status, step);
        return;
    }
    reply->value[SFPAGE_V_MAP_CHECK_NS] = checked - start;
    reply->value[SFPAGE_V_MAP_NS] = sf_now_ns() - checked;
}
