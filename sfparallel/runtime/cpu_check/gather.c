/* Gathers: all eight, with every register as the index and four forms of address. In SIB bytes of ordinary instructions, 4 as
   the index means that there is none; in gathers it is a register as any other. */
#include "check.h"

#include <string.h>

struct gather {
    unsigned index_bytes, element_bytes, elements; /* how many elements are loaded */
    const char *stubs;                             /* for each index register one for each form of address */
};

enum { REGISTERS = 16, FORMS = 4, TABLE = 2048 };

/* Indexes count from the middle, so that negative ones stay inside. */
static uint8_t table[TABLE];

static const struct address {
    const char *name;
    enum reg base;
    int scale, offset;
} addresses[FORMS] = {
    { "(rsi,INDEX,4)", RSI, 4, 0 }, { "(rsi,INDEX,8)", RSI, 8, 0 }, { "24(rdi,INDEX,1)", RDI, 1, 24 },
        { "-200(r13,INDEX,2)", R13, 2, -200 },
};

/* Mask and destination of each index register: they must be three different ones. */
static const struct { uint8_t mask, destination; } others[REGISTERS] = {
    { 1, 2 }, { 2, 10 }, { 1, 10 }, { 1, 2 }, { 1, 2 }, { 10, 13 }, { 1, 2 }, { 13, 4 },
    { 1, 2 }, { 1, 2 }, { 4, 12 }, { 1, 2 }, { 1, 2 }, { 8, 5 }, { 15, 0 }, { 0, 14 },
};

