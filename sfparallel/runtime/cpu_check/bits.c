/* Instructions on general registers with fixed operands: BMI, ADX, bit tests, double shifts, multiplication and division,
   compare and exchange, byte order, CRC. */
#include "general.h"

#define ALL ARITHMETIC

static uint64_t low(unsigned n)
{
    return n >= 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1;
}

/* ---- BMI1 and BMI2, in 64 and 32 bits; the source in a register or in memory ---- */

#define WORDS(id, insn, feature, flags, prepare, c64, c32, ...)                                                            \
    GENERAL(id##_64, insn " " c64, feature, flags, BITS, prepare, typedef uint64_t word; typedef int64_t signed_word;      \
            enum { BITS_ = 64 }; (void)sizeof(word); (void)sizeof(signed_word); (void)BITS_; __VA_ARGS__);                 \
    GENERAL(id##_32, insn " " c32, feature, flags, BITS, prepare, typedef uint32_t word; typedef int32_t signed_word;      \
            enum { BITS_ = 32 }; (void)sizeof(word); (void)sizeof(signed_word); (void)BITS_; __VA_ARGS__)

/* Defined flags of the group; the others are left alone by the test. */
#define SZO_C (CF | ZF | SF | OF)
#define LOGIC(s, result, carry) set_flags(s, SZO_C, (result_flags(result, BITS_) & ~(uint64_t)PF) | ((carry) ? CF : 0))

WORDS(andn, "andn", BMI1, SZO_C, NULL, "%rcx,%rdx,%rax", "%ecx,%edx,%eax", word x = ~(word)r[RDX] & (word)r[RCX];
      r[RAX] = x; LOGIC(s, x, 0););
WORDS(andn_memory, "andn", BMI1, SZO_C, NULL, "(%rsi),%r9,%r10", "(%rsi),%r9d,%r10d", word x = ~(word)r[R9] & AT(RSI, word);
      r[R10] = x; LOGIC(s, x, 0););
WORDS(blsi, "blsi", BMI1, SZO_C, NULL, "%rcx,%rax", "%ecx,%eax", word x = (word)r[RCX]; r[RAX] = (word)(-x & x);
      LOGIC(s, -x & x, x != 0););
WORDS(blsi_memory, "blsi", BMI1, SZO_C, NULL, "(%rsi),%r11", "(%rsi),%r11d", word x = AT(RSI, word); r[R11] = (word)(-x & x);
      LOGIC(s, -x & x, x != 0););
WORDS(blsr, "blsr", BMI1, SZO_C, NULL, "%rcx,%rax", "%ecx,%eax", word x = (word)r[RCX]; r[RAX] = (word)(x & (x - 1));
      LOGIC(s, x & (x - 1), x == 0););
WORDS(blsmsk, "blsmsk", BMI1, SZO_C, NULL, "%rcx,%rax", "%ecx,%eax", word x = (word)r[RCX]; r[RAX] = (word)(x ^ (x - 1));
      LOGIC(s, x ^ (x - 1), x == 0););
WORDS(bextr, "bextr", BMI1, CF | ZF | OF, NULL, "%rdx,%rcx,%rax", "%edx,%ecx,%eax", unsigned start = r[RDX] & 0xff,
      n = r[RDX] >> 8 & 0xff;
      word x = start < BITS_ ? (word)((word)r[RCX] >> start & low(n)) : 0; r[RAX] = x; set_flags(s, CF | ZF | OF, x ? 0 : ZF););

static void control(struct state *s) /* start and length that mean something, most of the time */
{
    s->r[RDX] = (random64() % 70) | (random64() % 70) << 8;
}
WORDS(bextr_inside, "bextr", BMI1, CF | ZF | OF, control, "%rdx,(%rsi),%r9", "%edx,(%rsi),%r9d",
      unsigned start = r[RDX] & 0xff, n = r[RDX] >> 8 & 0xff;
      word x = start < BITS_ ? (word)(AT(RSI, word) >> start & low(n)) : 0; r[R9] = x; set_flags(s, CF | ZF | OF, x ? 0 : ZF););
