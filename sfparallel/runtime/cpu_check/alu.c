/* Arithmetic of general registers: each operation in four sizes, on registers and in memory. */
#include "general.h"

/* d op s, with the flags before (and after) the operation. */
typedef uint64_t operation(uint64_t d, uint64_t s, unsigned bits, uint64_t *flags);

enum form { LOW, HIGH, STORE, LOAD, LOCKED, FORMS };

#define NOT_OF_0 (UINT64_C(1) << 63) /* among the flags: a source of 0 has no defined result */

struct alu_check {
    operation *operation;
    uint64_t flags;           /* that are defined afterwards */
    unsigned forms;           /* bits of enum form */
    bool bytes;               /* there is a form for bytes */
    bool result;              /* it has one beside its flags */
    uint8_t count_bits;       /* the source is a count: only so many bits of it are used; 0: it is a number */
    const char *stubs;        /* 4 sizes, for each the forms that are there */
};

static const char *const form_names[FORMS] = { "cl, al", "r9, r10", "cl, memory", "memory, al", "lock, cl, memory" };

static uint64_t mask(unsigned bits)
{
    return bits == 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
}

static uint64_t top(uint64_t value, unsigned bits)
{
    return value >> (bits - 1) & 1;
}

/* Registers keep what lies above 8 or 16 bits, and lose what lies above 32. */
static uint64_t put(uint64_t old, uint64_t value, unsigned bits)
{
    return bits >= 32 ? value & mask(bits) : (old & ~mask(bits)) | (value & mask(bits));
}

static uint64_t source_of(const struct alu_check *row, const struct state *s, enum form form, unsigned bits)
{
    uint64_t value = form == HIGH && !row->count_bits ? s->r[R9] : form == LOAD ? AT(RSI, uint64_t) : s->r[RCX];
    return value & mask(bits);
}

static void expect(const struct alu_check *row, struct state *s, enum form form, unsigned bits)
{
    uint64_t source = source_of(row, s, form, bits), flags = s->flags;
    bool in_memory = form == STORE || form == LOCKED;
    uint64_t *target = form == HIGH ? &s->r[R10] : &s->r[RAX];
    uint64_t old = in_memory ? AT(RDI, uint64_t) : *target;
    uint64_t result = row->operation(old & mask(bits), source, bits, &flags);
    if (row->result && in_memory)
        AT(RDI, uint64_t) = (old & ~mask(bits)) | (result & mask(bits));
    else if (row->result)
        *target = put(old, result, bits);
    s->flags = flags;
}

static void run_form(const struct check *check, const char *stub, enum form form, unsigned bits)
{
    const struct alu_check *row = check->of;
    for (unsigned round = 0; round < rounds(24); round++) {
        struct state before = { .mxcsr = MXCSR_DEFAULT }, got, wanted;
        for (unsigned i = 0; i < REGS; i++) {
            union lane lane;
            operand(&lane, BITS, round + i, i);
            before.r[i] = lane.u64[0];
        }
        if (row->count_bits)
            before.r[RCX] = (before.r[RCX] & ~UINT64_C(0xff)) | (random64() % 70);
        before.r[RSI] = (uint64_t)general_memory + RSI_AT + round % 3;
        before.r[RDI] = (uint64_t)general_memory + RDI_AT + (form == LOCKED ? 0 : round % 5);
        before.flags = random64() & ARITHMETIC;
        uint64_t in_memory[2] = { random64(), round % 2 ? random64() : before.r[RCX] }, stored;
        got = wanted = before;
        memcpy((void *)before.r[RSI], &in_memory[0], 8);
        memcpy((void *)before.r[RDI], &in_memory[1], 8);
        execute(stub, &got);
        memcpy(&stored, (void *)before.r[RDI], 8);
        memcpy((void *)before.r[RDI], &in_memory[1], 8);
        expect(row, &wanted, form, bits);
        uint64_t expected;
        memcpy(&expected, (void *)before.r[RDI], 8);
        if (row->flags & NOT_OF_0 && source_of(row, &before, form, bits) == 0)
            continue;
        const char *operands = text("rax %s rcx %s r9 %s r10 %s memory %s, %s flags %#lx", hex(&before.r[RAX], 8),
                                    hex(&before.r[RCX], 8), hex(&before.r[R9], 8), hex(&before.r[R10], 8), hex(&in_memory[0], 8),
                                    hex(&in_memory[1], 8), before.flags);
        const char *name = text("%u bits, %s", bits, form_names[form]);
        for (unsigned i = 0; i < REGS; i++)
            if (got.r[i] != wanted.r[i])
                wrong(check->name, name, operands, hex(&got.r[i], 8), hex(&wanted.r[i], 8));
        if (stored != expected)
            wrong(check->name, name, operands, hex(&stored, 8), hex(&expected, 8));
        uint64_t compared = row->flags;
        if (row->count_bits && (before.r[RCX] & mask(row->count_bits == 5 && bits == 64 ? 6 : row->count_bits)) != 1)
            compared &= ~(uint64_t)OF; /* defined for a count of 1 */
        if ((got.flags ^ wanted.flags) & compared)
            wrong(check->name, text("%s, flags", name), operands, text("%#lx", got.flags & compared),
                  text("%#lx", wanted.flags & compared));
    }
}

