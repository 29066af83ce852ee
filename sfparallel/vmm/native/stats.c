/* STATS: whose pages guest memory is made of, and what the process as a whole takes. */
#include <stdlib.h>

#include "internal.h"

static int count_pages(const struct sf_context *context, const struct sfpage_request *request, enum sf_want want, uint64_t *pages)
{
    struct sf_ranges ranges = {0};
    int status = sf_scan(context, request->address, 0, request->length / SFPAGE_PAGE_BYTES, want,
                         (request->flags & SFPAGE_PLAIN_PAGEMAP) != 0, &ranges);
    *pages = 0;
    for (size_t i = 0; i < ranges.count; i++)
        if (!ranges.items[i].zero_frame)
            *pages += ranges.items[i].pages;
    free(ranges.items);
    return status;
}

void sf_stats(struct sf_context *context, const struct sf_message *message, struct sfpage_reply *reply)
{
    uint32_t step;
    reply->flags = SFPAGE_INTACT;
    int status = sf_check_range(&message->request, &step);
    if (status == 0) {
        step = SFPAGE_STEP_SCAN;
        status = count_pages(context, &message->request, SF_PRIVATE, &reply->value[SFPAGE_V_PRIVATE_PAGES]);
    }
    if (status == 0)
        status = count_pages(context, &message->request, SF_FILE, &reply->value[SFPAGE_V_FILE_PAGES]);
    if (status == 0) {
        step = SFPAGE_STEP_STATS;
        status = sf_read_rollup(&reply->value[SFPAGE_V_PROCESS_PRIVATE], &reply->value[SFPAGE_V_PROCESS_ANON]);
    }
    if (status == 0)
        status = sf_count_maps(&context->maps);
    reply->value[SFPAGE_V_PROCESS_MAPPINGS] = context->maps;
    reply->value[SFPAGE_V_STATS_MAX_MAPPINGS] = context->max_maps;
    if (status != 0)
        sf_fail(reply, status, step);
}