WORDS(bzhi, "bzhi", BMI2, SZO_C, control, "%rdx,%rcx,%rax", "%edx,%ecx,%eax", unsigned n = r[RDX] & 0xff;
      word x = (word)(r[RCX] & low(n));
      r[RAX] = x; LOGIC(s, x, n >= BITS_););

static uint64_t deposit(uint64_t value, uint64_t mask)
{
    uint64_t out = 0;
    for (unsigned i = 0; i < 64; i++)
        if (mask >> i & 1) {
            out |= (value & 1) << i;
            value >>= 1;
        }
    return out;
}

static uint64_t extract(uint64_t value, uint64_t mask)
{
    uint64_t out = 0;
    for (unsigned i = 0, n = 0; i < 64; i++)
        if (mask >> i & 1)
            out |= (value >> i & 1) << n++;
    return out;
}
WORDS(pdep, "pdep", BMI2, ALL, NULL, "%rcx,%rdx,%rax", "%ecx,%edx,%eax", r[RAX] = deposit((word)r[RDX], (word)r[RCX]););
WORDS(pdep_memory, "pdep", BMI2, ALL, NULL, "(%rsi),%rdx,%r9", "(%rsi),%edx,%r9d", r[R9] = deposit((word)r[RDX], AT(RSI, word)););
WORDS(pext, "pext", BMI2, ALL, NULL, "%rcx,%rdx,%rax", "%ecx,%edx,%eax", r[RAX] = extract((word)r[RDX], (word)r[RCX]););
WORDS(pext_memory, "pext", BMI2, ALL, NULL, "(%rsi),%rdx,%r9", "(%rsi),%edx,%r9d", r[R9] = extract((word)r[RDX], AT(RSI, word)););
WORDS(rorx, "rorx", BMI2, ALL, NULL, "$13,%rcx,%rax", "$13,%ecx,%eax", word x = (word)r[RCX];
      r[RAX] = (word)(x >> 13 | x << (BITS_ - 13)););
WORDS(rorx_large, "rorx", BMI2, ALL, NULL, "$0xb7,(%rsi),%r9", "$0xb7,(%rsi),%r9d", word x = AT(RSI, word);
      unsigned n = 0xb7 & (BITS_ - 1);
      r[R9] = (word)(x >> n | x << (BITS_ - n)););
WORDS(shlx, "shlx", BMI2, ALL, control, "%rdx,%rcx,%rax", "%edx,%ecx,%eax",
      r[RAX] = (word)((word)r[RCX] << (r[RDX] & (BITS_ - 1))););
WORDS(shrx, "shrx", BMI2, ALL, control, "%rdx,(%rsi),%r9", "%edx,(%rsi),%r9d", 
      r[R9] = (word)(AT(RSI, word) >> (r[RDX] & (BITS_ - 1))););
WORDS(sarx, "sarx", BMI2, ALL, control, "%rdx,%rcx,%rax", "%edx,%ecx,%eax",
      r[RAX] = (word)((signed_word)r[RCX] >> (r[RDX] & (BITS_ - 1))););
WORDS(mulx, "mulx", BMI2, ALL, NULL, "%rcx,%rax,%r9", "%ecx,%eax,%r9d",
      unsigned __int128 x = (unsigned __int128)(word)r[RDX] * (word)r[RCX];
      r[RAX] = (word)x; r[R9] = (word)(x >> BITS_););
WORDS(mulx_one, "mulx", BMI2, ALL, NULL, "(%rsi),%r10,%r10", "(%rsi),%r10d,%r10d",
      unsigned __int128 x = (unsigned __int128)(word)r[RDX] * AT(RSI, word);
      r[R10] = (word)(x >> BITS_););

