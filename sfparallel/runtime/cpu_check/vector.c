/* Executes the forms of vector instructions and compares all registers with what the model says. */
#include "vector.h"

#include <math.h>
#include <string.h>

enum { FORMS = 5, MEMORY = 16 };

static const uint8_t immediates[] = { IMMEDIATES };
static const char *const encodings[3] = { "SSE", "VEX.128", "VEX.256" };

/* Registers of a, b and d in each form, as the stubs of vector.h have them. */
struct form {
    uint8_t a, b, d;
};

static const struct form legacy_binary[FORMS] = { { 1, 2, 1 }, { 1, MEMORY, 1 }, { 9, 13, 9 }, { 1, 1, 1 }, { 2, 9, 2 } };
static const struct form vex_binary[FORMS] = { { 1, 2, 3 }, { 1, MEMORY, 3 }, { 9, 13, 11 }, { 1, 2, 2 }, { 1, 2, 1 } };
static const struct form legacy_load[FORMS] = { { 1, MEMORY, 1 }, { 1, MEMORY, 1 }, { 9, MEMORY, 9 }, { 1, MEMORY, 1 },
    { 2, MEMORY, 2 } };
static const struct form vex_load[FORMS] = { { 1, MEMORY, 3 }, { 1, MEMORY, 3 }, { 1, MEMORY, 11 }, { 1, MEMORY, 2 },
    { 1, MEMORY, 1 } };
static const struct form vex_unary[FORMS] = { { 2, 2, 3 }, { 1, MEMORY, 3 }, { 13, 13, 11 }, { 2, 2, 2 }, { 9, 9, 1 } };

/* A case: one encoding, form and immediate. */
struct vector_case {
    const struct check *check;
    const struct vector_check *row;
    unsigned encoding;        /* index of row->features */
    struct form form;
    unsigned imm;
    const char *stub;
};

/* Legacy forms need an aligned operand in memory; VEX forms get one that is not. */
static uint8_t memory[96] __attribute__((aligned(64)));

static const struct vector *source(const struct state *state, unsigned number, struct vector *loaded)
{
    if (number != MEMORY)
        return &state->v[number];
    *loaded = *(const struct vector *)(const void *)memcpy(loaded, (const void *)state->r[RSI], sizeof *loaded);
    return loaded;
}

unsigned vector_rounding;

/* All but "denormal operand" (DE), which TCG does not raise before QEMU 10. */
#define COMPARED_FLAGS 0x3du

/* The four rounding modes, and denormals as zeros in operands (DAZ) and in results (FTZ). */
static const uint32_t mxcsr_modes[] = { 0, 0x2000, 0x4000, 0x6000, 0, 0x8040 };

static void fill(struct state *state, const struct vector_case *this, unsigned round)
{
    struct vector in_memory;
    for (unsigned i = 0; i < 16; i++)
        for (unsigned lane = 0; lane < 2; lane++)
            operand(&state->v[i].lane[lane], this->row->operand, round + lane, i % 4);
    for (unsigned lane = 0; lane < 2; lane++)
        operand(&in_memory.lane[lane], this->row->operand, round + lane, 2);
    uint8_t *at = memory + (this->encoding == 0 ? 0 : 13);
    memcpy(at, &in_memory, sizeof in_memory);
    state->r[RSI] = state->r[RDI] = (uint64_t)at;
    /* soft.h knows no DAZ nor FTZ; it is used where results are EXACT. */
    state->mxcsr = MXCSR_DEFAULT | mxcsr_modes[round % (this->row->compare == EXACT ? 4 : COUNT(mxcsr_modes))];
}

/* The model computes in the modes of the stub, and raises the flags that the stub should. */
static void model(struct vector *result, const struct vector *a, const struct vector *b, struct state *state,
                  const struct vector_case *this)
{
    const uint32_t usual = MXCSR_DEFAULT;
    vector_rounding = state->mxcsr >> 13 & 3;
    __asm__ volatile("ldmxcsr %0" : : "m"(state->mxcsr) : "memory");
    this->row->model(result, a, b, &state->v[0], this->imm, this->encoding == 2 ? 2 : 1);
    __asm__ volatile("stmxcsr %0" : "=m"(state->mxcsr) : : "memory");
    __asm__ volatile("ldmxcsr %0" : : "m"(usual) : "memory");
}