static void run(const struct check *check)
{
    const struct alu_check *row = check->of;
    const char *stub = row->stubs;
    for (unsigned bits = row->bytes ? 8 : 16; bits <= 64; bits *= 2)
        for (enum form form = LOW; form < FORMS; form++)
            if (row->forms >> form & 1) {
                run_form(check, stub, form, bits);
                stub += STUB_BYTES;
            }
}

#define EVERY 0x1f
#define NOT_LOCKED 0x0f
#define REGISTER_TARGET 0x0b
#define MEMORY_TARGET 0x17

/* Stubs of one size: suffix, registers of the source and of the target, low and high. */
#define TWO(i, s, c, a, r9, r10)                                                                                           \
    STUB(i s " " c "," a) STUB(i s " " r9 "," r10) STUB(i s " " c ",(%rdi)") STUB(i s " (%rsi)," a)
#define TWO_LOCKED(i, s, c, a, r9, r10) TWO(i, s, c, a, r9, r10) STUB("lock " i s " " c ",(%rdi)")
#define TO_REGISTER(i, s, c, a, r9, r10) STUB(i s " " c "," a) STUB(i s " " r9 "," r10) STUB(i s " (%rsi)," a)
#define BY_CL(i, s, c, a, r9, r10) STUB(i s " %cl," a) STUB(i s " %cl," r10) STUB(i s " %cl,(%rdi)")
#define ALONE(i, s, c, a, r9, r10) STUB(i s " " a) STUB(i s " " r10) STUB(i s " (%rdi)") STUB("lock " i s " (%rdi)")
#define BYTES(shape, i) shape(i, "b", "%cl", "%al", "%r9b", "%r10b")
#define LARGER(shape, i)                                                                                                   \
    shape(i, "w", "%cx", "%ax", "%r9w", "%r10w") shape(i, "l", "%ecx", "%eax", "%r9d", "%r10d")                            \
    shape(i, "q", "%rcx", "%rax", "%r9", "%r10")