/* Carries of two chains, side by side and mixed with ordinary additions. */
static void add_with(struct state *s, enum reg reg, uint64_t flag, uint64_t value, unsigned bits)
{
    unsigned __int128 sum = (unsigned __int128)(s->r[reg] & low(bits)) + (value & low(bits)) + (s->flags & flag ? 1 : 0);
    s->r[reg] = (uint64_t)sum & low(bits);
    set_flags(s, flag, (uint64_t)(sum >> bits) ? flag : 0);
}
WORDS(adcx, "adcx", ADX, ALL, NULL, "%rcx,%rax", "%ecx,%eax", add_with(s, RAX, CF, r[RCX], BITS_););
WORDS(adox, "adox", ADX, ALL, NULL, "%rcx,%rax", "%ecx,%eax", add_with(s, RAX, OF, r[RCX], BITS_););
WORDS(adcx_adox, "adcx %rdx,%r9; adox", ADX, ALL, NULL, "%rcx,%rax", "%ecx,%eax",
      add_with(s, R9, CF, r[RDX], 64); add_with(s, RAX, OF, r[RCX], BITS_););
WORDS(adox_adcx, "adox %rdx,%r9; adcx", ADX, ALL, NULL, "(%rsi),%rax", "(%rsi),%eax",
      add_with(s, R9, OF, r[RDX], 64); add_with(s, RAX, CF, AT(RSI, word), BITS_););
GENERAL(adcx_adc, "adcx %rcx,%rax; adcq %rdx,%r9; adox %r11,%r10", ADX, CF | OF, BITS, NULL, add_with(s, RAX, CF, r[RCX], 64);
        uint64_t d = r[R9]; add_with(s, R9, CF, r[RDX], 64); set_flags(s, OF, (~(d ^ r[RDX]) & (d ^ r[R9])) >> 63 ? OF : 0);
        add_with(s, R10, OF, r[R11], 64););

/* ---- bits by number: modulo the size in registers, anywhere in memory ---- */

#define BIT(id, insn, change)                                                                                              \
    WORDS(id, insn, SSE2, CF, NULL, "%rcx,%rax", "%ecx,%eax", word one = (word)1 << (r[RCX] & (BITS_ - 1)), x = (word)r[RAX];  \
          set_flags(s, CF, x & one ? CF : 0);                                                                              \
              if ((change) != 0) { r[RAX] = (word)((change) == 1 ? x | one : (change) == 2 ? x & ~one : x ^ one); }); \
    GENERAL(id##_memory, insn " %rcx,(%rdi)", SSE2, CF, BITS, near, uint8_t *byte = (uint8_t *)r[RDI] + ((int64_t)r[RCX] >> 3); \
            uint8_t one = (uint8_t)(1 << (r[RCX] & 7)); set_flags(s, CF, *byte & one ? CF : 0);                            \
            if ((change) != 0) *byte = (uint8_t)((change) == 1 ? *byte | one : (change) == 2 ? *byte & ~one : *byte ^ one);); \
    GENERAL(id##_immediate, insn "l $37,8(%rdi)", SSE2, CF, BITS, NULL, uint8_t *byte = (uint8_t *)r[RDI] + 8;              \
            set_flags(s, CF, *byte & 32 ? CF : 0);                                                                         \
            if ((change) != 0) *byte = (uint8_t)((change) == 1 ? *byte | 32 : (change) == 2 ? *byte & ~32 : *byte ^ 32);)

static void near(struct state *s)
{
    s->r[RCX] = random64() % 2048 - 1024;
}
BIT(bt, "bt", 0);
BIT(bts, "bts", 1);
BIT(btr, "btr", 2);
BIT(btc, "btc", 3);
GENERAL(bts_locked, "lock btsq %rcx,(%rdi)", SSE2, CF, BITS, near, uint8_t *byte = (uint8_t *)r[RDI] + ((int64_t)r[RCX] >> 3);
        uint8_t one = (uint8_t)(1 << (r[RCX] & 7)); set_flags(s, CF, *byte & one ? CF : 0); *byte |= one;);

/* ---- double shifts: SF, ZF and PF of the result, CF the last bit out ---- */

#define DOUBLE(id, code, n, result, carry)                                                                                 \
    GENERAL(id, code, SSE2, CF | SF | ZF | PF, BITS, NULL, uint64_t a = r[RAX], c = r[RCX]; (void)c; r[RAX] = (result);    \
            set_flags(s, CF | SF | ZF | PF, result_flags(r[RAX], 64) | ((carry) & 1 ? CF : 0));)
