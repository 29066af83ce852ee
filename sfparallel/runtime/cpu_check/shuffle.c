/* Instructions that move elements about in vectors: shuffles, blends, packs, widenings, permutations, broadcasts. */
#include "vector.h"

#define LANE_ROW(id, f, f256, ...) PER_LANE(id, __VA_ARGS__) BIN(id, f, f256, BITS, EXACT)
#define LANE_ROW_IMM(id, f, f256, ...) PER_LANE(id, __VA_ARGS__) BIN_IMM(id, f, f256, BITS, EXACT)

/* ---- interleave and pack ---- */

#define UNPACK(id, T, from, f256)                                                                                          \
    LANE_ROW(id, SSE2, f256, union lane out; for (unsigned i = 0; i < COUNT(D->T) / 2; i++) {                              \
        out.T[2 * i] = A->T[i + (from) * COUNT(D->T) / 2];                                                                 \
        out.T[2 * i + 1] = B->T[i + (from) * COUNT(D->T) / 2];                                                             \
    } *D = out;)
UNPACK(punpcklbw, u8, 0, AVX2);
UNPACK(punpcklwd, u16, 0, AVX2);
UNPACK(punpckldq, u32, 0, AVX2);
UNPACK(punpcklqdq, u64, 0, AVX2);
UNPACK(punpckhbw, u8, 1, AVX2);
UNPACK(punpckhwd, u16, 1, AVX2);
UNPACK(punpckhdq, u32, 1, AVX2);
UNPACK(punpckhqdq, u64, 1, AVX2);
UNPACK(unpcklps, u32, 0, AVX);
UNPACK(unpcklpd, u64, 0, AVX);
UNPACK(unpckhps, u32, 1, AVX);
UNPACK(unpckhpd, u64, 1, AVX);

#define PACK(id, f, from, to, low, high)                                                                                   \
    LANE_ROW(id, f, AVX2, for (unsigned i = 0; i < COUNT(D->to); i++) {                                                    \
        int32_t x = i < COUNT(D->from) ? A->from[i] : B->from[i - COUNT(D->from)];                                         \
        D->to[i] = (__typeof__(D->to[0]))(x < (low) ? (low) : x > (high) ? (high) : x);                                    \
    })
PACK(packsswb, SSE2, i16, i8, INT8_MIN, INT8_MAX);
PACK(packssdw, SSE2, i32, i16, INT16_MIN, INT16_MAX);
PACK(packuswb, SSE2, i16, u8, 0, UINT8_MAX);
PACK(packusdw, SSE41, i32, u16, 0, UINT16_MAX);

/* ---- shuffles in lanes ---- */

LANE_ROW(pshufb, SSSE3, AVX2, for (unsigned i = 0; i < 16; i++) D->u8[i] = B->u8[i] & 0x80 ? 0 : A->u8[B->u8[i] & 15];);
LANE_ROW_IMM(palignr, SSSE3, AVX2, for (unsigned i = 0; i < 16; i++) {
    unsigned at = i + imm;
    D->u8[i] = at < 16 ? B->u8[at] : at < 32 ? A->u8[at - 16] : 0;
});
LANE_ROW_IMM(shufps, SSE2, AVX, for (unsigned i = 0; i < 4; i++) D->u32[i] = (i < 2 ? A : B)->u32[imm >> 2 * i & 3];);
LANE_ROW_IMM(shufpd, SSE2, AVX, D->u64[0] = A->u64[imm >> 2 * lane & 1]; D->u64[1] = B->u64[imm >> (2 * lane + 1) & 1];);

PER_LANE(pshufd, for (unsigned i = 0; i < 4; i++) D->u32[i] = B->u32[imm >> 2 * i & 3];) UN_IMM(pshufd, SSE2, AVX2, BITS, EXACT);
PER_LANE(pshuflw, D->u64[1] = B->u64[1]; for (unsigned i = 0; i < 4; i++) D->u16[i] = B->u16[imm >> 2 * i & 3];)
UN_IMM(pshuflw, SSE2, AVX2, BITS, EXACT);
PER_LANE(pshufhw, D->u64[0] = B->u64[0]; for (unsigned i = 0; i < 4; i++) D->u16[4 + i] = B->u16[4 + (imm >> 2 * i & 3)];)
UN_IMM(pshufhw, SSE2, AVX2, BITS, EXACT);
PER_LANE(movshdup, for (unsigned i = 0; i < 4; i++) D->u32[i] = B->u32[i | 1];) UN(movshdup, SSE3, AVX, BITS, EXACT);
PER_LANE(movsldup, for (unsigned i = 0; i < 4; i++) D->u32[i] = B->u32[i & 2];) UN(movsldup, SSE3, AVX, BITS, EXACT);
PER_LANE(movddup, D->u64[0] = D->u64[1] = B->u64[0];) UN(movddup, SSE3, AVX, BITS, EXACT);

