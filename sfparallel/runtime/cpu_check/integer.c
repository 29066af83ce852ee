/* Integer arithmetic in vectors: SSE2 to SSE4.2, AVX, AVX2. */
#include "vector.h"

static int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* (The sum of two elements of 32 bits does not fit into theirs: where it matters, unsigned ones are taken.) */
#define ALL_VECTOR(id, f, T, expression) EACH(id, T, expression) BIN(id, f, AVX2, BITS, EXACT)

ALL_VECTOR(paddb, SSE2, u8, x + y);
ALL_VECTOR(paddw, SSE2, u16, x + y);
ALL_VECTOR(paddd, SSE2, u32, x + y);
ALL_VECTOR(paddq, SSE2, u64, x + y);
ALL_VECTOR(psubb, SSE2, u8, x - y);
ALL_VECTOR(psubw, SSE2, u16, x - y);
ALL_VECTOR(psubd, SSE2, u32, x - y);
ALL_VECTOR(psubq, SSE2, u64, x - y);
ALL_VECTOR(paddsb, SSE2, i8, clamp(x + y, INT8_MIN, INT8_MAX));
ALL_VECTOR(paddsw, SSE2, i16, clamp(x + y, INT16_MIN, INT16_MAX));
ALL_VECTOR(paddusb, SSE2, u8, clamp(x + y, 0, UINT8_MAX));
ALL_VECTOR(paddusw, SSE2, u16, clamp(x + y, 0, UINT16_MAX));
ALL_VECTOR(psubsb, SSE2, i8, clamp(x - y, INT8_MIN, INT8_MAX));
ALL_VECTOR(psubsw, SSE2, i16, clamp(x - y, INT16_MIN, INT16_MAX));
ALL_VECTOR(psubusb, SSE2, u8, clamp(x - y, 0, UINT8_MAX));
ALL_VECTOR(psubusw, SSE2, u16, clamp(x - y, 0, UINT16_MAX));
ALL_VECTOR(pavgb, SSE2, u8, (x + y + 1) >> 1);
ALL_VECTOR(pavgw, SSE2, u16, (x + y + 1) >> 1);
ALL_VECTOR(pmullw, SSE2, i16, x * y);
ALL_VECTOR(pmulhw, SSE2, i16, (x * y) >> 16);
ALL_VECTOR(pmulhuw, SSE2, u16, ((uint32_t)x * y) >> 16);
ALL_VECTOR(pmulhrsw, SSSE3, i16, (((x * y) >> 14) + 1) >> 1);
ALL_VECTOR(pmulld, SSE41, u32, x * y);
ALL_VECTOR(pmuludq, SSE2, u64, (x & UINT32_MAX) * (y & UINT32_MAX));
ALL_VECTOR(pmuldq, SSE41, i64, (int64_t)(int32_t)x * (int32_t)y);
ALL_VECTOR(pand, SSE2, u64, x & y);
ALL_VECTOR(pandn, SSE2, u64, ~x & y);
ALL_VECTOR(por, SSE2, u64, x | y);
ALL_VECTOR(pxor, SSE2, u64, x ^ y);
ALL_VECTOR(pcmpeqb, SSE2, i8, -(x == y));
ALL_VECTOR(pcmpeqw, SSE2, i16, -(x == y));
ALL_VECTOR(pcmpeqd, SSE2, i32, -(x == y));
ALL_VECTOR(pcmpeqq, SSE41, i64, -(x == y));
ALL_VECTOR(pcmpgtb, SSE2, i8, -(x > y));
ALL_VECTOR(pcmpgtw, SSE2, i16, -(x > y));
ALL_VECTOR(pcmpgtd, SSE2, i32, -(x > y));
ALL_VECTOR(pcmpgtq, SSE42, i64, -(x > y));
ALL_VECTOR(pminub, SSE2, u8, x < y ? x : y);
ALL_VECTOR(pminuw, SSE41, u16, x < y ? x : y);
ALL_VECTOR(pminud, SSE41, u32, x < y ? x : y);
ALL_VECTOR(pminsb, SSE41, i8, x < y ? x : y);
ALL_VECTOR(pminsw, SSE2, i16, x < y ? x : y);
ALL_VECTOR(pminsd, SSE41, i32, x < y ? x : y);
ALL_VECTOR(pmaxub, SSE2, u8, x > y ? x : y);
ALL_VECTOR(pmaxuw, SSE41, u16, x > y ? x : y);
ALL_VECTOR(pmaxud, SSE41, u32, x > y ? x : y);
ALL_VECTOR(pmaxsb, SSE41, i8, x > y ? x : y);
ALL_VECTOR(pmaxsw, SSE2, i16, x > y ? x : y);
ALL_VECTOR(pmaxsd, SSE41, i32, x > y ? x : y);
ALL_VECTOR(psignb, SSSE3, i8, y < 0 ? -x : y == 0 ? 0 : x);
ALL_VECTOR(psignw, SSSE3, i16, y < 0 ? -x : y == 0 ? 0 : x);
ALL_VECTOR(psignd, SSSE3, u32, (int32_t)y < 0 ? -x : y == 0 ? 0 : x);

