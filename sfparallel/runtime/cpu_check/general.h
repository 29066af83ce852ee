/* Rows of instructions that touch anything: general registers, flags, memory, vectors. The stub is executed with operands that
   are drawn anew each time, the model changes a copy of the same state and memory, and all of both must agree at the end. */
#ifndef SF_GENERAL_H
#define SF_GENERAL_H

#include <string.h>

#include "check.h"

enum { MEMORY_BYTES = 1024 };

/* RSI, RDI, R13 and R14 point into it before the instruction, 256 bytes or more from either end. */
extern uint8_t general_memory[MEMORY_BYTES];

struct general_check {
    const char *stub;
    uint64_t flags;                          /* that are defined afterwards (or unchanged) */
    enum operand operand;                    /* what vectors are filled with */
    void (*prepare)(struct state *state);    /* constrains the operands; NULL: any will do */
    void (*model)(struct state *state);
};

void general_run(const struct check *check);

#define RSI_AT 256
#define RDI_AT 512

/* The instruction as text names the row. */
#define GENERAL(id, code, feature, flags_, operand_, prepare_, ...)                                                        \
    STUBS(id, STUB(code));                                                                                                 \
    static void model_##id(struct state *s) { uint64_t *r = s->r; (void)r; __VA_ARGS__ }                                   \
    static const struct general_check general_##id = {                                                                     \
        .stub = stubs_##id, .flags = flags_, .operand = operand_, .prepare = prepare_, .model = model_##id };              \
    CHECK(id, code, feature, general_run, &general_##id)

#define AT(reg, type) (*(__attribute__((may_alias, aligned(1))) type *)s->r[reg])

static inline void set_flags(struct state *s, uint64_t mask, uint64_t value)
{
    s->flags = (s->flags & ~mask) | (value & mask);
}

/* ZF, SF and PF of a result. */
static inline uint64_t result_flags(uint64_t result, unsigned bits)
{
    uint64_t low = bits == 64 ? result : result & ((UINT64_C(1) << bits) - 1);
    return (low == 0 ? ZF : 0) | (low >> (bits - 1) & 1 ? SF : 0) | (__builtin_parity((unsigned)low & 0xff) ? 0 : PF);
}

static inline void clear_above(struct state *s, unsigned i) /* what a VEX.128 instruction does */
{
    memset(&s->v[i].lane[1], 0, sizeof s->v[i].lane[1]);
}

#endif