PER_LANE(vpermilps, for (unsigned i = 0; i < 4; i++) D->u32[i] = A->u32[B->u32[i] & 3];) BIN_VEX(vpermilps, AVX, AVX,
      BITS, EXACT);
PER_LANE(vpermilpd, for (unsigned i = 0; i < 2; i++) D->u64[i] = A->u64[B->u64[i] >> 1 & 1];)
BIN_VEX(vpermilpd, AVX, AVX, BITS, EXACT);

/* VEX only, with an immediate: two operands, or three. */
#define UN_VEX_IMM(id, insn, f128, f256)                                                                                   \
    STUBS(id, EACH_IMMEDIATE(VEX2(insn, IMM, "xmm", "xmm")) EACH_IMMEDIATE(VEX2(insn, IMM, "ymm", "ymm")));                \
    ROW(id, insn " imm", id, UNARY, BITS, EXACT, NEVER, f128, f256, true)
PER_LANE(vpermilps_imm, for (unsigned i = 0; i < 4; i++) D->u32[i] = B->u32[imm >> 2 * i & 3];)
UN_VEX_IMM(vpermilps_imm, "vpermilps", AVX, AVX);
PER_LANE(vpermilpd_imm, for (unsigned i = 0; i < 2; i++) D->u64[i] = B->u64[imm >> (2 * lane + i) & 1];)
UN_VEX_IMM(vpermilpd_imm, "vpermilpd", AVX, AVX);

/* ---- blends ---- */

LANE_ROW_IMM(pblendw, SSE41, AVX2, for (unsigned i = 0; i < 8; i++) D->u16[i] = (imm >> i & 1 ? B : A)->u16[i];);
LANE_ROW_IMM(blendps, SSE41, AVX, for (unsigned i = 0; i < 4; i++) D->u32[i] = (imm >> (4 * lane + i) & 1 ? B : A)->u32[i];);
LANE_ROW_IMM(blendpd, SSE41, AVX, for (unsigned i = 0; i < 2; i++) D->u64[i] = (imm >> (2 * lane + i) & 1 ? B : A)->u64[i];);
PER_LANE(vpblendd, for (unsigned i = 0; i < 4; i++) D->u32[i] = (imm >> (4 * lane + i) & 1 ? B : A)->u32[i];)
STUBS(vpblendd, EACH_IMMEDIATE(VEX3("vpblendd", IMM, "xmm", "xmm")) EACH_IMMEDIATE(VEX3("vpblendd", IMM, "ymm", "ymm")));
ROW(vpblendd, "vpblendd", vpblendd, BINARY, BITS, EXACT, NEVER, AVX2, AVX2, true);

