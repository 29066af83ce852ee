/* AES (FIPS 197), carry-less multiplication, SHA (FIPS 180-4). */
#include "vector.h"

/* ---- GF(2^8) and the S-box, computed ---- */

static uint8_t times(uint8_t a, uint8_t b)
{
    uint8_t product = 0;
    for (; b; b >>= 1, a = (uint8_t)(a << 1 ^ (a & 0x80 ? 0x1b : 0)))
        if (b & 1)
            product ^= a;
    return product;
}

static uint8_t rotated(uint8_t x, unsigned n)
{
    return (uint8_t)(x << n | x >> (8 - n));
}

static uint8_t sbox(uint8_t x)
{
    static uint8_t table[256]; /* 0 is in it once, for 0x52: a byte of 0 is computed anew, which does no harm */
    if (table[x] == 0) {
        uint8_t inverse = 1;
        for (unsigned i = 0; i < 254; i++)
            inverse = times(inverse, x);
        table[x] = (uint8_t)(inverse ^ rotated(inverse, 1) ^ rotated(inverse, 2) ^ rotated(inverse,
            3) ^ rotated(inverse, 4) ^ 0x63);
    }
    return table[x];
}

static uint8_t inverse_sbox(uint8_t x)
{
    static uint8_t table[256];
    static bool ready;
    for (unsigned i = 0; !ready && i < 256; i++)
        table[sbox((uint8_t)i)] = (uint8_t)i;
    ready = true;
    return table[x];
}

/* Byte 4 * column + row. */
static void shift_rows(uint8_t *out, const uint8_t *in, bool inverse)
{
    for (unsigned column = 0; column < 4; column++)
        for (unsigned row = 0; row < 4; row++)
            out[4 * column + row] = inverse ? inverse_sbox(in[4 * ((column - row) & 3) + row])
                : sbox(in[4 * ((column + row) & 3) + row]);
}

static void mix_columns(uint8_t *out, const uint8_t *in, const uint8_t factors[4])
{
    for (unsigned i = 0; i < 16; i++) {
        uint8_t sum = 0;
        for (unsigned k = 0; k < 4; k++)
            sum ^= times(in[(i & 12) + k], factors[(k - i) & 3]);
        out[i] = sum;
    }
}

static const uint8_t forward[4] = { 2, 3, 1, 1 }, backward[4] = { 14, 11, 13, 9 };

static void aes_round(union lane *d, const union lane *a, const union lane *key, bool inverse, bool last)
{
    union lane state, mixed;
    shift_rows(state.u8, a->u8, inverse);
    mix_columns(mixed.u8, state.u8, inverse ? backward : forward);
    for (unsigned i = 0; i < 2; i++)
        d->u64[i] = (last ? state : mixed).u64[i] ^ key->u64[i];
}