#define WITH_INDEX(insn, v, x, index, mask, destination)                                                                   \
    STUB(insn " %" v #mask ",(%rsi,%" x #index ",4),%" v #destination)                                                     \
    STUB(insn " %" v #mask ",(%rsi,%" x #index ",8),%" v #destination)                                                     \
    STUB(insn " %" v #mask ",24(%rdi,%" x #index ",1),%" v #destination)                                                   \
    STUB(insn " %" v #mask ",-200(%r13,%" x #index ",2),%" v #destination)
#define ALL_INDEXES(insn, v, x)                                                                                            \
    WITH_INDEX(insn, v, x, 0, 1, 2) WITH_INDEX(insn, v, x, 1, 2, 10)                                                       \
    WITH_INDEX(insn, v, x, 2, 1, 10) WITH_INDEX(insn, v, x, 3, 1, 2)                                                       \
    WITH_INDEX(insn, v, x, 4, 1, 2) WITH_INDEX(insn, v, x, 5, 10, 13)                                                      \
    WITH_INDEX(insn, v, x, 6, 1, 2) WITH_INDEX(insn, v, x, 7, 13, 4)                                                       \
    WITH_INDEX(insn, v, x, 8, 1, 2) WITH_INDEX(insn, v, x, 9, 1, 2)                                                        \
    WITH_INDEX(insn, v, x, 10, 4, 12) WITH_INDEX(insn, v, x, 11, 1, 2)                                                     \
    WITH_INDEX(insn, v, x, 12, 1, 2) WITH_INDEX(insn, v, x, 13, 8, 5)                                                      \
    WITH_INDEX(insn, v, x, 14, 15, 0) WITH_INDEX(insn, v, x, 15, 0, 14)

static int64_t element(const struct vector *vector, unsigned bytes, unsigned i)
{
    int64_t value = 0;
    memcpy(&value, (const uint8_t *)vector + i * bytes, bytes);
    return bytes == 4 ? (int32_t)value : value;
}

/* Indexes are small multiples of both signs, but for the bits above those that the address takes: there are none. */
static void fill(struct state *state, const struct gather *gather, unsigned index_register, const struct address *address)
{
    int64_t reach = TABLE / 2 / address->scale - 32;
    for (unsigned i = 0; i < 16; i++) {
        operand(&state->v[i].lane[0], BITS, 2, 0);
        operand(&state->v[i].lane[1], BITS, 2, 0);
    }
    struct vector *indexes = &state->v[index_register];
    for (unsigned i = 0; i < sizeof *indexes / gather->index_bytes; i++) {
        int64_t value = (int64_t)(random64() % (uint64_t)(2 * reach)) - reach;
        if (address->offset < 0)
            value = value / 2;
        memcpy((uint8_t *)indexes + i * gather->index_bytes, &value, gather->index_bytes);
    }
    state->r[address->base] = (uint64_t)(table + TABLE / 2);
}

static void expect(struct state *state, const struct gather *gather, unsigned index_register, const struct address *address)
{
    struct vector *mask = &state->v[others[index_register].mask], *out = &state->v[others[index_register].destination];
    unsigned size = gather->element_bytes;
    for (unsigned i = 0; i < gather->elements; i++) {
        int64_t index = element(&state->v[index_register], gather->index_bytes, i);
        if (element(mask, size, i) < 0)
            memcpy((uint8_t *)out + i * size,
                (const uint8_t *)state->r[address->base] + index * address->scale + address->offset, size);
    }
    memset((uint8_t *)out + gather->elements * size, 0, sizeof *out - gather->elements * size);
    memset(mask, 0, sizeof *mask);
}

static void compare(const struct check *check, unsigned index_register, const struct address *address,
                    const struct state *before, const struct state *got, const struct state *wanted)
{
    for (unsigned i = 0; i < REGISTERS; i++) {
        if (memcmp(&got->v[i], &wanted->v[i], sizeof got->v[i]) == 0)
            continue;
        const char *operands = text("index in register %u = %s, mask = %s", index_register, hex(&before->v[index_register], 32),
                                    hex(&before->v[others[index_register].mask], 32));
        wrong(check->name, address->name, operands, text("ymm%u %s", i, hex(&got->v[i], 32)), hex(&wanted->v[i], 32));
        return;
    }
}

static void run(const struct check *check)
{
    const struct gather *gather = check->of;
    for (size_t i = 0; i < sizeof table; i++)
        table[i] = (uint8_t)random64();
    for (unsigned n = 0; n < REGISTERS * FORMS; n++) {
        const struct address *address = &addresses[n % FORMS];
        for (unsigned round = 0; round < rounds(8); round++) {
            struct state before = { .mxcsr = MXCSR_DEFAULT }, got, wanted;
            fill(&before, gather, n / FORMS, address);
            got = wanted = before;
            execute(gather->stubs + STUB_BYTES * n, &got);
            expect(&wanted, gather, n / FORMS, address);
            compare(check, n / FORMS, address, &before, &got, &wanted);
        }
    }
}

/* Names are those of the type of index and of element; a form with fewer of either uses the lower half of their register. */
#define GATHER(insn, size, v, x, index_bytes_, element_bytes_, elements_)                                                  \
    STUBS(insn##size, ALL_INDEXES(#insn, v, x));                                                                           \
    static const struct gather gather_##insn##size = {                                                                     \
        .index_bytes = index_bytes_, .element_bytes = element_bytes_, .elements = elements_, .stubs = stubs_##insn##size }; \
    CHECK(insn##size, #insn " " #size, AVX2, run, &gather_##insn##size)

GATHER(vpgatherdd, xmm, "xmm", "xmm", 4, 4, 4);
GATHER(vpgatherdd, ymm, "ymm", "ymm", 4, 4, 8);
GATHER(vpgatherdq, xmm, "xmm", "xmm", 4, 8, 2);
GATHER(vpgatherdq, ymm, "ymm", "xmm", 4, 8, 4);
GATHER(vpgatherqd, xmm, "xmm", "xmm", 8, 4, 2);
GATHER(vpgatherqd, ymm, "xmm", "ymm", 8, 4, 4);
GATHER(vpgatherqq, xmm, "xmm", "xmm", 8, 8, 2);
GATHER(vpgatherqq, ymm, "ymm", "ymm", 8, 8, 4);
GATHER(vgatherdps, xmm, "xmm", "xmm", 4, 4, 4);
GATHER(vgatherdps, ymm, "ymm", "ymm", 4, 4, 8);
GATHER(vgatherdpd, xmm, "xmm", "xmm", 4, 8, 2);
GATHER(vgatherdpd, ymm, "ymm", "xmm", 4, 8, 4);
GATHER(vgatherqps, xmm, "xmm", "xmm", 8, 4, 2);
GATHER(vgatherqps, ymm, "xmm", "ymm", 8, 4, 4);
GATHER(vgatherqpd, xmm, "xmm", "xmm", 8, 8, 2);
GATHER(vgatherqpd, ymm, "ymm", "ymm", 8, 8, 4);
