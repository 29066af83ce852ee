/* Rows of vector instructions. Each has up to three encodings (legacy SSE, VEX.128, VEX.256), five forms of operands in each,
   and one model: a function of whole registers that is told how many lanes of 128 bits there are. */
#ifndef SF_VECTOR_H
#define SF_VECTOR_H

#include "check.h"

enum shape {
    BINARY,   /* d = a op b; the legacy form's d is a; the model finds a in d */
    UNARY,    /* d = op b; the model finds zeros in d */
    MERGING,  /* d = d op a op b, as fused multiplication and addition */
    LOADING,  /* d = op memory */
};

/* What of a result is compared. */
enum compare {
    EXACT,
    NAN32, NAN64, /* elements that are NaN in both are equal: which NaN it is differs between processors */
};

typedef void vector_model(struct vector *d, const struct vector *a, const struct vector *b, const struct vector *c,
                          unsigned imm, unsigned lanes);

struct vector_check {
    enum shape shape;
    enum operand operand;
    enum compare compare;
    enum feature features[3];     /* of the legacy, VEX.128 and VEX.256 encodings; NEVER: there is none, and no stubs */
    bool immediates;              /* the stubs are there once for each of the immediates */
    uint8_t bits[2];              /* of an immediate, that mean something in legacy and VEX forms; 0: all */
    vector_model *model;
    const char *stubs;
};

void vector_run(const struct check *check);

/* As MXCSR.RC is while a model runs. */
extern unsigned vector_rounding;

#define IMMEDIATES                                                                                                         \
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,  \
    0x31, 0x4e, 0x55, 0x80, 0x93, 0xb1, 0xd8, 0xe4, 0xff

/* ---- models ---- */

#define MODEL(id)                                                                                                          \
    static void model_##id(struct vector *restrict d, const struct vector *a, const struct vector *b,                      \
                           const struct vector *c, unsigned imm, unsigned lanes)
#define UNUSED (void)a, (void)b, (void)c, (void)imm, (void)lanes

/* For each element of type T: an expression of x, y (elements of a and b), z (of c), w (of d) and imm. */
#define EACH(id, T, expression)                                                                                            \
    MODEL(id)                                                                                                              \
    {                                                                                                                      \
        UNUSED;                                                                                                            \
        for (unsigned lane = 0; lane < lanes; lane++)                                                                      \
            for (unsigned i = 0; i < COUNT(d->lane[0].T); i++) {                                                           \
                __typeof__(d->lane[0].T[0]) x = a->lane[lane].T[i], y = b->lane[lane].T[i], z = c->lane[lane].T[i],         \
                                            w = d->lane[lane].T[i];                                                        \
                (void)x, (void)y, (void)z, (void)w;                                                                        \
                d->lane[lane].T[i] = (__typeof__(x))(expression);                                                          \
            }                                                                                                              \
    }

/* For each lane: statements with D, A, B and C, lanes of 128 bits. */
#define PER_LANE(id, ...)                                                                                                  \
    MODEL(id)                                                                                                              \
    {                                                                                                                      \
        UNUSED;                                                                                                            \
        for (unsigned lane = 0; lane < lanes; lane++) {                                                                    \
            union lane *D = &d->lane[lane];                                                                                \
            const union lane *A = &a->lane[lane], *B = &b->lane[lane], *C = &c->lane[lane];                                \
            (void)A, (void)B, (void)C;                                                                                     \
            __VA_ARGS__                                                                                                    \
        }                                                                                                                  \
    }

/* Only the lowest element of type T. */
#define LOWEST(id, T, expression)                                                                                          \
    MODEL(id)                                                                                                              \
    {                                                                                                                      \
        UNUSED;                                                                                                            \
        __typeof__(d->lane[0].T[0]) x = a->lane[0].T[0], y = b->lane[0].T[0], w = d->lane[0].T[0];                          \
        (void)x, (void)y, (void)w;                                                                                         \
        d->lane[0].T[0] = (__typeof__(x))(expression);                                                                     \
    }

/* ---- stubs: p is what stands before the operands (an immediate), s and t the kinds of register of source and target ---- */

#define LEGACY(i, p)                                                                                                       \
    STUB(i " " p "%xmm2,%xmm1") STUB(i " " p "(%rsi),%xmm1") STUB(i " " p "%xmm13,%xmm9") STUB(i " " p "%xmm1,%xmm1")      \
    STUB(i " " p "%xmm9,%xmm2")
