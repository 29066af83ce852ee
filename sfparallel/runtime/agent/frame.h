/* Frames of the agent port, without any I/O. The format is that of sfparallel/wire.py. */
#ifndef SF_FRAME_H
#define SF_FRAME_H

#include <stddef.h>
#include <stdint.h>

#define FRAME_HEADER_SIZE 8u
#define FRAME_MAX_PAYLOAD (1u << 20)

enum frame_type {
    FRAME_FROZEN = 1,
    FRAME_WOKEN = 2,
    FRAME_FAILED = 3,
    FRAME_REQUEST = 4,
    FRAME_GONE = 5,
    FRAME_OUTPUT = 6,
    FRAME_FUSE = 7,
    FRAME_EXITED = 8,
    FRAME_TAKEN = 9,
    FRAME_MODES = 10,
    FRAME_FREEZE = 32,
    FRAME_THAW = 33,
    FRAME_REPLY = 34,
    FRAME_STDIN = 35,
    FRAME_FUSE_REPLY = 36,
    FRAME_SIGNAL = 37,
    FRAME_RUN = 38,
    FRAME_CLOSE = 39,
    FRAME_TERMINAL = 40,
    FRAME_CLOCK = 41,
};

struct frame {
    uint16_t type;
    uint16_t channel;
    uint32_t size;
    const uint8_t *payload; /* inside the buffer: valid until the next frame_space() */
};

/* Bytes that came in and were not consumed: data[start .. end). */
struct frame_buffer {
    uint8_t *data; /* owned by the caller; at least FRAME_HEADER_SIZE + FRAME_MAX_PAYLOAD bytes */
    size_t capacity;
    size_t start;
    size_t end;
};

/* Where the next bytes belong, and how many fit there (never 0). Moves an incomplete frame to the front if it must. */
uint8_t *frame_space(struct frame_buffer *buffer, size_t *space);

/* `size` bytes were put where frame_space() said. */
void frame_filled(struct frame_buffer *buffer, size_t size);

/* Take the next complete frame. Returns 1, 0 if there is none yet, or -EPROTO for a header no correct host sends. */
int frame_next(struct frame_buffer *buffer, struct frame *frame);

/* Write the header of a frame to `out` (FRAME_HEADER_SIZE bytes). */
void frame_header(uint8_t *out, enum frame_type type, uint16_t channel, size_t size);

#endif