static void expect(struct state *state, const struct vector_case *this)
{
    struct vector loaded, result, a = *source(state, this->form.a, &loaded), b = *source(state, this->form.b, &loaded);
    const struct vector *out = &state->v[this->form.d];
    switch (this->row->shape) {
    case BINARY:
        result = a;
        break;
    case MERGING:
        result = *out;
        break;
    case UNARY:
    case LOADING:
        memset(&result, 0, sizeof result);
    }
    model(&result, &a, &b, state, this);
    if (this->encoding == 0) /* legacy forms leave the upper half of a register as it is, VEX.128 forms clear it */
        result.lane[1] = out->lane[1];
    if (this->encoding == 1)
        memset(&result.lane[1], 0, sizeof result.lane[1]);
    state->v[this->form.d] = result;
}

static bool equal(const struct vector *got, const struct vector *wanted, enum compare compare)
{
    if (memcmp(got, wanted, sizeof *got) == 0)
        return true;
    for (unsigned lane = 0; lane < 2; lane++) {
        const union lane *g = &got->lane[lane], *w = &wanted->lane[lane];
        for (unsigned i = 0; i < 4; i++)
            if (g->u32[i] != w->u32[i] && !(compare == NAN32 && isnan(g->f32[i]) && isnan(w->f32[i])) &&
                !(compare == NAN64 && isnan(g->f64[i / 2]) && isnan(w->f64[i / 2])))
                return false;
    }
    return true;
}

static void differs(const struct vector_case *this, const struct state *before, const char *got, const char *wanted)
{
    struct vector loaded;
    unsigned size = this->encoding == 2 ? 32 : 16;
    const char *operands = text("a %s", hex(source(before, this->form.a, &loaded), size));
    operands = text("%s b %s%s", operands, hex(source(before, this->form.b, &loaded), size),
                    this->row->immediates ? text(" imm %#x", this->imm) : "");
    if (this->row->operand != BITS)
        operands = text("%s mxcsr %#x", operands, before->mxcsr);
    if (this->row->shape == MERGING)
        operands = text("%s d %s", operands, hex(&before->v[this->form.d], size));
    const char *form = text("%s (a %u b %s d %u)", encodings[this->encoding], this->form.a,
                            this->form.b == MEMORY ? "memory" : text("%u", this->form.b), this->form.d);
    wrong(this->check->name, form, operands, got, wanted);
}

static void compare(const struct vector_case *this, const struct state *before, const struct state *got,
                    const struct state *wanted)
{
    unsigned size = has(AVX) ? 32 : 16;
    for (unsigned i = 0; i < 16; i++) {
        if (equal(&got->v[i], &wanted->v[i], i == this->form.d ? this->row->compare : EXACT))
            continue;
        differs(this, before, text("register %u %s", i, hex(&got->v[i], size)), hex(&wanted->v[i], size));
        return;
    }
    if (this->row->compare != EXACT && (got->mxcsr ^ wanted->mxcsr) & COMPARED_FLAGS)
        differs(this, before, text("mxcsr %#x", got->mxcsr), text("%#x", wanted->mxcsr));
}

static void run_case(const struct vector_case *this)
{
    for (unsigned round = 0; round < rounds(this->row->immediates ? 9 : 40); round++) {
        struct state before = { .mxcsr = MXCSR_DEFAULT }, got, wanted;
        fill(&before, this, round * 7 + this->imm);
        got = wanted = before;
        execute(this->stub, &got);
        expect(&wanted, this);
        compare(this, &before, &got, &wanted);
    }
}

static const struct form *forms_of(enum shape shape, bool legacy)
{
    switch (shape) {
    case UNARY:
        return legacy ? legacy_binary : vex_unary;
    case LOADING:
        return legacy ? legacy_load : vex_load;
    default:
        return legacy ? legacy_binary : vex_binary;
    }
}

void vector_run(const struct check *check)
{
    const struct vector_check *row = check->of;
    const char *stub = row->stubs;
    for (unsigned encoding = 0; encoding < 3; encoding++) {
        if (row->features[encoding] == NEVER)
            continue;
        const struct form *forms = forms_of(row->shape, encoding == 0);
        for (unsigned i = 0; i < (row->immediates ? COUNT(immediates) : 1) * FORMS; i++, stub += STUB_BYTES)
            if (has(row->features[encoding]))
                run_case(&(struct vector_case){ .check = check, .row = row, .encoding = encoding, .form = forms[i % FORMS],
                                                .imm = immediates[i / FORMS] & (row->bits[encoding > 0]
                                                    ? row->bits[encoding > 0] : 0xff),
                                                .stub = stub });
    }
}