DOUBLE(shld, "shldq $13,%rcx,%rax", 13, a << 13 | c >> 51, a >> 51);
DOUBLE(shrd, "shrdq $13,%rcx,%rax", 13, a >> 13 | c << 51, a >> 12);
DOUBLE(shld_1, "shldq $1,%rcx,%rax", 1, a << 1 | c >> 63, a >> 63);
GENERAL(shrd_32, "shrdl $7,%ecx,%eax", SSE2, CF | SF | ZF | PF, BITS, NULL, uint32_t a = (uint32_t)r[RAX], c = (uint32_t)r[RCX];
        uint32_t x = a >> 7 | c << 25; r[RAX] = x; set_flags(s, CF | SF | ZF | PF, result_flags(x, 32) | (a >> 6 & 1 ? CF : 0)););

/* ---- multiplication and division ---- */

GENERAL(mul, "mulq %rcx", SSE2, CF | OF, BITS, NULL, unsigned __int128 x = (unsigned __int128)r[RAX] * r[RCX];
      r[RAX] = (uint64_t)x;
        r[RDX] = (uint64_t)(x >> 64); set_flags(s, CF | OF, r[RDX] ? CF | OF : 0););
GENERAL(imul_wide, "imulq %rcx", SSE2, CF | OF, BITS, NULL, __int128 x = (__int128)(int64_t)r[RAX] * (int64_t)r[RCX];
      r[RAX] = (uint64_t)x;
        r[RDX] = (uint64_t)(x >> 64); set_flags(s, CF | OF, x == (int64_t)x ? 0 : CF | OF););
GENERAL(mul_32, "mull %ecx", SSE2, CF | OF, BITS, NULL, uint64_t x = (r[RAX] & UINT32_MAX) * (r[RCX] & UINT32_MAX);
      r[RAX] = (uint32_t)x;
        r[RDX] = x >> 32; set_flags(s, CF | OF, r[RDX] ? CF | OF : 0););
GENERAL(mul_8, "mulb %cl", SSE2, CF | OF, BITS, NULL, uint16_t x = (uint16_t)((r[RAX] & 0xff) * (r[RCX] & 0xff));
        r[RAX] = (r[RAX] & ~UINT64_C(0xffff)) | x; set_flags(s, CF | OF, x >> 8 ? CF | OF : 0););
GENERAL(imul_3, "imulq $-12345,(%rsi),%rax", SSE2, CF | OF, BITS, NULL, 
        __int128 x = (__int128)AT(RSI, int64_t) * -12345; r[RAX] = (uint64_t)x;
        set_flags(s, CF | OF, x == (int64_t)x ? 0 : CF | OF););

static void divisible(struct state *s) /* quotients must fit, with a sign or without */
{
    s->r[RCX] |= UINT64_C(0x0100000000000000);
    s->r[RDX] = s->r[RCX] >> 3 & UINT64_C(0x00ffffffffffffff) & ((s->r[RCX] & ~(UINT64_C(1) << 63)) >> 2);
    s->r[RCX] &= ~(UINT64_C(1) << 63);
}
GENERAL(div, "divq %rcx", SSE2, 0, BITS, divisible, unsigned __int128 x = (unsigned __int128)r[RDX] << 64 | r[RAX];
        r[RAX] = (uint64_t)(x / r[RCX]); r[RDX] = (uint64_t)(x % r[RCX]););

static void divisible_signed(struct state *s)
{
    divisible(s);
    s->r[RDX] >>= 2;
    if (random64() & 1)
        s->r[RDX] = ~s->r[RDX];
    if (random64() & 1)
        s->r[RCX] = -s->r[RCX];
}
GENERAL(idiv, "idivq %rcx", SSE2, 0, BITS, divisible_signed, __int128 x = (__int128)((unsigned __int128)r[RDX] << 64 | r[RAX]);
        r[RAX] = (uint64_t)(x / (int64_t)r[RCX]); r[RDX] = (uint64_t)(x % (int64_t)r[RCX]););

