/* Between vectors, general registers and memory: moves, insertions, extractions, masks, stores; comparisons that set flags, and
   conversions of single numbers. */
#include "general.h"
#include "soft.h"

#define ALL ARITHMETIC
#define X(i) (s->v[i].lane[0])
#define Y(i) (s->v[i])

#define BOTH(id, insn, operands, operand_, feature, ...)                                                                   \
    GENERAL(id, insn " " operands, feature, ALL, operand_, NULL, __VA_ARGS__);                                             \
    GENERAL(v##id, "v" insn " " operands, AVX, ALL, operand_, NULL, __VA_ARGS__)
/* The target is register 1, and the VEX form clears what lies above. */
#define LOADS(id, insn, operands, feature, ...)                                                                            \
    GENERAL(id, insn " " operands, feature, ALL, BITS, NULL, __VA_ARGS__);                                                 \
    GENERAL(v##id, "v" insn " " operands, AVX, ALL, BITS, NULL, __VA_ARGS__ clear_above(s, 1);)

LOADS(movd_to, "movd", "%ecx,%xmm1", SSE2, memset(&X(1), 0, 16); X(1).u32[0] = (uint32_t)r[RCX];);
LOADS(movq_to, "movq", "%rcx,%xmm1", SSE2, memset(&X(1), 0, 16); X(1).u64[0] = r[RCX];);
LOADS(movd_load, "movd", "(%rsi),%xmm1", SSE2, memset(&X(1), 0, 16); X(1).u32[0] = AT(RSI, uint32_t););
LOADS(movq_load, "movq", "(%rsi),%xmm1", SSE2, memset(&X(1), 0, 16); X(1).u64[0] = AT(RSI, uint64_t););
LOADS(movq_move, "movq", "%xmm2,%xmm1", SSE2, uint64_t low = X(2).u64[0]; memset(&X(1), 0, 16); X(1).u64[0] = low;);
LOADS(movss_load, "movss", "(%rsi),%xmm1", SSE2, memset(&X(1), 0, 16); X(1).u32[0] = AT(RSI, uint32_t););
LOADS(movsd_load, "movsd", "(%rsi),%xmm1", SSE2, memset(&X(1), 0, 16); X(1).u64[0] = AT(RSI, uint64_t););
LOADS(movaps, "movaps", "%xmm2,%xmm1", SSE2, X(1) = X(2););
LOADS(movntdqa, "movntdqa", "(%rsi),%xmm1", SSE41, memcpy(&X(1), (void *)r[RSI], 16););
BOTH(movd_from, "movd", "%xmm1,%ecx", BITS, SSE2, r[RCX] = X(1).u32[0];);
BOTH(movq_from, "movq", "%xmm9,%rcx", BITS, SSE2, r[RCX] = X(9).u64[0];);

/* Stores. */
BOTH(movd_store, "movd", "%xmm1,(%rdi)", BITS, SSE2, AT(RDI, uint32_t) = X(1).u32[0];);
BOTH(movss_store, "movss", "%xmm1,3(%rdi)", BITS, SSE2, memcpy((void *)(r[RDI] + 3), &X(1), 4););
BOTH(movsd_store, "movsd", "%xmm1,3(%rdi)", BITS, SSE2, memcpy((void *)(r[RDI] + 3), &X(1), 8););
BOTH(movlps_store, "movlps", "%xmm1,(%rdi)", BITS, SSE2, AT(RDI, uint64_t) = X(1).u64[0];);
BOTH(movhps_store, "movhps", "%xmm1,(%rdi)", BITS, SSE2, AT(RDI, uint64_t) = X(1).u64[1];);
BOTH(movups_store, "movups", "%xmm12,5(%rdi)", BITS, SSE2, memcpy((void *)(r[RDI] + 5), &X(12), 16););
BOTH(movdqa_store, "movdqa", "%xmm2,-16(%rdi)", BITS, SSE2, memcpy((void *)(r[RDI] - 16), &X(2), 16););
BOTH(movntps, "movntps", "%xmm2,(%rdi)", BITS, SSE2, memcpy((void *)r[RDI], &X(2), 16););
BOTH(movntdq, "movntdq", "%xmm2,(%rdi)", BITS, SSE2, memcpy((void *)r[RDI], &X(2), 16););
GENERAL(vmovups_store_y, "vmovups %ymm12,5(%rdi)", AVX, ALL, BITS, NULL, memcpy((void *)(r[RDI] + 5), &Y(12), 32););
GENERAL(vmovdqa_store_y, "vmovdqa %ymm2,32(%rdi)", AVX, ALL, BITS, NULL, memcpy((void *)(r[RDI] + 32), &Y(2), 32););
GENERAL(vextractf128_store, "vextractf128 $1,%ymm2,(%rdi)", AVX, ALL, BITS, NULL, memcpy((void *)r[RDI], &Y(2).lane[1], 16););
GENERAL(movnti, "movnti %rcx,(%rdi)", SSE2, ALL, BITS, NULL, AT(RDI, uint64_t) = r[RCX];);
GENERAL(vcvtps2ph_store, "vcvtps2ph $4,%ymm2,(%rdi)", F16C, ALL, FLOATS, NULL, uint16_t *out = (uint16_t *)r[RDI];
        for (unsigned i = 0; i < 8; i++) out[i] = (uint16_t)convert(Y(2).lane[i / 4].u32[i % 4], &single, &half, NEAREST););

/* Halves and single elements. */
#define MERGES(id, insn, operands, vex_operands, feature, ...)                                                             \
    GENERAL(id, insn " " operands ",%xmm1", feature, ALL, BITS, NULL, __VA_ARGS__);                                        \
    GENERAL(v##id, "v" insn " " vex_operands ",%xmm1", AVX, ALL, BITS, NULL, X(1) = X(3); __VA_ARGS__ clear_above(s, 1);)
#define MERGE(id, insn, source, feature, ...) MERGES(id, insn, source, source ",%xmm3", feature, __VA_ARGS__)
MERGE(movss, "movss", "%xmm2", SSE2, X(1).u32[0] = X(2).u32[0];);
MERGE(movsd, "movsd", "%xmm2", SSE2, X(1).u64[0] = X(2).u64[0];);
MERGE(movlps_load, "movlps", "(%rsi)", SSE2, X(1).u64[0] = AT(RSI, uint64_t););
MERGE(movhps_load, "movhps", "(%rsi)", SSE2, X(1).u64[1] = AT(RSI, uint64_t););
MERGE(movlpd_load, "movlpd", "(%rsi)", SSE2, X(1).u64[0] = AT(RSI, uint64_t););
MERGE(movhpd_load, "movhpd", "(%rsi)", SSE2, X(1).u64[1] = AT(RSI, uint64_t););
MERGE(movhlps, "movhlps", "%xmm2", SSE2, X(1).u64[0] = X(2).u64[1];);
MERGE(movlhps, "movlhps", "%xmm2", SSE2, X(1).u64[1] = X(2).u64[0];);
MERGE(pinsrb, "pinsrb", "$5,%ecx", SSE41, X(1).u8[5] = (uint8_t)r[RCX];);
MERGE(pinsrw, "pinsrw", "$6,%ecx", SSE2, X(1).u16[6] = (uint16_t)r[RCX];);
MERGE(pinsrw_load, "pinsrw", "$1,(%rsi)", SSE2, X(1).u16[1] = AT(RSI, uint16_t););
MERGE(pinsrd, "pinsrd", "$3,%ecx", SSE41, X(1).u32[3] = (uint32_t)r[RCX];);
MERGE(pinsrq, "pinsrq", "$1,(%rsi)", SSE41, X(1).u64[1] = AT(RSI, uint64_t););
MERGE(insertps, "insertps", "$0x9c,%xmm2", SSE41, X(1).u32[1] = X(2).u32[2]; X(1).u32[2] = X(1).u32[3] = 0;);
MERGE(insertps_load, "insertps", "$0xe1,(%rsi)", SSE41, X(1).u32[2] = AT(RSI, uint32_t); X(1).u32[0] = 0;);
BOTH(pextrb, "pextrb", "$13,%xmm1,%ecx", BITS, SSE41, r[RCX] = X(1).u8[13];);
BOTH(pextrb_store, "pextrb", "$2,%xmm1,(%rdi)", BITS, SSE41, AT(RDI, uint8_t) = X(1).u8[2];);
BOTH(pextrw, "pextrw", "$7,%xmm1,%ecx", BITS, SSE2, r[RCX] = X(1).u16[7];);
BOTH(pextrw_store, "pextrw", "$3,%xmm9,(%rdi)", BITS, SSE41, AT(RDI, uint16_t) = X(9).u16[3];);
BOTH(pextrd, "pextrd", "$2,%xmm1,%ecx", BITS, SSE41, r[RCX] = X(1).u32[2];);
BOTH(pextrq, "pextrq", "$1,%xmm1,(%rdi)", BITS, SSE41, AT(RDI, uint64_t) = X(1).u64[1];);
BOTH(extractps, "extractps", "$3,%xmm1,%ecx", BITS, SSE41, r[RCX] = X(1).u32[3];);

/* Signs as bits. */
static uint64_t signs(const struct vector *v, unsigned bytes, unsigned size)
{
    uint64_t out = 0;
    for (unsigned i = 0; i < size / bytes; i++)
        out |= (uint64_t)(((const uint8_t *)v)[(i + 1) * bytes - 1] >> 7) << i;
    return out;
}
BOTH(pmovmskb, "pmovmskb", "%xmm9,%ecx", BITS, SSE2, r[RCX] = signs(&Y(9), 1, 16););
BOTH(movmskps, "movmskps", "%xmm1,%ecx", BITS, SSE2, r[RCX] = signs(&Y(1), 4, 16););
BOTH(movmskpd, "movmskpd", "%xmm1,%r9d", BITS, SSE2, r[R9] = signs(&Y(1), 8, 16););
GENERAL(vpmovmskb_y, "vpmovmskb %ymm1,%ecx", AVX2, ALL, BITS, NULL, r[RCX] = signs(&Y(1), 1, 32););
GENERAL(vmovmskps_y, "vmovmskps %ymm9,%ecx", AVX, ALL, BITS, NULL, r[RCX] = signs(&Y(9), 4, 32););
GENERAL(vmovmskpd_y, "vmovmskpd %ymm1,%ecx", AVX, ALL, BITS, NULL, r[RCX] = signs(&Y(1), 8, 32););

/* Masked moves. */
static void masked(struct state *s, void *out, const void *in, const struct vector *mask, unsigned bytes, unsigned size,
    bool load)
{
    (void)s;
    for (unsigned i = 0; i < size; i += bytes) {
        bool chosen = ((const uint8_t *)mask)[i + bytes - 1] & 0x80;
        if (chosen)
            memcpy((uint8_t *)out + i, (const uint8_t *)in + i, bytes);
        else if (load)
            memset((uint8_t *)out + i, 0, bytes);
    }
}
BOTH(maskmovdqu, "maskmovdqu", "%xmm2,%xmm1", BITS, SSE2, masked(s, (void *)r[RDI], &Y(1), &Y(2), 1, 16, false););
#define MASKED(id, insn, bytes, feature)                                                                                   \
    GENERAL(id##_load, insn " 5(%rsi),%xmm2,%xmm1", feature, ALL, BITS, NULL, clear_above(s, 1);                           \
            masked(s, &Y(1), (void *)(r[RSI] + 5), &Y(2), bytes, 16, true););                                              \
    GENERAL(id##_load_y, insn " (%rsi),%ymm10,%ymm9", feature, ALL, BITS, NULL,                                            \
            masked(s, &Y(9), (void *)r[RSI], &Y(10), bytes, 32, true););                                                   \
    GENERAL(id##_store, insn " %xmm1,%xmm2,5(%rdi)", feature, ALL, BITS, NULL,                                             \
            masked(s, (void *)(r[RDI] + 5), &Y(1), &Y(2), bytes, 16, false););                                             \
    GENERAL(id##_store_y, insn " %ymm1,%ymm10,(%rdi)", feature, ALL, BITS, NULL,                                           \
            masked(s, (void *)r[RDI], &Y(1), &Y(10), bytes, 32, false);)
MASKED(vmaskmovps, "vmaskmovps", 4, AVX);
MASKED(vmaskmovpd, "vmaskmovpd", 8, AVX);
MASKED(vpmaskmovd, "vpmaskmovd", 4, AVX2);
MASKED(vpmaskmovq, "vpmaskmovq", 8, AVX2);

/* Clearing. */
GENERAL(vzeroupper, "vzeroupper", AVX, ALL, BITS, NULL, for (unsigned i = 0; i < 16; i++) clear_above(s, i););
GENERAL(vzeroall, "vzeroall", AVX, ALL, BITS, NULL, memset(s->v, 0, sizeof s->v););

/* ---- flags of vectors ---- */

static void tested(struct state *s, const struct vector *a, const struct vector *b, unsigned lanes, uint64_t bits)
{
    uint64_t both = 0, only = 0;
    for (unsigned lane = 0; lane < lanes; lane++)
        for (unsigned i = 0; i < 2; i++) {
            both |= a->lane[lane].u64[i] & b->lane[lane].u64[i] & bits;
            only |= ~a->lane[lane].u64[i] & b->lane[lane].u64[i] & bits;
        }
    s->flags = (both ? 0 : ZF) | (only ? 0 : CF);
}
static void related(struct state *s) /* so that either flag is set at times */
{
    if (random64() & 1)
        for (unsigned i = 0; i < 4; i++)
            s->v[2].lane[i / 2].u64[i % 2] &= random64() & 1 ? s->v[1].lane[i / 2].u64[i % 2] : ~s->v[1].lane[i / 2].u64[i % 2];
}
#define SIGNS_32 0x8000000080000000u
#define SIGNS_64 0x8000000000000000u
GENERAL(ptest, "ptest %xmm2,%xmm1", SSE41, ALL, BITS, related, tested(s, &Y(1), &Y(2), 1, UINT64_MAX););
GENERAL(vptest, "vptest %xmm2,%xmm1", AVX, ALL, BITS, related, tested(s, &Y(1), &Y(2), 1, UINT64_MAX););
GENERAL(vptest_y, "vptest %ymm2,%ymm1", AVX, ALL, BITS, related, tested(s, &Y(1), &Y(2), 2, UINT64_MAX););
GENERAL(vtestps, "vtestps %xmm2,%xmm1", AVX, ALL, BITS, related, tested(s, &Y(1), &Y(2), 1, SIGNS_32););
GENERAL(vtestps_y, "vtestps %ymm2,%ymm1", AVX, ALL, BITS, related, tested(s, &Y(1), &Y(2), 2, SIGNS_32););
GENERAL(vtestpd, "vtestpd %xmm2,%xmm1", AVX, ALL, BITS, related, tested(s, &Y(1), &Y(2), 1, SIGNS_64););
GENERAL(vtestpd_y, "vtestpd %ymm2,%ymm1", AVX, ALL, BITS, related, tested(s, &Y(1), &Y(2), 2, SIGNS_64););

static void same_at_times(struct state *s)
{
    if (random64() % 3 == 0)
        s->v[2] = s->v[1];
}
/* Numbers of the same sign compare as their bits do. */
static uint64_t order(uint64_t a, uint64_t b, const struct format *format)
{
    if (unpack(a, format).class == NOT_A_NUMBER || unpack(b, format).class == NOT_A_NUMBER)
        return ZF | PF | CF;
    uint64_t sign = UINT64_C(1) << (format->bits - 1);
    int64_t x = a & sign ? -(int64_t)(a & (sign - 1)) : (int64_t)a, y = b & sign ? -(int64_t)(b & (sign - 1)) : (int64_t)b;
    return x == y ? ZF : x < y ? CF : 0;
}
#define ORDER(insn, operand_, T, format)                                                                                   \
    GENERAL(insn, #insn " %xmm2,%xmm1", SSE2, ALL, operand_, same_at_times, s->flags = order(X(1).T[0], X(2).T[0], &format);); \
    GENERAL(v##insn, "v" #insn " (%rsi),%xmm9", AVX, ALL, operand_, same_at_times, uint64_t x_ = 0;                        \
        memcpy(&x_, (void *)r[RSI], sizeof X(1).T[0]); \
            s->flags = order(X(9).T[0], x_, &format);)
ORDER(comiss, FLOATS, u32, single);
ORDER(ucomiss, FLOATS, u32, single);
ORDER(comisd, DOUBLES, u64, twice);
ORDER(ucomisd, DOUBLES, u64, twice);

/* ---- single numbers from and to general registers, in all rounding modes ---- */

static void rounding_mode(struct state *s)
{
    s->mxcsr |= (uint32_t)(random64() & 3) << 13;
}
#define MODE ((enum rounding)(s->mxcsr >> 13 & 3))
#define TO_INTEGER(id, insn, operand_, T, format, bits, mode, target)                                                      \
    GENERAL(id, insn " %xmm1," target, SSE2, ALL, operand_, rounding_mode, int64_t x = to_integer(unpack(X(1).T[0],        \
        &format), bits, mode); \
            r[RCX] = bits == 32 ? (uint64_t)(uint32_t)x : (uint64_t)x;);                                                   \
    GENERAL(v##id, "v" insn " %xmm1," target, AVX, ALL, operand_, rounding_mode,                                           \
        int64_t x = to_integer(unpack(X(1).T[0], &format), bits, mode); \
            r[RCX] = bits == 32 ? (uint64_t)(uint32_t)x : (uint64_t)x;)
TO_INTEGER(cvtss2si_32, "cvtss2si", FLOATS, u32, single, 32, MODE, "%ecx");
TO_INTEGER(cvtss2si_64, "cvtss2si", FLOATS, u32, single, 64, MODE, "%rcx");
TO_INTEGER(cvttss2si_32, "cvttss2si", FLOATS, u32, single, 32, TRUNCATE, "%ecx");
TO_INTEGER(cvttss2si_64, "cvttss2si", FLOATS, u32, single, 64, TRUNCATE, "%rcx");
TO_INTEGER(cvtsd2si_32, "cvtsd2si", DOUBLES, u64, twice, 32, MODE, "%ecx");
TO_INTEGER(cvtsd2si_64, "cvtsd2si", DOUBLES, u64, twice, 64, MODE, "%rcx");
TO_INTEGER(cvttsd2si_32, "cvttsd2si", DOUBLES, u64, twice, 32, TRUNCATE, "%ecx");
TO_INTEGER(cvttsd2si_64, "cvttsd2si", DOUBLES, u64, twice, 64, TRUNCATE, "%rcx");

#define FROM_INTEGER(id, insn, T, format, type, source)                                                                    \
    GENERAL(id, insn " " source ",%xmm1", SSE2, ALL, BITS, rounding_mode,                                                  \
            X(1).T[0] = (__typeof__(X(1).T[0]))pack(from_integer((type)r[RCX]), &format, MODE););                          \
    GENERAL(v##id, "v" insn " " source ",%xmm3,%xmm1", AVX, ALL, BITS, rounding_mode, X(1) = X(3); clear_above(s, 1);      \
            X(1).T[0] = (__typeof__(X(1).T[0]))pack(from_integer((type)r[RCX]), &format, MODE);)
FROM_INTEGER(cvtsi2ss_32, "cvtsi2ssl", u32, single, int32_t, "%ecx");
FROM_INTEGER(cvtsi2ss_64, "cvtsi2ssq", u32, single, int64_t, "%rcx");
FROM_INTEGER(cvtsi2sd_32, "cvtsi2sdl", u64, twice, int32_t, "%ecx");
FROM_INTEGER(cvtsi2sd_64, "cvtsi2sdq", u64, twice, int64_t, "%rcx");
