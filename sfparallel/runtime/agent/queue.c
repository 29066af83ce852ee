#include "agent.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int queue_append(struct queue *queue, const void *data, size_t size)
{
    struct chunk *chunk = malloc(sizeof *chunk + size);
    if (!chunk)
        return -ENOMEM;
    *chunk = (struct chunk){ .size = size };
    memcpy(chunk->data, data, size);
    if (queue->last)
        queue->last->next = chunk;
    else
        queue->first = chunk;
    queue->last = chunk;
    return 0;
}

void queue_pop(struct queue *queue)
{
    struct chunk *chunk = queue->first;
    if (!chunk)
        return;
    queue->first = chunk->next;
    if (!queue->first)
        queue->last = NULL;
    free(chunk);
}

void queue_clear(struct queue *queue)
{
    while (queue->first)
        queue_pop(queue);
}