EACH(pabsb, i8, y < 0 ? -y : y) UN(pabsb, SSSE3, AVX2, BITS, EXACT);
EACH(pabsw, i16, y < 0 ? -y : y) UN(pabsw, SSSE3, AVX2, BITS, EXACT);
EACH(pabsd, u32, (int32_t)y < 0 ? -y : y) UN(pabsd, SSSE3, AVX2, BITS, EXACT);

/* ---- neighbours ---- */

#define LANE_ROW(id, f, ...) PER_LANE(id, __VA_ARGS__) BIN(id, f, AVX2, BITS, EXACT)

#define HORIZONTAL(id, T, operation)                                                                                       \
    LANE_ROW(id, SSSE3, for (unsigned i = 0; i < COUNT(D->T); i++) {                                                       \
        const union lane *from = i < COUNT(D->T) / 2 ? A : B;                                                              \
        int64_t x = from->T[2 * i % COUNT(D->T)], y = from->T[2 * i % COUNT(D->T) + 1];                                    \
        D->T[i] = (__typeof__(D->T[0]))(operation);                                                                        \
    })
HORIZONTAL(phaddw, i16, x + y);
HORIZONTAL(phaddd, i32, x + y);
HORIZONTAL(phaddsw, i16, clamp(x + y, INT16_MIN, INT16_MAX));
HORIZONTAL(phsubw, i16, x - y);
HORIZONTAL(phsubd, i32, x - y);
HORIZONTAL(phsubsw, i16, clamp(x - y, INT16_MIN, INT16_MAX));

LANE_ROW(pmaddwd, SSE2, for (unsigned i = 0; i < 4; i++) D->u32[i] =
    (uint32_t)(A->i16[2 * i] * B->i16[2 * i]) + (uint32_t)(A->i16[2 * i + 1] * B->i16[2 * i + 1]););
LANE_ROW(pmaddubsw, SSSE3, for (unsigned i = 0; i < 8; i++) D->i16[i] = (int16_t)clamp(
    A->u8[2 * i] * B->i8[2 * i] + A->u8[2 * i + 1] * B->i8[2 * i + 1], INT16_MIN, INT16_MAX););
LANE_ROW(psadbw, SSE2, for (unsigned half = 0; half < 2; half++) {
    uint64_t sum = 0;
    for (unsigned i = 8 * half; i < 8 * half + 8; i++)
        sum += (uint64_t)(A->u8[i] > B->u8[i] ? A->u8[i] - B->u8[i] : B->u8[i] - A->u8[i]);
    D->u64[half] = sum;
});

/* ---- shifts: by a count in the lowest 64 bits of b, in an immediate, or in each element ---- */

