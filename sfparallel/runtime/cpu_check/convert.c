/* Conversions and roundings in vectors, in all rounding modes; the models work in integers (soft.h). */
#include "soft.h"
#include "vector.h"

/* Mode of MXCSR, or that of an immediate. */
static enum rounding chosen(unsigned imm)
{
    return imm & 4 ? (enum rounding)vector_rounding : (enum rounding)(imm & 3);
}

#define MODE ((enum rounding)vector_rounding)

/* Elements of T to elements of U, one for each element `per` of the lanes; the rest becomes 0. For `narrow` ones the source is
   the larger register, and the assembler wants to be told by x or y how large it is. */
#define CONVERSION(id, T, U, per, expression)                                                                              \
    MODEL(id)                                                                                                              \
    {                                                                                                                      \
        UNUSED;                                                                                                            \
        for (unsigned i = 0, n = lanes * COUNT(b->lane[0].per); i < n; i++) {                                              \
            __typeof__(b->lane[0].T[0]) x = b->lane[i / COUNT(b->lane[0].T)].T[i % COUNT(b->lane[0].T)];                   \
            d->lane[i / COUNT(d->lane[0].U)].U[i % COUNT(d->lane[0].U)] = (__typeof__(d->lane[0].U[0]))(expression);       \
        }                                                                                                                  \
    }
#define SAME(id, operand, T, U, expression)                                                                                \
    CONVERSION(id, T, U, T, expression) UN(id, SSE2, AVX, operand, EXACT)
#define WIDER(id, operand, T, U, expression)                                                                               \
    CONVERSION(id, T, U, U, expression)                                                                                    \
    STUBS(id, LEGACY(#id, "") VEX2("v" #id, "", "xmm", "xmm") VEX2("v" #id, "", "xmm", "ymm"));                            \
    ROW(id, #id, id, UNARY, operand, EXACT, SSE2, AVX, AVX, false)
#define NARROWER(id, operand, T, U, expression)                                                                            \
    CONVERSION(id, T, U, T, expression)                                                                                    \
    STUBS(id, LEGACY(#id, "") VEX2("v" #id "x", "", "xmm", "xmm") VEX2("v" #id "y", "", "ymm", "xmm"));                    \
    ROW(id, #id, id, UNARY, operand, EXACT, SSE2, AVX, AVX, false)

SAME(cvtdq2ps, BITS, i32, u32, pack(from_integer(x), &single, MODE));
SAME(cvtps2dq, FLOATS, u32, i32, to_integer(unpack(x, &single), 32, MODE));
SAME(cvttps2dq, FLOATS, u32, i32, to_integer(unpack(x, &single), 32, TRUNCATE));
WIDER(cvtdq2pd, BITS, i32, u64, pack(from_integer(x), &twice, MODE));
WIDER(cvtps2pd, FLOATS, u32, u64, convert(x, &single, &twice, MODE));
NARROWER(cvtpd2ps, DOUBLES, u64, u32, convert(x, &twice, &single, MODE));
NARROWER(cvtpd2dq, DOUBLES, u64, i32, to_integer(unpack(x, &twice), 32, MODE));
NARROWER(cvttpd2dq, DOUBLES, u64, i32, to_integer(unpack(x, &twice), 32, TRUNCATE));

MODEL(cvtss2sd) { UNUSED; d->lane[0].u64[0] = convert(b->lane[0].u32[0], &single, &twice, MODE); }
BIN_128(cvtss2sd, SSE2, FLOATS, EXACT);
MODEL(cvtsd2ss) { UNUSED; d->lane[0].u32[0] = (uint32_t)convert(b->lane[0].u64[0], &twice, &single, MODE); }
BIN_128(cvtsd2ss, SSE2, DOUBLES, EXACT);

/* ---- to integral values ---- */

#define ROUNDING_ROW(id, operand, VEX, more, f256)                                                                         \
    STUBS(id, EACH_IMMEDIATE(LEGACY(#id, IMM_OF(15))) EACH_IMMEDIATE(VEX("v" #id, IMM_OF(15), "xmm", "xmm")) more);        \
    ROW(id, #id, id, UNARY_OR_##VEX, operand, EXACT, SSE41, AVX, f256, true, .bits = { 15, 15 })
#define UNARY_OR_VEX2 UNARY
#define UNARY_OR_VEX3 BINARY
PER_LANE(roundps, for (unsigned i = 0; i < 4; i++) D->u32[i] = (uint32_t)to_integral(B->u32[i], &single, chosen(imm));)
ROUNDING_ROW(roundps, FLOATS, VEX2, EACH_IMMEDIATE(VEX2("vroundps", IMM_OF(15), "ymm", "ymm")), AVX);
PER_LANE(roundpd, for (unsigned i = 0; i < 2; i++) D->u64[i] = to_integral(B->u64[i], &twice, chosen(imm));)
ROUNDING_ROW(roundpd, DOUBLES, VEX2, EACH_IMMEDIATE(VEX2("vroundpd", IMM_OF(15), "ymm", "ymm")), AVX);
MODEL(roundss) { UNUSED; d->lane[0].u32[0] = (uint32_t)to_integral(b->lane[0].u32[0], &single, chosen(imm)); }
ROUNDING_ROW(roundss, FLOATS, VEX3, , NEVER);
MODEL(roundsd) { UNUSED; d->lane[0].u64[0] = to_integral(b->lane[0].u64[0], &twice, chosen(imm)); }
ROUNDING_ROW(roundsd, DOUBLES, VEX3, , NEVER);

/* ---- half precision ---- */

CONVERSION(vcvtph2ps, u16, u32, u32, convert(x, &half, &single, MODE))
STUBS(vcvtph2ps, VEX2("vcvtph2ps", "", "xmm", "xmm") VEX2("vcvtph2ps", "", "xmm", "ymm"));
ROW(vcvtph2ps, "vcvtph2ps", vcvtph2ps, UNARY, BITS, EXACT, NEVER, F16C, F16C, false);

/* The last operand is the target, or memory: there is no source in memory. */
CONVERSION(vcvtps2ph, u32, u16, u32, convert(x, &single, &half, chosen(imm)))
#define HALF_STUB(from, to) STUB("vcvtps2ph " IMM_OF(7) "%" from ",%" to)
#define TO_HALF(s)                                                                                                         \
    HALF_STUB(s "2", "xmm3") STUB("vmovups (%rdi),%" s "3\nvcvtps2ph " IMM_OF(7) "%" s "3,%xmm3")                          \
    HALF_STUB(s "13", "xmm11") HALF_STUB(s "2", "xmm2") HALF_STUB(s "9", "xmm1")
STUBS(vcvtps2ph, EACH_IMMEDIATE(TO_HALF("xmm")) EACH_IMMEDIATE(TO_HALF("ymm")));
ROW(vcvtps2ph, "vcvtps2ph", vcvtps2ph, UNARY, FLOATS, EXACT, NEVER, F16C, F16C, true, .bits = { 7, 7 });
