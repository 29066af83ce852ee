#include "frame.h"

#include <errno.h>
#include <string.h>

static uint16_t get16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t get32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

uint8_t *frame_space(struct frame_buffer *buffer, size_t *space)
{
    if (buffer->start == buffer->end) {
        buffer->start = buffer->end = 0;
    } else if (buffer->start > 0 && buffer->capacity - buffer->start < FRAME_HEADER_SIZE + FRAME_MAX_PAYLOAD) {
        /* The largest frame must fit behind `start`. The buffer is twice that large, so this move is rare. */
        memmove(buffer->data, buffer->data + buffer->start, buffer->end - buffer->start);
        buffer->end -= buffer->start;
        buffer->start = 0;
    }
    *space = buffer->capacity - buffer->end;
    return buffer->data + buffer->end;
}

void frame_filled(struct frame_buffer *buffer, size_t size)
{
    buffer->end += size;
}

int frame_next(struct frame_buffer *buffer, struct frame *frame)
{
    const uint8_t *head = buffer->data + buffer->start;
    size_t have = buffer->end - buffer->start;
    if (have < FRAME_HEADER_SIZE)
        return 0;
    frame->size = get32(head);
    frame->type = get16(head + 4);
    frame->channel = get16(head + 6);
    if (frame->size > FRAME_MAX_PAYLOAD || frame->type < FRAME_FREEZE || frame->type > FRAME_CLOCK)
        return -EPROTO;
    if (have - FRAME_HEADER_SIZE < frame->size)
        return 0;
    frame->payload = head + FRAME_HEADER_SIZE;
    buffer->start += FRAME_HEADER_SIZE + frame->size;
    return 1;
}

void frame_header(uint8_t *out, enum frame_type type, uint16_t channel, size_t size)
{
    uint32_t length = (uint32_t)size;
    for (unsigned i = 0; i < 4; i++)
        out[i] = (uint8_t)(length >> (8 * i));
    out[4] = (uint8_t)((unsigned)type & 0xff);
    out[5] = (uint8_t)((unsigned)type >> 8);
    out[6] = (uint8_t)(channel & 0xff);
    out[7] = (uint8_t)(channel >> 8);
}