#define VEX3(i, p, s, t)                                                                                                   \
    STUB(i " " p "%" s "2,%" t "1,%" t "3") STUB(i " " p "(%rdi),%" t "1,%" t "3")                                         \
    STUB(i " " p "%" s "13,%" t "9,%" t "11") STUB(i " " p "%" s "2,%" t "1,%" t "2") STUB(i " " p "%" s "2,%" t "1,%" t "1")
#define VEX2(i, p, s, t)                                                                                                   \
    STUB(i " " p "%" s "2,%" t "3") STUB(i " " p "(%rdi),%" t "3") STUB(i " " p "%" s "13,%" t "11")                       \
    STUB(i " " p "%" s "2,%" t "2") STUB(i " " p "%" s "9,%" t "1")

#define STRING_(...) #__VA_ARGS__
#define STRING(...) STRING_(__VA_ARGS__)
#define EACH_IMMEDIATE(code) ".irp imm," STRING(IMMEDIATES) "\n" code ".endr\n"
#define IMM "$\\imm,"
#define IMM_OF(bits) "$\\imm&" #bits ","

/* ---- rows; id is the instruction's name without v, and of its model ---- */

#define ROW(id, name, function, shape_, operand_, compare_, f, f128, f256, immediates_, ...)                               \
    static const struct vector_check vector_##id = {                                                                       \
        .shape = shape_, .operand = operand_, .compare = compare_, .features = { f, f128, f256 },                          \
        .immediates = immediates_, .model = model_##function, .stubs = stubs_##id, __VA_ARGS__ };                          \
    CHECK(id, name, (f) != NEVER ? (f) : (f128) != NEVER ? (f128) : (f256), vector_run, &vector_##id)

/* Three operands in VEX forms, two in legacy ones. */
#define BIN(id, f, f256, operand, compare)                                                                                 \
    STUBS(id, LEGACY(#id, "") VEX3("v" #id, "", "xmm", "xmm") VEX3("v" #id, "", "ymm", "ymm"));                            \
    ROW(id, #id, id, BINARY, operand, compare, f, AVX, f256, false)
#define BIN_IMM(id, f, f256, operand, compare)                                                                             \
    STUBS(id, EACH_IMMEDIATE(LEGACY(#id, IMM)) EACH_IMMEDIATE(VEX3("v" #id, IMM, "xmm", "xmm"))                            \
                  EACH_IMMEDIATE(VEX3("v" #id, IMM, "ymm", "ymm")));                                                       \
    ROW(id, #id, id, BINARY, operand, compare, f, AVX, f256, true)
/* Of the lowest element, or of 128 bits only: no VEX.256 form. */
#define BIN_128(id, f, operand, compare)                                                                                   \
    STUBS(id, LEGACY(#id, "") VEX3("v" #id, "", "xmm", "xmm"));                                                            \
    ROW(id, #id, id, BINARY, operand, compare, f, AVX, NEVER, false)
#define BIN_128_IMM(id, f, operand, compare)                                                                               \
    STUBS(id, EACH_IMMEDIATE(LEGACY(#id, IMM)) EACH_IMMEDIATE(VEX3("v" #id, IMM, "xmm", "xmm")));                          \
    ROW(id, #id, id, BINARY, operand, compare, f, AVX, NEVER, true)
/* VEX forms only; the name has its v. */
#define BIN_VEX(id, f128, f256, operand, compare)                                                                          \
    STUBS(id, VEX3(#id, "", "xmm", "xmm") VEX3(#id, "", "ymm", "ymm"));                                                    \
    ROW(id, #id, id, BINARY, operand, compare, NEVER, f128, f256, false)
/* The legacy form has only this name. */
#define UN(id, f, f256, operand, compare)                                                                                  \
    STUBS(id, LEGACY(#id, "") VEX2("v" #id, "", "xmm", "xmm") VEX2("v" #id, "", "ymm", "ymm"));                            \
    ROW(id, #id, id, UNARY, operand, compare, f, AVX, f256, false)
#define UN_IMM(id, f, f256, operand, compare)                                                                              \
    STUBS(id, EACH_IMMEDIATE(LEGACY(#id, IMM)) EACH_IMMEDIATE(VEX2("v" #id, IMM, "xmm", "xmm"))                            \
                  EACH_IMMEDIATE(VEX2("v" #id, IMM, "ymm", "ymm")));                                                       \
    ROW(id, #id, id, UNARY, operand, compare, f, AVX, f256, true)

#endif