#define AES_ROUND(id, inverse, last)                                                                                       \
    PER_LANE(id, aes_round(D, A, B, inverse, last);)                                                                       \
    STUBS(id, LEGACY(#id, "") VEX3("v" #id, "", "xmm", "xmm") VEX3("v" #id, "", "ymm", "ymm"));                            \
    ROW(id, #id, id, BINARY, BITS, EXACT, AES, AES_AVX, VAES, false)
AES_ROUND(aesenc, false, false);
AES_ROUND(aesenclast, false, true);
AES_ROUND(aesdec, true, false);
AES_ROUND(aesdeclast, true, true);

PER_LANE(aesimc, mix_columns(D->u8, B->u8, backward);)
STUBS(aesimc, LEGACY("aesimc", "") VEX2("vaesimc", "", "xmm", "xmm"));
ROW(aesimc, "aesimc", aesimc, UNARY, BITS, EXACT, AES, AES_AVX, NEVER, false);

static uint32_t substituted(uint32_t x)
{
    return sbox((uint8_t)x) | (uint32_t)sbox((uint8_t)(x >> 8)) << 8 | (uint32_t)sbox((uint8_t)(x >> 16)) << 16
        | (uint32_t)sbox((uint8_t)(x >> 24)) << 24;
}
PER_LANE(aeskeygenassist, for (unsigned i = 0; i < 4; i += 2) {
    uint32_t x = substituted(B->u32[i + 1]);
    D->u32[i] = x;
    D->u32[i + 1] = (x >> 8 | x << 24) ^ imm;
})
STUBS(aeskeygenassist, EACH_IMMEDIATE(LEGACY("aeskeygenassist", IMM)) EACH_IMMEDIATE(VEX2("vaeskeygenassist", IMM,
      "xmm", "xmm")));
ROW(aeskeygenassist, "aeskeygenassist", aeskeygenassist, UNARY, BITS, EXACT, AES, AES_AVX, NEVER, true);

/* ---- carry-less multiplication ---- */

PER_LANE(pclmulqdq, uint64_t x = A->u64[imm & 1], y = B->u64[imm >> 4 & 1], low = 0, high = 0; for (unsigned i = 0;
      i < 64; i++) if (y >> i & 1) {
    low ^= x << i;
    high ^= i ? x >> (64 - i) : 0;
} D->u64[0] = low; D->u64[1] = high;)
STUBS(pclmulqdq, EACH_IMMEDIATE(LEGACY("pclmulqdq", IMM_OF(17))) EACH_IMMEDIATE(VEX3("vpclmulqdq", IMM_OF(17), "xmm", "xmm"))
                     EACH_IMMEDIATE(VEX3("vpclmulqdq", IMM_OF(17), "ymm", "ymm")));
ROW(pclmulqdq, "pclmulqdq", pclmulqdq, BINARY, BITS, EXACT, PCLMUL, PCLMUL_AVX, VPCLMUL, true, .bits = { 17, 17 });

/* ---- SHA: the first operand is a, the second b, XMM0 the third ---- */

static uint32_t rol(uint32_t x, unsigned n)
{
    return x << n | x >> (32 - n);
}
#define SHA_ROW(id, ...)                                                                                                   \
    PER_LANE(id, __VA_ARGS__) STUBS(id, LEGACY(#id, "")); ROW(id, #id, id, BINARY, BITS, EXACT, SHA, NEVER, NEVER, false)
SHA_ROW(sha1nexte, union lane out = *B; out.u32[3] += rol(A->u32[3], 30); *D = out;);
SHA_ROW(sha1msg1, union lane out = { .u32 = { A->u32[0] ^ B->u32[2], A->u32[1] ^ B->u32[3], A->u32[2] ^ A->u32[0],
      A->u32[3] ^ A->u32[1] } };
        *D = out;);
SHA_ROW(sha1msg2, union lane out; out.u32[3] = rol(A->u32[3] ^ B->u32[2], 1); out.u32[2] = rol(A->u32[2] ^ B->u32[1], 1);
        out.u32[1] = rol(A->u32[1] ^ B->u32[0], 1); out.u32[0] = rol(A->u32[0] ^ out.u32[3], 1); *D = out;);

static uint32_t sigma(uint32_t x, unsigned a, unsigned b, unsigned c, bool shift)
{
    return rol(x, 32 - a) ^ rol(x, 32 - b) ^ (shift ? x >> c : rol(x, 32 - c));
}
SHA_ROW(sha256msg1, union lane out; for (unsigned i = 0; i < 4; i++)
            out.u32[i] = A->u32[i] + sigma(i < 3 ? A->u32[i + 1] : B->u32[0], 7, 18, 3, true); *D = out;);
SHA_ROW(sha256msg2, union lane out; out.u32[0] = A->u32[0] + sigma(B->u32[2], 17, 19, 10, true);
      out.u32[1] = A->u32[1] + sigma(B->u32[3], 17, 19, 10, true);
        out.u32[2] = A->u32[2] + sigma(out.u32[0], 17, 19, 10, true); out.u32[3] = A->u32[3] + sigma(out.u32[1], 17, 19,
            10, true); *D = out;);

PER_LANE(sha256rnds2, uint32_t p = B->u32[3], q = B->u32[2], e = B->u32[1], f = B->u32[0], t = A->u32[3], k = A->u32[2],
      g = A->u32[1], h = A->u32[0];
         for (unsigned i = 0; i < 2; i++) {
             uint32_t x = h + sigma(e, 6, 11, 25, false) + ((e & f) ^ (~e & g)) + C->u32[i];
             uint32_t y = sigma(p, 2, 13, 22, false) + ((p & q) ^ (p & t) ^ (q & t));
             h = g, g = f, f = e, e = k + x, k = t, t = q, q = p, p = x + y;
         }
         D->u32[3] = p; D->u32[2] = q; D->u32[1] = e; D->u32[0] = f;)
STUBS(sha256rnds2, LEGACY("sha256rnds2", "%xmm0,"));
ROW(sha256rnds2, "sha256rnds2", sha256rnds2, BINARY, BITS, EXACT, SHA, NEVER, NEVER, false);

PER_LANE(sha1rnds4, static const uint32_t constants[4] = { 0x5a827999, 0x6ed9eba1, 0x8f1bbcdc, 0xca62c1d6 };
         uint32_t p = A->u32[3], q = A->u32[2], t = A->u32[1], k = A->u32[0], e = 0;
         for (unsigned i = 0; i < 4; i++) {
             uint32_t f = imm == 0 ? (q & t) ^ (~q & k) : imm == 2 ? (q & t) ^ (q & k) ^ (t & k) : q ^ t ^ k;
             uint32_t x = f + rol(p, 5) + B->u32[3 - i] + e + constants[imm];
             e = k, k = t, t = rol(q, 30), q = p, p = x;
         }
         D->u32[3] = p; D->u32[2] = q; D->u32[1] = t; D->u32[0] = k;)
STUBS(sha1rnds4, EACH_IMMEDIATE(LEGACY("sha1rnds4", IMM_OF(3))));
ROW(sha1rnds4, "sha1rnds4", sha1rnds4, BINARY, BITS, EXACT, SHA, NEVER, NEVER, true, .bits = { 3, 3 });