static void divisible_32(struct state *s)
{
    s->r[RCX] |= 0x01000000;
    s->r[RDX] = (s->r[RCX] & UINT32_MAX) >> 9;
}
GENERAL(div_32, "divl %ecx", SSE2, 0, BITS, divisible_32,
      uint64_t x = (r[RDX] & UINT32_MAX) << 32 | (r[RAX] & UINT32_MAX), y = r[RCX] & UINT32_MAX;
        r[RAX] = (uint32_t)(x / y); r[RDX] = (uint32_t)(x % y););

/* ---- compare and exchange; half of the times they are equal ---- */

static void maybe_equal(struct state *s)
{
    if (random64() & 1)
        s->r[RAX] = AT(RDI, uint64_t);
}
#define COMPARED(s, a, b, bits) do {                                                                                       \
        uint64_t d_ = (a) - (b);                                                                                           \
        set_flags(s, ALL, result_flags(d_, bits) | ((a) < (b) ? CF : 0) | (((a) ^ (b) ^ d_) & 16 ? AF : 0) |               \
                  ((((a) ^ (b)) & ((a) ^ d_)) >> ((bits) - 1) & 1 ? OF : 0));                                              \
    } while (0)
GENERAL(cmpxchg, "cmpxchgq %rcx,(%rdi)", SSE2, ALL, BITS, maybe_equal, uint64_t a = r[RAX], old = AT(RDI, uint64_t);
      COMPARED(s, a, old, 64);
        if (a == old) AT(RDI, uint64_t) = r[RCX]; else r[RAX] = old;);
GENERAL(cmpxchg_locked, "lock cmpxchgq %rcx,(%rdi)", SSE2, ALL, BITS, maybe_equal, uint64_t a = r[RAX], old = AT(RDI, uint64_t);
        COMPARED(s, a, old, 64); if (a == old) AT(RDI, uint64_t) = r[RCX]; else r[RAX] = old;);
GENERAL(cmpxchg_32, "lock cmpxchgl %ecx,(%rdi)", SSE2, ALL, BITS, maybe_equal, uint32_t a = (uint32_t)r[RAX],
      old = AT(RDI, uint32_t);
        COMPARED(s, (uint64_t)a, (uint64_t)old, 32); if (a == old) AT(RDI, uint32_t) = (uint32_t)r[RCX]; else r[RAX] = old;);

static void pair(struct state *s)
{
    s->r[RDI] &= ~UINT64_C(15);
    if (random64() & 1) {
        s->r[RAX] = AT(RDI, uint64_t);
        memcpy(&s->r[RDX], (void *)(s->r[RDI] + 8), 8);
    }
}
GENERAL(cmpxchg16b, "lock cmpxchg16b (%rdi)", CX16, ALL, BITS, pair, uint64_t *m = (uint64_t *)r[RDI];
        bool same = m[0] == r[RAX] && m[1] == r[RDX]; set_flags(s, ZF, same ? ZF : 0);
        if (same) { m[0] = r[RBX]; m[1] = r[RCX]; } else { r[RAX] = m[0]; r[RDX] = m[1]; });

static void pair_32(struct state *s)
{
    if (random64() & 1) {
        s->r[RAX] = AT(RDI, uint64_t) & UINT32_MAX;
        s->r[RDX] = AT(RDI, uint64_t) >> 32;
    }
}
GENERAL(cmpxchg8b, "lock cmpxchg8b (%rdi)", SSE2, ALL, BITS, pair_32, uint64_t old = AT(RDI, uint64_t);
        bool same = old == ((r[RDX] << 32) | (r[RAX] & UINT32_MAX)); set_flags(s, ZF, same ? ZF : 0);
        if (same) { AT(RDI, uint64_t) = r[RCX] << 32 | (r[RBX] & UINT32_MAX); }
        else { r[RAX] = (uint32_t)old; r[RDX] = old >> 32; });
GENERAL(xadd, "lock xaddq %rcx,(%rdi)", SSE2, ZF | SF, BITS, NULL, uint64_t old = AT(RDI, uint64_t), sum = old + r[RCX];
      AT(RDI, uint64_t) = sum;
        r[RCX] = old; set_flags(s, ZF | SF, result_flags(sum, 64)););