/* The mask of the legacy forms is XMM0; of the others it could be any, and is register 0 too. */
#define BLENDV(id, T, f256)                                                                                                \
    PER_LANE(id, for (unsigned i = 0; i < COUNT(D->T); i++) D->T[i] = (C->T[i] < 0 ? B : A)->T[i];)                        \
    STUBS(id, LEGACY(#id, "%xmm0,") VEX3("v" #id, "%xmm0,", "xmm", "xmm") VEX3("v" #id, "%ymm0,", "ymm", "ymm"));          \
    ROW(id, #id, id, BINARY, BITS, EXACT, SSE41, AVX, f256, false)
BLENDV(pblendvb, i8, AVX2);
BLENDV(blendvps, i32, AVX);
BLENDV(blendvpd, i64, AVX);

/* ---- widenings: the low elements of the source, whose register is smaller than the target ---- */

#define WIDEN(id, from, to)                                                                                                \
    MODEL(id)                                                                                                              \
    {                                                                                                                      \
        UNUSED;                                                                                                            \
        unsigned per_lane = COUNT(b->lane[0].to);                                                                          \
        for (unsigned i = 0; i < lanes * per_lane; i++)                                                                    \
            d->lane[i / per_lane].to[i % per_lane] = (__typeof__(b->lane[0].to[0]))b->lane[0].from[i];                     \
    }                                                                                                                      \
    STUBS(id, LEGACY(#id, "") VEX2("v" #id, "", "xmm", "xmm") VEX2("v" #id, "", "xmm", "ymm"));                            \
    ROW(id, #id, id, UNARY, BITS, EXACT, SSE41, AVX, AVX2, false)
WIDEN(pmovsxbw, i8, i16);
WIDEN(pmovsxbd, i8, i32);
WIDEN(pmovsxbq, i8, i64);
WIDEN(pmovsxwd, i16, i32);
WIDEN(pmovsxwq, i16, i64);
WIDEN(pmovsxdq, i32, i64);
WIDEN(pmovzxbw, u8, u16);
WIDEN(pmovzxbd, u8, u32);
WIDEN(pmovzxbq, u8, u64);
WIDEN(pmovzxwd, u16, u32);
WIDEN(pmovzxwq, u16, u64);
WIDEN(pmovzxdq, u32, u64);

/* ---- across lanes ---- */

#define ELEMENT(vector, T, i) ((vector)->lane[(i) / COUNT((vector)->lane[0].T)].T[(i) % COUNT((vector)->lane[0].T)])

/* Indexes come from the operand in VEX.vvvv. */
MODEL(vpermd)
{
    UNUSED;
    for (unsigned i = 0; i < 8; i++)
        ELEMENT(d, u32, i) = ELEMENT(b, u32, ELEMENT(a, u32, i) & 7);
}
STUBS(vpermd, VEX3("vpermd", "", "ymm", "ymm"));
ROW(vpermd, "vpermd", vpermd, BINARY, BITS, EXACT, NEVER, NEVER, AVX2, false);
STUBS(vpermps, VEX3("vpermps", "", "ymm", "ymm"));
ROW(vpermps, "vpermps", vpermd, BINARY, BITS, EXACT, NEVER, NEVER, AVX2, false);

MODEL(vpermq)
{
    UNUSED;
    for (unsigned i = 0; i < 4; i++)
        ELEMENT(d, u64, i) = ELEMENT(b, u64, imm >> 2 * i & 3);
}
STUBS(vpermq, EACH_IMMEDIATE(VEX2("vpermq", IMM, "ymm", "ymm")));
ROW(vpermq, "vpermq", vpermq, UNARY, BITS, EXACT, NEVER, NEVER, AVX2, true);
STUBS(vpermpd, EACH_IMMEDIATE(VEX2("vpermpd", IMM, "ymm", "ymm")));
ROW(vpermpd, "vpermpd", vpermq, UNARY, BITS, EXACT, NEVER, NEVER, AVX2, true);

MODEL(vperm2f128)
{
    static const union lane zero;
    UNUSED;
    for (unsigned i = 0; i < 2; i++) {
        unsigned control = imm >> 4 * i & 15;
        d->lane[i] = control & 8 ? zero : (control & 2 ? b : a)->lane[control & 1];
    }
}
STUBS(vperm2f128, EACH_IMMEDIATE(VEX3("vperm2f128", IMM, "ymm", "ymm")));
ROW(vperm2f128, "vperm2f128", vperm2f128, BINARY, BITS, EXACT, NEVER, NEVER, AVX, true);
STUBS(vperm2i128, EACH_IMMEDIATE(VEX3("vperm2i128", IMM, "ymm", "ymm")));
ROW(vperm2i128, "vperm2i128", vperm2f128, BINARY, BITS, EXACT, NEVER, NEVER, AVX2, true);

MODEL(vinsertf128)
{
    UNUSED;
    d->lane[1] = a->lane[1];
    d->lane[imm & 1] = b->lane[0];
}
STUBS(vinsertf128, EACH_IMMEDIATE(VEX3("vinsertf128", IMM, "xmm", "ymm")));
ROW(vinsertf128, "vinsertf128", vinsertf128, BINARY, BITS, EXACT, NEVER, NEVER, AVX, true);
STUBS(vinserti128, EACH_IMMEDIATE(VEX3("vinserti128", IMM, "xmm", "ymm")));
ROW(vinserti128, "vinserti128", vinsertf128, BINARY, BITS, EXACT, NEVER, NEVER, AVX2, true);

/* The source is the second operand, and the target always an XMM register: a VEX.128 row whose second lane is cleared. */
MODEL(vextractf128)
{
    UNUSED;
    d->lane[0] = b->lane[imm & 1];
}
#define EXTRACT(insn)                                                                                                      \
    STUB(insn " " IMM "%ymm2,%xmm3") STUB("vmovdqu (%rdi),%ymm3\n" insn " " IMM "%ymm3,%xmm3")                             \
    STUB(insn " " IMM "%ymm13,%xmm11") STUB(insn " " IMM "%ymm2,%xmm2") STUB(insn " " IMM "%ymm9,%xmm1")
STUBS(vextractf128, EACH_IMMEDIATE(EXTRACT("vextractf128")));
ROW(vextractf128, "vextractf128", vextractf128, UNARY, BITS, EXACT, NEVER, AVX, NEVER, true);
STUBS(vextracti128, EACH_IMMEDIATE(EXTRACT("vextracti128")));
ROW(vextracti128, "vextracti128", vextractf128, UNARY, BITS, EXACT, NEVER, AVX2, NEVER, true);

#define BROADCAST(id, T, f128, f256)                                                                                       \
    PER_LANE(id, for (unsigned i = 0; i < COUNT(D->T); i++) D->T[i] = b->lane[0].T[0];)                                    \
    STUBS(id, VEX2(#id, "", "xmm", "xmm") VEX2(#id, "", "xmm", "ymm"));                                                    \
    ROW(id, #id, id, UNARY, BITS, EXACT, NEVER, f128, f256, false)
BROADCAST(vpbroadcastb, u8, AVX2, AVX2);
BROADCAST(vpbroadcastw, u16, AVX2, AVX2);
BROADCAST(vpbroadcastd, u32, AVX2, AVX2);
BROADCAST(vpbroadcastq, u64, AVX2, AVX2);
BROADCAST(vbroadcastss, u32, AVX2, AVX2);
PER_LANE(vbroadcastsd, D->u64[0] = D->u64[1] = b->lane[0].u64[0];)
STUBS(vbroadcastsd, VEX2("vbroadcastsd", "", "xmm", "ymm"));
ROW(vbroadcastsd, "vbroadcastsd", vbroadcastsd, UNARY, BITS, EXACT, NEVER, NEVER, AVX2, false);

/* From memory AVX has these already. */
#define FROM_MEMORY(i, t)                                                                                                  \
    STUB(i " (%rdi),%" t "3") STUB(i " (%rdi),%" t "3") STUB(i " (%rdi),%" t "11") STUB(i " (%rdi),%" t "2")               \
    STUB(i " (%rdi),%" t "1")
PER_LANE(broadcast_float, for (unsigned i = 0; i < 4; i++) D->u32[i] = b->lane[0].u32[0];)
STUBS(broadcast_float, FROM_MEMORY("vbroadcastss", "xmm") FROM_MEMORY("vbroadcastss", "ymm"));
ROW(broadcast_float, "vbroadcastss from memory", broadcast_float, LOADING, BITS, EXACT, NEVER, AVX, AVX, false);
STUBS(broadcast_double, FROM_MEMORY("vbroadcastsd", "ymm"));
ROW(broadcast_double, "vbroadcastsd from memory", vbroadcastsd, LOADING, BITS, EXACT, NEVER, NEVER, AVX, false);
PER_LANE(broadcast_lane, *D = b->lane[0];)
STUBS(broadcast_lane, FROM_MEMORY("vbroadcastf128", "ymm"));
ROW(broadcast_lane, "vbroadcastf128", broadcast_lane, LOADING, BITS, EXACT, NEVER, NEVER, AVX, false);
STUBS(broadcast_lane_i, FROM_MEMORY("vbroadcasti128", "ymm"));
ROW(broadcast_lane_i, "vbroadcasti128", broadcast_lane, LOADING, BITS, EXACT, NEVER, NEVER, AVX2, false);
PER_LANE(load, *D = *B;)
#define FROM_MEMORY_SSE(i)                                                                                                 \
    STUB(i " (%rsi),%xmm1") STUB(i " (%rsi),%xmm1") STUB(i " (%rsi),%xmm9") STUB(i " (%rsi),%xmm1") STUB(i " (%rsi),%xmm2")
#define LOAD_ALL(id, f)                                                                                                    \
    STUBS(id, FROM_MEMORY_SSE(#id) FROM_MEMORY("v" #id, "xmm") FROM_MEMORY("v" #id, "ymm"));                               \
    ROW(id, #id " from memory", load, LOADING, BITS, EXACT, f, AVX, AVX, false)
LOAD_ALL(movups, SSE2);
LOAD_ALL(movdqu, SSE2);
LOAD_ALL(lddqu, SSE3);