#define SHIFT(id, T, expression)                                                                                           \
    PER_LANE(id, uint64_t n = b->lane[0].u64[0]; (void)B; for (unsigned i = 0; i < COUNT(D->T); i++) {                     \
        uint64_t bits = 8 * sizeof D->T[0];                                                                                \
        __typeof__(D->T[0]) x = A->T[i];                                                                                   \
        D->T[i] = (__typeof__(x))(expression);                                                                             \
    })                                                                                                                     \
    STUBS(id, LEGACY(#id, "") VEX3("v" #id, "", "xmm", "xmm") VEX3("v" #id, "", "xmm", "ymm"));                            \
    ROW(id, #id, id, BINARY, BITS, EXACT, SSE2, AVX, AVX2, false)
SHIFT(psllw, u16, n < bits ? x << n : 0);
SHIFT(pslld, u32, n < bits ? x << n : 0);
SHIFT(psllq, u64, n < bits ? x << n : 0);
SHIFT(psrlw, u16, n < bits ? x >> n : 0);
SHIFT(psrld, u32, n < bits ? x >> n : 0);
SHIFT(psrlq, u64, n < bits ? x >> n : 0);
SHIFT(psraw, i16, x >> (n < bits ? n : bits - 1));
SHIFT(psrad, i32, x >> (n < bits ? n : bits - 1));

/* In VEX forms the target is the operand in VEX.vvvv. */
#define SHIFT_STUBS(id, i)                                                                                                 \
    STUBS(id, EACH_IMMEDIATE(STUB(i " " IMM "%xmm1") STUB(i " " IMM "%xmm1") STUB(i " " IMM "%xmm9")                       \
                             STUB(i " " IMM "%xmm1") STUB(i " " IMM "%xmm2"))                                              \
          EACH_IMMEDIATE(SHIFT_VEX("v" i, "xmm")) EACH_IMMEDIATE(SHIFT_VEX("v" i, "ymm")))
#define SHIFT_VEX(i, s)                                                                                                    \
    STUB(i " " IMM "%" s "1,%" s "3") STUB(i " " IMM "%" s "1,%" s "3") STUB(i " " IMM "%" s "9,%" s "11")                 \
    STUB(i " " IMM "%" s "1,%" s "2") STUB(i " " IMM "%" s "1,%" s "1")
#define SHIFT_IMM(id, i, T, expression)                                                                                    \
    PER_LANE(id, for (unsigned k = 0; k < COUNT(D->T); k++) {                                                              \
        unsigned bits = 8 * sizeof D->T[0], n = imm;                                                                       \
        __typeof__(D->T[0]) x = A->T[k];                                                                                   \
        D->T[k] = (__typeof__(x))(expression);                                                                             \
    })                                                                                                                     \
    SHIFT_STUBS(id, i);                                                                                                    \
    ROW(id, i " imm", id, BINARY, BITS, EXACT, SSE2, AVX, AVX2, true)
SHIFT_IMM(psllw_imm, "psllw", u16, n < bits ? x << n : 0);
SHIFT_IMM(pslld_imm, "pslld", u32, n < bits ? x << n : 0);
SHIFT_IMM(psllq_imm, "psllq", u64, n < bits ? x << n : 0);
SHIFT_IMM(psrlw_imm, "psrlw", u16, n < bits ? x >> n : 0);
SHIFT_IMM(psrld_imm, "psrld", u32, n < bits ? x >> n : 0);
SHIFT_IMM(psrlq_imm, "psrlq", u64, n < bits ? x >> n : 0);
SHIFT_IMM(psraw_imm, "psraw", i16, x >> (n < bits ? n : bits - 1));
SHIFT_IMM(psrad_imm, "psrad", i32, x >> (n < bits ? n : bits - 1));

PER_LANE(pslldq, for (unsigned i = 0; i < 16; i++) D->u8[i] = i >= imm ? A->u8[i - imm] : 0;)
SHIFT_STUBS(pslldq, "pslldq");
ROW(pslldq, "pslldq", pslldq, BINARY, BITS, EXACT, SSE2, AVX, AVX2, true);
PER_LANE(psrldq, for (unsigned i = 0; i < 16; i++) D->u8[i] = i + imm < 16 ? A->u8[i + imm] : 0;)
SHIFT_STUBS(psrldq, "psrldq");
ROW(psrldq, "psrldq", psrldq, BINARY, BITS, EXACT, SSE2, AVX, AVX2, true);

EACH(vpsllvd, u32, y < 32 ? x << y : 0) BIN_VEX(vpsllvd, AVX2, AVX2, BITS, EXACT);
EACH(vpsllvq, u64, y < 64 ? x << y : 0) BIN_VEX(vpsllvq, AVX2, AVX2, BITS, EXACT);
EACH(vpsrlvd, u32, y < 32 ? x >> y : 0) BIN_VEX(vpsrlvd, AVX2, AVX2, BITS, EXACT);
EACH(vpsrlvq, u64, y < 64 ? x >> y : 0) BIN_VEX(vpsrlvq, AVX2, AVX2, BITS, EXACT);
EACH(vpsravd, i32, x >> ((uint32_t)y < 32 ? y : 31)) BIN_VEX(vpsravd, AVX2, AVX2, BITS, EXACT);

/* ---- others ---- */

PER_LANE(phminposuw, unsigned best = 0; for (unsigned i = 1; i < 8; i++) if (B->u16[i] < B->u16[best]) best = i;
         D->u16[0] = B->u16[best]; D->u16[1] = (uint16_t)best;)
STUBS(phminposuw, LEGACY("phminposuw", "") VEX2("vphminposuw", "", "xmm", "xmm"));
ROW(phminposuw, "phminposuw", phminposuw, UNARY, BITS, EXACT, SSE41, AVX, NEVER, false);

PER_LANE(mpsadbw, unsigned control = imm >> 3 * lane & 7; for (unsigned i = 0; i < 8; i++) {
    unsigned sum = 0;
    for (unsigned k = 0; k < 4; k++) {
        uint8_t x = A->u8[(control & 4) + i + k], y = B->u8[4 * (control & 3) + k];
        sum += (unsigned)(x > y ? x - y : y - x);
    }
    D->u16[i] = (uint16_t)sum;
})
BIN_IMM(mpsadbw, SSE41, AVX2, BITS, EXACT);