GENERAL(xchg, "xchgl %ecx,(%rdi)", SSE2, ALL, BITS, NULL, uint32_t old = AT(RDI, uint32_t);
      AT(RDI, uint32_t) = (uint32_t)r[RCX]; r[RCX] = old;);

/* ---- others ---- */

GENERAL(bswap, "bswapq %r9", SSE2, ALL, BITS, NULL, r[R9] = __builtin_bswap64(r[R9]););
GENERAL(bswap_32, "bswapl %eax", SSE2, ALL, BITS, NULL, r[RAX] = __builtin_bswap32((uint32_t)r[RAX]););
/* TZCNT and BSF are the same instruction, and have the same result, if the source is not 0: compilers rely on that. */
static void not_zero(struct state *s)
{
    s->r[RCX] |= 0x800000;
}
GENERAL(rep_bsf, "rep bsfq %rcx,%rax", SSE2, 0, BITS, not_zero, r[RAX] = (uint64_t)__builtin_ctzll(r[RCX]););
GENERAL(movbe_load, "movbeq (%rsi),%rax", MOVBE, ALL, BITS, NULL, r[RAX] = __builtin_bswap64(AT(RSI, uint64_t)););
GENERAL(movbe_load_16, "movbew (%rsi),%ax", MOVBE, ALL, BITS, NULL,
      r[RAX] = (r[RAX] & ~UINT64_C(0xffff)) | __builtin_bswap16(AT(RSI, uint16_t)););
GENERAL(movbe_store, "movbel %ecx,(%rdi)", MOVBE, ALL, BITS, NULL, AT(RDI, uint32_t) = __builtin_bswap32((uint32_t)r[RCX]););

static uint64_t crc32c(uint64_t crc, uint64_t data, unsigned bits)
{
    crc = (uint32_t)crc;
    for (unsigned i = 0; i < bits; i++, data >>= 1)
        crc = crc >> 1 ^ (-((crc ^ data) & 1) & 0x82f63b78u);
    return crc;
}
GENERAL(crc32_8, "crc32b %cl,%eax", SSE42, ALL, BITS, NULL, r[RAX] = crc32c(r[RAX], r[RCX], 8););
GENERAL(crc32_16, "crc32w (%rsi),%eax", SSE42, ALL, BITS, NULL, r[RAX] = crc32c(r[RAX], AT(RSI, uint16_t), 16););
GENERAL(crc32_32, "crc32l %r9d,%r10d", SSE42, ALL, BITS, NULL, r[R10] = crc32c(r[R10], r[R9], 32););
GENERAL(crc32_64, "crc32q %rcx,%rax", SSE42, ALL, BITS, NULL, r[RAX] = crc32c(r[RAX], r[RCX], 64););

GENERAL(lahf, "cmpq %rcx,%rax; lahf", SSE2, ALL, BITS, NULL, COMPARED(s, r[RAX], r[RCX], 64);
        r[RAX] = (r[RAX] & ~UINT64_C(0xff00)) | (s->flags & 0xd5) << 8 | 0x200;);
GENERAL(cmov_set, "cmpq %rcx,%rdx; cmovgq %r9,%r10; setbe %al; cmovpl %ecx,%r11d", SSE2, ALL, BITS, NULL, COMPARED(s,
      r[RDX], r[RCX], 64);
        if ((int64_t)r[RDX] > (int64_t)r[RCX]) r[R10] = r[R9]; r[RAX] = (r[RAX] & ~UINT64_C(0xff)) | (r[RDX] <= r[RCX]);
        r[R11] = s->flags & PF ? (uint32_t)r[RCX] : (uint32_t)r[R11];);
GENERAL(extend, "movsbq %cl,%rax; movslq %edx,%r9; movzwl %cx,%r10d; cqto", SSE2, ALL, BITS, NULL,
      r[RAX] = (uint64_t)(int8_t)r[RCX];
        r[R9] = (uint64_t)(int32_t)r[RDX]; r[R10] = (uint16_t)r[RCX]; r[RDX] = (int64_t)r[RAX] < 0 ? UINT64_MAX : 0;);
