/* Floating-point arithmetic in vectors. The models use the scalar instructions for single numbers, which known.c compares
   with the compiler's exact arithmetic; what is tested here is the rest: elements, encodings, rounding modes, flags. */
#include "vector.h"

#include <math.h>

#define PACKED(id, T, operand, compare, expression) EACH(id, T, expression) BIN(id, SSE2, AVX, operand, compare)
#define PS(id, expression) PACKED(id, f32, FLOATS, NAN32, expression)
#define PD(id, expression) PACKED(id, f64, DOUBLES, NAN64, expression)
#define SS(id, expression) LOWEST(id, f32, expression) BIN_128(id, SSE2, FLOATS, NAN32)
#define SD(id, expression) LOWEST(id, f64, expression) BIN_128(id, SSE2, DOUBLES, NAN64)
#define FOUR(name, expression) PS(name##ps, expression); PD(name##pd, expression); SS(name##ss, expression);               \
    SD(name##sd, expression)

FOUR(add, x + y);
FOUR(sub, x - y);
FOUR(mul, x * y);
FOUR(div, x / y);
FOUR(min, x < y ? x : y);
FOUR(max, x > y ? x : y);

/* (sqrt of a negative number calls the C library after the instruction; -fno-math-errno leaves it out.) */
EACH(sqrtps, f32, __builtin_sqrtf(y)) UN(sqrtps, SSE2, AVX, FLOATS, NAN32);
EACH(sqrtpd, f64, __builtin_sqrt(y)) UN(sqrtpd, SSE2, AVX, DOUBLES, NAN64);
SS(sqrtss, __builtin_sqrtf(y));
SD(sqrtsd, __builtin_sqrt(y));

#define BITWISE(id, expression) EACH(id, u64, expression) BIN(id, SSE2, AVX, BITS, EXACT)
BITWISE(andps, x & y);
BITWISE(andpd, x & y);
BITWISE(andnps, ~x & y);
BITWISE(andnpd, ~x & y);
BITWISE(orps, x | y);
BITWISE(orpd, x | y);
BITWISE(xorps, x ^ y);
BITWISE(xorpd, x ^ y);

/* ---- neighbours ---- */

#define LANE_ROW(id, f, operand, compare, ...) PER_LANE(id, __VA_ARGS__) BIN(id, f, AVX, operand, compare)
LANE_ROW(addsubps, SSE3, FLOATS, NAN32,
         for (unsigned i = 0; i < 4; i++) D->f32[i] = i & 1 ? A->f32[i] + B->f32[i] : A->f32[i] - B->f32[i];);
LANE_ROW(addsubpd, SSE3, DOUBLES, NAN64, D->f64[0] = A->f64[0] - B->f64[0]; D->f64[1] = A->f64[1] + B->f64[1];);

#define HORIZONTAL(id, T, operand, compare, op)                                                                            \
    LANE_ROW(id, SSE3, operand, compare, for (unsigned i = 0; i < COUNT(D->T); i++) {                                      \
        const union lane *from = i < COUNT(D->T) / 2 ? A : B;                                                              \
        D->T[i] = from->T[2 * i % COUNT(D->T)] op from->T[2 * i % COUNT(D->T) + 1];                                        \
    })
HORIZONTAL(haddps, f32, FLOATS, NAN32, +);
HORIZONTAL(haddpd, f64, DOUBLES, NAN64, +);
HORIZONTAL(hsubps, f32, FLOATS, NAN32, -);
HORIZONTAL(hsubpd, f64, DOUBLES, NAN64, -);

/* Products are added in pairs. */
PER_LANE(dpps, float t[4]; for (unsigned i = 0; i < 4; i++) t[i] = imm >> (4 + i) & 1 ? A->f32[i] * B->f32[i] : 0;
         float low = t[0] + t[1], high = t[2] + t[3], sum = low + high;
         for (unsigned i = 0; i < 4; i++) D->f32[i] = imm >> i & 1 ? sum : 0;)
BIN_IMM(dpps, SSE41, AVX, FLOATS, NAN32);
PER_LANE(dppd, double t[2]; for (unsigned i = 0; i < 2; i++) t[i] = imm >> (4 + i) & 1 ? A->f64[i] * B->f64[i] : 0;
         double sum = t[0] + t[1]; for (unsigned i = 0; i < 2; i++) D->f64[i] = imm >> i & 1 ? sum : 0;)
BIN_128_IMM(dppd, SSE41, DOUBLES, NAN64);

/* ---- comparisons: 8 predicates, 32 in VEX forms ---- */

static bool predicate(double x, double y, unsigned number)
{
    bool unordered = isnan(x) || isnan(y);
    bool result;
    switch (number & 7) { /* 8 more: the same if neither is NaN, but true (EQ_UQ, NGE, NGT) or false where they are not */
    case 0:
        return number & 8 ? unordered || !islessgreater(x, y) : !unordered && !islessgreater(x, y);
    case 1:
        return number & 8 ? unordered || isless(x, y) : isless(x, y);
    case 2:
        return number & 8 ? unordered || islessequal(x, y) : islessequal(x, y);
    case 3:
        return number & 8 ? false : unordered;
    case 4:
        result = islessgreater(x, y);
        return number & 8 ? result : unordered || result;
    case 5:
        return number & 8 ? isgreaterequal(x, y) : unordered || isgreaterequal(x, y);
    case 6:
        return number & 8 ? isgreater(x, y) : unordered || isgreater(x, y);
    default:
        return number & 8 ? true : !unordered;
    }
}

#define COMPARE(id, T, I, operand)                                                                                         \
    PER_LANE(id, for (unsigned i = 0; i < COUNT(D->T); i++) D->I[i] = -predicate(A->T[i], B->T[i], imm);)                  \
    STUBS(id, EACH_IMMEDIATE(LEGACY(#id, IMM_OF(7))) EACH_IMMEDIATE(VEX3("v" #id, IMM_OF(31), "xmm", "xmm"))                     \
                  EACH_IMMEDIATE(VEX3("v" #id, IMM_OF(31), "ymm", "ymm")));                                                \
    ROW(id, #id, id, BINARY, operand, EXACT, SSE2, AVX, AVX, true, .bits = { 7, 31 })
#define COMPARE_LOWEST(id, T, I, operand)                                                                                  \
    MODEL(id) { UNUSED; d->lane[0].I[0] = -predicate(a->lane[0].T[0], b->lane[0].T[0], imm); }                             \
    STUBS(id, EACH_IMMEDIATE(LEGACY(#id, IMM_OF(7))) EACH_IMMEDIATE(VEX3("v" #id, IMM_OF(31), "xmm", "xmm")));                   \
    ROW(id, #id, id, BINARY, operand, EXACT, SSE2, AVX, NEVER, true, .bits = { 7, 31 })

COMPARE(cmpps, f32, i32, FLOATS);
COMPARE(cmppd, f64, i64, DOUBLES);
COMPARE_LOWEST(cmpss, f32, i32, FLOATS);
COMPARE_LOWEST(cmpsd, f64, i64, DOUBLES);

/* ---- fused multiplication and addition: one rounding. The digits are the operands of the product, then of the sum:
   1 the target, 2 the operand in VEX.vvvv, 3 the last. ---- */

#define FMA_LOWEST(id, T, operand, compare, expression)                                                                    \
    LOWEST(id, T, expression)                                                                                              \
    STUBS(id, VEX3(#id, "", "xmm", "xmm"));                                                                                \
    ROW(id, #id, id, MERGING, operand, compare, NEVER, FMA, NEVER, false)
#define FMA_PACKED(id, T, operand, compare, expression)                                                                    \
    EACH(id, T, expression)                                                                                                \
    STUBS(id, VEX3(#id, "", "xmm", "xmm") VEX3(#id, "", "ymm", "ymm"));                                                    \
    ROW(id, #id, id, MERGING, operand, compare, NEVER, FMA, FMA, false)
#define FUSED(name, order, first, second, added)                                                                           \
    FMA_PACKED(name##order##ps, f32, FLOATS, NAN32, __builtin_fmaf(first, second, added));                                 \
    FMA_PACKED(name##order##pd, f64, DOUBLES, NAN64, __builtin_fma(first, second, added));                                 \
    FMA_LOWEST(name##order##ss, f32, FLOATS, NAN32, __builtin_fmaf(first, second, added));                                 \
    FMA_LOWEST(name##order##sd, f64, DOUBLES, NAN64, __builtin_fma(first, second, added))
#define FUSED_ORDERS(name, sign, added_sign)                                                                               \
    FUSED(name, 132, sign w, y, added_sign x);                                                                             \
    FUSED(name, 213, sign x, w, added_sign y);                                                                             \
    FUSED(name, 231, sign x, y, added_sign w)
FUSED_ORDERS(vfmadd, , );
FUSED_ORDERS(vfmsub, , -);
FUSED_ORDERS(vfnmadd, -, );
FUSED_ORDERS(vfnmsub, -, -);

#define ALTERNATING(name, order, T, kind, compare, fused, first, second, added, odd)                                       \
    FMA_PACKED(name##order, T, kind, compare, fused(first, second, (i & 1) == (odd) ? (added) : -(added)))
#define ALTERNATING_ORDERS(name, suffix, T, kind, compare, fused, odd)                                                     \
    ALTERNATING(name, 132##suffix, T, kind, compare, fused, w, y, x, odd);                                                 \
    ALTERNATING(name, 213##suffix, T, kind, compare, fused, x, w, y, odd);                                                 \
    ALTERNATING(name, 231##suffix, T, kind, compare, fused, x, y, w, odd)
ALTERNATING_ORDERS(vfmaddsub, ps, f32, FLOATS, NAN32, __builtin_fmaf, 1);
ALTERNATING_ORDERS(vfmaddsub, pd, f64, DOUBLES, NAN64, __builtin_fma, 1);
ALTERNATING_ORDERS(vfmsubadd, ps, f32, FLOATS, NAN32, __builtin_fmaf, 0);
ALTERNATING_ORDERS(vfmsubadd, pd, f64, DOUBLES, NAN64, __builtin_fma, 0);
