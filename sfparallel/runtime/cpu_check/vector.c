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
    state->mxcsr = MXCSR_DEFAULT;
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
        memset(&result, 0, sizeof result);
    }
    this->row->model(&result, &a, &b, &state->v[0], this->imm, this->encoding == 2 ? 2 : 1);
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

static void compare(const struct vector_case *this, const struct state *before, const struct state *got,
                    const struct state *wanted)
{
    struct vector loaded;
    unsigned size = this->encoding == 0 || !has(AVX) ? 16 : 32;
    for (unsigned i = 0; i < 16; i++) {
        if (equal(&got->v[i], &wanted->v[i], i == this->form.d ? this->row->compare : EXACT))
            continue;
        const struct vector *a = source(before, this->form.a, &loaded);
        const char *operands = text("a %s", hex(a, size));
        operands = text("%s b %s%s", operands, hex(source(before, this->form.b, &loaded), size),
                        this->row->immediates ? text(" imm %#x", this->imm) : "");
        const char *form = text("%s (a %u b %s d %u)", encodings[this->encoding], this->form.a,
                                this->form.b == MEMORY ? "memory" : text("%u", this->form.b), this->form.d);
        wrong(this->check->name, form, operands, text("%smm%u %s", size == 16 ? "x" : "y", i, hex(&got->v[i], size)),
              hex(&wanted->v[i], size));
        return;
    }
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

void vector_run(const struct check *check)
{
    const struct vector_check *row = check->of;
    const char *stub = row->stubs;
    for (unsigned encoding = 0; encoding < 3; encoding++) {
        if (row->features[encoding] == NEVER)
            continue;
        const struct form *forms = row->shape == UNARY && encoding > 0 ? vex_unary : encoding == 0 ? legacy_binary : vex_binary;
        for (unsigned i = 0; i < (row->immediates ? COUNT(immediates) : 1) * FORMS; i++, stub += STUB_BYTES)
            if (has(row->features[encoding]))
                run_case(&(struct vector_case){ .check = check, .row = row, .encoding = encoding, .form = forms[i % FORMS],
                                                .imm = immediates[i / FORMS], .stub = stub });
    }
}