#define ALU(name, feature, code, forms_, bytes_, result_, count, flags_, ...)                                              \
    static uint64_t operation_##name(uint64_t d, uint64_t s, unsigned bits, uint64_t *f)                                   \
    {                                                                                                                      \
        (void)d, (void)s, (void)bits, (void)f;                                                                             \
        __VA_ARGS__                                                                                                        \
    }                                                                                                                      \
    STUBS(alu_##name, code);                                                                                               \
    static const struct alu_check alu_##name = { .operation = operation_##name, .flags = flags_, .forms = forms_,          \
        .bytes = bytes_, .result = result_, .count_bits = count, .stubs = stubs_alu_##name };                              \
    CHECK(alu_##name, #name, feature, run, &alu_##name)
#define ORDINARY(name, ...) \
    ALU(name, SSE2, BYTES(TWO_LOCKED, #name) LARGER(TWO_LOCKED, #name), EVERY, true, true, 0, ARITHMETIC, __VA_ARGS__)

static uint64_t add(uint64_t d, uint64_t s, uint64_t carry, unsigned bits, uint64_t *f)
{
    uint64_t r = (d + s + carry) & mask(bits);
    bool out = bits == 64 ? (carry ? r <= d : r < d) : (d + s + carry) >> bits & 1;
    *f = result_flags(r, bits) | (out ? CF : 0) | ((d ^ s ^ r) & 0x10 ? AF : 0) | (top((d ^ r) & (s ^ r), bits) ? OF : 0);
    return r;
}

static uint64_t subtract(uint64_t d, uint64_t s, uint64_t borrow, unsigned bits, uint64_t *f)
{
    uint64_t r = (d - s - borrow) & mask(bits);
    *f = result_flags(r, bits) | (d < s || (borrow && d == s) ? CF : 0) | ((d ^ s ^ r) & 0x10 ? AF : 0) |
         (top((d ^ s) & (d ^ r), bits) ? OF : 0);
    return r;
}

ORDINARY(add, return add(d, s, 0, bits, f););
ORDINARY(adc, return add(d, s, *f & CF, bits, f););
ORDINARY(sub, return subtract(d, s, 0, bits, f););
ORDINARY(sbb, return subtract(d, s, *f & CF, bits, f););
#define LOGIC(name, expression)                                                                                            \
    ALU(name, SSE2, BYTES(TWO_LOCKED, #name) LARGER(TWO_LOCKED, #name), EVERY, true, true, 0, ARITHMETIC & ~AF,            \
        uint64_t r = expression; *f = result_flags(r, bits); return r;)
LOGIC(and, d & s);
LOGIC(or, d | s);
LOGIC(xor, d ^ s);
ALU(cmp, SSE2, BYTES(TWO, "cmp") LARGER(TWO, "cmp"), NOT_LOCKED, true, false, 0, ARITHMETIC, return subtract(d, s, 0, bits, f););
ALU(inc, SSE2, BYTES(ALONE, "inc") LARGER(ALONE, "inc"), MEMORY_TARGET, true, true, 0, ARITHMETIC,
    uint64_t carry = *f & CF, r = add(d, 1, 0, bits, f); *f = (*f & ~(uint64_t)CF) | carry; return r;);
ALU(dec, SSE2, BYTES(ALONE, "dec") LARGER(ALONE, "dec"), MEMORY_TARGET, true, true, 0, ARITHMETIC,
    uint64_t carry = *f & CF, r = subtract(d, 1, 0, bits, f); *f = (*f & ~(uint64_t)CF) | carry; return r;);
ALU(neg, SSE2, BYTES(ALONE, "neg") LARGER(ALONE, "neg"), MEMORY_TARGET, true, true, 0, ARITHMETIC,
    return subtract(0, d, 0, bits, f););
ALU(not, SSE2, BYTES(ALONE, "not") LARGER(ALONE, "not"), MEMORY_TARGET, true, true, 0, ARITHMETIC, return ~d;);

/* ---- shifts and rotations: counts are taken modulo 32, or 64; a count of 0 leaves the flags as they are ---- */

#define SHIFT(name, flags_, ...)                                                                                           \
    ALU(name, SSE2, BYTES(BY_CL, #name) LARGER(BY_CL, #name), LOW_HIGH_STORE, true, true, 5, flags_,                       \
        unsigned n = (unsigned)s & (bits == 64 ? 63 : 31); if (n == 0) return d; __VA_ARGS__)
#define LOW_HIGH_STORE 0x07

static uint64_t shift_flags(uint64_t r, unsigned bits, uint64_t carry, uint64_t overflow)
{
    return result_flags(r, bits) | (carry & 1 ? CF : 0) | (overflow & 1 ? OF : 0);
}

SHIFT(shl, SF | ZF | PF | OF, uint64_t r = n < bits ? d << n & mask(bits) : 0;
      *f = shift_flags(r, bits, 0, top(r, bits) ^ (n <= bits ? d >> (bits - n) : 0)); return r;);
SHIFT(shr, SF | ZF | PF | OF, uint64_t r = n < bits ? d >> n : 0; *f = shift_flags(r, bits, 0, top(d, bits)); return r;);
SHIFT(sar, SF | ZF | PF | OF | CF, int64_t x = (int64_t)(d << (64 - bits)) >> (64 - bits);
      uint64_t r = (uint64_t)(x >> n) & mask(bits);
      *f = shift_flags(r, bits, (uint64_t)(x >> (n - 1)), 0); return r;);
/* Rotations leave SF, ZF, AF and PF. */
SHIFT(rol, ARITHMETIC, unsigned k = n % bits; uint64_t r = k ? (d << k | d >> (bits - k)) & mask(bits) : d;
      *f = (*f & ~(uint64_t)(CF | OF)) | (r & 1 ? CF : 0) | (top(r, bits) ^ (r & 1) ? OF : 0); return r;);
SHIFT(ror, ARITHMETIC, unsigned k = n % bits; uint64_t r = k ? (d >> k | d << (bits - k)) & mask(bits) : d;
      *f = (*f & ~(uint64_t)(CF | OF)) | (top(r, bits) ? CF : 0) | (top(r ^ r << 1, bits) ? OF : 0); return r;);
SHIFT(rcl, ARITHMETIC, uint64_t carry = *f & CF; for (unsigned k = n % (bits + 1); k > 0; k--) {
    uint64_t out = top(d, bits);
    d = (d << 1 | carry) & mask(bits);
    carry = out;
} *f = (*f & ~(uint64_t)(CF | OF)) | (carry ? CF : 0) | (top(d, bits) ^ carry ? OF : 0); return d;);
SHIFT(rcr, ARITHMETIC, uint64_t carry = *f & CF, k = n % (bits + 1); for (; k > 0; k--) {
    uint64_t out = d & 1;
    d = d >> 1 | carry << (bits - 1);
    carry = out;
} *f = (*f & ~(uint64_t)(CF | OF)) | (carry ? CF : 0) | (top(d ^ d << 1, bits) ? OF : 0); return d;);

/* ---- counting bits ---- */

#define COUNTING(name, feature, flags_, ...) ALU(name, feature, LARGER(TO_REGISTER, #name), REGISTER_TARGET, false,        \
    true, 0, flags_, __VA_ARGS__)
static uint64_t trailing(uint64_t s, unsigned bits) { return s ? (uint64_t)__builtin_ctzll(s) : bits; }
static uint64_t leading(uint64_t s, unsigned bits) { return s ? (uint64_t)__builtin_clzll(s) - (64 - bits) : bits; }
COUNTING(popcnt, POPCNT, ARITHMETIC, *f = s ? 0 : ZF; return (uint64_t)__builtin_popcountll(s););
COUNTING(tzcnt, BMI1, CF | ZF, *f = (s ? 0 : CF) | (s & 1 ? ZF : 0); return trailing(s, bits););
COUNTING(lzcnt, LZCNT, CF | ZF, *f = (s ? 0 : CF) | (top(s, bits) ? ZF : 0); return leading(s, bits););
/* What the target is for a source of 0 differs between processors. */
COUNTING(bsf, SSE2, ZF | NOT_OF_0, *f = s ? 0 : ZF; return s ? trailing(s, bits) : d;);
COUNTING(bsr, SSE2, ZF | NOT_OF_0, *f = s ? 0 : ZF; return s ? bits - 1 - leading(s, bits) : d;);
COUNTING(imul, SSE2, CF | OF, __int128 x = (int64_t)(d << (64 - bits)) >> (64 - bits),
      y = (int64_t)(s << (64 - bits)) >> (64 - bits), r = x * y;
         *f = r == (int64_t)((uint64_t)r << (64 - bits)) >> (64 - bits) ? 0 : CF | OF; return (uint64_t)r;);
